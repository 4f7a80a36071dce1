//! What other libraries take for current while a body runs on a device that a driver has.
//!
//! The driver's context is current on the thread, which every library follows. CuPy and PyTorch have a
//! current stream of their own a thread and a device; for those of them that are imported it is the
//! task's. What makes a stream theirs (`charioteer/_cuda.py`) is made once a thread and stream, and
//! before each body the library is asked for its current one, which costs a third of a change: a body may have
//! left another one, and mostly has not.
//!
//! A runtime that checks looks at the legacy default stream of each device before and after a body: what
//! is left there when it ends, where nothing was when it began, nobody waits for. Whose it is cannot be
//! told, since any thread of the program may use that stream, so this is a warning and no failure. It is
//! about what is left: work that is over by then is not seen.
//!
//! A thread of the runtime is not put back after a body, since the next one will do as much: only where
//! a body without devices follows, and once. Any other thread, and a body within which another one ran,
//! is as it was before.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use charioteer::engine::Running;
use charioteer::machine::{Device, DeviceId, Machine, Stream};
use charioteer_cuda::{CudaGpu, pool};
use pyo3::ffi;
use pyo3::prelude::*;
use smallvec::SmallVec;

use crate::devices::raise;
use crate::gateway::PyRef;
use crate::interp::{Core, Interp, Task, report};
use crate::runtime::CURRENT_DEVICE;
use crate::support::support;

/// Devices and streams of a body, the current one's place among them.
#[derive(Clone)]
struct Frame {
    lent: SmallVec<[(DeviceId, Stream); 2]>,
    at: usize,
}

/// How a stream is made current in a library.
struct Use {
    /// Gives, called with the device, what is current.
    current: PyRef,
    device: PyRef,
    /// The same of this stream.
    own: PyRef,
    /// Changes it.
    change: PyRef,
}

impl Use {
    fn apply(&self, py: Python<'_>) -> PyResult<()> {
        let current = self.current.bind(py).call1((self.device.bind(py),))?;
        let own = self.own.bind(py);
        if !current.is(own) && !current.eq(own)? {
            self.change.bind(py).call0()?;
        }
        Ok(())
    }
}

/// Those of one stream, of the libraries that were there then.
type Uses = (usize, Rc<[Use]>);

thread_local! {
    /// The body on devices that runs on this thread.
    static RUNNING: RefCell<Option<Frame>> = const { RefCell::new(None) };
    /// The devices on which libraries have streams of tasks here.
    static LEFT: RefCell<SmallVec<[u16; 8]>> = RefCell::default();
    static OURS: Cell<bool> = const { Cell::new(false) };
    /// The device that was made current here last by a body that needs no library.
    static OCCUPIED: Cell<usize> = const { Cell::new(usize::MAX) };
    /// By the stream's handle and its device's index: the driver may give a handle again, for any device.
    static USES: RefCell<HashMap<(usize, u16), Uses>> = RefCell::default();
}

/// How many modules there were when the libraries were looked for last, and which were there.
static MODULES: AtomicUsize = AtomicUsize::new(0);
static PRESENT: AtomicUsize = AtomicUsize::new(0);

/// This thread is one of the runtime's.
pub fn is_ours() {
    OURS.set(true);
}

/// Which libraries are imported, as bits.
pub fn present(py: Python<'_>) -> PyResult<usize> {
    // SAFETY: attached; the result is borrowed and alive as long as the interpreter.
    let modules = unsafe { ffi::PyDict_Size(ffi::PyImport_GetModuleDict()) };
    let modules = usize::try_from(modules).unwrap_or(0);
    if MODULES.load(Ordering::Relaxed) != modules {
        let (found, ready): (usize, bool) =
            support(py).cuda.bind(py).call1(("libraries",))?.extract()?;
        PRESENT.store(found, Ordering::Relaxed);
        if ready {
            MODULES.store(modules, Ordering::Relaxed);
        }
    }
    Ok(PRESENT.load(Ordering::Relaxed))
}

/// Makes a device current for all libraries, and its stream for those that are there.
fn make_current(
    py: Python<'_>,
    machine: &Machine,
    present: usize,
    lent: (DeviceId, Stream),
) -> PyResult<()> {
    let device = machine.device(lent.0);
    OCCUPIED.set(usize::MAX);
    device.make_current().map_err(|error| raise(py, &error))?;
    if present == 0 {
        return Ok(());
    }
    let Some(handle) = device.handle(lent.1) else {
        return Ok(());
    };
    let key = (handle, lent.0.index());
    let known = USES.with_borrow(|uses| {
        let (of, uses) = uses.get(&key)?;
        (*of == present).then(|| Rc::clone(uses))
    });
    let uses = match known {
        Some(uses) => uses,
        None => {
            let made: Vec<[Bound<'_, PyAny>; 4]> = support(py)
                .cuda
                .bind(py)
                .call1(("uses", handle, lent.0.index(), present))?
                .extract()?;
            let made = made.into_iter().map(|parts| {
                let [current, device, own, change] = parts.map(PyRef::from);
                Use {
                    current,
                    device,
                    own,
                    change,
                }
            });
            let made: Rc<[Use]> = made.collect();
            let news = (present, Rc::clone(&made));
            let old = USES.with_borrow_mut(|uses| uses.insert(key, news));
            drop(old);
            made
        }
    };
    for one in &*uses {
        one.apply(py)?;
    }
    LEFT.with_borrow_mut(|left| {
        if !left.contains(&lent.0.index()) {
            left.push(lent.0.index());
        }
    });
    Ok(())
}

fn apply(py: Python<'_>, machine: &Machine, frame: &Frame) -> PyResult<()> {
    let present = present(py)?;
    if pool::is_shared() {
        tell_pool(machine, frame);
    }
    // The current one last.
    let others = frame
        .lent
        .iter()
        .enumerate()
        .filter(|(at, _)| *at != frame.at);
    for (_, lent) in others {
        make_current(py, machine, present, *lent)?;
    }
    make_current(py, machine, present, frame.lent[frame.at])
}

/// Which streams are one body's: what libraries allocate on one of them may be used on the others.
#[cold]
fn tell_pool(machine: &Machine, frame: &Frame) {
    let handle = |(device, stream): &(DeviceId, Stream)| {
        Some((device.index(), machine.device(*device).handle(*stream)?))
    };
    let streams: SmallVec<[_; 2]> = frame.lent.iter().filter_map(handle).collect();
    match streams[..] {
        [(_, alone)] => pool::alone(alone),
        _ => pool::together(&streams),
    }
}

/// What was current before a body.
pub struct Entered {
    /// The body below this one on the stack, and the machine. Of a body on no other one nothing is kept
    /// that threads share: while it begins and ends, all others wait for the interpreter.
    outer: Option<(Frame, Arc<Machine>)>,
    place: Option<(u64, usize)>,
    /// Puts a thread back that is not ours.
    restore: Option<PyRef>,
    /// Devices with nothing on their default streams, where the runtime checks.
    idle: SmallVec<[DeviceId; 2]>,
}

/// The body of a task is about to run here; `None` where the machine's devices have no driver.
#[inline]
pub fn enter(py: Python<'_>, running: &Running<'_, Interp>) -> PyResult<Option<Entered>> {
    if running.engine.domain().gpus.is_empty() {
        return Ok(None);
    }
    enter_driver(py, running).map(Some)
}

fn enter_driver(py: Python<'_>, running: &Running<'_, Interp>) -> PyResult<Entered> {
    let engine = running.engine;
    let machine = engine.machine().expect("its devices have a driver");
    let lent = running.lent();
    let outer = RUNNING.take();
    let mut entered = Entered {
        outer: outer.map(|frame| (frame, Arc::clone(machine))),
        place: CURRENT_DEVICE.get(),
        restore: None,
        idle: SmallVec::new(),
    };
    if lent.is_empty() {
        let left = LEFT.take();
        OCCUPIED.set(usize::MAX);
        if !left.is_empty() {
            support(py).cuda.bind(py).call1(("reset", left.to_vec()))?;
        }
        return Ok(entered);
    }
    if entered.outer.is_none() && !OURS.get() && present(py)? != 0 {
        let devices: Vec<u16> = lent.iter().map(|(device, _)| device.index()).collect();
        let restore = support(py).cuda.bind(py).call1(("restorer", devices))?;
        entered.restore = Some(restore.into());
    }
    let frame = Frame { lent, at: 0 };
    let applied = apply(py, machine, &frame);
    if engine.domain().checks {
        let devices = frame.lent.iter().map(|(device, _)| *device);
        entered.idle = devices
            .filter(|id| is_idle(engine, *id) == Some(true))
            .collect();
    }
    RUNNING.set(Some(frame));
    if let Err(error) = applied {
        entered.leave(py);
        return Err(error);
    }
    Ok(entered)
}

/// Whether the default stream of a device has nothing on it, if that can be said.
fn is_idle(engine: &Core, device: DeviceId) -> Option<bool> {
    let gpu = engine.domain().gpus.get(usize::from(device.index()))?;
    gpu.default_stream_is_idle().ok()
}

impl Entered {
    /// Warns of what the body left on default streams; the exception, if warnings are such.
    pub fn warn(&self, py: Python<'_>, engine: &Core, task: &Task) -> PyResult<()> {
        for device in &self.idle {
            if is_idle(engine, *device) == Some(false) {
                let warn = support(py).cuda.bind(py);
                let label = task.label().to_string();
                warn.call1(("warn_of_default_stream", label, device.to_string()))?;
            }
        }
        Ok(())
    }

    /// The body ended.
    pub fn leave(self, py: Python<'_>) {
        CURRENT_DEVICE.set(self.place);
        if let Some((frame, machine)) = &self.outer {
            report(py, apply(py, machine, frame));
        }
        RUNNING.set(self.outer.map(|(frame, _)| frame));
        if let Some(restore) = &self.restore {
            report(py, restore.bind(py).call0());
            LEFT.take();
        }
    }
}

/// The body that runs here made this device of its set current.
pub fn switch(py: Python<'_>, machine: &Machine, device: DeviceId) -> PyResult<()> {
    let lent = RUNNING.with_borrow_mut(|running| {
        let frame = running.as_mut()?;
        frame.at = frame.lent.iter().position(|(id, _)| *id == device)?;
        Some(frame.lent[frame.at])
    });
    match lent {
        Some(lent) => make_current(py, machine, present(py)?, lent),
        None => Ok(()),
    }
}

/// A body that needs no library is about to use a device on this thread. On a thread of the runtime it stays
/// current, so that the calls that follow need not change it back and forth.
pub fn occupy(gpu: &CudaGpu) {
    if !OURS.get() || OCCUPIED.get() == gpu.ordinal() {
        return;
    }
    // Who uses the device hears of an error.
    if gpu.make_current().is_ok() {
        OCCUPIED.set(gpu.ordinal());
        let device = gpu.info().id.index();
        LEFT.with_borrow_mut(|left| {
            if !left.contains(&device) {
                left.push(device);
            }
        });
    }
}

/// The device that is current in the body that runs here, and the task's stream on it.
pub fn current() -> Option<(DeviceId, Stream)> {
    RUNNING.with_borrow(|running| running.as_ref().map(|frame| frame.lent[frame.at]))
}

/// A library was imported in the body that runs here.
pub fn refresh(py: Python<'_>, machine: &Machine) -> PyResult<()> {
    let frame = RUNNING.with_borrow(Clone::clone);
    match frame {
        Some(frame) => apply(py, machine, &frame),
        None => Ok(()),
    }
}
