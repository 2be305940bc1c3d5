//! Recording launches into a CUDA graph.

use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys;

use super::context::{Context, check};
use crate::buffer::{Charge, Component, MemoryAccount};

/// An instantiated graph. Device memory that is dropped while graphs exist is freed only after the last of them, so
/// that a replay never meets memory of somebody else.
#[derive(Debug)]
pub(crate) struct Graph {
    executable: sys::CUgraphExec,
    context: Arc<Context>,
    _charge: Charge,
}

impl Graph {
    /// Records what `launches` puts on the context's stream. Nothing runs. What the device has less of afterwards goes to
    /// `account`.
    pub(crate) fn capture(
        context: &Arc<Context>,
        account: &Arc<MemoryAccount>,
        launches: &mut dyn FnMut(),
    ) -> Self {
        let stream = context.stream();
        // Launchers may grow their scratch meanwhile, which only the relaxed mode allows.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is the context's, and not capturing yet.
        check(unsafe { sys::cuStreamBeginCapture_v2(stream, mode) }, "begin capture");
        context.hold_memory();
        launches();
        let mut graph = null_mut();
        // SAFETY: begun above, on this thread.
        check(unsafe { sys::cuStreamEndCapture(stream, &raw mut graph) }, "end capture");
        let (free, _) = context.memory_info();
        let mut executable = null_mut();
        // SAFETY: the graph was just made; it is not needed once it is instantiated.
        unsafe {
            check(sys::cuGraphInstantiateWithFlags(&raw mut executable, graph, 0), "instantiate a graph");
            check(sys::cuGraphUpload(executable, stream), "upload a graph");
            check(sys::cuGraphDestroy(graph), "destroy a graph");
        }
        let (left, _) = context.memory_info();
        let charge = account.charge(Component::Graphs, free.saturating_sub(left));
        Self { executable, context: Arc::clone(context), _charge: charge }
    }

    /// Runs the graph after everything launched before.
    pub(crate) fn replay(&self) {
        // SAFETY: the graph's kernels got valid arguments when they were recorded, and the memory among them has not
        // been freed since.
        check(unsafe { sys::cuGraphLaunch(self.executable, self.context.stream()) }, "launch a graph");
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.context.synchronize();
        // SAFETY: instantiated in `capture`, and not running.
        check(unsafe { sys::cuGraphExecDestroy(self.executable) }, "destroy a graph");
        self.context.release_memory();
    }
}
