//! Launches that a stream is given together.
//!
//! The driver takes 4 µs for a launch and an event behind it, most of it once for what it is given at once.
//! Eight kernels in a graph, each with an event of its own behind it, take 1.4 µs each, new arguments and
//! events included (one H100, driver 580, in a virtual machine; see `benchmarks/README.md`). So launches
//! that are [deferred](charioteer::machine::defer) go to the driver as a graph: a chain of as many kernels,
//! where behind each kernel its event is recorded, beside the next kernel. It is made once for a stream and a
//! length, and then only told which kernels, arguments and events it is about; the driver has copied these
//! when it has launched it. Events are as good as recorded ones: complete when their kernel is, whatever comes
//! after it.
//!
//! A graph refers to the code of its kernels until it is told of others, so it keeps that loaded. Code that is
//! another library's it cannot keep; kernels of these are not deferred.
//!
//! To make a graph takes the driver 0.1 ms and more, so a stream has to have had some launches before. What
//! graphs cannot do (the driver says so before anything is enqueued) is launched one by one, on that stream
//! from then on.

use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys;
use smallvec::SmallVec;

use crate::driver::{
    Answer, CUfunction, CUstream, Context, Handle, Library, Recorded, check, confirms, launch,
};
use crate::kernel::Dimensions;

/// How many are given together at most.
pub(crate) const MOST: usize = 8;

/// So many launches of a stream are made one by one before a graph is worth its making.
const FIRST: u32 = 32;

/// A kernel and its arguments.
pub(crate) struct Launch {
    pub(crate) function: Handle<CUfunction>,
    /// What it is of.
    pub(crate) code: Arc<Library>,
    pub(crate) dimensions: Dimensions,
    pub(crate) words: SmallVec<[u64; 8]>,
    /// Where the value of each parameter begins.
    pub(crate) starts: SmallVec<[u16; 8]>,
}

/// Pointers to the values of parameters, which the driver reads only.
pub(crate) fn pointers(words: &[u64], starts: &[u16]) -> SmallVec<[*mut c_void; 16]> {
    let base = words.as_ptr();
    let at = |start: &u16| base.wrapping_add(usize::from(*start));
    starts.iter().map(|it| at(it).cast_mut().cast()).collect()
}

/// One of those that are given together, and the event behind it.
pub(crate) type Entry = (Launch, Option<Arc<Recorded>>);

/// The graphs of a stream.
#[derive(Default)]
pub(crate) struct Batches {
    /// By their lengths.
    chains: [Option<Chain>; MOST],
    launched: u32,
    /// The driver refused a graph.
    refused: bool,
    /// How many graphs were launched.
    graphs: u64,
}

impl Batches {
    /// How many graphs were launched.
    pub(crate) fn graphs(&self) -> u64 {
        self.graphs
    }

    /// Enqueues launches, each with its event behind it.
    ///
    /// # Safety
    /// As of [`launch`], for each.
    pub(crate) unsafe fn submit(
        &mut self,
        context: &Context,
        stream: Handle<CUstream>,
        entries: &[Entry],
    ) -> Answer<()> {
        let _entered = context.enter()?;
        let count = u32::try_from(entries.len()).unwrap_or(u32::MAX);
        self.launched = self.launched.saturating_add(count);
        if self.launched >= FIRST && !self.refused && !confirms() {
            match self.submit_graph(stream, entries) {
                Ok(true) => {
                    self.graphs += 1;
                    return Ok(());
                }
                Ok(false) => {}
                Err(_) => self.refused = true,
            }
        }
        for (it, event) in entries {
            let Dimensions {
                grid,
                block,
                shared,
            } = it.dimensions;
            let mut arguments = pointers(&it.words, &it.starts);
            // SAFETY: as the caller says.
            unsafe { launch(it.function, grid, block, shared, stream, &mut arguments) }?;
            if let Some(event) = event {
                event.record(stream)?;
            }
        }
        Ok(())
    }

    /// The same as one graph; false if not all have an event, or they are too many. After an error nothing is
    /// enqueued.
    fn submit_graph(&mut self, stream: Handle<CUstream>, entries: &[Entry]) -> Answer<bool> {
        if entries.iter().any(|(_, event)| event.is_none()) {
            return Ok(false);
        }
        let Some(place) = (entries.len().checked_sub(1)).and_then(|at| self.chains.get_mut(at))
        else {
            return Ok(false);
        };
        match place {
            Some(chain) => chain.set(entries)?,
            None => *place = Some(Chain::new(entries)?),
        }
        let chain = place.as_ref().expect("it was just made");
        // SAFETY: the graph lives, and is launched on this stream alone, so that it never waits for itself.
        check(unsafe { sys::cuGraphLaunch(chain.executable, stream.0) })?;
        Ok(true)
    }
}

/// A graph of kernels one after the other, an event behind each.
struct Chain {
    graph: sys::CUgraph,
    executable: sys::CUgraphExec,
    /// The nodes of each kernel and of its event.
    nodes: SmallVec<[(sys::CUgraphNode, sys::CUgraphNode); MOST]>,
    /// Of the kernels that it is about.
    code: SmallVec<[Arc<Library>; MOST]>,
    /// Of those that it was made of, which the graph itself refers to.
    _made_of: SmallVec<[Arc<Library>; MOST]>,
}

// SAFETY: the driver's handles belong to no thread; of a graph one thread at a time has the only reference.
unsafe impl Send for Chain {}

/// What the driver copies of a launch. The arguments are `pointers`.
fn parameters(launch: &Launch, pointers: &mut [*mut c_void]) -> sys::CUDA_KERNEL_NODE_PARAMS {
    let Dimensions {
        grid,
        block,
        shared,
    } = launch.dimensions;
    sys::CUDA_KERNEL_NODE_PARAMS {
        func: launch.function.0,
        gridDimX: grid[0],
        gridDimY: grid[1],
        gridDimZ: grid[2],
        blockDimX: block[0],
        blockDimY: block[1],
        blockDimZ: block[2],
        sharedMemBytes: shared,
        kernelParams: pointers.as_mut_ptr(),
        extra: ptr::null_mut(),
        kern: ptr::null_mut(),
        ctx: ptr::null_mut(),
    }
}

impl Chain {
    /// Of these launches; all have an event.
    fn new(entries: &[Entry]) -> Answer<Self> {
        let code = || entries.iter().map(|it| Arc::clone(&it.0.code)).collect();
        let mut chain = Self {
            graph: ptr::null_mut(),
            executable: ptr::null_mut(),
            nodes: SmallVec::new(),
            code: code(),
            _made_of: code(),
        };
        // SAFETY: a place for the handle.
        check(unsafe { sys::cuGraphCreate(&raw mut chain.graph, 0) })?;
        for (launch, event) in entries {
            let event = event.as_ref().expect("all have one");
            let mut arguments = pointers(&launch.words, &launch.starts);
            let parameters = parameters(launch, &mut arguments);
            let (mut kernel, mut record) = (ptr::null_mut(), ptr::null_mut());
            let before: SmallVec<[_; 1]> = chain.nodes.last().map(|it| it.0).into_iter().collect();
            // SAFETY: places for the handles; as many nodes before as it says; the arguments are those that
            // the function takes, and the driver copies them.
            unsafe {
                check(sys::cuGraphAddKernelNode_v2(
                    &raw mut kernel,
                    chain.graph,
                    before.as_ptr(),
                    before.len(),
                    &raw const parameters,
                ))?;
                check(sys::cuGraphAddEventRecordNode(
                    &raw mut record,
                    chain.graph,
                    &raw const kernel,
                    1,
                    event.handle(),
                ))?;
            }
            chain.nodes.push((kernel, record));
        }
        // SAFETY: a place for the handle; the graph was just made.
        check(unsafe {
            sys::cuGraphInstantiateWithFlags(&raw mut chain.executable, chain.graph, 0)
        })?;
        Ok(chain)
    }

    /// It is of these launches from now on, which are as many; what was launched before stays as it was.
    fn set(&mut self, entries: &[Entry]) -> Answer<()> {
        for (at, (launch, event)) in entries.iter().enumerate() {
            let (kernel, record) = self.nodes[at];
            let event = event.as_ref().expect("all have one");
            let mut arguments = pointers(&launch.words, &launch.starts);
            let parameters = parameters(launch, &mut arguments);
            // SAFETY: nodes of the graph that this was made of; the arguments are those that the function
            // takes, and the driver copies them.
            unsafe {
                check(sys::cuGraphExecKernelNodeSetParams_v2(
                    self.executable,
                    kernel,
                    &raw const parameters,
                ))?;
                check(sys::cuGraphExecEventRecordNodeSetEvent(
                    self.executable,
                    record,
                    event.handle(),
                ))?;
            }
            if !Arc::ptr_eq(&self.code[at], &launch.code) {
                self.code[at] = Arc::clone(&launch.code);
            }
        }
        Ok(())
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        // SAFETY: nobody else has them. What is under way of it the driver frees when it is done. A driver that
        // has ended refuses.
        unsafe {
            if !self.executable.is_null() {
                let _ = sys::cuGraphExecDestroy(self.executable);
            }
            if !self.graph.is_null() {
                let _ = sys::cuGraphDestroy(self.graph);
            }
        }
    }
}
