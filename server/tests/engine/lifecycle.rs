//! Starting, queueing, cancelling, stopping, dying.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kernels::Component;
use server::engine::{EngineError, EngineStats, SequenceReport, SubmitError};

use super::*;

/// A request that runs for as long as the context lasts: some hundred steps.
fn long() -> GenerateRequest {
    request(10, 900)
}

/// Waits until the engine's numbers are as wanted.
pub(crate) fn wait_for(engine: &EngineHandle, what: &str, wanted: impl Fn(EngineStats) -> bool) {
    let start = Instant::now();
    while !wanted(engine.stats()) {
        assert!(start.elapsed() < Duration::from_secs(60), "not {what}: {:?}", engine.stats());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits for a sequence's next token.
fn next_token(events: &mut UnboundedReceiver<TokenEvent>) {
    loop {
        match events.blocking_recv() {
            Some(TokenEvent::Prompt { .. }) => {}
            event => return assert!(matches!(event, Some(TokenEvent::Token { .. })), "{event:?}"),
        }
    }
}

#[test]
fn dropping_the_channel_cancels_running_and_waiting_sequences() {
    let engine = start(EngineOptions { max_num_seqs: 1, ..options(64) });
    let mut running = engine.submit(long()).unwrap();
    let waiting = engine.submit(long()).unwrap();
    let last = engine.submit(request(5, 3)).unwrap();
    next_token(&mut running);
    assert_eq!((engine.stats().running, engine.stats().waiting), (1, 2));
    assert!(engine.stats().kv_blocks_used > 0);
    drop(waiting);
    wait_for(&engine, "cancelled while waiting", |stats| stats.waiting == 1);
    drop(running);
    assert_eq!(hear(last).tokens.len(), 3);
    let stats = engine.stats();
    assert_eq!((stats.running, stats.waiting, stats.kv_blocks_used), (0, 0, 0));
    assert!(stats.generation_tokens < 900, "neither ran to its end: {stats:?}");
}

#[test]
fn the_queue_is_bounded_and_groups_go_in_whole() {
    let engine = start(EngineOptions { max_num_seqs: 1, max_num_queued_reqs: 2, ..options(64) });
    let mut running = engine.submit(long()).unwrap();
    next_token(&mut running);
    let waiting = engine.submit(long()).unwrap();
    let refused = engine.submit_all(vec![long(), long()]).unwrap_err();
    assert_eq!(refused, SubmitError::Overloaded { queued: 1 });
    let last = engine.submit(request(5, 1)).unwrap();
    assert_eq!(engine.submit(request(5, 1)).unwrap_err(), SubmitError::Overloaded { queued: 2 });
    drop((running, waiting));
    assert_eq!(hear(last).tokens.len(), 1);
    let group = engine.submit_all(vec![request(5, 1), request(6, 2), request(7, 3)]).unwrap();
    assert_eq!(group.into_iter().map(|events| hear(events).tokens.len()).collect::<Vec<_>>(), [1, 2, 3]);
}

#[test]
fn what_cannot_run_is_refused_at_once() {
    let engine = start(options(4)); // 64 tokens
    assert_eq!(engine.info().max_model_len, 64);
    let refused = |request| engine.submit(request).unwrap_err();
    assert_eq!(refused(request(64, 1)), SubmitError::TooLong { needed: 65, capacity: 64 });
    assert_eq!(refused(request(65, 0)), SubmitError::TooLong { needed: 65, capacity: 64 });
    assert!(matches!(refused(request(0, 1)), SubmitError::Invalid(_)));
    let outside = GenerateRequest { prompt: vec![1, 4096], ..request(2, 1) };
    assert_eq!(refused(outside).to_string(), "request 2+1: token 4096 is outside the vocabulary of 4096");
    let nothing = Sampling { allowed_token_ids: Some(vec![]), ..Sampling::default() };
    assert!(matches!(
        refused(GenerateRequest { sampling: nothing, ..request(2, 1) }),
        SubmitError::Invalid(_)
    ));
    assert_eq!(run(&engine, request(63, 1)).tokens.len(), 1, "and the engine goes on");
}

#[test]
fn draining_finishes_what_is_there() {
    let engine = start(options(64));
    let mut going = engine.submit(request(10, 200)).unwrap();
    next_token(&mut going);
    engine.drain();
    assert!(engine.is_draining() && engine.is_alive());
    assert_eq!(engine.submit(request(5, 1)).unwrap_err(), SubmitError::ShuttingDown);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(engine.idle());
    assert_eq!(engine.stats().running, 0);
    assert_eq!(hear(going).tokens.len(), 199, "all but the one heard before");
    runtime.block_on(engine.idle());
}

#[test]
fn who_is_taken_as_the_engine_begins_to_drain_is_served() {
    let engine = start(EngineOptions { max_num_queued_reqs: 8, ..options(64) });
    let client = || {
        let engine = engine.clone();
        std::thread::spawn(move || {
            let mut taken = Vec::new();
            loop {
                match engine.submit(request(3, 1)) {
                    Ok(events) => taken.push(events),
                    Err(SubmitError::Overloaded { .. }) => std::thread::yield_now(),
                    Err(error) => {
                        assert_eq!(error, SubmitError::ShuttingDown);
                        return taken;
                    }
                }
            }
        })
    };
    let clients: Vec<_> = (0..4).map(|_| client()).collect();
    wait_for(&engine, "busy", |stats| stats.generation_tokens > 10);
    engine.drain();
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(engine.idle());
    engine.shutdown();
    for events in clients.into_iter().flat_map(|client| client.join().unwrap()) {
        let end = hear(events).end.map(|(reason, _)| reason);
        assert_eq!(end, Some(FinishReason::Length), "nobody is forgotten or aborted");
    }
}

#[test]
fn shutdown_aborts_and_gives_the_memory_back() {
    let engine = start(EngineOptions { max_num_seqs: 1, ..options(64) });
    let memory = Arc::clone(&engine.info().memory);
    assert!(memory.bytes(Component::Unquantized) > 0 && memory.bytes(Component::KvCache) > 0);
    let mut running = engine.submit(long()).unwrap();
    let waiting = engine.submit(long()).unwrap();
    next_token(&mut running);
    engine.shutdown();
    for events in [running, waiting] {
        let (reason, usage) = hear(events).end.expect("an aborted sequence is told so");
        assert_eq!((reason, usage.prompt_tokens), (FinishReason::Aborted, 10));
    }
    assert!(!engine.is_alive());
    assert_eq!(engine.submit(long()).unwrap_err(), SubmitError::ShuttingDown);
    assert_eq!(Component::ALL.map(|component| memory.bytes(component)), [0; 6]);
    engine.shutdown(); // again: nothing happens
}

#[test]
fn dropping_the_last_handle_lets_work_finish() {
    let engine = start(options(64));
    let memory = Arc::clone(&engine.info().memory);
    let events = engine.submit(request(10, 50)).unwrap();
    drop(engine);
    assert_eq!(hear(events).tokens.len(), 50);
    let start = Instant::now();
    while memory.bytes(Component::KvCache) > 0 {
        assert!(start.elapsed() < Duration::from_secs(60), "the thread does not end");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// An observer with a bug.
struct Panics;

impl EngineObserver for Panics {
    fn step(&mut self, _: usize) {
        panic!("a bug on the engine's thread (this test asked for it)");
    }
}

#[test]
fn a_dead_engine_is_seen() {
    let engine = start_observed(options(64), Box::new(Panics));
    let events = engine.submit(request(5, 5)).unwrap();
    assert_eq!(hear(events).end, None, "the channel closes without an end");
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(engine.idle());
    wait_for(&engine, "dead", |_| !engine.is_alive());
    assert_eq!(engine.submit(request(5, 5)).unwrap_err(), SubmitError::ShuttingDown);
    engine.shutdown();
}

/// Writes down what it hears.
#[derive(Clone, Default)]
struct Notes(Arc<Mutex<NotesInner>>);

#[derive(Default)]
struct NotesInner {
    step_tokens: usize,
    first: usize,
    next: usize,
    ended: Vec<SequenceReport>,
}

impl EngineObserver for Notes {
    fn step(&mut self, tokens: usize) {
        self.0.lock().unwrap().step_tokens += tokens;
    }
    fn first_token(&mut self, _: Duration) {
        self.0.lock().unwrap().first += 1;
    }
    fn next_token(&mut self, _: Duration) {
        self.0.lock().unwrap().next += 1;
    }
    fn ended(&mut self, report: &SequenceReport) {
        self.0.lock().unwrap().ended.push(*report);
    }
}

#[test]
fn the_observer_hears_of_every_sequence() {
    let notes = Notes::default();
    let engine = start_observed(options(64), Box::new(notes.clone()));
    run(&engine, request(10, 4));
    let mut cancelled = engine.submit(long()).unwrap();
    next_token(&mut cancelled);
    next_token(&mut cancelled);
    drop(cancelled);
    wait_for(&engine, "idle", |stats| stats.running + stats.waiting == 0);
    let notes = notes.0.lock().unwrap();
    let reasons: Vec<_> = notes.ended.iter().map(|report| report.reason).collect();
    assert_eq!(reasons, [Some(FinishReason::Length), None]);
    let generated: usize = notes.ended.iter().map(|report| report.usage.completion_tokens).sum();
    assert_eq!((notes.first, notes.next), (2, generated - 2));
    // The last token of a sequence is never computed.
    assert_eq!(notes.step_tokens, 20 + generated - 2);
    for report in &notes.ended {
        let timing = report.timing;
        assert!(timing.prefill > Duration::ZERO && timing.decode > Duration::ZERO);
        assert!(timing.queue + timing.prefill + timing.decode <= timing.total);
    }
}

#[test]
fn a_model_that_does_not_load_says_why() {
    let broken = || Err::<Loaded, _>("no such folder: x");
    let error = EngineHandle::start(EngineOptions::default(), Box::new(()), broken).unwrap_err();
    assert!(matches!(error, EngineError::Load(_)));
    assert_eq!(error.to_string(), "no such folder: x");

    let panics = || -> Result<Loaded, String> { panic!("asked for by this test") };
    let error = EngineHandle::start(EngineOptions::default(), Box::new(()), panics).unwrap_err();
    assert!(matches!(error, EngineError::Died));

    let too_long = EngineOptions { max_model_len: Some(1025), ..options(64) };
    let error = EngineHandle::start(too_long, Box::new(()), load).unwrap_err();
    assert_eq!(
        error.to_string(),
        "max_model_len is 1025, but the model was made for 1024 tokens (max_position_embeddings)"
    );
}
