//! Models of the crew: who looks at what is due, and who parks.

use std::sync::Arc;

use crate::loom_domain::explore;
use crate::machine::Machine;
use crate::machine::description::{Description, Time};
use crate::machine::device::{Device, Event, Operation, Stream};
use crate::machine::virtual_gpu::VirtualGpu;
use crate::sync::{AtomicUsize, Ordering};

fn machine(gpus: usize) -> Arc<Machine> {
    Machine::virtual_machine(Description::uniform(1, gpus, 1, Time::Real).unwrap())
}

fn gpu(machine: &Machine, index: usize) -> (&Arc<VirtualGpu>, Stream) {
    let gpu = &machine.as_virtual().unwrap().gpus()[index];
    (gpu, gpu.create_stream().unwrap())
}

/// An operation that expects to be the one after so many.
fn after(count: &Arc<AtomicUsize>, expected: usize) -> Operation {
    let count = Arc::clone(count);
    Box::new(move || {
        assert_eq!(count.fetch_add(1, Ordering::Relaxed), expected);
        Ok(())
    })
}

fn enqueue(gpu: &VirtualGpu, stream: Stream, operation: Operation) -> Event {
    gpu.enqueue(stream, operation).unwrap();
    gpu.record(stream).unwrap()
}

/// What is enqueued while the crew's one thread parks, or ends what it ran, is run, and who blocks for
/// it is woken.
#[test]
fn what_is_enqueued_is_run() {
    explore(|| {
        let machine = machine(1);
        let (gpu, stream) = gpu(&machine, 0);
        let count = Arc::new(AtomicUsize::new(0));
        enqueue(gpu, stream, after(&count, 0));
        let event = enqueue(gpu, stream, after(&count, 1));
        gpu.synchronize(event).unwrap();
        let event = enqueue(gpu, stream, after(&count, 2));
        gpu.synchronize(event).unwrap();
        assert_eq!(count.load(Ordering::Relaxed), 3);
    });
}

/// A stream waits for one of another device, which may be done before, while or after it is told to.
#[test]
fn a_wait_across_devices_ends() {
    explore(|| {
        let machine = machine(2);
        let (first, on_first) = gpu(&machine, 0);
        let (second, on_second) = gpu(&machine, 1);
        let count = Arc::new(AtomicUsize::new(0));
        let event = enqueue(first, on_first, after(&count, 0));
        second.wait(on_second, event).unwrap();
        let event = enqueue(second, on_second, after(&count, 1));
        second.synchronize(event).unwrap();
        assert_eq!(count.load(Ordering::Relaxed), 2);
        assert_eq!(second.is_complete(event), Ok(true));
    });
}

/// Two threads enqueue on two streams whose operations need each other to be running: there is a
/// thread of the crew for each.
#[test]
fn there_is_a_thread_for_each_stream() {
    explore(|| {
        let machine = machine(1);
        let (gpu, first) = gpu(&machine, 0);
        let second = gpu.create_stream().unwrap();
        let met = Arc::new(crate::sync::Mutex::new(0));
        let changed = Arc::new(crate::sync::Condvar::new());
        let meet = || -> Operation {
            let (met, changed) = (Arc::clone(&met), Arc::clone(&changed));
            Box::new(move || {
                let mut met = met.lock();
                *met += 1;
                changed.notify_all();
                while *met < 2 {
                    met = changed.wait(met);
                }
                Ok(())
            })
        };
        let event = enqueue(gpu, first, meet());
        let other = enqueue(gpu, second, meet());
        gpu.synchronize(event).unwrap();
        gpu.synchronize(other).unwrap();
    });
}

/// A completion that is registered while its event completes, or while the device is lost, is called
/// once.
#[test]
fn a_completion_is_called_once() {
    explore(|| {
        let machine = machine(1);
        let (gpu, stream) = gpu(&machine, 0);
        let count = Arc::new(AtomicUsize::new(0));
        let event = enqueue(gpu, stream, Box::new(|| Ok(())));
        let calls = Arc::clone(&count);
        gpu.when_complete(
            event,
            Box::new(move |_| {
                calls.fetch_add(1, Ordering::Relaxed);
            }),
        );
        gpu.lose("on purpose");
        let _ = gpu.synchronize(event);
        drop(machine);
        let calls = count;
        // Whoever completed the event calls after that.
        while calls.load(Ordering::Relaxed) == 0 {
            loom::thread::yield_now();
        }
        assert_eq!(calls.load(Ordering::Relaxed), 1);
    });
}
