//! The arrays that a body gets on the devices where it runs.
//!
//! # What a body gets
//!
//! A task that may run on devices has slots among its arguments ([`crate::access::Slot`]). When its body
//! begins it is known where it runs, and the core has the data there: for each member of the set, and each
//! access, a [`View`]: an address, and the way from one index of the array to the next. Of that an array is
//! made, of the library that computes on the device: a `charioteer.virtual.ndarray` on a virtual GPU, on one
//! of a driver what [`Library`] says. A core's is the NumPy view of the host's buffer, as ever.
//!
//! A body that was declared for a set gets a tuple for a region, one array a member in the set's order, each
//! of the whole region or of its shard; every other body gets the array itself. Whether it was is said by
//! [`Gathers`].
//!
//! # What is kept
//!
//! To make an array costs more than a task. So a region keeps the last ones, and finds them by where they
//! are: the engine, the address, the strides and the shard. A chain of tasks over one region makes one array.
//! What a body keeps of it beyond its task names memory that is somebody else's by then. On virtual devices
//! a runtime that checks finds that: it gives each body arrays of its own, and takes them back when the body
//! ends.
//!
//! # Reductions
//!
//! A task that may run on a device has a partial of its own, a managed array that nobody else knows: it is
//! filled with the identity where the body runs, before that begins. So the core moves, counts and evicts it
//! like all data. For a set it has a row a member.

use std::sync::Arc;

use charioteer::engine::{Place, Running};
use charioteer::machine::{DeviceId, Machine};
use charioteer::mapping::Choices;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyEllipsis, PyString, PyTuple};
use smallvec::SmallVec;

use crate::access::{Mode, Shards, Slot};
use crate::data::{Piece, Region};
use crate::devices::Memory;
use crate::gateway::PyRef;
use crate::interp::Interp;
use crate::libraries;
use crate::placement::SET;
use crate::reduce::OPERATIONS;
use crate::runtime::CURRENT_DEVICE;
use crate::support::{error, support};

pub use charioteer::data::Spread;
use charioteer::data::Views;
use charioteer::data::store::View;

/// Whose arrays a body gets on the devices of a driver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Library {
    CuPy,
    Torch,
    /// Nobody's: they have the protocols of other libraries, and compute nothing.
    Plain,
}

impl Library {
    /// `ValueError` or `TypeError` if there is none such.
    pub fn read(said: &Bound<'_, PyAny>) -> PyResult<Self> {
        let Ok(name) = said.cast::<PyString>() else {
            return Err(PyTypeError::new_err(format!(
                "array_library is a name, not {}",
                said.get_type().name()?
            )));
        };
        match &*name.to_string_lossy() {
            "cupy" => Ok(Self::CuPy),
            "torch" => Ok(Self::Torch),
            "none" => Ok(Self::Plain),
            other => Err(PyValueError::new_err(format!(
                "array_library is \"cupy\", \"torch\" or \"none\", not {other:?}"
            ))),
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::CuPy => "cupy",
            Self::Torch => "torch",
            Self::Plain => "none",
        }
    }
}

/// Whether the body is for a set, and gets tuples.
#[derive(Clone)]
pub enum Gathers {
    Always(bool),
    /// As the choice says that the task was mapped to.
    Chosen(Arc<Choices>),
}

/// What is known at the spawn of a task that may run on devices.
#[derive(Clone)]
pub struct Deferral {
    /// How many members its largest set has.
    pub width: usize,
    pub shards: Option<Arc<Shards>>,
    pub gathers: Gathers,
    pub library: Option<Library>,
}

/// Where a body runs, and what it has there.
pub struct Placed {
    places: SmallVec<[Place; 2]>,
    /// For each member, of each access; `None` if nothing of the task's data is on devices.
    views: Option<Views>,
    gathers: bool,
    /// What marks arrays that are taken back when the body ends.
    loan: Option<PyRef>,
    library: Option<Library>,
}

impl Placed {
    /// Of the task that runs; `gathers` if the body was chosen by its devices.
    pub fn of(
        py: Python<'_>,
        running: &Running<'_, Interp>,
        deferral: &Deferral,
        gathers: Option<bool>,
    ) -> PyResult<Self> {
        let engine = running.engine;
        let places = engine.held_by(running.task, &running.grant());
        let views = engine.views_of(running.task);
        let on_devices = places
            .iter()
            .any(|place| matches!(place, Place::Device(..)));
        if on_devices
            && views
                .as_ref()
                .is_some_and(|views| views.len() != places.len())
        {
            // One of them was lost, and left the set.
            return Err(error(
                py,
                "DeviceLostError",
                (
                    running.task.label().to_string(),
                    "a device of its set is lost",
                ),
            ));
        }
        let gathers = gathers.unwrap_or_else(|| match &deferral.gathers {
            Gathers::Always(gathers) => *gathers,
            Gathers::Chosen(choices) => {
                // One that was not mapped has but one choice.
                let choice = running.choice().unwrap_or(0);
                choices.list()[choice].variant & SET != 0
            }
        });
        let virtual_devices = engine
            .machine()
            .is_some_and(|machine| machine.as_virtual().is_some());
        let loan = if on_devices && virtual_devices && engine.domain().checks {
            let label = running.task.label().to_string();
            let made = support(py).data.bind(py).call1(("loan", label))?;
            Some(made.into())
        } else {
            None
        };
        Ok(Self {
            gathers: gathers && on_devices,
            places,
            views,
            loan,
            library: deferral.library,
        })
    }

    pub fn is_on_devices(&self) -> bool {
        self.places
            .iter()
            .any(|place| matches!(place, Place::Device(..)))
    }

    /// What the body gets for a slot.
    pub fn fill<'py>(
        &self,
        py: Python<'py>,
        running: &Running<'_, Interp>,
        slot: &Slot,
    ) -> PyResult<Bound<'py, PyAny>> {
        let engine = running.engine;
        let (region, writes) = match slot.partial() {
            Some((_, own)) => (own.bind(py), true),
            None => (slot.region().bind(py), slot.mode() != Mode::In),
        };
        if !self.is_on_devices() {
            let array = self.member(py, running, region, slot, 0, 1, writes)?;
            return self.begin(py, running, slot, 0, array);
        }
        let count = self.places.len();
        if !self.gathers {
            let array = self.member(py, running, region, slot, 0, count, writes)?;
            return self.begin(py, running, slot, 0, array);
        }
        let arrays = (0..count)
            .map(|at| {
                let array = self.member(py, running, region, slot, at, count, writes)?;
                self.begin(py, running, slot, at, array)
            })
            .collect::<PyResult<Vec<_>>>()?;
        if slot.partial().is_some() && count > 1 {
            self.switch(py, running, 0)?;
            CURRENT_DEVICE.set(None);
        }
        let _ = engine;
        Ok(PyTuple::new(py, arrays)?.into_any())
    }

    /// The array of one member.
    #[expect(clippy::too_many_arguments, reason = "what one array depends on")]
    fn member<'py>(
        &self,
        py: Python<'py>,
        running: &Running<'_, Interp>,
        region: &Bound<'py, Region>,
        slot: &Slot,
        at: usize,
        count: usize,
        writes: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let piece = match slot.spread() {
            Spread::Shard(axis) if count > 1 => Some(region.get().piece(axis, at, count)),
            _ => None,
        };
        self.array(py, running, region, piece, slot.access(), at, writes)
    }

    /// The array of a part of a region on one member; `access` is the one that it lies in.
    #[expect(clippy::too_many_arguments, reason = "what one array depends on")]
    pub fn array<'py>(
        &self,
        py: Python<'py>,
        running: &Running<'_, Interp>,
        region: &Bound<'py, Region>,
        piece: Option<Piece>,
        access: usize,
        at: usize,
        writes: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let device = match self.places.get(at) {
            Some(Place::Device(device, _)) => *device,
            _ => return region.get().host_view(py, piece, writes),
        };
        let machine = running.engine.machine().expect("it has devices");
        let views = self.views.as_ref().map(|views| &views[at]);
        let view = views.and_then(|views| views.get(access)?.as_deref());
        let wanted = Wanted {
            engine: charioteer::engine::Engine::<Interp>::id(running.engine),
            machine,
            device,
            view,
            piece,
            writes,
            library: self.library,
        };
        region.get().array_on(py, &wanted, self.loan.as_ref())
    }

    /// Makes the array of a reduction ready: nothing of any other.
    fn begin<'py>(
        &self,
        py: Python<'py>,
        running: &Running<'_, Interp>,
        slot: &Slot,
        at: usize,
        array: Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        if slot.partial().is_none() {
            return Ok(array);
        }
        if self.places.len() > 1 && self.is_on_devices() {
            self.switch(py, running, at)?;
        }
        let operation = slot.operation().expect("only reductions have partials");
        let dtype = slot.region().bind(py).get().dtype(py)?;
        let name = OPERATIONS[operation as usize];
        let data = support(py).data.bind(py);
        let identity = data.call1(("identity", name, dtype))?;
        array.set_item(PyEllipsis::get(py), identity)?;
        match slot.spread() {
            // Of numbers alone NumPy would give a copy.
            Spread::Shard(_) => array.get_item((0_usize, PyEllipsis::get(py))),
            _ => Ok(array),
        }
    }

    /// Makes a member current.
    fn switch(&self, py: Python<'_>, running: &Running<'_, Interp>, at: usize) -> PyResult<()> {
        CURRENT_DEVICE.set(Some((running.task.id(), at)));
        if let Some(Place::Device(device, _)) = self.places.get(at)
            && let Some(machine) = running.engine.machine()
            && machine.as_virtual().is_none()
        {
            libraries::switch(py, machine, *device)?;
        }
        Ok(())
    }

    /// The body ended: arrays that it was lent are no good any more.
    pub fn end(self, py: Python<'_>) -> PyResult<()> {
        if let Some(loan) = self.loan {
            loan.bind(py).setattr(pyo3::intern!(py, "ended"), true)?;
        }
        Ok(())
    }
}

/// What an array is to be of.
pub struct Wanted<'a> {
    pub engine: u32,
    pub machine: &'a Arc<Machine>,
    pub device: DeviceId,
    /// `None` of a region without elements.
    pub view: Option<&'a View>,
    pub piece: Option<Piece>,
    pub writes: bool,
    pub library: Option<Library>,
}

/// Where the elements of an array are.
pub struct Layout {
    pub shape: SmallVec<[usize; 4]>,
    /// In bytes.
    pub strides: SmallVec<[isize; 4]>,
    /// The first byte that it reaches.
    pub address: u64,
    /// The bytes from there on that it reaches.
    pub size: u64,
    /// Where its first element is, behind the first byte.
    pub offset: u64,
}

impl Wanted<'_> {
    /// Makes the array.
    pub fn make<'py>(
        &self,
        py: Python<'py>,
        layout: &Layout,
        dtype: &Bound<'py, PyAny>,
        loan: Option<&PyRef>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let shape = PyTuple::new(py, &layout.shape)?;
        let strides = PyTuple::new(py, &layout.strides)?;
        let loan = loan.map(|loan| loan.bind(py));
        if let Some(devices) = self.machine.as_virtual() {
            let memory = Memory::at(devices.gpu(self.device), layout.address, layout.size);
            let memory = Bound::new(py, memory)?;
            let all = (
                memory,
                shape,
                dtype,
                strides,
                layout.offset,
                self.writes,
                loan,
            );
            return support(py).virtual_array.bind(py).call1(all);
        }
        let library = self.library.map(Library::name);
        let index = self.device.index();
        let memory = (layout.address, layout.size, layout.offset);
        let all = (
            "managed",
            library,
            index,
            memory,
            shape,
            dtype,
            strides,
            self.writes,
        );
        let before = libraries::present(py)?;
        let made = support(py).cuda.bind(py).call1(all)?;
        if libraries::present(py)? != before {
            // It came just now, with a current stream that is not the task's.
            libraries::refresh(py, self.machine)?;
        }
        Ok(made)
    }
}
