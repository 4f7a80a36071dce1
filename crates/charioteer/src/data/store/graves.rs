//! Storages that were dropped, whose copies on devices are still to be freed.
//!
//! What keeps the host's buffer is dropped when no copy uses it any more, with no lock held: it is the
//! user's.

use super::events::Events;
use super::storage::Buffer;
use super::{State, Store};
use crate::machine::Machine;
use crate::sync::{AtomicBool, Mutex, Ordering};

/// The storages that were dropped since the store looked last: their numbers, and their buffers.
pub(super) struct Graves {
    dropped: Mutex<Vec<(u64, Buffer)>>,
    /// Whether there is one.
    news: AtomicBool,
}

impl Graves {
    pub(super) fn new() -> Self {
        Self {
            dropped: Mutex::new(Vec::new()),
            news: AtomicBool::new(false),
        }
    }

    pub(super) fn bury(&self, storage: u64, buffer: Buffer) {
        self.dropped.lock().push((storage, buffer));
        self.news.store(true, Ordering::Release);
    }

    fn take(&self) -> Vec<(u64, Buffer)> {
        self.news.store(false, Ordering::Relaxed);
        std::mem::take(&mut *self.dropped.lock())
    }
}

/// A buffer that copies may be using.
pub(super) struct Mourned {
    pub(super) until: Events,
    buffer: Buffer,
}

impl Store {
    /// Frees what dropped storages have on devices. Gives what is to be dropped when no lock is held.
    #[inline]
    pub(super) fn mourn(&self, state: &mut State) -> Vec<Buffer> {
        if self.graves.news.load(Ordering::Acquire) || !state.mourned.is_empty() {
            state.mourn(&self.machine, self.graves.take())
        } else {
            Vec::new()
        }
    }
}

impl State {
    #[cold]
    fn mourn(&mut self, machine: &Machine, dropped: Vec<(u64, Buffer)>) -> Vec<Buffer> {
        for (storage, buffer) in dropped {
            let mut until = Events::new();
            if let Some(number) = self.names.remove(&storage) {
                until = self.forget(machine, number);
            }
            self.mourned.push(Mourned { until, buffer });
        }
        let mut free = Vec::new();
        let mut at = 0;
        while at < self.mourned.len() {
            self.mourned[at].until.prune(machine);
            if self.mourned[at].until.is_empty() {
                free.push(self.mourned.swap_remove(at).buffer);
            } else {
                at += 1;
            }
        }
        free
    }

    /// Drops all that is known of an array. Gives what uses its host's buffer, and memory that it brought along.
    fn forget(&mut self, machine: &Machine, number: u32) -> Events {
        let directory = &mut self.directories[number];
        let mut until = Events::new();
        let mut ready: Vec<(u32, Events)> = Vec::new();
        for (_, piece) in directory.pieces.iter_mut() {
            until.join(&piece.home);
            until.join(&piece.own);
            for holder in std::mem::take(&mut piece.holders) {
                ready.push((holder.at, holder.ready));
            }
        }
        for (_, frame) in directory.frames.iter_mut() {
            frame.wanted.clear();
        }
        for (at, events) in ready {
            match self.instances.get_mut(at) {
                Some(instance) => {
                    if instance.adopted {
                        until.join(&events);
                    }
                    instance.uses.join(&events);
                    instance.valid -= 1;
                }
                None => until.join(&events),
            }
        }
        let frames = &self.directories[number].frames;
        let instances: Vec<u32> = frames
            .iter()
            .flat_map(|(_, frame)| frame.instances.iter().map(|(_, at)| *at))
            .collect();
        for at in instances {
            let adopted = self.instances[at].adopted;
            let block = self.remove(at);
            if !adopted {
                self.give_back(machine, block);
            }
        }
        self.directories.remove(number);
        until
    }
}
