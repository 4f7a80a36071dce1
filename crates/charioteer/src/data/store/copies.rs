//! How elements come to where they are wanted.
//!
//! Each ordered pair of memories has a stream for the copies from the one to the other, so that they run
//! beside the work of tasks and beside copies in the other direction. A copy is behind whatever its
//! source is ready behind, and behind whoever uses its target; the failure of a task is none of a
//! copy's, which would take others on its stream with it. What is on its way is held by its target
//! behind the copy's event, so that nobody copies it again; a copy of a copy that is still on its way is
//! ready behind both events. If one failed there is no such holder.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use smallvec::SmallVec;

use super::directory::{Holder, Lost, Numbers, coalesce};
use super::events::{Events, is_pending};
use super::instance::HOME;
use super::{Moved, State};
use crate::machine::{DeviceError, DeviceId, DevicePointer, Event, HOST, Machine, Stream};
use crate::region::{Region, Span};

struct Lane {
    stream: Stream,
    last: Option<Event>,
}

/// The streams of copies.
pub(super) struct Lanes {
    lanes: HashMap<(DeviceId, DeviceId), Lane>,
    /// Between which memories nothing can be copied, though a link was described.
    barred: HashSet<(DeviceId, DeviceId)>,
    /// Of each accelerator, which streams are the store's.
    own: Vec<Vec<bool>>,
}

impl Lanes {
    pub(super) fn new(gpus: usize) -> Self {
        Self {
            lanes: HashMap::new(),
            barred: HashSet::new(),
            own: vec![Vec::new(); gpus],
        }
    }

    /// Whether an event of the stream is that of a copy, and not of a task.
    #[inline]
    pub(super) fn owns(&self, stream: Stream) -> bool {
        let own = &self.own[usize::from(stream.device.index())];
        own.get(stream.number as usize).copied().unwrap_or(false)
    }

    /// Which of these events are those of copies.
    pub(super) fn copies<'a>(&'a self, events: &'a Events) -> impl Iterator<Item = Event> + 'a {
        events.iter().filter(|event| self.owns(event.stream))
    }

    /// A new stream of the store's.
    pub(super) fn create(
        &mut self,
        machine: &Machine,
        device: DeviceId,
    ) -> Result<Stream, DeviceError> {
        let stream = machine.device(device).create_stream()?;
        let own = &mut self.own[usize::from(device.index())];
        let number = stream.number as usize;
        own.resize(own.len().max(number + 1), false);
        own[number] = true;
        Ok(stream)
    }

    /// The stream of copies from one memory to the other: one of the target, if it is no host.
    fn open(
        &mut self,
        machine: &Machine,
        from: DeviceId,
        to: DeviceId,
    ) -> Result<Stream, DeviceError> {
        if let Some(lane) = self.lanes.get(&(from, to)) {
            let device = machine.device(lane.stream.device);
            // Behind a failure nothing is copied any more.
            if lane
                .last
                .is_none_or(|last| device.is_complete(last).is_ok())
            {
                return Ok(lane.stream);
            }
        }
        let device = if to == HOST { from } else { to };
        if from != HOST && to != HOST && from != to {
            machine.device(to).enable_peer(from)?;
        }
        let stream = self.create(machine, device)?;
        self.lanes.insert((from, to), Lane { stream, last: None });
        Ok(stream)
    }

    /// How long so many bytes take, if they can be copied.
    pub(super) fn time(
        &self,
        machine: &Machine,
        from: DeviceId,
        to: DeviceId,
        bytes: u64,
    ) -> Option<Duration> {
        if self.barred.contains(&(from, to)) {
            return None;
        }
        machine.description().transfer_time(from, to, bytes)
    }

    /// The device is lost, with its streams.
    pub(super) fn lose(&mut self, device: DeviceId) {
        self.lanes.retain(|_, lane| lane.stream.device != device);
    }
}

impl State {
    pub(super) fn device_of(&self, at: u32) -> DeviceId {
        if at == HOME {
            HOST
        } else {
            self.instances[at].device
        }
    }

    /// Forgets what of a piece's events is complete, and holders to whom the copy failed.
    pub(super) fn settle(&mut self, machine: &Machine, directory: u32, number: u32) {
        let piece = &mut self.directories[directory].pieces[number];
        if piece.holders.iter().all(|holder| holder.ready.is_empty()) {
            return;
        }
        let mut gone: SmallVec<[Holder; 2]> = SmallVec::new();
        let mut lost = None;
        piece.holders.retain(|holder| {
            let mut failed = false;
            holder.ready.retain(|event| {
                let device = machine.device(event.stream.device);
                match device.is_complete(event) {
                    Ok(complete) => !complete,
                    // What a task leaves behind that failed is whatever is there.
                    Err(error) => {
                        if self.lanes.owns(event.stream) {
                            failed = true;
                            lost = Some(match error {
                                DeviceError::Lost(device, _) => Lost::Device(device),
                                _ => Lost::Copy(event.stream.device),
                            });
                        }
                        false
                    }
                }
            });
            if failed {
                gone.push(holder.clone());
            }
            !failed
        });
        if piece.holders.is_empty() {
            piece.lost = piece.lost.or(lost);
        }
        // Other copies on their way there still write to the memory.
        for holder in gone {
            let piece = &mut self.directories[directory].pieces[number];
            if holder.at == HOME {
                piece.home.join(&holder.ready);
            } else {
                let instance = &mut self.instances[holder.at];
                instance.uses_of_mut(piece).join(&holder.ready);
                instance.valid -= 1;
                self.rerank(holder.at);
            }
        }
    }

    /// That nobody has a piece any more.
    pub(super) fn lost(&self, directory: u32, piece: u32) -> DeviceError {
        let directory = &self.directories[directory];
        let piece = &directory.pieces[piece];
        let what = format!("nobody has {}{} any more", directory.label, piece.region);
        match piece.lost.expect("whoever has it last says why it goes") {
            Lost::Device(device) => DeviceError::Lost(device, what.into()),
            Lost::Copy(device) => {
                DeviceError::Operation(device, format!("{what}: its copy failed").into())
            }
        }
    }

    /// Who gives a piece to a device soonest.
    pub(super) fn source(
        &self,
        machine: &Machine,
        directory: u32,
        piece: u32,
        to: DeviceId,
    ) -> Option<u32> {
        let directory = &self.directories[directory];
        let piece = &directory.pieces[piece];
        let bytes = directory.bytes(&piece.region);
        let holders = piece.holders.iter().filter_map(|holder| {
            let time = self
                .lanes
                .time(machine, self.device_of(holder.at), to, bytes)?;
            // Of equals who has it already, and has given least.
            let instance = self.instances.get(holder.at);
            let given = instance.map_or(0, |instance| instance.uses_of(piece).len());
            Some(((time, !holder.ready.is_empty(), given), holder.at))
        });
        holders.min().map(|(_, at)| at)
    }

    /// Makes a region valid in an instance, or on the host. What copies it is ready behind is added to
    /// `behind`.
    pub(super) fn bring(
        &mut self,
        machine: &Machine,
        directory: u32,
        mut frame: Option<u32>,
        region: &Region,
        to: u32,
        behind: &mut Events,
    ) -> Result<(), DeviceError> {
        let numbers = self.directories[directory].cover(region, frame, &mut self.instances);
        if self.is_there(machine, directory, &numbers, to, behind) {
            return Ok(());
        }
        while let Err(error) = self.fetch(machine, directory, region, &numbers, to) {
            if !self.is_overcome(&error, self.device_of(to)) {
                return Err(error);
            }
            // A device that was lost may have been the last to have the box. An instance keeps its own.
            if to == HOME {
                frame = self.directories[directory].find(region);
            }
        }
        // Not looked at again: one of these copies that failed by now fails who wants it, as it would
        // a moment later.
        for &number in &numbers {
            let holder = self.directories[directory].pieces[number].holder(to);
            let ready = &holder.expect("it was fetched").ready;
            self.lanes.copies(ready).for_each(|event| behind.add(event));
        }
        self.directories[directory].merge(region, &numbers, frame, &mut self.instances);
        Ok(())
    }

    /// Whether all pieces are held there, or on their way.
    #[inline]
    fn is_there(
        &mut self,
        machine: &Machine,
        directory: u32,
        numbers: &[u32],
        to: u32,
        behind: &mut Events,
    ) -> bool {
        let mut there = true;
        for &number in numbers {
            let ready = |state: &Self| {
                let holder = state.directories[directory].pieces[number].holder(to)?;
                let copies = state.lanes.copies(&holder.ready);
                Some(copies.collect::<SmallVec<[Event; 2]>>())
            };
            match ready(self) {
                Some(copies) if copies.is_empty() => {}
                None => there = false,
                Some(_) => {
                    self.settle(machine, directory, number);
                    match ready(self) {
                        Some(copies) => copies.into_iter().for_each(|event| behind.add(event)),
                        None => there = false,
                    }
                }
            }
        }
        there
    }

    /// Enqueues the copies of what is not there.
    fn fetch(
        &mut self,
        machine: &Machine,
        directory: u32,
        region: &Region,
        numbers: &[u32],
        to: u32,
    ) -> Result<(), DeviceError> {
        let device = self.device_of(to);
        let mut direct: Vec<(u32, u32)> = Vec::new();
        let mut by_host: Vec<(u32, u32)> = Vec::new();
        for &number in numbers {
            if self.directories[directory].pieces[number]
                .holder(to)
                .is_some()
            {
                continue;
            }
            self.settle(machine, directory, number);
            if self.directories[directory].pieces[number]
                .holders
                .is_empty()
            {
                return Err(self.lost(directory, number));
            }
            if let Some(from) = self.source(machine, directory, number, device) {
                direct.push((from, number));
            } else if let Some(from) = self.source(machine, directory, number, HOST) {
                by_host.push((from, number));
                direct.push((HOME, number));
            } else {
                return Err(DeviceError::NoAccess(HOST, device));
            }
        }
        for (pairs, to) in [(&mut by_host, HOME), (&mut direct, to)] {
            pairs.sort_unstable();
            for group in pairs.chunk_by(|one, other| one.0 == other.0) {
                let numbers: Numbers = group.iter().map(|pair| pair.1).collect();
                self.carry(machine, directory, group[0].0, to, &numbers, region)?;
            }
        }
        Ok(())
    }

    /// Whether another way may be found after the error: what is in the way is noted.
    fn is_overcome(&mut self, error: &DeviceError, to: DeviceId) -> bool {
        match *error {
            DeviceError::Lost(device, _) if device != to && device != HOST => {
                let room = &self.rooms[usize::from(device.index())];
                if room.lost {
                    return false;
                }
                self.lose(device);
                true
            }
            DeviceError::NoAccess(..) => std::mem::take(&mut self.barred),
            _ => false,
        }
    }

    /// Where a region begins in an instance, and how many bytes its indices are apart there.
    fn place(
        &self,
        directory: u32,
        at: u32,
        region: &Region,
    ) -> (DevicePointer, SmallVec<[u64; 4]>) {
        let (pointer, strides, origin): (_, &[u64], &[u64]) = if at == HOME {
            let directory = &self.directories[directory];
            let pointer = DevicePointer {
                device: HOST,
                address: directory.address,
            };
            (pointer, &directory.strides, &[])
        } else {
            let view = &self.instances[at].view;
            (view.pointer, &view.strides, &view.origin)
        };
        let mut offset = 0;
        let mut apart = SmallVec::new();
        for (axis, span) in region.spans().iter().enumerate() {
            let origin = origin.get(axis).copied().unwrap_or(0);
            offset += (span.start() - origin) * strides[axis];
            apart.push(span.step() * strides[axis]);
        }
        (pointer.offset(offset), apart)
    }

    /// Enqueues copies of pieces, all parts of `whole`, which `from` holds and `to` does not.
    pub(super) fn carry(
        &mut self,
        machine: &Machine,
        directory: u32,
        from: u32,
        to: u32,
        numbers: &[u32],
        whole: &Region,
    ) -> Result<Event, DeviceError> {
        let (source, target) = (self.device_of(from), self.device_of(to));
        let stream = match self.lanes.open(machine, source, target) {
            Err(error @ DeviceError::NoAccess(..)) => {
                self.barred |= self.lanes.bar(source, target);
                return Err(error);
            }
            opened => opened?,
        };
        let device = machine.device(stream.device);
        let (mut before, mut chain) = (Events::new(), Events::new());
        let mut regions = Vec::with_capacity(numbers.len());
        for &number in numbers {
            let piece = &mut self.directories[directory].pieces[number];
            let holder = piece.holder(from).expect("it holds the piece");
            before.join(&holder.ready);
            self.lanes
                .copies(&holder.ready)
                .for_each(|event| chain.add(event));
            if to == HOME {
                piece.home.prune(machine);
                before.join(&piece.home);
            } else if self.instances[to].adopted {
                piece.own.prune(machine);
                before.join(&piece.own);
            }
            regions.push(piece.region.clone());
        }
        if to != HOME {
            let instance = &mut self.instances[to];
            instance.born.prune(machine);
            instance.uses.prune(machine);
            before.join(&instance.users());
        }
        for event in before.iter().filter(|event| event.stream != stream) {
            device.follow(stream, event)?;
        }
        let regions = coalesce(regions, whole);
        let copied = regions.iter().try_for_each(|region| {
            let (from, from_strides) = self.place(directory, from, region);
            let (to, to_strides) = self.place(directory, to, region);
            let extents: SmallVec<[u64; 4]> = region.spans().iter().map(Span::count).collect();
            let item = self.directories[directory].item;
            // SAFETY: the host's buffer is kept until the event below is complete, which the pieces'
            // lists of events have; all who use it meanwhile are in order by the same lists.
            unsafe {
                device.copy_strided(from, &from_strides, to, &to_strides, &extents, item, stream)
            }
        });
        if let Err(DeviceError::NoAccess(..)) = copied {
            self.barred |= self.lanes.bar(source, target);
        }
        let event = device.record(stream)?;
        self.lanes.note(source, target, event);
        // Whoever is about to write where it is copied from has to be behind it, or it is no copy.
        let copied = copied.and_then(|()| match self.instances.get(from) {
            Some(instance) => {
                let keepers = instance.keepers.iter();
                let mut keepers = keepers.filter(|it| it.stream != stream && it.keeps(&regions));
                keepers.try_for_each(|it| machine.device(it.stream.device).follow(it.stream, event))
            }
            None => Ok(()),
        });
        let is_adopted = |at: u32| self.instances.get(at).is_some_and(|it| it.adopted);
        let (from_own, to_own) = (is_adopted(from), is_adopted(to));
        for &number in numbers {
            let piece = &mut self.directories[directory].pieces[number];
            if from == HOME || (to == HOME && copied.is_err()) {
                piece.home.add(event);
            }
            if from_own || (to_own && copied.is_err()) {
                piece.own.add(event);
            }
            if copied.is_err() {
                continue;
            }
            let mut ready = chain.clone();
            ready.add(event);
            piece.holders.push(Holder { at: to, ready });
        }
        if from != HOME && !from_own {
            self.instances[from].uses.add(event);
        }
        if to != HOME {
            let instance = &mut self.instances[to];
            if copied.is_err() {
                if !to_own {
                    instance.uses.add(event);
                }
            } else {
                instance.valid += numbers.len() as u32;
                self.rerank(to);
            }
        }
        copied?;
        if self.observed {
            let at = Instant::now();
            for region in regions {
                self.told.push(Moved {
                    storage: self.directories[directory].storage,
                    bytes: self.directories[directory].bytes(&region),
                    region,
                    from: source,
                    to: target,
                    source: self.frame_of(directory, from).clone(),
                    target: self.frame_of(directory, to).clone(),
                    event: Some(event),
                    at,
                });
            }
        }
        Ok(event)
    }

    /// The box of an instance.
    pub(super) fn frame_of(&self, directory: u32, at: u32) -> &Region {
        let directory = &self.directories[directory];
        match self.instances.get(at) {
            Some(instance) => &directory.frames[instance.frame].region,
            None => &directory.whole,
        }
    }

    /// Has the stream wait for copies, whose failure is its failure too, and be behind what used the
    /// memory before.
    pub(super) fn put_behind(
        &self,
        machine: &Machine,
        stream: Stream,
        copies: &Events,
        users: &Events,
    ) -> Result<(), DeviceError> {
        let device = machine.device(stream.device);
        for event in copies.iter().filter(|event| event.stream != stream) {
            device.wait(stream, event)?;
        }
        let mut users = users.iter();
        users.try_for_each(|event| {
            let passed = event.stream == stream || !is_pending(machine, event);
            if passed {
                Ok(())
            } else {
                device.follow(stream, event)
            }
        })
    }
}

impl Lanes {
    /// Nothing is copied from the one accelerator to the other from now on. Whether that is news.
    fn bar(&mut self, from: DeviceId, to: DeviceId) -> bool {
        from != HOST && to != HOST && from != to && self.barred.insert((from, to))
    }

    fn note(&mut self, from: DeviceId, to: DeviceId, event: Event) {
        if let Some(lane) = self.lanes.get_mut(&(from, to)) {
            lane.last = Some(event);
        }
    }
}
