//! Tasks over 1, 2, 4 or 8 of 8 devices: how busy the devices are when nobody may be overtaken by
//! much. A discrete-event simulation: it counts, it does not time.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::sync::Arc;

use super::{any, gpus, request};
use crate::machine::{DeviceId, Event, Stream};
use crate::schedule::gang::{Alternative, Gang, Grant, Limits, Step};

const DEVICES: u16 = 8;
const TASKS: usize = 10_000;

/// Uniform numbers above 0 and below 1.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn uniform(&mut self) -> f64 {
        ((self.bits() >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
    }
}

/// Devices with streams on which launched work waits for what is before it.
#[derive(Default)]
struct World {
    /// Seconds, as bits of a positive number, which are ordered like it.
    now: u64,
    streams: HashMap<DeviceId, u32>,
    /// The last task of a stream, and its position.
    last: HashMap<Stream, Event>,
    done: HashMap<Stream, u64>,
    /// Which launched tasks wait for an event, and for how many events each still.
    waiters: HashMap<Event, Vec<usize>>,
    missing: HashMap<usize, usize>,
    events: HashMap<usize, Vec<Event>>,
    ends: BinaryHeap<Reverse<(u64, usize)>>,
}

impl World {
    fn launch(&mut self, task: usize, grant: &Grant, durations: &[f64]) -> Vec<Event> {
        let mut events = Vec::new();
        let mut missing = 0;
        for lent in &grant.lent {
            let stream = lent.stream.unwrap_or_else(|| {
                let number = self.streams.entry(lent.device).or_default();
                *number += 1;
                Stream {
                    device: lent.device,
                    number: *number,
                }
            });
            let before = self.last.get(&stream).copied();
            for &event in lent.waits.iter().chain(&before) {
                if self.done.get(&event.stream).copied().unwrap_or(0) < event.position {
                    self.waiters.entry(event).or_default().push(task);
                    missing += 1;
                }
            }
            let position = before.map_or(1, |event| event.position + 1);
            let event = Event { stream, position };
            self.last.insert(stream, event);
            events.push(event);
        }
        self.events.insert(task, events.clone());
        if missing == 0 {
            self.begin(task, durations);
        } else {
            self.missing.insert(task, missing);
        }
        events
    }

    fn begin(&mut self, task: usize, durations: &[f64]) {
        let end = f64::from_bits(self.now) + durations[task];
        self.ends.push(Reverse((end.to_bits(), task)));
    }

    /// What the next task that ends leaves.
    fn end(&mut self, durations: &[f64]) -> Option<Vec<Event>> {
        let Reverse((now, task)) = self.ends.pop()?;
        self.now = now;
        let events = self.events.remove(&task).unwrap();
        for &event in &events {
            self.done.insert(event.stream, event.position);
            for waiter in self.waiters.remove(&event).unwrap_or_default() {
                let missing = self.missing.get_mut(&waiter).unwrap();
                *missing -= 1;
                if *missing == 0 {
                    self.begin(waiter, durations);
                }
            }
        }
        Some(events)
    }
}

/// Utilisation, and by how much a task was overtaken at most.
fn run(limits: Limits, one_by_one: bool, seed: u64) -> (f64, u64) {
    let mut random = Random(seed);
    let mut gang = Gang::new(&gpus(DEVICES, 0), limits);
    let shapes: [Arc<[Alternative]>; 4] = [1, 2, 4, 8].map(|width| [any(width)].into());
    let mut durations = Vec::new();
    // By how much each waiting task has been overtaken.
    let mut waiting = BTreeMap::new();
    let mut busy = 0.0;
    let mut world = World::default();
    let mut most = 0;
    let mut next = 0;
    loop {
        if next < TASKS {
            let task = next;
            next += 1;
            let shape = &shapes[(random.bits() % 4) as usize];
            gang.submit(task, request(shape)).unwrap();
            durations.push(-random.uniform().ln());
            busy += durations[task] * shape[0].members.len() as f64;
            waiting.insert(task, 0);
            if !one_by_one && next < TASKS {
                continue;
            }
        }
        while let Some(step) = gang.next(|_| true) {
            let Step::Start(task, grant) = step else {
                panic!("nobody waits and nobody is cancelled")
            };
            waiting.remove(&task).expect("a task starts once");
            for (_, overtaken) in waiting.range_mut(..task) {
                *overtaken += grant.lent.len() as u64;
                most = most.max(*overtaken);
            }
            let events = world.launch(task, &grant, &durations);
            gang.launched(grant.id, &events.into_iter().map(Some).collect::<Vec<_>>());
        }
        if next < TASKS {
            continue;
        }
        let Some(events) = world.end(&durations) else {
            break;
        };
        for event in events {
            gang.completed(event);
        }
    }
    assert_eq!((gang.waiting(), waiting.len()), (0, 0), "every task ran");
    (
        busy / (f64::from(DEVICES) * f64::from_bits(world.now)),
        most,
    )
}

#[test]
fn a_mix_of_widths_keeps_devices_busy_within_the_bound() {
    for (overtaking, runahead, least) in [
        (32, 0, 0.92),
        (128, 0, 0.97),
        (32, 64, 0.90),
        (128, 64, 0.96),
    ] {
        let limits = Limits {
            overtaking,
            runahead,
        };
        for (seed, one_by_one) in [(1, false), (2, false), (3, true)] {
            let (utilisation, most) = run(limits, one_by_one, seed);
            assert!(
                utilisation >= least,
                "{utilisation} of the devices' time is used, with {limits:?}"
            );
            assert!(
                most <= overtaking,
                "a task is overtaken by {most}, with {limits:?}"
            );
        }
    }
}
