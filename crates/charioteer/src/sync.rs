//! The synchronisation primitives that the whole crate uses, behind one facade.
//!
//! Every atomic, lock, shared cell and thread-local of the lock-free parts comes from here, so that
//! the same code runs on the standard library in production and on `loom`'s permuting scheduler in
//! the models (`RUSTFLAGS="--cfg loom"`).
//!
//! `Mutex` counts the locks that the current thread holds in builds that validate (debug builds
//! and the feature `validate`). Invariant 8 says that nothing may call into the user's world (the
//! interpreter, a callback, a destructor of a user's value) while a lock is held; [`assert_unlocked`]
//! stands at every such site and proves it.
//!
//! With `--cfg tsan`, for `make test-tsan`, the locks also order their holders by an atomic of this
//! crate (`Order`). ThreadSanitizer sees what is compiled for it, which the standard library is
//! not: it would take what a lock protects for unprotected.
//!
//! `perturb` gives the processor away at random at the places where an interleaving matters, in
//! validating builds whose environment has `CHARIOTEER_PERTURB=SEED`. It widens races that a quiet
//! machine would hardly ever show.

use crate::fetch::fetch;

#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{
    AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
};

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{
    AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
};

#[cfg(not(loom))]
pub(crate) use std::{thread::yield_now, thread_local};

#[cfg(loom)]
pub(crate) use loom::thread::yield_now;

/// `loom`'s macro knows no constant initialisers.
#[cfg(loom)]
macro_rules! loom_thread_local {
    ($($(#[$attribute:meta])* static $name:ident: $type:ty = const $init:block;)+) => {
        $(loom::thread_local! { $(#[$attribute])* static $name: $type = $init; })+
    };
}
#[cfg(loom)]
pub(crate) use loom_thread_local as thread_local;

#[cfg(not(loom))]
use std::sync as imp;

#[cfg(loom)]
use loom::sync as imp;

/// A cell whose access the surrounding protocol makes exclusive or shared-after-publication.
#[derive(Debug)]
pub(crate) struct Cell<T>(
    #[cfg(not(loom))] std::cell::UnsafeCell<T>,
    #[cfg(loom)] loom::cell::UnsafeCell<T>,
);

impl<T> Cell<T> {
    pub(crate) fn new(value: T) -> Self {
        #[cfg(not(loom))]
        return Self(std::cell::UnsafeCell::new(value));
        #[cfg(loom)]
        return Self(loom::cell::UnsafeCell::new(value));
    }

    /// Runs `f` on a pointer for reading; the caller upholds that nobody writes meanwhile.
    #[inline]
    pub(crate) fn with<R>(&self, f: impl FnOnce(*const T) -> R) -> R {
        #[cfg(not(loom))]
        return f(self.0.get());
        #[cfg(loom)]
        return self.0.with(f);
    }

    /// Runs `f` on a pointer for writing; the caller upholds that nobody else uses it meanwhile.
    #[inline]
    pub(crate) fn with_mut<R>(&self, f: impl FnOnce(*mut T) -> R) -> R {
        #[cfg(not(loom))]
        return f(self.0.get());
        #[cfg(loom)]
        return self.0.with_mut(f);
    }
}

/// Where something was, for who wants to ask for it early: a guess, which may be wrong in any way. So it
/// orders nothing, and loom need not try what it might say.
#[derive(Debug, Default)]
pub(crate) struct Hint(std::sync::atomic::AtomicUsize);

impl Hint {
    /// Asks for the memory there.
    #[inline]
    pub(crate) fn fetch(&self) {
        let address = self.0.load(Ordering::Relaxed);
        if address != 0 {
            fetch(std::ptr::without_provenance::<()>(address));
        }
    }

    /// It is there now. That is written where it is news, since many threads read it.
    #[inline]
    pub(crate) fn set<T>(&self, place: &T) {
        let address = std::ptr::from_ref(place).addr();
        if self.0.load(Ordering::Relaxed) != address {
            self.0.store(address, Ordering::Relaxed);
        }
    }
}

impl Clone for Hint {
    fn clone(&self) -> Self {
        Self(self.0.load(Ordering::Relaxed).into())
    }
}

#[cfg(any(debug_assertions, feature = "validate"))]
mod held {
    super::thread_local! {
        static HELD: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
    }
    pub(super) fn add() {
        let _ = HELD.try_with(|held| held.set(held.get() + 1));
    }
    pub(super) fn sub() {
        let _ = HELD.try_with(|held| held.set(held.get() - 1));
    }
    pub(super) fn count() -> usize {
        HELD.try_with(std::cell::Cell::get).unwrap_or(0)
    }
}

/// Asserts, in validating builds, that this thread holds no internal lock (invariant 8).
#[inline]
#[track_caller]
pub fn assert_unlocked() {
    #[cfg(any(debug_assertions, feature = "validate"))]
    assert_eq!(
        held::count(),
        0,
        "invariant 8: user code would run under an internal lock"
    );
}

/// What a lock of the standard library does to memory, where ThreadSanitizer sees it; nothing in
/// other builds.
#[derive(Debug)]
pub(crate) struct Order(#[cfg(tsan)] AtomicU32);

impl Order {
    pub(crate) const fn new() -> Self {
        Self(
            #[cfg(tsan)]
            AtomicU32::new(0),
        )
    }

    /// Orders the calling thread after all who called before it: first thing under a lock, and last.
    #[inline]
    pub(crate) fn point(&self) {
        #[cfg(tsan)]
        self.0.fetch_add(1, Ordering::AcqRel);
    }
}

/// A value that one thread sets once.
pub(crate) struct OnceLock<T> {
    inner: std::sync::OnceLock<T>,
    #[cfg(tsan)]
    is_set: AtomicBool,
}

impl<T> OnceLock<T> {
    pub(crate) const fn new() -> Self {
        Self {
            inner: std::sync::OnceLock::new(),
            #[cfg(tsan)]
            is_set: AtomicBool::new(false),
        }
    }

    /// Sets the value, or gives it back if there is one.
    pub(crate) fn set(&self, value: T) -> Result<(), T> {
        self.inner.set(value)?;
        #[cfg(tsan)]
        self.is_set.store(true, Ordering::Release);
        Ok(())
    }

    #[inline]
    pub(crate) fn get(&self) -> Option<&T> {
        #[cfg(tsan)]
        if !self.is_set.load(Ordering::Acquire) {
            return None;
        }
        self.inner.get()
    }
}

/// A mutual exclusion lock without poisoning: no user code runs under it, so that a panic inside
/// is a bug of ours and the data behind it are not worth protecting from it.
#[derive(Debug)]
pub(crate) struct Mutex<T> {
    inner: imp::Mutex<T>,
    order: Order,
}

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self {
            inner: imp::Mutex::new(value),
            order: Order::new(),
        }
    }

    #[inline]
    pub(crate) fn lock(&self) -> Guard<'_, T> {
        perturb();
        let inner = self
            .inner
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        #[cfg(any(debug_assertions, feature = "validate"))]
        held::add();
        self.order.point();
        Guard {
            inner: Some(inner),
            order: &self.order,
        }
    }

    /// The lock, if nobody has it.
    #[inline]
    pub(crate) fn try_lock(&self) -> Option<Guard<'_, T>> {
        perturb();
        let inner = match self.inner.try_lock() {
            Ok(inner) => inner,
            Err(std::sync::TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(std::sync::TryLockError::WouldBlock) => return None,
        };
        #[cfg(any(debug_assertions, feature = "validate"))]
        held::add();
        self.order.point();
        Some(Guard {
            inner: Some(inner),
            order: &self.order,
        })
    }
}

/// The right to use what a [`Mutex`] protects.
pub(crate) struct Guard<'a, T> {
    inner: Option<imp::MutexGuard<'a, T>>,
    order: &'a Order,
}

impl<T> std::ops::Deref for Guard<'_, T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        self.inner
            .as_ref()
            .expect("the guard is held until its drop")
    }
}

impl<T> std::ops::DerefMut for Guard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        self.inner
            .as_mut()
            .expect("the guard is held until its drop")
    }
}

impl<T> Drop for Guard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        self.order.point();
        self.inner = None;
        #[cfg(any(debug_assertions, feature = "validate"))]
        held::sub();
    }
}

/// Waits on a condition under a [`Mutex`].
#[derive(Debug)]
pub(crate) struct Condvar(imp::Condvar);

impl Condvar {
    pub(crate) fn new() -> Self {
        Self(imp::Condvar::new())
    }

    pub(crate) fn wait<'a, T>(&self, mut guard: Guard<'a, T>) -> Guard<'a, T> {
        guard.order.point();
        let inner = guard
            .inner
            .take()
            .expect("the guard is held until its drop");
        let inner = self
            .0
            .wait(inner)
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        guard.inner = Some(inner);
        guard.order.point();
        guard
    }

    #[cfg(not(loom))]
    pub(crate) fn wait_for<'a, T>(
        &self,
        mut guard: Guard<'a, T>,
        timeout: std::time::Duration,
    ) -> Guard<'a, T> {
        guard.order.point();
        let inner = guard
            .inner
            .take()
            .expect("the guard is held until its drop");
        let (inner, _) = self
            .0
            .wait_timeout(inner, timeout)
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        guard.inner = Some(inner);
        guard.order.point();
        guard
    }

    /// `loom` has no time: its waits end only when they are told.
    #[cfg(loom)]
    pub(crate) fn wait_for<'a, T>(
        &self,
        guard: Guard<'a, T>,
        _timeout: std::time::Duration,
    ) -> Guard<'a, T> {
        self.wait(guard)
    }

    pub(crate) fn notify_one(&self) {
        self.0.notify_one();
    }

    pub(crate) fn notify_all(&self) {
        self.0.notify_all();
    }
}

/// Yields at random where the environment asked for it; nothing in ordinary builds.
#[inline]
pub(crate) fn perturb() {
    #[cfg(all(any(debug_assertions, feature = "validate"), not(loom)))]
    perturbation::point();
}

#[cfg(all(any(debug_assertions, feature = "validate"), not(loom)))]
mod perturbation {
    use std::cell::Cell;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static SEED: OnceLock<Option<u64>> = OnceLock::new();
    static THREADS: AtomicU64 = AtomicU64::new(0);

    thread_local! {
        static STATE: Cell<u64> = const { Cell::new(0) };
    }

    pub(super) fn point() {
        let seed = SEED.get_or_init(|| std::env::var("CHARIOTEER_PERTURB").ok()?.parse().ok());
        let Some(seed) = seed else { return };
        let roll = STATE.try_with(|state| {
            let mut x = state.get();
            if x == 0 {
                let thread = THREADS.fetch_add(1, Ordering::Relaxed) + 1;
                x = (seed ^ thread.wrapping_mul(0x9E37_79B9_7F4A_7C15)) | 1;
            }
            // xorshift64: cheap, and good enough to vary interleavings.
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            state.set(x);
            x
        });
        match roll.unwrap_or(1) % 64 {
            0 => std::thread::sleep(std::time::Duration::from_micros(20)),
            1..=4 => std::thread::yield_now(),
            _ => {}
        }
    }
}
