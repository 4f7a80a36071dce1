//! Charioteer runs the tasks of one program over the cores of one machine.
//!
//! The crate is the runtime itself: it knows nothing of Python. Use it from Rust through
//! [`native`]; an interpreter binds to it by implementing [`task::Domain`].
//!
//! ```
//! use charioteer::native::{Runtime, TaskSpace};
//!
//! let runtime = Runtime::new(2)?;
//! let squares: Vec<_> = (0..8).map(|i: u64| runtime.spawn(move || i * i)).collect();
//! let sum: u64 = squares.iter().map(|task| *task.result().unwrap()).sum();
//! assert_eq!(sum, 140);
//! runtime.close()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Rooms
//!
//! | room | what lives there | whom it knows |
//! |---|---|---|
//! | [`task`] | identity, the state machine, outcomes, links, latches | words of `machine` and [`gang`] |
//! | [`region`] | index sets: overlap, difference | nobody |
//! | [`data`] | data, accesses, and the order that follows from them | [`region`], [`task`] |
//! | `graph` | dependencies, cycles | `task` |
//! | `schedule` | ready queues, places and grants, sessions and their width, time limits | `task` |
//! | [`gang`] in it | the ledger of devices: who may start, where, behind what | words of `machine` |
//! | [`mapping`] in it | which of its alternatives a task runs on; run times; policies | words of `machine` and [`gang`] |
//! | `work` | the threads that run tasks, and waiting | all above |
//! | [`engine`] | the façade that joins them: spawn, wait, cancel, close | all above |
//! | [`machine`] | devices, streams, events, links | nobody |
//! | [`trace`] | event rings, trace files, and what is proved from them | words of `machine`, [`region`], [`data`] |
//! | [`hash`] | a quick hash of numbers | nobody |
//! | `fetch` | memory that is asked for before it is used | nobody |
//! | [`native`] | the Rust API: closures as tasks, typed handles, task spaces | the façade |

pub mod data;
pub mod engine;
mod fetch;
mod graph;
pub mod hash;
#[cfg(all(test, loom))]
mod loom_domain;
pub mod machine;
#[cfg(not(loom))]
pub mod native;
pub mod region;
mod schedule;
pub mod sync;
pub mod task;
pub mod trace;
mod work;

pub use schedule::gang;
pub use schedule::map as mapping;
pub use schedule::places::Grant;
pub use schedule::width::Width;
