//! The machine: its devices, what lies between them, and how work is put on them.
//!
//! # Vocabulary
//!
//! A *device* ([`Device`]) has memory of its own and runs what is enqueued on its *streams*. A stream
//! is in order: its work runs one after the other. Different streams run side by side. Enqueueing
//! returns at once, so that the host runs ahead.
//!
//! An *event* ([`Event`]) is a position on a stream's timeline. It is complete when everything that
//! was enqueued on that stream up to it is done. A stream can be told to wait for an event of any
//! stream of any device: what is enqueued on it afterwards starts after that. Only a reader on the
//! host ever waits on the host.
//!
//! A position is a number that only grows, so an event is two words, is copied freely, is never freed,
//! and of two events of one stream the later one stands for both. What a driver has for events (a
//! handle that is recorded and queried) an implementation keeps behind its timelines.
//!
//! # Rules for implementations
//!
//! * No method blocks on device work but [`Device::synchronize`]; none calls back before it returns
//!   but [`Device::when_complete`] on an event that is complete already.
//! * Locks of an implementation are leaves: nothing is called under them, so that any thread may call
//!   a device, attached to an interpreter or not (invariant 8).
//! * A device that fails is *lost*: every event of it that is not complete completes as failed, and
//!   every call answers [`DeviceError::Lost`] from then on. Nothing waits for it for ever. Only an
//!   event that was complete before stays what it was, since somebody may have been told.
//!
//! # What is here
//!
//! | file | what it has |
//! |---|---|
//! | [`cpus`] | the processors of the host, and threads that are kept on some |
//! | `device` | the interface, with the names that all share |
//! | `description` | a machine as plain data, and what a transfer takes on it |
//! | `machine` | [`Machine`]: a description and its devices |
//! | `strided` | boxes of elements that are copied |
//! | `deferred` | what a thread has put off handing to its devices |
//! | `observer` | who is told what devices are asked for and what becomes of it |
//! | [`virtual_gpu`] | a device in host memory, in real and in virtual time |
//!
//! This folder knows nobody.

pub mod cpus;
mod deferred;
mod description;
mod device;
#[allow(clippy::module_inception, reason = "named for what it holds")]
mod machine;
mod observer;
mod strided;
mod together;
pub mod virtual_gpu;

pub use deferred::{Deferred, at_once, defer, deferring, may_defer, submit};
pub use description::{Description, DescriptionError, Gpu, Host, Link, Links, MAX_GPUS, Time};
pub use device::{
    Completion, Device, DeviceError, DeviceId, DeviceInfo, DevicePointer, Event, Foreign, HOST,
    Kind, Mark, Operation, Stream, Traffic,
};
pub use machine::{Machine, VirtualMachine};
pub use observer::{Enqueued, Observed, Observer, Observers};
pub use strided::{Axis, Strided};
pub use together::{keep_until_told, together};
