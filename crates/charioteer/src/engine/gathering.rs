//! Letters to the ledger of devices that belong together, and are read together.
//!
//! A completion gives devices back and makes tasks ready. Were each of its letters read as soon as it is
//! sent, what was given back would go to who waits already, and of the tasks that became ready the first
//! that asks would have it, whatever its rank. So whoever works off what follows from one event *gathers*:
//! the letters of this thread to its engine go into the mailbox, in their order, and the turn is tried when
//! all that follows is done (see [`devices`](super::devices)). The ledger then sees what is free and
//! everybody who asks for it. Nobody waits for a thread that gathers: others take turns meanwhile, and read
//! what it has sent so far.
//!
//! *Completions* that a device tells of together are gathered for together, as long as the device says:
//! what follows from all of them the ledger reads in one turn. Of the events of one stream it hears the last
//! alone, which all before it are complete by.
//!
//! **The user's world.** What a thread sends it must not keep back while it runs code that may wait for
//! what comes of it. Callbacks and reports are called [`apart`], and a wait [delivers](Engine::deliver)
//! first, whoever waits: a destructor, or an operation of a virtual device.

use std::cell::Cell;
use std::sync::Arc;

use super::{Engine, Moving};
use crate::machine::{Event, keep_until_told};
use crate::task::Domain;

crate::sync::thread_local! {
    /// The engine (its number, or 0) for which this thread gathers, and whether it has sent anything.
    static GATHERING: Cell<(u32, bool)> = const { Cell::new((0, false)) };
    /// The engine for which it does so since completions are told here together.
    static TELLING: Cell<u32> = const { Cell::new(0) };
    /// The event that this thread was told of last while it gathers, of which the ledger is still to hear.
    static LANDED: Cell<Option<Event>> = const { Cell::new(None) };
}

/// While there is one, this thread gathers.
pub(super) struct Gathering<'a, D: Domain>(Option<&'a Arc<Engine<D>>>);

impl<D: Domain> Drop for Gathering<'_, D> {
    fn drop(&mut self) {
        if let Some(engine) = self.0 {
            let (_, sent) = GATHERING.with(|gathering| gathering.replace((0, false)));
            if sent {
                engine.read_mail();
            }
        }
    }
}

/// Gathers while a thread of a device tells of completions, and counts as one that moves tasks.
struct Telling<D: Domain>(Arc<Engine<D>>);

impl<D: Domain> Telling<D> {
    fn new(engine: &Arc<Engine<D>>) -> Self {
        std::mem::forget(Moving::new(engine));
        GATHERING.with(|gathering| gathering.set((engine.id, false)));
        TELLING.with(|telling| telling.set(engine.id));
        Self(Arc::clone(engine))
    }
}

impl<D: Domain> Drop for Telling<D> {
    fn drop(&mut self) {
        TELLING.with(|telling| telling.set(0));
        drop(Gathering(Some(&self.0)));
        drop(Moving(&self.0));
    }
}

impl<D: Domain> Engine<D> {
    /// Carries out what follows from a completion, on the thread that tells of it.
    #[inline]
    pub(super) fn told(self: &Arc<Self>, follow: impl FnOnce()) {
        let tells = TELLING.with(Cell::get) == self.id;
        let gathers = GATHERING.with(Cell::get).0 != 0;
        if tells || (!gathers && keep_until_told(|| Box::new(Telling::new(self)))) {
            return follow();
        }
        let _moving = Moving::new(self);
        // What is free now goes to whom it makes ready as well.
        let _gathering = self.gather();
        follow();
    }

    /// Gathers, unless this thread does already.
    #[inline]
    pub(super) fn gather(self: &Arc<Self>) -> Gathering<'_, D> {
        let first = self.devices.is_some()
            && GATHERING.with(|gathering| {
                let first = gathering.get().0 == 0;
                if first {
                    gathering.set((self.id, false));
                }
                first
            });
        Gathering(first.then_some(self))
    }

    /// Whether a letter that this thread sent just now is read later.
    pub(super) fn is_gathered(&self) -> bool {
        GATHERING.with(|gathering| {
            let gathers = gathering.get().0 == self.id;
            if gathers {
                gathering.set((self.id, true));
            }
            gathers
        })
    }

    /// Lets the letters that this thread has gathered so far be read.
    #[inline]
    pub(super) fn deliver() {
        let (id, sent) = GATHERING.with(Cell::get);
        if sent {
            GATHERING.with(|gathering| gathering.set((id, false)));
            match D::engines().get(id) {
                Some(engine) => engine.read_mail(),
                // Nobody is left who would hear of it.
                None => drop(take_landed()),
            }
        }
    }

    /// Notes that an event is complete while this thread gathers. An event of another stream that was noted
    /// before comes back.
    pub(super) fn note_landed(event: Event) -> Option<Event> {
        let before = take_landed();
        let (last, other) = match before {
            Some(before) if before.stream != event.stream => (event, Some(before)),
            Some(before) if before.position > event.position => (before, None),
            _ => (event, None),
        };
        LANDED.with(|landed| landed.set(Some(last)));
        other
    }
}

/// The event that this thread noted last, if the ledger has not heard of it.
pub(super) fn take_landed() -> Option<Event> {
    LANDED.with(Cell::take)
}

/// Calls the user's code, with nothing kept back.
pub(super) fn apart<D: Domain>(call: impl FnOnce()) {
    struct Restore(u32);
    impl Drop for Restore {
        fn drop(&mut self) {
            GATHERING.with(|gathering| gathering.set((self.0, false)));
        }
    }
    Engine::<D>::deliver();
    let (id, _) = GATHERING.with(|gathering| gathering.replace((0, false)));
    let _restore = Restore(id);
    call();
}
