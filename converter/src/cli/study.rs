//! `mxconvert study`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;
use converter::study::{StudyOptions, default_output};

use super::Invocation;

#[derive(Debug, Args)]
pub(super) struct StudyArgs {
    /// An unquantized checkpoint folder.
    model: PathBuf,

    /// Text whose first 512 tokens are read by the model; without it, only weights are studied.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,

    /// The HTML report; the JSON file beside it has the same name [default: MODEL-study.html, here].
    #[arg(short, long, value_name = "FILE.html")]
    output: Option<PathBuf>,

    /// Decoder layers that are sampled, evenly spread.
    #[arg(long, value_name = "N", default_value = "4")]
    layers: NonZeroUsize,

    /// Threads [default: all cores].
    #[arg(long)]
    threads: Option<NonZeroUsize>,
}

impl StudyArgs {
    pub(super) fn into_invocation(self) -> Invocation {
        let output = self.output.unwrap_or_else(|| default_output(&self.model));
        let mut options =
            StudyOptions { text: self.text, layers: self.layers, ..StudyOptions::new(self.model) };
        options.threads = self.threads.unwrap_or(options.threads);
        Invocation::Study { options, output }
    }
}
