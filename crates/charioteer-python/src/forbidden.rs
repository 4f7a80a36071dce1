//! What `clippy.toml` forbids everywhere but in the gateway, once each: a path that the lint does not
//! find would leave its expectation here unfulfilled, which is an error to `make lint`. No build has
//! this module.

#![allow(dead_code)]

use pyo3::ffi;
use pyo3::prelude::*;

#[expect(clippy::disallowed_methods)]
fn attach() {
    Python::attach(|_| ());
}

#[expect(clippy::disallowed_methods)]
fn try_attach() {
    Python::try_attach(|_| ());
}

#[expect(clippy::disallowed_methods)]
fn attach_unchecked() {
    // SAFETY: never called, as all that follow.
    unsafe { Python::attach_unchecked(|_| ()) }
}

#[expect(clippy::disallowed_methods)]
fn detach(py: Python<'_>) {
    py.detach(|| ());
}

#[expect(clippy::disallowed_methods)]
fn ensure() -> ffi::PyGILState_STATE {
    // SAFETY: as above.
    unsafe { ffi::PyGILState_Ensure() }
}

#[expect(clippy::disallowed_methods)]
fn release(state: ffi::PyGILState_STATE) {
    // SAFETY: as above.
    unsafe { ffi::PyGILState_Release(state) }
}

#[expect(clippy::disallowed_methods)]
fn save_thread() -> *mut ffi::PyThreadState {
    // SAFETY: as above.
    unsafe { ffi::PyEval_SaveThread() }
}

#[expect(clippy::disallowed_methods)]
fn restore_thread(state: *mut ffi::PyThreadState) {
    // SAFETY: as above.
    unsafe { ffi::PyEval_RestoreThread(state) }
}

#[expect(clippy::disallowed_methods)]
fn acquire_thread(state: *mut ffi::PyThreadState) {
    // SAFETY: as above.
    unsafe { ffi::PyEval_AcquireThread(state) }
}

#[expect(clippy::disallowed_methods)]
fn release_thread(state: *mut ffi::PyThreadState) {
    // SAFETY: as above.
    unsafe { ffi::PyEval_ReleaseThread(state) }
}

#[expect(clippy::disallowed_methods)]
fn swap(state: *mut ffi::PyThreadState) -> *mut ffi::PyThreadState {
    // SAFETY: as above.
    unsafe { ffi::PyThreadState_Swap(state) }
}
