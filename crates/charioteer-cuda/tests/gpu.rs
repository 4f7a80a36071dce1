//! Devices of the CUDA driver as the runtime uses them. Where there is none, nothing is tested.

use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use charioteer::machine::{Device, DeviceError, DeviceId, DevicePointer, HOST, Observers, Stream};
use charioteer_cuda::{CudaGpu, found, open};

const SOON: Duration = Duration::from_secs(30);

/// The devices, if there are as many.
fn gpus(count: usize) -> Option<Vec<Arc<CudaGpu>>> {
    let there = found().unwrap().len();
    if there < count {
        eprintln!("needs {count} GPUs, and there are {there}: not tested");
        return None;
    }
    Some(open(&vec![u64::MAX; count], &Arc::new(Observers::default())).unwrap())
}

fn host(bytes: &[u8]) -> DevicePointer {
    DevicePointer {
        device: HOST,
        address: bytes.as_ptr() as u64,
    }
}

/// Bytes that tell their places.
fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at % 251) as u8).collect()
}

/// Keeps a stream busy for some milliseconds.
fn occupy(gpu: &CudaGpu, stream: Stream, memory: DevicePointer, half: u64) {
    for _ in 0..64 {
        // SAFETY: no host memory.
        unsafe { gpu.copy(memory, memory.offset(half), half, stream) }.unwrap();
    }
}

#[test]
fn bytes_come_back_as_they_went() {
    let Some(gpus) = gpus(1) else { return };
    let gpu = &gpus[0];
    let stream = gpu.create_stream().unwrap();
    // Below the least buffer, several pieces, and an odd end.
    for bytes in [1, 1000, (40 << 20) + 3] {
        let sent = pattern(bytes);
        let mut back = vec![0; bytes];
        let memory = gpu.allocate(bytes as u64, stream).unwrap();
        // SAFETY: both live until the event behind the copies.
        unsafe {
            gpu.copy(host(&sent), memory, bytes as u64, stream).unwrap();
            gpu.copy(memory, host(&back), bytes as u64, stream).unwrap();
        }
        gpu.free(memory, stream).unwrap();
        gpu.synchronize(gpu.record(stream).unwrap()).unwrap();
        assert!(sent == std::mem::take(&mut back));
    }
    let counters = gpu.counters();
    assert_eq!(counters.traffic.len(), 2);
    assert_eq!(counters.traffic[0].copies, 3);
    gpu.close();
}

#[test]
fn the_sender_may_change_what_it_sent_once_the_call_is_back() {
    let Some(gpus) = gpus(1) else { return };
    let gpu = &gpus[0];
    let stream = gpu.create_stream().unwrap();
    let half = 256 << 20;
    let work = gpu.allocate(2 * half, stream).unwrap();
    let memory = gpu.allocate(1 << 20, stream).unwrap();
    occupy(gpu, stream, work, half);
    let mut sent = pattern(1 << 20);
    // SAFETY: the bytes live on.
    unsafe { gpu.copy(host(&sent), memory, 1 << 20, stream) }.unwrap();
    let event = gpu.record(stream).unwrap();
    assert_eq!(gpu.is_complete(event), Ok(false), "the call waited");
    sent.fill(0);
    let back = vec![0; 1 << 20];
    // SAFETY: as above.
    unsafe { gpu.copy(memory, host(&back), 1 << 20, stream) }.unwrap();
    gpu.synchronize(gpu.record(stream).unwrap()).unwrap();
    assert!(back == pattern(1 << 20));
    gpu.free(work, stream).unwrap();
    gpu.free(memory, stream).unwrap();
    gpu.close();
}

#[test]
fn streams_wait_for_events_and_the_host_is_told() {
    let Some(gpus) = gpus(1) else { return };
    let gpu = &gpus[0];
    let (first, second) = (gpu.create_stream().unwrap(), gpu.create_stream().unwrap());
    let half = 256 << 20;
    let work = gpu.allocate(2 * half, first).unwrap();
    let idle = gpu.record(second).unwrap();
    assert_eq!(gpu.is_complete(idle), Ok(true));
    occupy(gpu, first, work, half);
    let busy = gpu.record(first).unwrap();
    assert_eq!(gpu.is_complete(busy), Ok(false));
    gpu.wait(second, busy).unwrap();
    let behind = gpu.record(second).unwrap();
    assert_eq!(gpu.is_complete(behind), Ok(false));
    let (told, hears) = mpsc::channel();
    gpu.when_complete(behind, Box::new(move |result| told.send(result).unwrap()));
    assert_eq!(hears.recv_timeout(SOON), Ok(Ok(())));
    assert_eq!(gpu.is_complete(busy), Ok(true));
    let counters = gpu.counters();
    assert_eq!(
        (counters.stream_waits, counters.host_synchronisations),
        (1, 0)
    );
    assert_eq!(counters.notifications, 1);
    gpu.free(work, first).unwrap();
    gpu.close();
}

#[test]
fn marks_tell_how_long_work_took() {
    let Some(gpus) = gpus(1) else { return };
    let gpu = &gpus[0];
    let stream = gpu.create_stream().unwrap();
    let half = 256 << 20;
    let work = gpu.allocate(2 * half, stream).unwrap();
    let start = gpu.mark(stream).unwrap();
    occupy(gpu, stream, work, half);
    let end = gpu.mark(stream).unwrap();
    assert_eq!(gpu.elapsed(&start, &end), None);
    gpu.synchronize(gpu.record(stream).unwrap()).unwrap();
    let took = gpu.elapsed(&start, &end).unwrap();
    // 32 GiB are read and written.
    assert!(
        took > Duration::from_millis(2) && took < Duration::from_secs(2),
        "{took:?}"
    );
    gpu.free(work, stream).unwrap();
    gpu.close();
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let Some(gpus) = gpus(1) else { return };
    let gpu = &gpus[0];
    let stream = gpu.create_stream().unwrap();
    let memory = gpu.info().memory;
    let refused = gpu.allocate(4 * memory, stream);
    assert!(
        matches!(refused, Err(DeviceError::OutOfMemory { wanted, .. }) if wanted == 4 * memory),
        "{refused:?}"
    );
    let nobodys = DevicePointer {
        device: gpu.info().id,
        address: 0x1000,
    };
    assert_eq!(
        gpu.free(nobodys, stream),
        Err(DeviceError::BadAddress(nobodys, 0))
    );
    let absent = DeviceId::gpu(63);
    assert_eq!(
        gpu.enable_peer(absent),
        Err(DeviceError::NoAccess(gpu.info().id, absent))
    );
    // The device lives on.
    let free = gpu.free_memory();
    let piece = gpu.allocate(64 << 20, stream).unwrap();
    assert!(gpu.free_memory() < free);
    gpu.free(piece, stream).unwrap();
    gpu.synchronize(gpu.record(stream).unwrap()).unwrap();
    assert!(gpu.free_memory() >= free - (2 << 20));
    gpu.close();
    assert!(matches!(gpu.record(stream), Err(DeviceError::Lost(..))));
    assert!(matches!(gpu.create_stream(), Err(DeviceError::Lost(..))));
}

#[test]
fn closing_tells_who_waits_that_it_is_lost() {
    let Some(gpus) = gpus(1) else { return };
    let gpu = &gpus[0];
    let stream = gpu.create_stream().unwrap();
    let half = 256 << 20;
    let work = gpu.allocate(2 * half, stream).unwrap();
    for _ in 0..16 {
        occupy(gpu, stream, work, half);
    }
    let event = gpu.record(stream).unwrap();
    let (told, hears) = mpsc::channel();
    gpu.when_complete(event, Box::new(move |result| told.send(result).unwrap()));
    gpu.close();
    assert!(matches!(hears.try_recv(), Ok(Err(DeviceError::Lost(..)))));
}

#[test]
fn bytes_go_from_one_device_to_another() {
    let Some(gpus) = gpus(2) else { return };
    let (one, two) = (&gpus[0], &gpus[1]);
    let (first, second) = (one.create_stream().unwrap(), two.create_stream().unwrap());
    let bytes = 8 << 20;
    let here = one.allocate(bytes, first).unwrap();
    let there = two.allocate(bytes, second).unwrap();
    // SAFETY: no host memory.
    let refused = unsafe { two.copy(here, there, bytes, second) };
    assert_eq!(
        refused,
        Err(DeviceError::NoAccess(two.info().id, one.info().id))
    );
    if two.enable_peer(one.info().id).is_err() {
        eprintln!("the GPUs do not reach each other: not tested");
        return;
    }
    let sent = pattern(8 << 20);
    let back = vec![0; 8 << 20];
    // SAFETY: both live until the event behind the copies.
    unsafe {
        one.copy(host(&sent), here, bytes, first).unwrap();
        two.wait(second, one.record(first).unwrap()).unwrap();
        two.copy(here, there, bytes, second).unwrap();
        two.copy(there, host(&back), bytes, second).unwrap();
    }
    two.synchronize(two.record(second).unwrap()).unwrap();
    assert!(back == sent);
    let (bandwidth, latency) = two.measure(one.info().id, true, 64 << 20).unwrap();
    assert!(bandwidth > 1e9 && latency < Duration::from_millis(1));
    one.close();
    two.close();
}

/// A box in an array of the host: its shape, and along each axis the first index, the step and how many.
struct Part<'a> {
    shape: &'a [u64],
    axes: &'a [(u64, u64, u64)],
}

const ITEM: u64 = 8;

impl Part<'_> {
    fn extents(&self) -> Vec<u64> {
        self.axes.iter().map(|axis| axis.2).collect()
    }

    fn elements(&self) -> u64 {
        self.extents().iter().product()
    }

    /// Bytes between neighbours in a compact array.
    fn compact(extents: &[u64]) -> Vec<u64> {
        let mut stride = ITEM;
        let mut strides: Vec<u64> = extents
            .iter()
            .rev()
            .map(|extent| {
                stride *= extent;
                stride / extent
            })
            .collect();
        strides.reverse();
        strides
    }

    /// Where the box begins in the array, and bytes between its neighbours.
    fn place(&self) -> (u64, Vec<u64>) {
        let strides = Self::compact(self.shape);
        let axes = self.axes.iter().zip(&strides);
        let start = axes.clone().map(|(axis, stride)| axis.0 * stride).sum();
        (start, axes.map(|(axis, stride)| axis.1 * stride).collect())
    }

    /// Where each of its elements is in the array.
    fn offsets(&self) -> Vec<u64> {
        let (start, strides) = self.place();
        let mut offsets = vec![start];
        for (axis, stride) in self.axes.iter().zip(strides) {
            offsets = offsets
                .iter()
                .flat_map(|offset| (0..axis.2).map(move |at| offset + at * stride))
                .collect();
        }
        offsets
    }
}

/// Boxes with one axis to several, with rows far and near, and one that goes through several buffers.
const PARTS: [Part<'static>; 6] = [
    Part {
        shape: &[1000],
        axes: &[(17, 1, 900)],
    },
    Part {
        shape: &[1000],
        axes: &[(3, 7, 140)],
    },
    Part {
        shape: &[300, 200],
        axes: &[(10, 1, 100), (50, 1, 64)],
    },
    Part {
        shape: &[20, 30, 40],
        axes: &[(1, 2, 9), (3, 1, 20), (5, 1, 30)],
    },
    Part {
        shape: &[6, 7, 8, 9],
        axes: &[(0, 2, 3), (1, 1, 5), (2, 3, 2), (0, 2, 5)],
    },
    Part {
        shape: &[5000, 1200],
        axes: &[(4, 1, 4900), (100, 1, 1000)],
    },
];

/// Copies the box to the device and back into other bytes: those.
fn there_and_back(
    gpu: &CudaGpu,
    stream: Stream,
    part: &Part<'_>,
    pinned: bool,
) -> (Vec<u8>, Vec<u8>) {
    let bytes = part.shape.iter().product::<u64>() * ITEM;
    let sent = pattern(bytes as usize);
    let back = vec![0xee_u8; bytes as usize];
    let registered: Vec<bool> = [&sent, &back]
        .iter()
        .map(|side| {
            // SAFETY: it lives until it is unregistered.
            pinned && unsafe { gpu.register_host(side.as_ptr() as u64, bytes) }.unwrap()
        })
        .collect();
    let extents = part.extents();
    let compact = Part::compact(&extents);
    let (start, strides) = part.place();
    let memory = gpu.allocate(part.elements() * ITEM, stream).unwrap();
    let (from, to) = (host(&sent).offset(start), host(&back).offset(start));
    // SAFETY: both live until the event behind the copies.
    unsafe {
        gpu.copy_strided(from, &strides, memory, &compact, &extents, ITEM, stream)
            .unwrap();
        gpu.copy_strided(memory, &compact, to, &strides, &extents, ITEM, stream)
            .unwrap();
    }
    gpu.free(memory, stream).unwrap();
    gpu.synchronize(gpu.record(stream).unwrap()).unwrap();
    for (side, registered) in [&sent, &back].iter().zip(registered) {
        if registered {
            gpu.unregister_host(side.as_ptr() as u64);
        }
    }
    (sent, back)
}

#[test]
fn boxes_come_back_as_they_went() {
    let Some(gpus) = gpus(1) else { return };
    let gpu = &gpus[0];
    let stream = gpu.create_stream().unwrap();
    for pinned in [false, true] {
        for part in &PARTS {
            let (sent, back) = there_and_back(gpu, stream, part, pinned);
            let mut expected = vec![0xee; sent.len()];
            for offset in part.offsets() {
                let element = offset as usize..(offset + ITEM) as usize;
                expected[element.clone()].copy_from_slice(&sent[element]);
            }
            assert!(
                back == expected,
                "{:?} {:?} pinned: {pinned}",
                part.shape,
                part.axes
            );
        }
    }
    let moved: u64 = PARTS.iter().map(|part| 2 * part.elements() * ITEM).sum();
    for traffic in gpu.counters().traffic {
        assert_eq!(
            (traffic.copies, traffic.bytes),
            (2 * PARTS.len() as u64, moved)
        );
    }
    gpu.close();
}

#[test]
fn memory_is_registered_once() {
    let Some(gpus) = gpus(1) else { return };
    let gpu = &gpus[0];
    let stream = gpu.create_stream().unwrap();
    let sent = pattern(8 << 20);
    let (address, bytes) = (sent.as_ptr() as u64, sent.len() as u64);
    // SAFETY: it lives until it is unregistered.
    let register = || unsafe { gpu.register_host(address, bytes) };
    assert_eq!(register(), Ok(true));
    assert_eq!(register(), Ok(false));
    let memory = gpu.allocate(bytes, stream).unwrap();
    // SAFETY: the bytes live until the event behind the copy.
    unsafe { gpu.copy(host(&sent), memory, bytes, stream) }.unwrap();
    gpu.synchronize(gpu.record(stream).unwrap()).unwrap();
    gpu.unregister_host(address);
    // What is registered in part is copied all the same.
    // SAFETY: as above.
    assert_eq!(unsafe { gpu.register_host(address, bytes / 2) }, Ok(true));
    let back = vec![0; 8 << 20];
    // SAFETY: as above.
    unsafe {
        gpu.copy(host(&sent), memory, bytes, stream).unwrap();
        gpu.copy(memory, host(&back), bytes, stream).unwrap();
    }
    gpu.synchronize(gpu.record(stream).unwrap()).unwrap();
    gpu.unregister_host(address);
    assert!(back == sent);
    gpu.free(memory, stream).unwrap();
    gpu.close();
}

#[test]
fn boxes_go_from_one_device_to_another() {
    let Some(gpus) = gpus(2) else { return };
    let (one, two) = (&gpus[0], &gpus[1]);
    let (first, second) = (one.create_stream().unwrap(), two.create_stream().unwrap());
    if two.enable_peer(one.info().id).is_err() {
        eprintln!("the GPUs do not reach each other: not tested");
        return;
    }
    for part in &PARTS {
        let bytes = part.shape.iter().product::<u64>() * ITEM;
        let sent = pattern(bytes as usize);
        let extents = part.extents();
        let compact = Part::compact(&extents);
        let (start, strides) = part.place();
        let here = one.allocate(bytes, first).unwrap();
        let there = two.allocate(part.elements() * ITEM, second).unwrap();
        let back = vec![0; (part.elements() * ITEM) as usize];
        // SAFETY: both live until the event behind the copies.
        unsafe {
            one.copy(host(&sent), here, bytes, first).unwrap();
            two.wait(second, one.record(first).unwrap()).unwrap();
            two.copy_strided(
                here.offset(start),
                &strides,
                there,
                &compact,
                &extents,
                ITEM,
                second,
            )
            .unwrap();
            two.copy(there, host(&back), back.len() as u64, second)
                .unwrap();
        }
        two.synchronize(two.record(second).unwrap()).unwrap();
        let offsets = part.offsets().into_iter();
        let expected: Vec<u8> = offsets
            .flat_map(|offset| sent[offset as usize..(offset + ITEM) as usize].to_vec())
            .collect();
        assert!(back == expected, "{:?} {:?}", part.shape, part.axes);
        one.wait(first, two.record(second).unwrap()).unwrap();
        one.free(here, first).unwrap();
        two.free(there, second).unwrap();
    }
    one.close();
    two.close();
}
