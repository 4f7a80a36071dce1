//! A machine as plain data: its host, its accelerators, and what lies between their memories.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use super::device::{DeviceId, HOST};

/// How many accelerators a description may have; numbers of devices have 16 bits.
pub const MAX_GPUS: usize = 65_534;

/// The host: its cores over its one memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Cores.
    pub cores: usize,
    /// Memory in bytes; without, it is not bounded by the description.
    pub memory: Option<u64>,
}

/// An accelerator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// What its maker calls it.
    pub name: String,
    /// Its memory in bytes.
    pub memory: u64,
}

/// What bytes go through on their way from one memory to another, in one direction. It carries one
/// copy at a time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Bytes per second; may be infinite.
    pub bandwidth: f64,
    /// What each copy takes beyond its bytes.
    pub latency: Duration,
}

impl Link {
    /// How long so many bytes take, alone on the link.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "far below what a clock tells")]
    pub fn time(&self, bytes: u64) -> Duration {
        let seconds = bytes as f64 / self.bandwidth;
        Duration::try_from_secs_f64(seconds)
            .unwrap_or(Duration::MAX)
            .saturating_add(self.latency)
    }
}

/// The links of a machine: by default, and pairs that differ.
#[derive(Clone, Debug, PartialEq)]
pub struct Links {
    /// Between the host and each accelerator, in each direction.
    pub host: Link,
    /// Between any two accelerators, in each direction; without, none reaches another.
    pub peer: Option<Link>,
    /// Within the memory of one accelerator.
    pub local: Link,
    /// Pairs that differ, each for one direction: from, to, and the link.
    pub pairs: Vec<(DeviceId, DeviceId, Link)>,
}

impl Default for Links {
    /// Those of an ordinary server: the host over PCIe 4, accelerators over NVLink, memory of a
    /// terabyte a second.
    fn default() -> Self {
        let link = |gigabytes: f64, latency| Link {
            bandwidth: gigabytes * 1e9,
            latency: Duration::from_micros(latency),
        };
        Self {
            host: link(24.0, 8),
            peer: Some(link(200.0, 3)),
            local: link(1000.0, 1),
            pairs: Vec::new(),
        }
    }
}

/// How time goes by on a virtual machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Time {
    /// As on the wall: what takes a while takes it.
    #[default]
    Real,
    /// On a discrete-event clock that moves when it is told to.
    Virtual,
}

/// Why a description is none of a machine.
#[derive(Clone, Debug, PartialEq)]
pub enum DescriptionError {
    /// The host has no core.
    NoCores,
    /// The device has no memory.
    NoMemory(DeviceId),
    /// More than [`MAX_GPUS`] accelerators: how many.
    TooManyGpus(usize),
    /// The bandwidth from one to the other is negative, zero or not a number: in bytes a second.
    BadBandwidth(DeviceId, DeviceId, f64),
    /// A link of a device that the machine does not have.
    UnknownDevice(DeviceId),
    /// A link from the host to itself, which does not need one.
    HostToHost,
    /// Two links from one to the other.
    DuplicateLink(DeviceId, DeviceId),
}

impl fmt::Display for DescriptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCores => f.write_str("the host has no core"),
            Self::NoMemory(device) => write!(f, "{device} has no memory"),
            Self::TooManyGpus(gpus) => {
                write!(f, "{gpus} GPUs are more than {MAX_GPUS}")
            }
            Self::BadBandwidth(from, to, bandwidth) => write!(
                f,
                "the bandwidth from {from} to {to} is not above zero: {bandwidth} bytes/s"
            ),
            Self::UnknownDevice(device) => {
                write!(f, "a link names {device}, which the machine does not have")
            }
            Self::HostToHost => f.write_str("a link from the host to itself"),
            Self::DuplicateLink(from, to) => write!(f, "two links from {from} to {to}"),
        }
    }
}

impl std::error::Error for DescriptionError {}

/// A machine that could be: checked, and then only read.
#[derive(Clone, Debug, PartialEq)]
pub struct Description {
    host: Host,
    gpus: Vec<Gpu>,
    links: Links,
    /// `links.pairs`, to be found.
    pairs: HashMap<(DeviceId, DeviceId), Link>,
    time: Time,
}

impl Description {
    /// Checks what is given.
    ///
    /// # Errors
    /// What is wrong with it, the first thing found.
    pub fn new(
        host: Host,
        gpus: Vec<Gpu>,
        links: Links,
        time: Time,
    ) -> Result<Self, DescriptionError> {
        if host.cores == 0 {
            return Err(DescriptionError::NoCores);
        }
        if host.memory == Some(0) {
            return Err(DescriptionError::NoMemory(HOST));
        }
        if gpus.len() > MAX_GPUS {
            return Err(DescriptionError::TooManyGpus(gpus.len()));
        }
        let ids = (0..).map(DeviceId::gpu);
        if let Some((id, _)) = ids.zip(&gpus).find(|(_, gpu)| gpu.memory == 0) {
            return Err(DescriptionError::NoMemory(id));
        }
        let check = |from, to, link: &Link| {
            if link.bandwidth > 0.0 {
                Ok(())
            } else {
                Err(DescriptionError::BadBandwidth(from, to, link.bandwidth))
            }
        };
        let first = DeviceId::gpu(0);
        check(HOST, first, &links.host)?;
        check(first, first, &links.local)?;
        if let Some(peer) = &links.peer {
            check(first, DeviceId::gpu(1), peer)?;
        }
        let mut pairs = HashMap::new();
        for &(from, to, link) in &links.pairs {
            for device in [from, to] {
                if usize::from(device.0) > gpus.len() {
                    return Err(DescriptionError::UnknownDevice(device));
                }
            }
            if (from, to) == (HOST, HOST) {
                return Err(DescriptionError::HostToHost);
            }
            check(from, to, &link)?;
            if pairs.insert((from, to), link).is_some() {
                return Err(DescriptionError::DuplicateLink(from, to));
            }
        }
        Ok(Self {
            host,
            gpus,
            links,
            pairs,
            time,
        })
    }

    /// A host and equal accelerators with so many bytes each, over the default links.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn uniform(
        cores: usize,
        gpus: usize,
        memory: u64,
        time: Time,
    ) -> Result<Self, DescriptionError> {
        let host = Host {
            cores,
            memory: None,
        };
        if gpus > MAX_GPUS {
            return Err(DescriptionError::TooManyGpus(gpus));
        }
        let gpu = Gpu {
            name: "virtual GPU".into(),
            memory,
        };
        Self::new(host, vec![gpu; gpus], Links::default(), time)
    }

    /// The host.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The accelerators, in the order of their numbers.
    #[must_use]
    pub fn gpus(&self) -> &[Gpu] {
        &self.gpus
    }

    /// How time goes by.
    #[must_use]
    pub fn time(&self) -> Time {
        self.time
    }

    /// What bytes go through from one memory to the other: `None` if nothing links them, or one of
    /// the two is not of the machine, or both are the host.
    #[must_use]
    pub fn link(&self, from: DeviceId, to: DeviceId) -> Option<&Link> {
        if usize::from(from.0.max(to.0)) > self.gpus.len() || (from, to) == (HOST, HOST) {
            return None;
        }
        let pair = self.pairs.get(&(from, to));
        pair.or(if from == to {
            Some(&self.links.local)
        } else if from == HOST || to == HOST {
            Some(&self.links.host)
        } else {
            self.links.peer.as_ref()
        })
    }

    /// How long so many bytes take from one memory to the other, alone on the link: `None` if
    /// nothing links them, no time within the host.
    #[must_use]
    pub fn transfer_time(&self, from: DeviceId, to: DeviceId, bytes: u64) -> Option<Duration> {
        if (from, to) == (HOST, HOST) {
            return Some(Duration::ZERO);
        }
        self.link(from, to).map(|link| link.time(bytes))
    }

    /// Who of the holders gives so many bytes to `to` in the shortest time; of equals the first.
    /// `None` if none is linked to it.
    #[must_use]
    pub fn nearest(
        &self,
        to: DeviceId,
        holders: impl IntoIterator<Item = DeviceId>,
        bytes: u64,
    ) -> Option<DeviceId> {
        holders
            .into_iter()
            .filter_map(|from| {
                // A holder needs no copy, whatever its memory's own speed.
                let time = if from == to {
                    Duration::ZERO
                } else {
                    self.transfer_time(from, to, bytes)?
                };
                Some((time, from))
            })
            .min_by_key(|&(time, _)| time)
            .map(|(_, from)| from)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn links() -> Links {
        let link = |bandwidth, latency| Link {
            bandwidth,
            latency: Duration::from_micros(latency),
        };
        Links {
            host: link(1e9, 10),
            peer: Some(link(4e9, 2)),
            local: link(1e12, 0),
            pairs: vec![(DeviceId::gpu(1), DeviceId::gpu(0), link(8e9, 1))],
        }
    }

    fn describe(
        change: impl FnOnce(&mut Host, &mut Vec<Gpu>, &mut Links),
    ) -> Result<Description, DescriptionError> {
        let mut host = Host {
            cores: 4,
            memory: None,
        };
        let gpu = Gpu {
            name: "gpu".into(),
            memory: 1 << 30,
        };
        let (mut gpus, mut links) = (vec![gpu; 3], links());
        change(&mut host, &mut gpus, &mut links);
        Description::new(host, gpus, links, Time::Real)
    }

    #[test]
    fn what_is_no_machine_is_named() {
        type Change = fn(&mut Host, &mut Vec<Gpu>, &mut Links);
        let gpu = DeviceId::gpu;
        let cases: Vec<(Change, DescriptionError)> = vec![
            (|host, _, _| host.cores = 0, DescriptionError::NoCores),
            (
                |host, _, _| host.memory = Some(0),
                DescriptionError::NoMemory(HOST),
            ),
            (
                |_, gpus, _| gpus[2].memory = 0,
                DescriptionError::NoMemory(gpu(2)),
            ),
            (
                |_, gpus, _| gpus.resize(65_535, gpus[0].clone()),
                DescriptionError::TooManyGpus(65_535),
            ),
            (
                |_, _, links| links.host.bandwidth = 0.0,
                DescriptionError::BadBandwidth(HOST, gpu(0), 0.0),
            ),
            (
                |_, _, links| links.peer.as_mut().unwrap().bandwidth = -1.0,
                DescriptionError::BadBandwidth(gpu(0), gpu(1), -1.0),
            ),
            (
                |_, _, links| links.local.bandwidth = -2.0,
                DescriptionError::BadBandwidth(gpu(0), gpu(0), -2.0),
            ),
            (
                |_, _, links| links.pairs[0].2.bandwidth = -3.0,
                DescriptionError::BadBandwidth(gpu(1), gpu(0), -3.0),
            ),
            (
                |_, gpus, _| gpus.truncate(1),
                DescriptionError::UnknownDevice(gpu(1)),
            ),
            (
                |_, _, links| links.pairs[0].0 = HOST,
                DescriptionError::DuplicateLink(HOST, gpu(0)),
            ),
            (
                |_, _, links| (links.pairs[0].0, links.pairs[0].1) = (HOST, HOST),
                DescriptionError::HostToHost,
            ),
        ];
        for (change, error) in cases {
            let result = describe(|host, gpus, links| {
                links.pairs.push((HOST, gpu(0), links.host));
                change(host, gpus, links);
            });
            assert_eq!(result.unwrap_err(), error);
        }
        let nan = describe(|_, _, links| links.host.bandwidth = f64::NAN);
        assert!(matches!(
            nan.unwrap_err(),
            DescriptionError::BadBandwidth(..)
        ));
        assert!(describe(|_, gpus, _| gpus.resize(65_534, gpus[0].clone())).is_ok());
        assert_eq!(
            Description::uniform(1, usize::MAX, 1, Time::Real),
            Err(DescriptionError::TooManyGpus(usize::MAX))
        );
    }

    #[test]
    fn a_transfer_takes_what_its_link_takes() {
        let machine = describe(|_, _, _| {}).unwrap();
        let time = |from, to| machine.transfer_time(from, to, 8_000);
        let micros = |micros| Some(Duration::from_micros(micros));
        let gpu = DeviceId::gpu;
        assert_eq!(time(HOST, gpu(0)), micros(18));
        assert_eq!(time(gpu(2), HOST), micros(18));
        assert_eq!(time(gpu(0), gpu(1)), micros(4));
        assert_eq!(time(gpu(1), gpu(0)), micros(2));
        assert_eq!(time(gpu(0), gpu(0)), Some(Duration::from_nanos(8)));
        assert_eq!(time(HOST, HOST), micros(0));
        assert_eq!(time(HOST, gpu(3)), None);
    }

    #[test]
    fn the_nearest_holder_is_who_gives_soonest() {
        let machine = describe(|_, _, _| {}).unwrap();
        let gpu = DeviceId::gpu;
        let nearest =
            |to, holders: &[DeviceId]| machine.nearest(to, holders.iter().copied(), 8_000);
        assert_eq!(nearest(gpu(0), &[HOST, gpu(2), gpu(1)]), Some(gpu(1)));
        assert_eq!(nearest(gpu(0), &[gpu(1), gpu(0)]), Some(gpu(0)));
        assert_eq!(nearest(gpu(2), &[gpu(1), gpu(0)]), Some(gpu(1)));
        assert_eq!(nearest(gpu(0), &[]), None);
        let apart = describe(|_, _, links| links.peer = None).unwrap();
        assert_eq!(apart.transfer_time(gpu(0), gpu(2), 1), None);
        assert_eq!(apart.nearest(gpu(2), [gpu(0), gpu(1)], 1), None);
        assert_eq!(apart.nearest(gpu(2), [gpu(0), HOST], 1), Some(HOST));
    }
}
