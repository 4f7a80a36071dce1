//! The store over virtual machines in virtual time, played without an engine.

mod eviction;
mod random;
mod rules;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::*;
use crate::machine::virtual_gpu::VirtualGpu;
use crate::machine::{Description, Device, Gpu, Host, Link, Links, Time};
use crate::region::Span;

/// A machine in virtual time with so many devices of so many bytes.
fn machine(gpus: usize, memory: u64, peers: bool) -> Arc<Machine> {
    let link = |bandwidth, micros| Link {
        bandwidth,
        latency: Duration::from_micros(micros),
    };
    let host = Host {
        cores: 1,
        memory: None,
    };
    let gpu = Gpu {
        name: "gpu".into(),
        memory,
    };
    let links = Links {
        host: link(1e9, 10),
        peer: peers.then(|| link(8e9, 2)),
        local: link(1e11, 1),
        pairs: Vec::new(),
    };
    let description = Description::new(host, vec![gpu; gpus], links, Time::Virtual).unwrap();
    Machine::virtual_machine(description)
}

fn gpu(machine: &Machine, device: DeviceId) -> &Arc<VirtualGpu> {
    machine.as_virtual().unwrap().gpu(device)
}

/// Lets everything happen that is enqueued.
fn finish(machine: &Machine) {
    while machine.as_virtual().unwrap().clock().advance() {}
}

/// An array of the host whose bytes are `bytes`.
fn array(shape: &[u64], item: u64, bytes: Vec<u8>) -> Arc<Storage> {
    assert_eq!(shape.iter().product::<u64>() * item, bytes.len() as u64);
    let address = bytes.as_ptr().expose_provenance() as u64;
    Storage::new(
        crate::trace::next_id(),
        "A",
        shape,
        item,
        address,
        Box::new(bytes),
    )
}

/// The same array in memory of a device, where it is still to be written when this returns. The host has
/// nothing of it.
fn abroad(machine: &Machine, device: DeviceId, host: &Storage) -> Arc<Storage> {
    let gpu = gpu(machine, device);
    let stream = gpu.create_stream().unwrap();
    let pointer = gpu.allocate(host.bytes(), stream).unwrap();
    gpu.busy(stream, Duration::from_micros(500)).unwrap();
    let view = View {
        pointer,
        strides: host.strides.clone(),
        origin: SmallVec::from_elem(0, host.strides.len()),
    };
    let elements = bytes(host);
    operate(machine, stream, &view, host.bytes(), move |there| {
        there.copy_from_slice(&elements)
    });
    let nothing = vec![0xBD; host.bytes() as usize];
    let address = nothing.as_ptr().expose_provenance() as u64;
    let shape: Vec<u64> = host.whole.spans().iter().map(Span::count).collect();
    Storage::adopting(
        crate::trace::next_id(),
        "A",
        &shape,
        host.item,
        address,
        Box::new(nothing),
        Some(Adopted {
            pointer,
            behind: gpu.foreign(Some(gpu.record(stream).unwrap())),
        }),
    )
}

/// What is in memory of a device, when all is done.
fn fetched(machine: &Machine, pointer: DevicePointer, bytes: u64) -> Vec<u8> {
    let stream = machine.device(pointer.device).create_stream().unwrap();
    let view = View {
        pointer,
        strides: SmallVec::new(),
        origin: SmallVec::new(),
    };
    let found: Arc<Mutex<Vec<u8>>> = Arc::default();
    let keep = Arc::clone(&found);
    operate(machine, stream, &view, bytes, move |there| {
        keep.lock().unwrap().extend_from_slice(there);
    });
    finish(machine);
    std::mem::take(&mut *found.lock().unwrap())
}

/// The bytes of an array on the host.
fn bytes(storage: &Storage) -> Vec<u8> {
    let first = std::ptr::with_exposed_provenance(storage.address() as usize);
    // SAFETY: the bytes live as long as the storage, and what is enqueued is done.
    unsafe { std::slice::from_raw_parts::<u8>(first, storage.bytes() as usize) }.to_vec()
}

fn want<'a>(storage: &'a Arc<Storage>, region: &'a Region, touch: Touch) -> Want<'a> {
    Want {
        storage,
        region,
        touch,
    }
}

fn range(start: u64, end: u64) -> Region {
    Region::new([Span::range(start, end)])
}

/// What a store tells, kept.
fn watch(store: &Store) -> Arc<Mutex<Vec<Moved>>> {
    let told: Arc<Mutex<Vec<Moved>>> = Arc::default();
    let keep = Arc::clone(&told);
    store.observe(Box::new(move |moved| {
        keep.lock().unwrap().push(moved.clone())
    }));
    told
}

/// Enqueues an operation that sees the bytes of a view, as many as its box has.
fn operate(
    machine: &Machine,
    stream: Stream,
    view: &View,
    bytes: u64,
    call: impl FnOnce(&mut [u8]) + Send + 'static,
) {
    let (gpu, pointer) = (Arc::clone(gpu(machine, stream.device)), view.pointer);
    let inner = Arc::clone(&gpu);
    gpu.enqueue(
        stream,
        Box::new(move || {
            let bytes = inner.bytes(pointer, bytes)?;
            // SAFETY: the bytes are there, and the test orders who uses them.
            call(unsafe { std::slice::from_raw_parts_mut(bytes.as_ptr(), bytes.len()) });
            Ok(())
        }),
    )
    .unwrap();
}
