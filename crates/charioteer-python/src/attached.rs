//! What attached threads share.
//!
//! With the GIL, one thread is attached at a time and gives that up only inside of a call to the
//! interpreter. So a section without such a call needs no lock, and a lock would cost: each of its
//! two atomic operations waits until everything that the thread has written is in its cache, which
//! for new objects is from memory. Without the GIL it is a lock. Either way no section may call the
//! interpreter (invariant 8).

use pyo3::prelude::*;

/// A value that only attached threads use, one at a time.
pub struct Attached<T>(Inner<T>);

#[cfg(Py_GIL_DISABLED)]
type Inner<T> = std::sync::Mutex<T>;

#[cfg(not(Py_GIL_DISABLED))]
type Inner<T> = std::cell::RefCell<T>;

// SAFETY: the cell is reached through the methods below alone, by threads that hold the GIL. Their
// guards are not `Send`, and are dropped before the GIL can be given up; a section that broke that
// would find the cell borrowed and panic.
#[cfg(not(Py_GIL_DISABLED))]
unsafe impl<T: Send> Sync for Attached<T> {}

impl<T> Attached<T> {
    pub fn new(value: T) -> Self {
        Self(Inner::new(value))
    }

    /// The value, for a section that calls the interpreter nowhere.
    #[cfg(Py_GIL_DISABLED)]
    #[inline]
    pub fn lock(&self, _: Python<'_>) -> std::sync::MutexGuard<'_, T> {
        self.0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The value, for a section that calls the interpreter nowhere.
    #[cfg(not(Py_GIL_DISABLED))]
    #[inline]
    pub fn lock(&self, _: Python<'_>) -> std::cell::RefMut<'_, T> {
        self.0.borrow_mut()
    }

    /// As [`try_lock`](Self::try_lock), to change it.
    pub fn try_lock_mut(&self) -> Option<impl std::ops::DerefMut<Target = T>> {
        #[cfg(Py_GIL_DISABLED)]
        return self.0.try_lock().ok();
        #[cfg(not(Py_GIL_DISABLED))]
        return self.0.try_borrow_mut().ok();
    }

    /// The value, unless a section is under way: for the garbage collector, which may come while a
    /// section allocates, or stop a thread in the middle of one.
    pub fn try_lock(&self) -> Option<impl std::ops::Deref<Target = T>> {
        #[cfg(Py_GIL_DISABLED)]
        return self.0.try_lock().ok();
        #[cfg(not(Py_GIL_DISABLED))]
        return self.0.try_borrow_mut().ok();
    }
}
