//! The one gateway to the interpreter.
//!
//! # Protocol
//!
//! Everything in this crate that attaches to the interpreter, or detaches from it, does so through
//! [`attach`] and [`detach`], at a named [`Site`] whose visits are counted, with the time that they
//! waited for the interpreter and the time until they left again. Both assert, in validating builds, that the thread holds no internal lock (invariant 8), since another thread
//! may hold the interpreter and want that lock.
//!
//! The lint `disallowed_methods` forbids every other way in or out (`clippy.toml`), and `forbidden.rs`
//! fails it where it would not look.
//!
//! # Why there is no deadlock
//!
//! An *internal* lock is one of this project: of the core (`charioteer::sync`), [`DEFERRED`], the
//! names of `callable`, what is open in `runtime`, [`crate::attached::Attached`], the observer's in
//! `gil`. Validating builds count those of the core that a thread holds, and assert at each site that
//! there is none; of those of this crate each section is a few lines, and ends before its function
//! calls anything else.
//!
//! | at | the thread holds | and waits for |
//! |---|---|---|
//! | every attaching site | no internal lock | the interpreter |
//! | every detaching site, going out | no internal lock | nothing |
//! | the same, coming back | no internal lock: the closure has ended, and its guards with it | the interpreter |
//! | detached inside [`Site::Wait`], [`Site::StandBack`], [`Site::Main`] | no internal lock but the one of the condition that it sleeps on, which sleeping gives up | tasks, time |
//! | detached inside [`Site::Native`], [`Site::Kernel`] | no internal lock | what the C function waits for |
//! | between sites, attached | at most internal locks, in sections that call no Python | internal locks |
//!
//! * *The GIL.* A thread in a section of an internal lock never asks for the interpreter: sections
//!   call no Python API, run no callback and drop no user's value (invariant 8); the most that one
//!   does is count a reference up. So each section ends whoever has the GIL, and a thread that is
//!   attached and waits for an internal lock waits for a bounded time: no circle leads through the
//!   GIL.
//! * *A pause of a free-threaded interpreter* (for the collector, for one) waits until every attached
//!   thread has come to a point of its own at which it can stop, or is detached. A section has no such
//!   point, so nobody is stopped while it holds an internal lock, and who is to stop comes to its
//!   point after a bounded time. Whoever waits longer than a section (for tasks, time, a C
//!   function) is detached, and counts as stopped.
//! * *Another library's lock.* A C function is called detached, so that one who waits in it for its
//!   library's lock keeps the interpreter from nobody; and it comes back only when it has returned,
//!   without that lock. Python bodies and callbacks run with no internal lock held, so whatever locks
//!   they take are above all of ours, and so are the locks of the package's own Python, which let the
//!   interpreter go while a thread waits for them. What is left are circles that a program makes by itself: a
//!   C function that holds a lock and calls back into Python, beside a Python body that wants that
//!   lock without letting the interpreter go. The only such lock that we want attached is the one
//!   of the thread limits of BLAS and OpenMP (`_pools.py`), whose holders never call Python.
//!
//! # References
//!
//! References may be dropped by any thread: the last owner of a result can be a worker that is not
//! attached. [`PyRef`] frees its object at once if the thread is attached, and else puts it into a
//! queue. Who attaches empties it, who comes back from a wait, and who asks for the result of a task,
//! so that what a task kept is free when it is known to be done; else the main thread does, between
//! two bytecodes. The queue is bounded: the thread that finds it full attaches itself.

#![expect(
    clippy::disallowed_methods,
    reason = "everywhere else attaches and detaches through this module"
)]

use std::cell::{Cell, RefCell};
use std::mem::ManuallyDrop;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use charioteer::sync::assert_unlocked;
use pyo3::ffi;
use pyo3::prelude::*;

/// Where the interpreter is entered or left.
#[derive(Clone, Copy)]
#[repr(usize)]
pub enum Site {
    /// A worker attaches to run Python bodies.
    Worker,
    /// A thread is started.
    ThreadStart,
    /// A callback is called by a thread that may not be attached.
    Callback,
    /// A failure is handed to `on_failure`.
    Report,
    /// A full queue of references is emptied.
    Drop,
    /// A waiting main thread looks for signals.
    Signal,
    /// A warning is given.
    Warn,
    /// A thread detaches to wait.
    Wait,
    /// A thread that spawns detaches, for others to get on.
    StandBack,
    /// The main function of a worker detaches.
    Main,
    /// An attached thread detaches to call a native body.
    Native,
    /// A kernel of the benchmarks detaches.
    Kernel,
    /// A thread that stands for a device attaches to call an operation, or to tell that it is lost.
    Device,
}

const SITES: [&str; 13] = [
    "worker",
    "thread_start",
    "callback",
    "report",
    "drop",
    "signal",
    "warn",
    "wait",
    "stand_back",
    "main",
    "native",
    "kernel",
    "device",
];

/// The counts of one site. Times are in nanoseconds.
struct Counts {
    visits: AtomicU64,
    waits: AtomicU64,
    waited: AtomicU64,
    inside: AtomicU64,
}

/// The counts that some threads share, apart from the cache lines of others: what a thread counts
/// right after it got the interpreter, all others wait for.
#[repr(align(128))]
struct Shard([Counts; SITES.len()]);

/// More than there are cores on most machines; threads take them in turn.
const SHARDS: usize = 64;

static COUNTS: [Shard; SHARDS] = [const {
    Shard(
        [const {
            Counts {
                visits: AtomicU64::new(0),
                waits: AtomicU64::new(0),
                waited: AtomicU64::new(0),
                inside: AtomicU64::new(0),
            }
        }; SITES.len()],
    )
}; SHARDS];

static THREADS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// The shard of this thread, once it has one. Without a destructor, so that it is there to the
    /// end of the thread.
    static SHARD: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// To attach takes less where nobody is in the way.
const NO_WAIT: Duration = Duration::from_micros(5);

#[inline]
fn counts(site: Site) -> &'static Counts {
    let mut shard = SHARD.get();
    if shard == usize::MAX {
        shard = THREADS.fetch_add(1, Ordering::Relaxed) % SHARDS;
        SHARD.set(shard);
    }
    &COUNTS[shard].0[site as usize]
}

#[inline]
fn visit(site: Site) {
    assert_unlocked();
    counts(site).visits.fetch_add(1, Ordering::Relaxed);
}

/// Counts the time that a visit waited for the interpreter.
#[inline]
fn count_wait(site: Site, waited: Duration) {
    let counts = counts(site);
    if waited > NO_WAIT {
        counts.waits.fetch_add(1, Ordering::Relaxed);
    }
    add(&counts.waited, waited);
}

#[inline]
fn add(counter: &AtomicU64, time: Duration) {
    let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    counter.fetch_add(nanoseconds, Ordering::Relaxed);
}

/// What was counted at a site since the process began.
pub struct Visits {
    pub visits: u64,
    /// Visits that found the interpreter taken.
    pub waits: u64,
    /// The time until the thread was attached, or attached again.
    pub waited: Duration,
    /// The time that it was attached, or detached, in between.
    pub inside: Duration,
}

/// The name of every site and what was counted there.
pub fn visits() -> impl Iterator<Item = (&'static str, Visits)> {
    SITES.iter().enumerate().map(|(site, name)| {
        let sum = |counter: fn(&Counts) -> &AtomicU64| {
            COUNTS
                .iter()
                .map(|shard| counter(&shard.0[site]).load(Ordering::Relaxed))
                .fold(0, u64::wrapping_add)
        };
        let visits = Visits {
            visits: sum(|counts| &counts.visits),
            waits: sum(|counts| &counts.waits),
            waited: Duration::from_nanos(sum(|counts| &counts.waited)),
            inside: Duration::from_nanos(sum(|counts| &counts.inside)),
        };
        (*name, visits)
    })
}

/// Calls `f` attached to the interpreter.
#[inline]
pub fn attach<R>(site: Site, f: impl FnOnce(Python<'_>) -> R) -> R {
    visit(site);
    let asked = Instant::now();
    Python::attach(|py| inside(py, site, asked, f))
}

/// Calls `f` attached to the interpreter, unless that has ended or is about to.
pub fn try_attach<R>(site: Site, f: impl FnOnce(Python<'_>) -> R) -> Option<R> {
    visit(site);
    let asked = Instant::now();
    Python::try_attach(|py| inside(py, site, asked, f))
}

/// Calls `f` on a thread that asked to be attached then, and is.
#[inline]
fn inside<R>(py: Python<'_>, site: Site, asked: Instant, f: impl FnOnce(Python<'_>) -> R) -> R {
    let attached = Instant::now();
    drop_deferred(py);
    let result = f(py);
    count_wait(site, attached - asked);
    add(&counts(site).inside, attached.elapsed());
    result
}

/// Calls `f` detached from the interpreter. Attached again, the thread drops what others left, so
/// that who waited for a task finds its arguments released.
#[inline]
pub fn detach<R>(py: Python<'_>, site: Site, f: impl FnOnce() -> R) -> R {
    assert_unlocked();
    /// Says that a closure may run detached.
    struct Stays<F>(F);
    // SAFETY: PyO3 takes `Send` for "holds nothing that is bound to the interpreter". The closures
    // that come here stay on this thread and hold no such thing; what else they borrow may well
    // not be `Send`.
    unsafe impl<F> Send for Stays<F> {}
    impl<R, F: FnOnce() -> R> Stays<F> {
        fn call(self) -> Stays<R> {
            Stays((self.0)())
        }
    }
    let f = Stays(f);
    // What can be counted detached is: others wait for this thread while it is attached.
    let (result, asked) = py.detach(move || {
        let detached = Instant::now();
        let result = f.call();
        let asked = Instant::now();
        let counts = counts(site);
        counts.visits.fetch_add(1, Ordering::Relaxed);
        add(&counts.inside, asked - detached);
        (result, asked)
    });
    count_wait(site, asked.elapsed());
    drop_deferred(py);
    result.0
}

/// Whether this interpreter has a GIL, and it is on.
pub fn has_gil(py: Python<'_>) -> PyResult<bool> {
    if cfg!(Py_GIL_DISABLED) {
        return py.import("sys")?.call_method0("_is_gil_enabled")?.extract();
    }
    Ok(true)
}

/// Whether the calling thread is attached. Unlike `PyGILState_Check` it also answers no after the
/// interpreter ended, when the last thread-local caches are dropped.
#[inline]
pub fn is_attached() -> bool {
    // SAFETY: both may be called at any time: they read which state is current, and which is this
    // thread's.
    unsafe {
        let current = ffi::compat::PyThreadState_GetUnchecked();
        // Before 3.12 the current state is the process's, whoever holds the GIL.
        !current.is_null() && (cfg!(Py_3_12) || current == ffi::PyGILState_GetThisThreadState())
    }
}

/// References that threads dropped while they were not attached.
static DEFERRED: Mutex<Vec<usize>> = Mutex::new(Vec::new());
static DEFERRED_LENGTH: AtomicUsize = AtomicUsize::new(0);

/// How many references may wait to be dropped.
const BOUND: usize = 4096;

/// Whether objects are hidden from the garbage collector; see [`Hidden`].
pub const HIDES: bool = cfg!(not(Py_GIL_DISABLED));

/// In the lowest bit of a deferred address, which alignment leaves free: the object is hidden.
const HIDDEN: usize = 1;

fn defer(object: usize) {
    let (first, full) = {
        let mut deferred = DEFERRED.lock().unwrap_or_else(PoisonError::into_inner);
        deferred.push(object);
        DEFERRED_LENGTH.store(deferred.len(), Ordering::Release);
        (deferred.len() == 1, deferred.len() >= BOUND)
    };
    if first {
        // SAFETY: both may be called by any thread, attached or not; the call takes no argument.
        unsafe {
            if ffi::Py_IsInitialized() != 0 {
                // One that has too many of these to take another empties the queue some other time.
                let _ = ffi::Py_AddPendingCall(Some(drop_pending), std::ptr::null_mut());
            }
        }
    }
    if full {
        visit(Site::Drop);
        // An interpreter that ends frees everything by itself.
        let _ = Python::try_attach(drop_deferred);
    }
}

/// The main thread empties the queue between two of its bytecodes.
extern "C" fn drop_pending(_: *mut std::ffi::c_void) -> std::ffi::c_int {
    // SAFETY: the interpreter calls this, on a thread that is attached.
    drop_deferred(unsafe { Python::assume_attached() });
    0
}

/// Drops what other threads left.
#[inline]
pub fn drop_deferred(_: Python<'_>) {
    if DEFERRED_LENGTH.load(Ordering::Acquire) == 0 {
        return;
    }
    let deferred = {
        let mut deferred = DEFERRED.lock().unwrap_or_else(PoisonError::into_inner);
        DEFERRED_LENGTH.store(0, Ordering::Release);
        std::mem::take(&mut *deferred)
    };
    for object in deferred {
        let pointer = (object & !HIDDEN) as *mut ffi::PyObject;
        // SAFETY: `defer` took over a reference, this thread is attached, and no lock is held.
        unsafe {
            if HIDES && object & HIDDEN != 0 {
                show(pointer);
            }
            ffi::Py_DECREF(pointer);
        }
    }
}

/// A reference that any thread may drop.
pub struct PyRef(ManuallyDrop<Py<PyAny>>);

impl PyRef {
    #[inline]
    pub fn new(object: Py<PyAny>) -> Self {
        Self(ManuallyDrop::new(object))
    }

    #[inline]
    pub fn bind<'py>(&self, py: Python<'py>) -> &Bound<'py, PyAny> {
        self.0.bind(py)
    }

    #[inline]
    pub fn get(&self) -> &Py<PyAny> {
        &self.0
    }

    #[inline]
    pub fn as_ptr(&self) -> *mut ffi::PyObject {
        self.0.as_ptr()
    }

    #[inline]
    pub fn clone_ref(&self, py: Python<'_>) -> Py<PyAny> {
        self.0.clone_ref(py)
    }
}

impl<T> From<Bound<'_, T>> for PyRef {
    #[inline]
    fn from(object: Bound<'_, T>) -> Self {
        Self::new(object.into_any().unbind())
    }
}

impl Drop for PyRef {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: the field is not used after this.
        let object = unsafe { ManuallyDrop::take(&mut self.0) }.into_ptr();
        if is_attached() {
            assert_unlocked();
            // SAFETY: this owned the reference and the thread is attached.
            unsafe { ffi::Py_DECREF(object) };
        } else {
            defer(object as usize);
        }
    }
}

/// A reference to an object that only a pending task can reach, hidden from the garbage collector
/// meanwhile.
///
/// The collector could never free such an object, since it does not see the task that holds it; but
/// it would look at each one again and again, which for many pending tasks costs more than the tasks
/// themselves. The object comes back into sight before the reference is dropped.
///
/// Without a GIL nothing is hidden: there the collector walks the heap and comes across such objects
/// all the same, and it comes when their number has grown by a part of what it saw alive. What it does
/// not see would only let it come more often, and stop all threads each time.
pub struct Hidden(ManuallyDrop<Py<PyAny>>);

impl Hidden {
    /// Hides a function with a closure of its own, or a context.
    #[inline]
    pub fn new(object: Bound<'_, PyAny>) -> Self {
        if HIDES {
            // SAFETY: attached, alive.
            unsafe { hide(object.as_ptr()) };
        }
        Self(ManuallyDrop::new(object.unbind()))
    }

    #[inline]
    pub fn as_ptr(&self) -> *mut ffi::PyObject {
        self.0.as_ptr()
    }

    #[inline]
    pub fn bind<'py>(&self, py: Python<'py>) -> &Bound<'py, PyAny> {
        self.0.bind(py)
    }
}

impl Drop for Hidden {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: the field is not used after this.
        let object = unsafe { ManuallyDrop::take(&mut self.0) }.into_ptr();
        if is_attached() {
            assert_unlocked();
            // SAFETY: this owned the reference and the thread is attached.
            unsafe {
                if HIDES {
                    show(object);
                }
                ffi::Py_DECREF(object);
            }
        } else {
            defer(object as usize | HIDDEN);
        }
    }
}

/// Calls `f` on `object` and, if it is a function, on its closure and the cells in it.
///
/// # Safety
/// Attached; the object is alive.
#[inline]
unsafe fn each_part(object: *mut ffi::PyObject, f: unsafe fn(*mut ffi::PyObject)) {
    // SAFETY: as promised; closures are tuples of cells or null; the references are borrowed.
    unsafe {
        if ffi::PyFunction_Check(object) != 0 {
            let closure = ffi::PyFunction_GetClosure(object);
            if !closure.is_null() {
                for at in 0..ffi::PyTuple_GET_SIZE(closure) {
                    f(ffi::PyTuple_GET_ITEM(closure, at));
                }
                f(closure);
            }
        }
        f(object);
    }
}

/// Takes an object, and a closure that is its own, out of the collector's sight. Parts that others
/// know of stay.
///
/// # Safety
/// Attached; the object is alive.
#[inline]
unsafe fn hide(object: *mut ffi::PyObject) {
    unsafe fn one(object: *mut ffi::PyObject) {
        // SAFETY: attached, alive. One reference means that nobody else knows the object.
        unsafe {
            if ffi::Py_REFCNT(object) == 1 && ffi::PyObject_GC_IsTracked(object) != 0 {
                ffi::PyObject_GC_UnTrack(object.cast());
            }
        }
    }
    // SAFETY: as promised.
    unsafe { each_part(object, one) }
}

/// Brings an object and its closure back into the collector's sight. Types untrack their objects
/// when they free them, some without a look whether they are tracked.
///
/// # Safety
/// Attached; the object is alive.
#[inline]
unsafe fn show(object: *mut ffi::PyObject) {
    unsafe fn one(object: *mut ffi::PyObject) {
        // SAFETY: attached, alive; only objects that can be tracked and are not may be.
        unsafe {
            if ffi::PyObject_IS_GC(object) != 0 && ffi::PyObject_GC_IsTracked(object) == 0 {
                ffi::PyObject_GC_Track(object.cast());
            }
        }
    }
    // SAFETY: as promised.
    unsafe { each_part(object, one) }
}

thread_local! {
    /// What a wait of this thread was interrupted with.
    static INTERRUPT: RefCell<Option<PyErr>> = const { RefCell::new(None) };
    static MAIN: bool = is_main_thread();
}

fn is_main_thread() -> bool {
    // SAFETY: both calls only read who we are.
    unsafe { libc::syscall(libc::SYS_gettid) == libc::c_long::from(libc::getpid()) }
}

/// Whether this is the thread on which Python handles signals.
pub fn handles_signals() -> bool {
    MAIN.with(|main| *main)
}

/// Lets Python handle signals; true if that raised, and then [`take_interrupt`] has the exception.
pub fn check_signals() -> bool {
    attach(Site::Signal, |py| match py.check_signals() {
        Ok(()) => false,
        Err(error) => {
            INTERRUPT.with(|interrupt| *interrupt.borrow_mut() = Some(error));
            true
        }
    })
}

/// The exception that interrupted the last wait of this thread, once.
pub fn take_interrupt() -> Option<PyErr> {
    INTERRUPT.with(|interrupt| interrupt.borrow_mut().take())
}
