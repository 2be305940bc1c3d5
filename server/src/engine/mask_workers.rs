//! Masks of constrained sequences, computed on threads of their own while the device runs the step that needs them.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::constraint::{Canceller, Constraint, ConstraintError, Progress, SharedGrammar, TokenMask};
use super::sequence::SequenceId;

/// Most threads: a mask takes well under a millisecond, and the device's own threads want the processors too.
const MAX_WORKERS: usize = 8;

/// How long a step waits for masks: a grammar that takes longer would hold up everyone.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long it waits for each mask when that time is over, so that one grammar does not end the others behind it.
const GRACE: Duration = Duration::from_millis(100);

/// The places of all constrained sequences in their grammars.
#[derive(Default)]
pub(super) struct Constraints {
    places: BTreeMap<SequenceId, Place>,
    /// `None` until the first constrained sequence comes.
    jobs: Option<Sender<Job>>,
}

/// Where a sequence stands.
enum Place {
    /// A worker has it, until it is cancelled.
    Computing(Receiver<Masked>, Option<Canceller>),
    /// The next token may be drawn.
    Ready(Masked),
    /// It cannot go on; the error was or will be reported by [`Constraints::follow`].
    Lost(ConstraintError),
}

/// A place and the tokens that it allows.
struct Masked {
    constraint: Box<dyn Constraint>,
    mask: Result<TokenMask, ConstraintError>,
}

/// A mask to compute.
struct Job {
    start: Start,
    done: std::sync::mpsc::SyncSender<Masked>,
}

enum Start {
    Beginning(SharedGrammar),
    Here(Box<dyn Constraint>),
}

impl Constraints {
    /// Starts computing the first mask of a sequence.
    pub(super) fn begin(&mut self, id: SequenceId, grammar: SharedGrammar) {
        self.compute(id, Start::Beginning(grammar));
    }

    /// Forgets a sequence; nothing happens if it has no constraint.
    pub(super) fn remove(&mut self, id: SequenceId) {
        self.places.remove(&id);
    }

    /// When a step that begins to draw now stops waiting.
    pub(super) fn deadline() -> Instant {
        Instant::now() + PATIENCE
    }

    /// The tokens that the sequence may draw now; waits until they are known, or the step's [`deadline`](Self::deadline)
    /// is over. `None`: it has no constraint, or one that cannot be followed, and ends with whatever it draws.
    pub(super) fn mask(&mut self, id: SequenceId, deadline: Instant) -> Option<&TokenMask> {
        let place = self.places.get_mut(&id)?;
        if let Place::Computing(done, canceller) = place {
            let patience = deadline.saturating_duration_since(Instant::now()).max(GRACE);
            *place = match done.recv_timeout(patience) {
                Ok(Masked { mask: Err(error), .. }) => Place::Lost(error),
                Ok(masked) => Place::Ready(masked),
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(cancel) = canceller {
                        cancel();
                    }
                    Place::Lost(ConstraintError("a mask takes too long".to_owned()))
                }
                // The worker panicked: the panic has been reported where it happened.
                Err(RecvTimeoutError::Disconnected) => {
                    Place::Lost(ConstraintError("the grammar cannot be followed".to_owned()))
                }
            };
        }
        match place {
            Place::Ready(Masked { mask: Ok(mask), .. }) => Some(mask),
            _ => None,
        }
    }

    /// The sequence drew `token`: starts computing its next mask. `Complete` when nothing may follow.
    ///
    /// # Errors
    /// The grammar cannot be followed any further.
    pub(super) fn follow(&mut self, id: SequenceId, token: u32) -> Result<Progress, ConstraintError> {
        match self.places.remove(&id) {
            Some(Place::Ready(Masked { mut constraint, .. })) => {
                let progress = constraint.accept(token)?;
                if progress == Progress::Open {
                    self.compute(id, Start::Here(constraint));
                }
                Ok(progress)
            }
            Some(Place::Lost(error)) => Err(error),
            // Nothing is drawn before the mask was asked for.
            Some(place @ Place::Computing(..)) => {
                self.places.insert(id, place);
                Ok(Progress::Open)
            }
            None => Ok(Progress::Open),
        }
    }

    fn compute(&mut self, id: SequenceId, start: Start) {
        let (done, result) = sync_channel(1);
        let canceller = match &start {
            Start::Beginning(_) => None,
            Start::Here(constraint) => constraint.canceller(),
        };
        let jobs = self.jobs.get_or_insert_with(start_workers);
        let place = match jobs.send(Job { start, done }) {
            Ok(()) => Place::Computing(result, canceller),
            Err(_) => Place::Lost(ConstraintError("no thread could be started for the grammar".to_owned())),
        };
        self.places.insert(id, place);
    }
}

/// Starts the workers; they end when the sender is dropped.
fn start_workers() -> Sender<Job> {
    let (jobs, inbox) = channel();
    let inbox = Arc::new(Mutex::new(inbox));
    let workers = thread::available_parallelism().map_or(1, NonZeroUsize::get).min(MAX_WORKERS);
    for index in 0..workers {
        let inbox = Arc::clone(&inbox);
        let started = thread::Builder::new().name(format!("mask-{index}")).spawn(move || work(&inbox));
        if let Err(error) = started {
            tracing::warn!("a thread for masks cannot be started: {error}");
        }
    }
    jobs
}

fn work(inbox: &Mutex<Receiver<Job>>) {
    loop {
        let job = inbox.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { start, done }) = job else { return };
        // A panic over one grammar must not take the thread from the others; it has been reported where it happened,
        // and the sequence ends when it finds `done` dropped.
        let masked = catch_unwind(AssertUnwindSafe(|| {
            let mut constraint = match start {
                Start::Beginning(grammar) => grammar.0.begin(),
                Start::Here(constraint) => constraint,
            };
            let mask = constraint.allowed();
            Masked { constraint, mask }
        }));
        if let Ok(masked) = masked {
            // Fails when the sequence is over.
            let _ = done.send(masked);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::super::constraint::Grammar;
    use super::*;

    /// Allows 0, then 1, …, until `end`; cannot go beyond `lost`.
    struct Counting {
        next: u32,
        end: u32,
        lost: u32,
    }

    impl Constraint for Counting {
        fn allowed(&mut self) -> Result<TokenMask, ConstraintError> {
            if self.next >= self.lost {
                return Err(ConstraintError("too high".to_owned()));
            }
            let mut mask = TokenMask::default();
            mask.insert(self.next);
            Ok(mask)
        }

        fn accept(&mut self, token: u32) -> Result<Progress, ConstraintError> {
            assert_eq!(token, self.next, "only what is allowed is drawn");
            self.next += 1;
            Ok(if self.next == self.end { Progress::Complete } else { Progress::Open })
        }
    }

    struct Count {
        end: u32,
        lost: u32,
    }

    impl Grammar for Count {
        fn begin(&self) -> Box<dyn Constraint> {
            Box::new(Counting { next: 0, end: self.end, lost: self.lost })
        }
    }

    fn begun(end: u32, lost: u32, sequences: u64) -> Constraints {
        let mut constraints = Constraints::default();
        let grammar = SharedGrammar(Arc::new(Count { end, lost }));
        for id in 0..sequences {
            constraints.begin(SequenceId(id), grammar.clone());
        }
        constraints
    }

    #[test]
    fn each_sequence_has_a_place_of_its_own() {
        let mut constraints = begun(3, u32::MAX, 2);
        for (id, token, progress) in [
            (0, 0, Progress::Open),
            (0, 1, Progress::Open),
            (1, 0, Progress::Open),
            (0, 2, Progress::Complete),
            (1, 1, Progress::Open),
        ] {
            let id = SequenceId(id);
            let mask = constraints.mask(id, Constraints::deadline()).unwrap();
            assert!(mask.contains(token) && !mask.contains(token + 1));
            assert_eq!(constraints.follow(id, token), Ok(progress));
        }
        assert!(constraints.mask(SequenceId(0), Constraints::deadline()).is_none(), "it is complete");
        constraints.remove(SequenceId(1));
        assert!(constraints.mask(SequenceId(1), Constraints::deadline()).is_none(), "it was forgotten");
        assert_eq!(constraints.follow(SequenceId(7), 1), Ok(Progress::Open), "it never had a constraint");
    }

    /// Computes until it is cancelled.
    struct Endless(Arc<AtomicBool>);

    impl Grammar for Endless {
        fn begin(&self) -> Box<dyn Constraint> {
            Box::new(Self(Arc::clone(&self.0)))
        }
    }

    impl Constraint for Endless {
        fn allowed(&mut self) -> Result<TokenMask, ConstraintError> {
            while !self.0.swap(false, Ordering::AcqRel) {
                thread::yield_now();
            }
            Ok(TokenMask::all(8))
        }

        fn accept(&mut self, _: u32) -> Result<Progress, ConstraintError> {
            Ok(Progress::Open)
        }

        fn canceller(&self) -> Option<Canceller> {
            let stop = Arc::clone(&self.0);
            Some(Box::new(move || stop.store(true, Ordering::Release)))
        }
    }

    #[test]
    fn a_mask_that_takes_too_long_is_given_up() {
        let (mut constraints, id) = (Constraints::default(), SequenceId(0));
        let stop = Arc::new(AtomicBool::new(true));
        constraints.begin(id, SharedGrammar(Arc::new(Endless(Arc::clone(&stop)))));
        assert!(constraints.mask(id, Constraints::deadline()).is_some(), "the first one stops at once");
        assert_eq!(constraints.follow(id, 1), Ok(Progress::Open));
        assert!(constraints.mask(id, Constraints::deadline()).is_none());
        assert!(constraints.follow(id, 1).unwrap_err().to_string().contains("too long"));
        // The worker is free for others.
        while stop.load(Ordering::Acquire) {
            thread::yield_now();
        }
    }

    /// Has no beginning.
    struct Panicking;

    impl Grammar for Panicking {
        fn begin(&self) -> Box<dyn Constraint> {
            // As a panic, without its message and backtrace on the tests' output.
            std::panic::resume_unwind(Box::new(()));
        }
    }

    #[test]
    fn a_panic_ends_its_own_sequence_only() {
        let mut constraints = Constraints::default();
        let deadline = Instant::now() + Duration::from_secs(60);
        // More of them than there are threads.
        for id in 0..2 * MAX_WORKERS as u64 {
            constraints.begin(SequenceId(id), SharedGrammar(Arc::new(Panicking)));
            assert!(constraints.mask(SequenceId(id), deadline).is_none());
            let error = constraints.follow(SequenceId(id), 0).unwrap_err();
            assert!(error.to_string().contains("cannot be followed"), "{error}");
        }
        let id = SequenceId(99);
        constraints.begin(id, SharedGrammar(Arc::new(Count { end: 3, lost: 9 })));
        assert!(constraints.mask(id, deadline).is_some_and(|mask| mask.contains(0)));
    }

    #[test]
    fn what_cannot_be_followed_is_told_once() {
        let mut constraints = begun(9, 1, 1);
        let id = SequenceId(0);
        assert!(constraints.mask(id, Constraints::deadline()).is_some());
        assert_eq!(constraints.follow(id, 0), Ok(Progress::Open));
        assert!(constraints.mask(id, Constraints::deadline()).is_none());
        assert_eq!(constraints.follow(id, 5), Err(ConstraintError("too high".to_owned())));
    }
}
