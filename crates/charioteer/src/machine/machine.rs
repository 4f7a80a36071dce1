//! The devices of one machine, shared by all who use them.

use std::fmt;
use std::sync::Arc;

use super::description::{Description, Host, Links, Time};
use super::device::{Device, DeviceId, HOST, Kind};
use super::observer::{Observer, Observers};
use super::virtual_gpu::{Clock, VirtualGpu, build};

/// A machine: what it is, and its devices. When it is dropped its devices are lost.
pub struct Machine {
    description: Description,
    /// The accelerators, in the order of their numbers.
    devices: Vec<Arc<dyn Device>>,
    virtual_machine: Option<VirtualMachine>,
    /// Of devices that are not virtual.
    observers: Arc<Observers>,
}

/// What only a virtual machine has.
pub struct VirtualMachine {
    gpus: Vec<Arc<VirtualGpu>>,
    clock: Clock,
}

impl Machine {
    /// The host alone.
    ///
    /// # Panics
    /// If there is no core.
    #[must_use]
    pub fn host_only(cores: usize) -> Arc<Self> {
        let host = Host {
            cores,
            memory: None,
        };
        let description = Description::new(host, Vec::new(), Links::default(), Time::Real)
            .expect("a host has a core");
        Arc::new(Self {
            description,
            devices: Vec::new(),
            virtual_machine: None,
            observers: Arc::default(),
        })
    }

    /// A machine with these accelerators, which a driver has: as many as the description says, in the
    /// order of their numbers. `observers` is whom they tell what they see.
    ///
    /// # Panics
    /// If they are more or fewer.
    #[must_use]
    pub fn with_devices(
        description: Description,
        devices: Vec<Arc<dyn Device>>,
        observers: Arc<Observers>,
    ) -> Arc<Self> {
        assert_eq!(devices.len(), description.gpus().len());
        Arc::new(Self {
            description,
            devices,
            virtual_machine: None,
            observers,
        })
    }

    /// A machine whose accelerators are virtual: see [`virtual_gpu`](super::virtual_gpu). It is the
    /// description that says whether time is real.
    #[must_use]
    pub fn virtual_machine(description: Description) -> Arc<Self> {
        let (gpus, clock) = build(&description);
        let devices = gpus
            .iter()
            .map(|gpu| Arc::clone(gpu) as Arc<dyn Device>)
            .collect();
        Arc::new(Self {
            description,
            devices,
            virtual_machine: Some(VirtualMachine { gpus, clock }),
            observers: Arc::default(),
        })
    }

    /// What it is.
    #[must_use]
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// How many accelerators it has.
    #[must_use]
    pub fn gpus(&self) -> usize {
        self.devices.len()
    }

    /// Whether it has the device.
    #[must_use]
    pub fn has(&self, device: DeviceId) -> bool {
        device == HOST || usize::from(device.index()) < self.devices.len()
    }

    /// An accelerator.
    ///
    /// # Panics
    /// If it is the host, which has no streams, or not of this machine.
    #[must_use]
    #[inline]
    pub fn device(&self, device: DeviceId) -> &Arc<dyn Device> {
        assert_eq!(device.kind(), Kind::Gpu, "the host has no streams");
        &self.devices[usize::from(device.index())]
    }

    /// Tells `observer` from now on what the devices are asked for and what they see.
    pub fn add_observer(&self, observer: Arc<dyn Observer>) {
        self.observers().add(observer);
    }

    fn observers(&self) -> &Observers {
        match &self.virtual_machine {
            Some(devices) => devices.clock.observers(),
            None => &self.observers,
        }
    }

    /// Tells `observer` nothing any more. When this returns, no call of it is under way.
    pub fn remove_observer(&self, observer: &Arc<dyn Observer>) {
        self.observers().remove(observer);
    }

    /// Ends its devices now, whoever still knows of them: they are lost. The machine's end does the
    /// same.
    pub fn close(&self) {
        match &self.virtual_machine {
            // They have one end.
            Some(devices) => devices.clock.close(),
            None => self.devices.iter().for_each(|device| device.close()),
        }
    }

    /// The virtual devices and their clock, if they are virtual.
    #[must_use]
    pub fn as_virtual(&self) -> Option<&VirtualMachine> {
        self.virtual_machine.as_ref()
    }
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine")
            .field("description", &self.description)
            .field("virtual", &self.virtual_machine.is_some())
            .finish_non_exhaustive()
    }
}

impl VirtualMachine {
    /// The accelerators, in the order of their numbers.
    #[must_use]
    pub fn gpus(&self) -> &[Arc<VirtualGpu>] {
        &self.gpus
    }

    /// An accelerator.
    ///
    /// # Panics
    /// If it is the host or not of this machine.
    #[must_use]
    pub fn gpu(&self, device: DeviceId) -> &Arc<VirtualGpu> {
        assert_eq!(device.kind(), Kind::Gpu, "the host is not virtual");
        &self.gpus[usize::from(device.index())]
    }

    /// Its clock.
    #[must_use]
    pub fn clock(&self) -> &Clock {
        &self.clock
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.close();
    }
}
