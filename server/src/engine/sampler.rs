//! From logits to tokens. What all requests share is one [`Backend::sample`] for all rows; the rows of requests with
//! penalties, biases or masks are changed on the host before.

use kernels::{Backend, Buffer, SampleParams, TokenLogprobs};

use super::constraint::TokenMask;
use super::mask_workers::Constraints;
use super::request::Sampling;
use super::sequence::Sequence;
use super::token_counts::TokenCounts;

/// Draws tokens; owns the scratch memory for it.
#[derive(Debug)]
pub(super) struct Sampler {
    /// Logits of one row as the model made them, F32 `[vocab]`.
    raw: Vec<f32>,
    /// The same row as it is sampled from.
    row: Vec<f32>,
    params: Vec<SampleParams>,
    /// U32 `[max_rows]`: what the device drew.
    drawn: Buffer,
    tokens: Vec<u32>,
}

/// A token to draw: the one that follows the sequence, or a draft of it that is so long.
#[derive(Debug, Clone, Copy)]
pub(super) struct Draw<'a> {
    pub(super) sequence: &'a Sequence,
    /// Tokens of the draft before it.
    pub(super) ahead: usize,
}

/// A drawn token.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Drawn {
    /// Its id.
    pub(super) token: u32,
    /// Its log-probability under the model's own logits, before penalties, biases and temperature; if asked for.
    pub(super) logprobs: Option<TokenLogprobs>,
}

impl Sampler {
    /// A sampler of `vocab_size` tokens for up to `max_rows` rows at a time.
    ///
    /// # Errors
    /// Out of memory.
    pub(super) fn new(backend: &dyn Backend, vocab_size: usize, max_rows: usize) -> kernels::Result<Self> {
        Ok(Self {
            raw: vec![0.0; vocab_size],
            row: Vec::with_capacity(vocab_size),
            params: Vec::with_capacity(max_rows),
            drawn: backend.alloc(kernels::Dtype::U32, max_rows, kernels::Component::Workspace)?,
            tokens: Vec::with_capacity(max_rows),
        })
    }

    /// Makes all `draws`, whose logits are the rows of `logits`, `[_, vocab]`, in order; appends to `out`. Waits for the
    /// masks of those that follow a grammar.
    pub(super) fn draw(
        &mut self,
        backend: &dyn Backend,
        logits: &mut Buffer,
        draws: &[Draw<'_>],
        constraints: &mut Constraints,
        out: &mut Vec<Drawn>,
    ) {
        let vocab = self.raw.len();
        let first = out.len();
        let top = draws.iter().filter_map(|draw| draw.sequence.logprobs()).max();
        self.params.clear();
        self.params.extend(draws.iter().map(params));

        let deadline = Constraints::deadline();
        let mut restore = Vec::new();
        let sequences = draws.iter().map(|draw| draw.sequence);
        for (index, sequence) in sequences.enumerate().filter(|(_, sequence)| is_processed(sequence)) {
            backend.read_f32(logits, index * vocab, &mut self.raw);
            self.row.clone_from(&self.raw);
            process(sequence, constraints.mask(sequence.id(), deadline), &self.raw, &mut self.row);
            backend.write_f32(logits, index * vocab, &self.row);
            if sequence.logprobs().is_some() {
                restore.push((index, self.raw.clone()));
            }
        }
        backend.sample(logits, vocab, &self.params, &mut self.drawn);
        self.tokens.resize(draws.len(), 0);
        backend.read_u32(&self.drawn, 0, &mut self.tokens);
        out.extend(self.tokens.iter().map(|&token| Drawn { token, logprobs: None }));

        let Some(top) = top else { return };
        for (index, raw) in restore {
            backend.write_f32(logits, index * vocab, &raw);
        }
        let reported = |index: &usize| draws[*index].sequence.logprobs().is_some();
        let rows: Vec<usize> = (0..draws.len()).filter(reported).collect();
        let targets: Vec<u32> = rows.iter().map(|&row| self.tokens[row]).collect();
        for (&row, mut logprobs) in rows.iter().zip(backend.logprobs(logits, vocab, &rows, &targets, top)) {
            logprobs.top.truncate(draws[row].sequence.logprobs().unwrap_or(0));
            out[first + row].logprobs = Some(logprobs);
        }
    }
}

/// The device's part of a sequence's sampling. The draw's number is the token's place in the output, so a sequence
/// that is computed again goes on with the same random numbers, and so does one whose draft is verified.
fn params(draw: &Draw<'_>) -> SampleParams {
    let Draw { sequence, ahead } = draw;
    let sampling = sequence.sampling();
    SampleParams {
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        seed: sampling.seed,
        draw: (sequence.generated() + ahead) as u64,
    }
}

/// Whether stop tokens are still forbidden.
fn is_too_short_to_stop(sequence: &Sequence) -> bool {
    let stop = sequence.stop();
    sequence.generated() < stop.min_tokens
        && !(stop.eos_token_ids.is_empty() && stop.stop_token_ids.is_empty())
}

/// Whether the sequence's logits must be changed before sampling.
pub(super) fn is_processed(sequence: &Sequence) -> bool {
    let Sampling { logit_bias, allowed_token_ids, bad_words, grammar, .. } = sequence.sampling();
    sequence.counts().is_some()
        || grammar.is_some()
        || !bad_words.is_empty()
        || !logit_bias.is_empty()
        || allowed_token_ids.is_some()
        || is_too_short_to_stop(sequence)
}

/// Applies masks, bias and penalties to one row of logits, a copy of `raw`, in vLLM's order. Ids outside the vocabulary
/// are skipped. `mask`: what the grammar allows.
fn process(sequence: &Sequence, mask: Option<&TokenMask>, raw: &[f32], row: &mut [f32]) {
    let sampling = sequence.sampling();
    if let Some(mask) = mask {
        mask.apply(row);
    }
    if let Some(allowed) = &sampling.allowed_token_ids {
        keep_only(row, allowed);
        if let Some(mask) = mask.filter(|_| row.iter().all(|&logit| logit == f32::NEG_INFINITY)) {
            row.copy_from_slice(raw);
            mask.apply(row);
        }
    }
    forbid(row, bad_endings(sequence));
    if is_too_short_to_stop(sequence) {
        let stop = sequence.stop();
        forbid(row, stop.eos_token_ids.iter().chain(&stop.stop_token_ids).copied());
    }
    for &(token, bias) in &sampling.logit_bias {
        if let Some(logit) = row.get_mut(token as usize) {
            *logit += bias;
        }
    }
    for (token, generated) in sequence.counts().into_iter().flat_map(TokenCounts::iter) {
        let Some(logit) = row.get_mut(token as usize) else { continue };
        let factor = sampling.repetition_penalty;
        *logit = if *logit > 0.0 { *logit / factor } else { *logit * factor };
        if generated > 0 {
            *logit -= sampling.frequency_penalty * generated as f32 + sampling.presence_penalty;
        }
    }
}

/// Masks every token but `allowed`.
fn keep_only(row: &mut [f32], allowed: &[u32]) {
    let kept: Vec<(usize, f32)> = allowed
        .iter()
        .filter_map(|&token| row.get(token as usize).map(|&logit| (token as usize, logit)))
        .collect();
    row.fill(f32::NEG_INFINITY);
    for (token, logit) in kept {
        row[token] = logit;
    }
}

/// The tokens that would complete one of `bad_words`.
fn bad_endings(sequence: &Sequence) -> impl Iterator<Item = u32> + Clone {
    let output = &sequence.tokens()[sequence.prompt_len()..];
    sequence.sampling().bad_words.iter().filter_map(|word| {
        let (last, before) = word.split_last()?;
        output.ends_with(before).then_some(*last)
    })
}

/// Masks `tokens`, unless nothing else is possible: a row without any possible token has no meaning.
fn forbid(row: &mut [f32], tokens: impl Iterator<Item = u32> + Clone) {
    if tokens.clone().next().is_none() {
        return;
    }
    let is_forbidden = |token: usize| tokens.clone().any(|other| other as usize == token);
    let other_is_possible =
        row.iter().enumerate().any(|(token, &logit)| logit > f32::NEG_INFINITY && !is_forbidden(token));
    if !other_is_possible {
        return;
    }
    for token in tokens {
        if let Some(logit) = row.get_mut(token as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

#[cfg(test)]
mod tests;
