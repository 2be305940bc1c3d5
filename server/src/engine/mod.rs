//! The engine: continuous batching over one model, on a thread of its own.
//!
//! `EngineHandle` is the outside: requests in, `TokenEvent`s out, from any thread. Inside, `Engine::step` is all
//! there is: `Scheduler` decides who runs, `ModelRunner` computes it,
//! the scheduler takes note, clients hear of it. Device handles never leave the engine's thread.

mod block_manager;
mod constraint;
mod decode_graphs;
mod error;
mod handle;
mod mask_workers;
mod ngram;
mod offline;
mod options;
mod pooling;
mod prefix_cache;
mod request;
mod runner;
mod sampler;
mod scheduler;
mod sequence;
mod stats;
mod token_counts;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

pub use constraint::{Canceller, Constraint, ConstraintError, Grammar, Progress, SharedGrammar, TokenMask};
pub use error::EngineError;
pub use handle::{EngineHandle, Loaded};
pub use ngram::NgramLookup;
pub use offline::{OfflineBatch, OfflineSizes};
pub(crate) use options::check_model_len;
pub use options::{EngineInfo, EngineOptions, KvCacheSize, LinearKernel};
pub use request::{
    FinishReason, GenerateRequest, Pooling, Sampling, Scheduling, StopConditions, SubmitError, TokenEvent,
    Usage,
};
pub use stats::{EngineObserver, EngineStats, SequenceReport, Timing};

use handle::{Command, Status, Submission};
use mask_workers::Constraints;
use runner::{ModelRunner, StepOutput};
use scheduler::{Batch, NewToken, Scheduler, Speculated, Update};
use sequence::{PromptDone, Sequence, SequenceId};
use stats::Clock;

/// The engine's own side: everything that lives on its thread.
struct Engine {
    scheduler: Scheduler,
    runner: ModelRunner,
    constraints: Constraints,
    /// Who listens to each sequence.
    clients: BTreeMap<SequenceId, Client>,
    observer: Box<dyn EngineObserver>,
    status: Arc<Status>,
    commands: Receiver<Command>,
    max_model_len: usize,
    hidden_size: usize,
    next_id: SequenceId,
    // The current step; kept for their memory.
    batch: Batch,
    output: StepOutput,
    updates: Vec<Update>,
}

/// The other end of a sequence.
struct Client {
    request_id: String,
    events: UnboundedSender<TokenEvent>,
    clock: Clock,
}

/// What the engine does after looking at its commands.
enum Next {
    Step,
    Exit,
}

impl Engine {
    /// Serves until it is told to stop, or nobody is left who could submit anything.
    fn serve(mut self) {
        while let Next::Step = self.receive() {
            self.step();
        }
        self.abort_all();
    }

    /// One step: who runs, run it, take note, tell. Where the device computes by itself, clients hear of a step while the
    /// next one runs.
    fn step(&mut self) {
        self.drop_cancelled();
        self.scheduler.schedule(&mut self.batch);
        if self.batch.items.is_empty() {
            self.tell();
            return self.publish();
        }
        self.note_scheduled();
        self.runner.launch(self.scheduler.running(), &self.batch);
        self.tell();
        self.runner.finish(self.scheduler.running(), &self.batch, &mut self.constraints, &mut self.output);
        self.follow_grammars();
        let width = self.hidden_size;
        for (index, hidden) in self.output.hidden.drain(..) {
            if let Some(pooled) = self.scheduler.running_mut()[index].pooled_mut() {
                pooled.add(&hidden, width);
            }
        }
        for (index, logprobs) in self.output.prompt_logprobs.drain(..) {
            self.scheduler.running_mut()[index].score_prompt(logprobs);
        }
        self.scheduler.commit(&self.batch, &self.output.tokens, &mut self.updates);
        self.publish();
        self.observer.step(self.batch.tokens());
        if !self.runner.is_asynchronous() || self.scheduler.is_idle() {
            self.tell();
        }
    }

    /// Takes new work; waits for it when there is none, so an idle engine uses no processor.
    fn receive(&mut self) -> Next {
        loop {
            let command = if self.scheduler.is_idle() {
                self.commands.recv().map_err(|_| TryRecvError::Disconnected)
            } else {
                self.commands.try_recv()
            };
            match command {
                Ok(Command::Submit(submissions)) => submissions.into_iter().for_each(|s| self.accept(s)),
                Ok(Command::Shutdown) => return Next::Exit,
                Err(TryRecvError::Disconnected) if self.scheduler.is_idle() => return Next::Exit,
                Err(TryRecvError::Disconnected | TryRecvError::Empty) => return Next::Step,
            }
        }
    }

    /// Queues a sequence that [`EngineHandle`] has checked.
    fn accept(&mut self, submission: Submission) {
        let Submission { request, events, submitted } = submission;
        let id = self.next_id;
        self.next_id = SequenceId(id.0 + 1);
        let client = Client { request_id: request.id.clone(), events, clock: Clock::new(submitted) };
        self.clients.insert(id, client);
        if let Some(grammar) = &request.sampling.grammar {
            self.constraints.begin(id, grammar.clone());
        }
        self.scheduler.add(Sequence::new(id, request, self.max_model_len));
    }

    /// Moves the grammars of constrained sequences on by what was drawn, so that their next masks are computed while
    /// the step is told of and the next one runs. A sequence whose grammar ends there ends with this token.
    fn follow_grammars(&mut self) {
        let mut draws = 0;
        for item in &self.batch.items {
            let first_draw = draws;
            draws += item.draws();
            let sequence = &mut self.scheduler.running_mut()[item.index];
            if !item.samples || sequence.sampling().grammar.is_none() {
                continue;
            }
            // Who follows a grammar is not drafted for, so this is the only draw.
            match self.constraints.follow(sequence.id(), self.output.tokens[first_draw]) {
                Ok(Progress::Open) => {}
                Ok(Progress::Complete) => sequence.end_with_next(FinishReason::GrammarEnd),
                Err(error) => {
                    if let Some(client) = self.clients.get(&sequence.id()) {
                        tracing::warn!(request = client.request_id, "a grammar is given up: {error}");
                    }
                    sequence.end_with_next(FinishReason::GrammarLost);
                }
            }
        }
    }

    /// Drops the sequences whose clients went away.
    fn drop_cancelled(&mut self) {
        let is_gone = |(&id, client): (&SequenceId, &Client)| client.events.is_closed().then_some(id);
        let gone: Vec<SequenceId> = self.clients.iter().filter_map(is_gone).collect();
        for id in gone {
            if let Some(sequence) = self.scheduler.remove(id) {
                self.end(id, None, sequence.usage(), Instant::now());
            }
        }
    }

    /// Records what the plan for the next step did to sequences.
    fn note_scheduled(&mut self) {
        let now = Instant::now();
        for id in &self.batch.admitted {
            if let Some(client) = self.clients.get_mut(id) {
                client.clock.scheduled(now);
            }
        }
        for id in &self.batch.preempted {
            if let Some(client) = self.clients.get(id) {
                tracing::debug!(request = client.request_id, "preempted: the KV cache is full");
            }
        }
        let stats = &self.status.stats;
        stats.preemptions.fetch_add(self.batch.preempted.len() as u64, Relaxed);
        stats.prefix_cache_queries.fetch_add(self.batch.prefix_queries as u64, Relaxed);
        stats.prefix_cache_hits.fetch_add(self.batch.prefix_hits as u64, Relaxed);
    }

    /// Makes the state after a step visible. Before its events: who hears of a sequence's end finds its blocks free.
    fn publish(&self) {
        let stats = &self.status.stats;
        stats.running.store(self.scheduler.running().len(), Relaxed);
        stats.kv_blocks_used.store(self.scheduler.blocks().used(), Relaxed);
        if !self.batch.items.is_empty() {
            stats.steps.fetch_add(1, Relaxed);
        }
        let prompt_tokens: usize =
            self.updates.iter().filter_map(|update| Some(update.prompt.as_ref()?.tokens)).sum();
        stats.prompt_tokens.fetch_add(prompt_tokens as u64, Relaxed);
        let generated = self.updates.iter().filter(|update| update.token.is_some()).count();
        stats.generation_tokens.fetch_add(generated as u64, Relaxed);
        let Speculated { drafts, tokens, accepted } = self.scheduler.speculated();
        stats.spec_decode_drafts.store(drafts, Relaxed);
        stats.spec_decode_draft_tokens.store(tokens, Relaxed);
        stats.spec_decode_accepted_tokens.store(accepted, Relaxed);
    }

    /// Tells clients and the observer what the step brought.
    fn tell(&mut self) {
        let now = Instant::now();
        let mut ended = Vec::new();
        for update in self.updates.drain(..) {
            let Some(client) = self.clients.get_mut(&update.id) else { continue };
            // A send fails only when the client went away; the next step drops the sequence.
            if let Some(PromptDone { tokens: _, cached_tokens, logprobs, embedding }) = update.prompt {
                let _ = client.events.send(TokenEvent::Prompt { cached_tokens, logprobs });
                if let Some(embedding) = embedding {
                    let _ = client.events.send(TokenEvent::Embedding(embedding));
                }
            }
            if let Some(NewToken { id, draw }) = update.token {
                client.clock.token(now, self.observer.as_mut());
                let logprobs = self.output.drawn[draw].logprobs.take();
                let last = update.finished.map(|(reason, _)| reason);
                let _ = client.events.send(TokenEvent::Token { id, logprobs, last });
            }
            ended.extend(update.finished.map(|(reason, usage)| (update.id, reason, usage)));
        }
        for (id, reason, usage) in ended {
            self.end(id, Some(reason), usage, now);
        }
    }

    /// Ends a sequence that the scheduler has let go; `None` when its client went away.
    fn end(&mut self, id: SequenceId, reason: Option<FinishReason>, usage: Usage, now: Instant) {
        self.constraints.remove(id);
        let Some(client) = self.clients.remove(&id) else { return };
        self.observer.ended(&SequenceReport { reason, usage, timing: client.clock.timing(now) });
        // First the place in the queue, then the news: who waits for it may submit the next request at once.
        self.status.release(1);
        match reason {
            Some(reason) => {
                let _ = client.events.send(TokenEvent::Finished { reason, usage });
            }
            None => tracing::debug!(request = client.request_id, "cancelled: the client went away"),
        }
    }

    /// Ends everything that is left.
    fn abort_all(&mut self) {
        self.tell();
        while let Ok(command) = self.commands.try_recv() {
            if let Command::Submit(submissions) = command {
                submissions.into_iter().for_each(|submission| self.accept(submission));
            }
        }
        let left: Vec<SequenceId> = self.clients.keys().copied().collect();
        for id in left {
            if let Some(sequence) = self.scheduler.remove(id) {
                self.end(id, Some(FinishReason::Aborted), sequence.usage(), Instant::now());
            }
        }
        self.batch = Batch::default();
        self.output = StepOutput::default();
        self.updates.clear();
        self.publish();
    }
}
