//! Masks of constrained sequences, computed on threads of their own while the device runs the step that needs them.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use super::constraint::{Constraint, ConstraintError, Progress, SharedGrammar, TokenMask};
use super::sequence::SequenceId;

/// Most threads: a mask takes well under a millisecond, and the device's own threads want the processors too.
const MAX_WORKERS: usize = 8;

/// The places of all constrained sequences in their grammars.
#[derive(Default)]
pub(super) struct Constraints {
    places: BTreeMap<SequenceId, Place>,
    /// `None` until the first constrained sequence comes.
    jobs: Option<Sender<Job>>,
}

/// Where a sequence stands.
enum Place {
    /// A worker has it.
    Computing(Receiver<Masked>),
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

    /// The tokens that the sequence may draw now; waits until they are known. `None`: it has no constraint, or one that
    /// cannot be followed, and ends with whatever it draws.
    pub(super) fn mask(&mut self, id: SequenceId) -> Option<&TokenMask> {
        let place = self.places.get_mut(&id)?;
        if let Place::Computing(done) = place {
            *place = match done.recv() {
                Ok(Masked { mask: Err(error), .. }) => Place::Lost(error),
                Ok(masked) => Place::Ready(masked),
                // The worker panicked: the panic has been reported where it happened.
                Err(_) => Place::Lost(ConstraintError("the grammar cannot be followed".to_owned())),
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
            Some(place @ Place::Computing(_)) => {
                self.places.insert(id, place);
                Ok(Progress::Open)
            }
            None => Ok(Progress::Open),
        }
    }

    fn compute(&mut self, id: SequenceId, start: Start) {
        let (done, result) = sync_channel(1);
        let jobs = self.jobs.get_or_insert_with(start_workers);
        let place = match jobs.send(Job { start, done }) {
            Ok(()) => Place::Computing(result),
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
        let mut constraint = match start {
            Start::Beginning(grammar) => grammar.0.begin(),
            Start::Here(constraint) => constraint,
        };
        let mask = constraint.allowed();
        // Fails when the sequence is over.
        let _ = done.send(Masked { constraint, mask });
    }
}

#[cfg(test)]
mod tests {
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
            let mask = constraints.mask(id).unwrap();
            assert!(mask.contains(token) && !mask.contains(token + 1));
            assert_eq!(constraints.follow(id, token), Ok(progress));
        }
        assert!(constraints.mask(SequenceId(0)).is_none(), "it is complete");
        constraints.remove(SequenceId(1));
        assert!(constraints.mask(SequenceId(1)).is_none(), "it was forgotten");
        assert_eq!(constraints.follow(SequenceId(7), 1), Ok(Progress::Open), "it never had a constraint");
    }

    #[test]
    fn what_cannot_be_followed_is_told_once() {
        let mut constraints = begun(9, 1, 1);
        let id = SequenceId(0);
        assert!(constraints.mask(id).is_some());
        assert_eq!(constraints.follow(id, 0), Ok(Progress::Open));
        assert!(constraints.mask(id).is_none());
        assert_eq!(constraints.follow(id, 5), Err(ConstraintError("too high".to_owned())));
    }
}
