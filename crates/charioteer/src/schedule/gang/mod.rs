//! The ledger of devices: which waiting task may start next, on which devices and streams, and what
//! its streams have to wait for.
//!
//! [`Gang`] is plain data with one owner. It has no locks and no threads, calls nobody, and drops
//! nothing that its user gave it. Whoever owns it tells it what happened and asks [`Gang::next`]
//! until there is nothing more to do.
//!
//! # A task's way
//!
//! [`submit`](Gang::submit) → [`next`](Gang::next) grants it devices, streams, shares and memory,
//! all of its set or nothing (invariant 4: nothing is taken before everything fits) → its body runs
//! on the host → [`launched`](Gang::launched): what it had is given back, behind the events that it
//! left, and its streams are free → [`completed`](Gang::completed) for each of these events. In
//! between a body that waits is [`paused`](Gang::paused) and [`resumed`](Gang::resumed).
//!
//! # Timelines
//!
//! Shares and memory are reserved on a device's timeline, not on the host's. What is given back is
//! *in flight* until its event is complete, then *at rest*. A grant may take what is in flight: the
//! body starts at once and its stream waits for the event, so that the work of the two follows each
//! other on the device. Every piece passes from one task to the next in this way, so no moment of
//! the timeline sees more than the device has (invariant 5). A task takes first what is in flight
//! on its own stream, where stream order is the wait; then what is at rest; then the oldest in
//! flight.
//!
//! *Run-ahead.* What is in flight is taken only while fewer than [`Limits::runahead`] tasks of that
//! device are granted and not complete; what is at rest always. Run times that are known bound it
//! further: beyond 4 tasks and 2 ms of them nobody runs ahead. The host needs far less to launch the next
//! ones, and whoever is granted has its place on the timeline for good, though somebody more urgent, or with
//! data that are there, may become ready meanwhile. Tasks without a share are counted
//! apart and bounded in the same way, by one if `runahead` is 0, so that they wait for nobody but
//! each other. A set runs ahead only behind its own predecessors or behind one task that all its
//! devices ran last: elsewhere its devices would become free one by one and idle until the last is.
//!
//! *Streams.* A stream is lent to one body at a time. A task gets the stream of a predecessor, if
//! no other work came behind the predecessor's; else one at rest; else a new one. So a chain uses one
//! stream and no events, and tasks that have nothing to do with each other have no stream in common
//! while work of both is pending: a failure fails what is behind it on its stream. Of a device that
//! [fails as a whole](Capacity::fails_whole) a task rather gets the stream of one that it has to wait for
//! since it takes its share, so that tasks that take the whole device one after the other use one.
//!
//! *Pauses.* A paused body gives its share back like one that returned and keeps streams and
//! memory. When its wait is over it comes before all waiting tasks: what it needs is held for it.
//! What it waits for may be any task, so one that cannot be served while paused bodies keep their
//! memory is *stuck*: nothing is held for it and nobody overtakes it. Of one that has another alternative
//! that alone counts. If everybody is stuck, somebody has to fail; the ledger's owner says who.
//!
//! # Order
//!
//! Waiting tasks with equal alternatives (and their data on one device) are a *shape* and wait in one queue for each priority, so
//! that only the first of each shape is looked at: 100,000 tasks of five shapes cost what five do.
//! They rank by priority, then by age.
//!
//! **The bound.** Whenever a task gets devices, all who wait, rank before it and could use one of
//! them are overtaken, by as many *device-times* as there are such devices. Nobody is overtaken by
//! more than [`Limits::overtaking`]: such a grant is not made. Of one queue the first has been
//! overtaken the most: whoever overtakes a later one overtakes it too. So a counter a queue is
//! enough, with the grants in it by age, so that those older than the next first can be taken out
//! again. A grant in rank order costs nothing; another one costs as much as there are queues that
//! it passes by.
//!
//! **Sweeps.** Devices idle when a wide task gathers them: eight tasks of one device each, of
//! unknown lengths, leave 13.7 device-times idle before one of eight devices starts, and hardly any
//! if the widths double on the way. From wide to narrow costs nothing. So shapes of equal priority
//! are served like floors by an elevator: a *sweep* goes up, from the least part of the machine to
//! the largest, and the next one down if what is largest fits then, else up again. A sweep
//! comprises the tasks up to a *horizon*, the last task such that serving all before it in the
//! sweep's order keeps the bound. Down the narrow ones are overtaken by the wide, up the wide by
//! the narrow, which is less: so a sweep up is longer. With a bound of 32 mean run times of one
//! device, 10,000 tasks over 1, 2, 4 or 8 of 8 devices use .93 of the devices' time, with one of
//! 128 .98 (`tests/mix.rs`), where the oldest that fits, as far as the bound allows, uses .88 and
//! .955.
//!
//! If the task whose turn it is does not fit, devices are *held* for it: those that it could have
//! now, then those that are free soonest. What is not held goes to the rest of the sweep, then to
//! others by rank. Tasks of lower priority take what is held too, as far as the bound allows: they
//! fill the gap.
//!
//! # Policy
//!
//! `choose` in `ledger.rs` says which alternative a task gets, and on which devices. Where run times are
//! known it is the one that is estimated to finish first; a task may wait for one that is faster and
//! busy, though a slower one fits. Then devices are held for it like for any task that does not fit. It
//! declines so for as many grants as it may be overtaken by device-times, and then takes what fits.
//!
//! *Data.* Each device has an estimated timeline, on a clock that all share: it is past whatever time those
//! tasks were due that are complete. A task begins on a device when that is free and the data are there, which
//! come as soon as the last of its predecessors in flight is due. What comes from the host comes over a link
//! of the device's own, one transfer after the other: the time when that link is free is kept as well. A
//! transfer from another device also counts for a part of the time of its links (a quarter), since those are
//! shared. Of equals the device goes first that idles least before it. What
//! a device waits for is part of its timeline, since what was granted runs in that order: so a device that
//! idles before a task is not taken for free. If a device would idle before the task whose turn it is, since
//! its data have still to come, one of equal priority and size goes first there that finds its data, as far as
//! the bound allows. Where a task's run
//! time is not known devices are compared by tasks instead: it goes where the transfer is shortest, among
//! the devices that have at most `PATIENCE` (2) more tasks before them than the one with
//! the fewest; so tasks that have nothing to do with each other spread, though their data are in one place.
//! Those who wait and have their data on one device count among what that device has before it. Both
//! rules let a task wait for a device that does not fit at the moment, as long as a body has it. So tasks
//! whose data are on different devices are different shapes, and do not keep each other waiting.
//!
//! Rooms: `request` (what is asked for, and whether a machine can give it), `device` (the book of
//! one device), `queue` (who waits, ranks, the bound, sweeps), `ledger` (what joins them). All this
//! knows the vocabulary of [`machine`](crate::machine), and nobody else.

mod device;
mod ledger;
mod queue;
mod request;

pub use ledger::{Gang, Grant, GrantId, Lent, Limits, Step};
pub use request::{
    Alternative, Capacity, Coming, MOST_DEVICES, Member, Reason, Request, Transfer, WHOLE, check,
};

#[cfg(all(test, not(loom)))]
mod tests;
