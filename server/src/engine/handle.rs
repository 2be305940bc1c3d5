//! The outside of the engine: starts its thread, checks and queues requests, stops it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use config::SchedulingPolicy;
use kernels::Backend;
use models::Model;
use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::mask_workers::Constraints;
use super::stats::StatsCell;
use super::{
    Batch, Engine, EngineError, EngineInfo, EngineObserver, EngineOptions, EngineStats, GenerateRequest,
    ModelRunner, Scheduler, SequenceId, StepOutput, SubmitError, TokenEvent,
};

/// What an engine runs: made together, on its thread.
pub type Loaded = (Box<dyn Backend>, Box<dyn Model>);

/// A running engine. Clones are the same engine; it stops when the last one is dropped and its work is done, or at
/// [`shutdown`](Self::shutdown).
#[derive(Debug, Clone)]
pub struct EngineHandle {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    info: EngineInfo,
    /// Sequences that may be in the engine at a time, waiting and running.
    max_in_flight: usize,
    commands: Sender<Command>,
    status: Arc<Status>,
    accepts: AtomicBool,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What the engine's thread and its handles both see.
#[derive(Debug, Default)]
pub(super) struct Status {
    pub(super) stats: StatsCell,
    /// Sequences that were submitted and have not ended.
    in_flight: AtomicUsize,
    /// Whether the engine's thread has ended, in whatever way.
    ended: AtomicBool,
    /// Notified when `in_flight` falls to 0, and when the thread ends.
    idle: Notify,
}

/// What a handle sends to the engine's thread.
pub(super) enum Command {
    /// Queue these, in order.
    Submit(Vec<Submission>),
    /// Abort everything and end.
    Shutdown,
}

/// A checked request on its way.
pub(super) struct Submission {
    pub(super) request: GenerateRequest,
    pub(super) events: UnboundedSender<TokenEvent>,
    pub(super) submitted: Instant,
}

impl Status {
    /// Takes `count` places, unless more than `limit` would be in use; then says how many are.
    fn reserve(&self, count: usize, limit: usize) -> Result<(), usize> {
        let add = |used: usize| used.checked_add(count).filter(|&sum| sum <= limit);
        self.in_flight.fetch_update(Ordering::SeqCst, Ordering::SeqCst, add).map(|_| ())
    }

    /// Gives `count` places back.
    pub(super) fn release(&self, count: usize) {
        if self.in_flight.fetch_sub(count, Ordering::AcqRel) == count {
            self.idle.notify_waiters();
        }
    }
}

/// Marks the engine's end, also when its thread panics: submissions fail from then on, and waiters wake up.
struct EndGuard(Arc<Status>);

impl Drop for EndGuard {
    fn drop(&mut self) {
        if thread::panicking() {
            tracing::error!("the engine died; its requests are lost");
        }
        self.0.stats.running.store(0, Ordering::Relaxed);
        self.0.ended.store(true, Ordering::Release);
        self.0.idle.notify_waiters();
    }
}

impl EngineHandle {
    /// Starts an engine. `load` runs on the engine's thread, which keeps what it returns; this call waits for it.
    ///
    /// # Errors
    /// What `load` returns, sizes that do not fit the model, or too little memory.
    pub fn start<E>(
        options: EngineOptions,
        observer: Box<dyn EngineObserver>,
        load: impl FnOnce() -> Result<Loaded, E> + Send + 'static,
    ) -> Result<Self, EngineError>
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let (commands, inbox) = channel();
        let (loaded, result) = sync_channel(1);
        let status = Arc::new(Status::default());
        let guard = EndGuard(Arc::clone(&status));
        let thread = thread::Builder::new().name("engine".to_owned()).spawn(move || {
            // Dropped after the engine: when `ended` is seen, the device's memory is free again.
            let guard = guard;
            let loading = load().map_err(|error| EngineError::Load(error.into()));
            let engine = loading.and_then(|(backend, model)| {
                build(options, backend, model, observer, Arc::clone(&guard.0), inbox)
            });
            match engine {
                Ok((engine, info)) => {
                    if loaded.send(Ok(info)).is_ok() {
                        engine.serve();
                    }
                }
                Err(error) => {
                    let _ = loaded.send(Err(error));
                }
            }
        })?;
        let info = result.recv().map_err(|_| EngineError::Died)??;
        let max_in_flight = options.max_num_seqs.saturating_add(options.max_num_queued_reqs);
        let shared = Shared {
            info,
            max_in_flight,
            commands,
            status,
            accepts: AtomicBool::new(true),
            thread: Mutex::new(Some(thread)),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Queues one sequence. Its events arrive on the returned channel; dropping the channel cancels the sequence and
    /// frees its memory.
    ///
    /// # Errors
    /// See [`SubmitError`].
    pub fn submit(&self, request: GenerateRequest) -> Result<UnboundedReceiver<TokenEvent>, SubmitError> {
        self.submit_all(vec![request])?.pop().ok_or(SubmitError::ShuttingDown)
    }

    /// Queues all of these sequences, or none. The channels are in the order of the requests.
    ///
    /// # Errors
    /// See [`SubmitError`].
    pub fn submit_all(
        &self,
        requests: Vec<GenerateRequest>,
    ) -> Result<Vec<UnboundedReceiver<TokenEvent>>, SubmitError> {
        let Shared { info, max_in_flight, commands, status, accepts, .. } = &*self.shared;
        for request in &requests {
            check(request, info)?;
        }
        let is_over = || !accepts.load(Ordering::SeqCst) || !self.is_alive();
        if is_over() {
            return Err(SubmitError::ShuttingDown);
        }
        let count = requests.len();
        status.reserve(count, *max_in_flight).map_err(|in_flight| SubmitError::Overloaded {
            queued: status.stats.snapshot(in_flight).waiting,
        })?;
        // Again, now that the places are taken: either this sees that the engine drains, or who waits for it to be idle
        // sees the places.
        if is_over() {
            status.release(count);
            return Err(SubmitError::ShuttingDown);
        }
        let submitted = Instant::now();
        let (submissions, channels) = requests
            .into_iter()
            .map(|request| {
                let (events, channel) = unbounded_channel();
                (Submission { request, events, submitted }, channel)
            })
            .unzip();
        commands.send(Command::Submit(submissions)).map_err(|_| {
            status.release(count);
            SubmitError::ShuttingDown
        })?;
        Ok(channels)
    }

    /// What runs, and how large it is.
    pub fn info(&self) -> &EngineInfo {
        &self.shared.info
    }

    /// What the engine does now.
    pub fn stats(&self) -> EngineStats {
        let status = &self.shared.status;
        status.stats.snapshot(status.in_flight.load(Ordering::Acquire))
    }

    /// Whether the engine's thread runs. It ends at [`shutdown`](Self::shutdown), or by a bug.
    pub fn is_alive(&self) -> bool {
        !self.shared.status.ended.load(Ordering::Acquire)
    }

    /// Whether [`drain`](Self::drain) or [`shutdown`](Self::shutdown) was called.
    pub fn is_draining(&self) -> bool {
        !self.shared.accepts.load(Ordering::Acquire)
    }

    /// Takes no more requests; those in the engine go on.
    pub fn drain(&self) {
        self.shared.accepts.store(false, Ordering::SeqCst);
    }

    /// Waits until no request is in the engine, or it has died.
    pub async fn idle(&self) {
        let status = &self.shared.status;
        loop {
            let mut notified = std::pin::pin!(status.idle.notified());
            // Registered before looking, so that a change in between is not missed.
            notified.as_mut().enable();
            if status.in_flight.load(Ordering::SeqCst) == 0 || !self.is_alive() {
                return;
            }
            notified.await;
        }
    }

    /// Aborts what is left ([`FinishReason::Aborted`](super::FinishReason::Aborted)) and waits for the thread's end,
    /// which takes as long as one step.
    pub fn shutdown(&self) {
        self.drain();
        // Fails if the thread has ended already.
        let _ = self.shared.commands.send(Command::Shutdown);
        let thread = self.shared.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // A panic has been reported where it happened.
            let _ = thread.join();
        }
    }
}

/// Allocates everything. Runs on the engine's thread.
fn build(
    options: EngineOptions,
    backend: Box<dyn Backend>,
    model: Box<dyn Model>,
    observer: Box<dyn EngineObserver>,
    status: Arc<Status>,
    commands: Receiver<Command>,
) -> Result<(Engine, EngineInfo), EngineError> {
    let (runner, sizes) = ModelRunner::new(backend, model, &options)?;
    let info = runner.info(sizes, &options);
    status.stats.kv_blocks_total.store(sizes.kv_blocks, Ordering::Relaxed);
    let engine = Engine {
        scheduler: Scheduler::new(sizes.limits, options.features(), sizes.kv_blocks),
        runner,
        constraints: Constraints::default(),
        clients: std::collections::BTreeMap::new(),
        observer,
        status,
        commands,
        max_model_len: sizes.max_model_len,
        hidden_size: info.hidden_size,
        next_id: SequenceId(0),
        batch: Batch::default(),
        output: StepOutput::default(),
        updates: Vec::new(),
    };
    Ok((engine, info))
}

/// Holds a request to the contract that the engine's thread relies on.
fn check(request: &GenerateRequest, info: &EngineInfo) -> Result<(), SubmitError> {
    let GenerateRequest { id, prompt, sampling, stop, scheduling, .. } = request;
    let invalid = |what: &str| Err(SubmitError::Invalid(format!("request {id}: {what}")));
    if prompt.is_empty() {
        return invalid("the prompt is empty");
    }
    if let Some(token) = prompt.iter().find(|&&token| token as usize >= info.vocab_size) {
        return invalid(&format!("token {token} is outside the vocabulary of {}", info.vocab_size));
    }
    let needed = prompt.len() + stop.max_tokens.min(1);
    if needed > info.max_model_len {
        return Err(SubmitError::TooLong { needed, capacity: info.max_model_len });
    }
    let is_in_vocabulary = |&token: &u32| (token as usize) < info.vocab_size;
    if sampling.allowed_token_ids.as_ref().is_some_and(|allowed| !allowed.iter().any(is_in_vocabulary)) {
        return invalid("allowed_token_ids allows no token");
    }
    if sampling.temperature.is_nan() || sampling.temperature < 0.0 {
        return invalid("the temperature is negative or NaN");
    }
    if scheduling.priority != 0 && info.scheduling_policy != SchedulingPolicy::Priority {
        return invalid("it has a priority, and requests are served in order of arrival");
    }
    Ok(())
}
