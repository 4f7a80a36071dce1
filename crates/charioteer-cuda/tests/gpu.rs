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
    Some(open(count, &Arc::new(Observers::default())).unwrap())
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
