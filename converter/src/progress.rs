//! How a conversion says where it is.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::mix::Trial;

/// Hears where a conversion is, from several threads.
pub trait Progress: Sync {
    /// `bytes` of source tensors are to be done.
    fn begin(&self, bytes: u64);
    /// `bytes` more are done.
    fn advance(&self, bytes: u64);
    /// `done` of `layers` layers are calibrated; the others will take about as long as `left`.
    fn calibrated(&self, done: usize, layers: usize, left: Duration);
    /// The channels of `done` of `layers` layers are in order; the others will take about as long as `left`.
    fn permuted(&self, done: usize, layers: usize, left: Duration);
    /// This share of comparing formats is done; the rest will take about as long as `left`.
    fn measured(&self, share: f64, left: Duration);
    /// A mix was tried on held-out text.
    fn tried(&self, trial: &Trial);
    /// Something the user should know.
    fn warn(&self, message: &str);
    /// The output is in place.
    fn finish(&self);
}

/// Silence.
impl Progress for () {
    fn begin(&self, _bytes: u64) {}
    fn advance(&self, _bytes: u64) {}
    fn calibrated(&self, _done: usize, _layers: usize, _left: Duration) {}
    fn permuted(&self, _done: usize, _layers: usize, _left: Duration) {}
    fn measured(&self, _share: f64, _left: Duration) {}
    fn tried(&self, _trial: &Trial) {}
    fn warn(&self, _message: &str) {}
    fn finish(&self) {}
}

/// To standard error: a bar on a terminal, a line every tenth elsewhere.
#[derive(Debug)]
pub struct ConsoleProgress {
    label: String,
    terminal: bool,
    bar: ProgressBar,
    /// Tenths that have been reported.
    reported: Mutex<u64>,
    done: AtomicU64,
    total: AtomicU64,
}

impl ConsoleProgress {
    /// `label` names what is being made.
    pub fn new(label: impl Into<String>) -> Self {
        Self {
            label: label.into(),
            terminal: std::io::stderr().is_terminal(),
            bar: ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden()),
            reported: Mutex::new(0),
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
        }
    }

    fn line(&self, text: &str) {
        // There is nobody to tell when standard error is closed.
        let _ = self.bar.suspend(|| writeln!(std::io::stderr(), "{text}"));
    }
}

impl Progress for ConsoleProgress {
    fn begin(&self, bytes: u64) {
        self.total.store(bytes, Ordering::Relaxed);
        if !self.terminal {
            return;
        }
        let template = "{prefix} [{bar:32}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style.progress_chars("=> "));
        }
        self.bar.set_prefix(self.label.clone());
        self.bar.set_length(bytes);
        self.bar.set_draw_target(ProgressDrawTarget::stderr());
        self.bar.enable_steady_tick(Duration::from_millis(200));
    }

    fn advance(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if self.terminal {
            self.bar.inc(bytes);
            return;
        }
        let total = self.total.load(Ordering::Relaxed).max(1);
        let tenths = u64::try_from(u128::from(done) * 10 / u128::from(total)).unwrap_or(10);
        if let Ok(mut reported) = self.reported.lock()
            && *reported < tenths
        {
            *reported = tenths;
            self.line(&format!("{}: {}%", self.label, tenths * 10));
        }
    }

    fn calibrated(&self, done: usize, layers: usize, left: Duration) {
        let left = minutes(left);
        self.line(&format!("{}: {done} of {layers} layers calibrated, {left} left", self.label));
    }

    fn permuted(&self, done: usize, layers: usize, left: Duration) {
        let left = minutes(left);
        self.line(&format!("{}: channels of {done} of {layers} layers ordered, {left} left", self.label));
    }

    fn measured(&self, share: f64, left: Duration) {
        let percent = 100.0 * share;
        self.line(&format!("{}: {percent:.0}% of comparing formats, {} left", self.label, minutes(left)));
    }

    fn tried(&self, trial: &Trial) {
        let Trial { bits, perplexity, increase } = trial;
        let percent = 100.0 * increase;
        self.line(&format!(
            "{}: {bits:.2} bits per weight: perplexity {perplexity:.3} ({percent:+.2}%)",
            self.label
        ));
    }

    fn warn(&self, message: &str) {
        self.line(&format!("warning: {message}"));
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// `12:07`.
fn minutes(time: Duration) -> String {
    format!("{}:{:02}", time.as_secs() / 60, time.as_secs() % 60)
}
