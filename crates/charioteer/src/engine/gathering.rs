//! Letters to the ledger of devices that belong together, and are read together.
//!
//! A completion gives devices back and makes tasks ready. Were each of its letters read as soon as it is
//! sent, what was given back would go to who waits already, and of the tasks that became ready the first
//! that asks would have it, whatever its rank. So whoever works off what follows from one event *gathers*:
//! the letters of this thread to its engine are held back, in their order, and the turn is tried when
//! all that follows is done (see [`devices`](super::devices)). The ledger then sees what is free and
//! everybody who asks for it. Nobody waits for a thread that gathers: others take turns meanwhile.
//!
//! *Completions* that a device tells of together are gathered for together, as long as the device says:
//! what follows from all of them the ledger reads in one turn.
//!
//! **What is kept, and what is sent at once.** What asks for a task's devices stays with the thread until it
//! takes the turn itself, or finds it taken and puts it into the mailbox: that is a queue which all threads share,
//! and costs as much as reading the letters does. All others go there at once, in front of what is kept. What is
//! complete or given back has to be there before anybody can see what follows from it and ask, on whichever
//! thread: else who asks would be given another stream, or another device. That a body pauses has to be there
//! before anybody can say that it goes on.
//!
//! **The user's world.** What a thread sends it must not keep back while it runs code that may wait for
//! what comes of it. Callbacks and reports are called [`apart`], and a wait [delivers](Engine::deliver)
//! first, whoever waits: a destructor, or an operation of a virtual device.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::sync::Arc;

use super::{Engine, Moving};
use crate::machine::{at_once, keep_until_told, submit};
use crate::task::Domain;

crate::sync::thread_local! {
    /// The engine (its number, or 0) for which this thread gathers, and whether it has sent anything.
    static GATHERING: Cell<(u32, bool)> = const { Cell::new((0, false)) };
    /// The engine for which it does so since completions are told here together.
    static TELLING: Cell<u32> = const { Cell::new(0) };
    /// The letters that this thread keeps, [`Kept`].
    static LETTERS: RefCell<Option<Box<dyn Any>>> = const { RefCell::new(None) };
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

    /// Lets the letters that this thread has gathered so far be read, and has enqueued what it has deferred.
    #[inline]
    pub(super) fn deliver() {
        submit();
        let (id, sent) = GATHERING.with(Cell::get);
        if sent {
            GATHERING.with(|gathering| gathering.set((id, false)));
            match D::engines().get(id) {
                Some(engine) => engine.read_mail(),
                // Nobody is left who would hear of it.
                None => drop(LETTERS.with(RefCell::take)),
            }
        }
    }
}

/// Letters to the engine for which a thread gathers.
pub(super) struct Kept<L>(pub(super) Vec<L>);

/// Keeps a letter of this thread, which gathers. It comes back if the thread is about to end.
pub(super) fn keep<L: 'static>(letter: L) -> Option<L> {
    let mut letter = Some(letter);
    let _ = LETTERS.try_with(|letters| {
        let mut letters = letters.borrow_mut();
        let known = letters.as_mut().and_then(|it| it.downcast_mut::<Kept<L>>());
        match known {
            Some(known) => known.0.extend(letter.take()),
            // Those of another engine are none: it has been told of all.
            None => *letters = Some(Box::new(Kept(Vec::from_iter(letter.take())))),
        }
    });
    letter
}

/// What this thread has kept.
pub(super) fn take_kept<L: 'static>() -> Box<Kept<L>> {
    let kept = LETTERS.try_with(RefCell::take).ok().flatten();
    let kept = kept.and_then(|kept| kept.downcast().ok());
    kept.unwrap_or_else(|| Box::new(Kept(Vec::new())))
}

/// Gives back what is empty, and whose memory is of use for the next letters.
pub(super) fn give_back<L: 'static>(kept: Box<Kept<L>>) {
    debug_assert!(kept.0.is_empty(), "what was kept was sent");
    let _ = LETTERS.try_with(|letters| letters.borrow_mut().get_or_insert(kept).is::<Kept<L>>());
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
    at_once(call);
}
