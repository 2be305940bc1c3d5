//! Why there is no mix.

/// No mix does what was asked for.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum MixError {
    /// Every mix is too large.
    #[error("--bits {bits}: the smallest mix of these formats takes {least:.3} bits per weight")]
    OverBudget {
        /// As asked for.
        bits: f64,
        /// What is possible.
        least: f64,
    },
    /// Every mix is too bad.
    #[error(
        "--max-ppl-increase {}: the largest mix of these formats, {bits:.2} bits per weight, raises it by {}",
        percent(*share),
        percent(*least)
    )]
    OverIncrease {
        /// As asked for.
        share: f64,
        /// What is possible.
        least: f64,
        /// Of the largest mix.
        bits: f64,
    },
    /// The perplexity that an increase is of is no number.
    #[error("--max-ppl-increase: the model's own perplexity on the text is not finite")]
    Unmeasurable,
    /// Every module has a format already, or none.
    #[error("--format auto: --layer and --exclude leave no module of the decoder layers to choose for")]
    NothingToMix,
}

/// `1.25%`.
pub(crate) fn percent(share: f64) -> String {
    // Rounded, as most decimal fractions are not binary ones.
    format!("{}%", (1e6 * share).round() / 1e4)
}
