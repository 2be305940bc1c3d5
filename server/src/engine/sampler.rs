//! From logits to tokens. What all requests share is one [`Backend::sample`] for all rows; the rows of requests with
//! penalties, biases or masks are changed on the host before.

use kernels::{Backend, Buffer, SampleParams, TokenLogprobs};

use super::constraint::TokenMask;
use super::mask_workers::Constraints;
use super::request::Sampling;
use super::sequence::{Sequence, TokenCounts};

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
mod tests {
    use super::*;
    use crate::engine::block_manager::BlockManager;
    use crate::engine::request::{GenerateRequest, Scheduling, StopConditions};
    use crate::engine::sequence::SequenceId;

    /// A sequence with prompt 0, 1 and output 1, 2, 2.
    fn sequence(sampling: Sampling, stop: StopConditions) -> Sequence {
        let stop = StopConditions { max_tokens: 100, ..stop };
        let (id, prompt) = (String::new(), vec![0, 1]);
        let scheduling = Scheduling::default();
        let request = GenerateRequest {
            id,
            prompt,
            sampling,
            stop,
            scheduling,
            logprobs: None,
            prompt_logprobs: None,
            pooling: None,
        };
        let mut sequence = Sequence::new(SequenceId(0), request, 100);
        for token in [1, 2, 2] {
            sequence.push(token);
        }
        sequence
    }

    #[test]
    fn rows_are_processed_as_asked() {
        const NO: f32 = f32::NEG_INFINITY;
        let off = Sampling::default;
        let until = |min_tokens, eos: &[u32], stop: &[u32]| StopConditions {
            min_tokens,
            eos_token_ids: eos.to_vec(),
            stop_token_ids: stop.to_vec(),
            ..StopConditions::default()
        };
        let none = StopConditions::default;
        let cases: [(&str, Sampling, StopConditions, [f32; 4]); 15] = [
            (
                "presence: once for each generated token",
                Sampling { presence_penalty: 1.0, ..off() },
                none(),
                [4.0, 1.0, -3.0, 1.0],
            ),
            (
                "frequency: by occurrences",
                Sampling { frequency_penalty: 1.0, ..off() },
                none(),
                [4.0, 1.0, -4.0, 1.0],
            ),
            (
                "repetition: prompt and output, by sign",
                Sampling { repetition_penalty: 2.0, ..off() },
                none(),
                [2.0, 1.0, -4.0, 1.0],
            ),
            (
                "bias, ids out of range skipped",
                Sampling { logit_bias: vec![(3, 5.0), (9, 1.0)], ..off() },
                none(),
                [4.0, 2.0, -2.0, 6.0],
            ),
            (
                "bias before penalties",
                Sampling { logit_bias: vec![(2, 4.0)], repetition_penalty: 2.0, ..off() },
                none(),
                [2.0, 1.0, 1.0, 1.0],
            ),
            (
                "allowed",
                Sampling { allowed_token_ids: Some(vec![3, 1, 9]), ..off() },
                none(),
                [NO, 2.0, NO, 1.0],
            ),
            (
                "a bias does not allow",
                Sampling { allowed_token_ids: Some(vec![1]), logit_bias: vec![(0, 9.0)], ..off() },
                none(),
                [NO, 2.0, NO, NO],
            ),
            (
                "a bad word of one token",
                Sampling { bad_words: vec![vec![0]], ..off() },
                none(),
                [NO, 2.0, -2.0, 1.0],
            ),
            (
                "a bad word of several, where the others were said",
                Sampling { bad_words: vec![vec![2, 2, 3], vec![1, 2, 0], vec![0, 1, 1]], ..off() },
                none(),
                [4.0, 2.0, -2.0, NO],
            ),
            (
                "nothing but bad words",
                Sampling { bad_words: vec![vec![0], vec![1]], allowed_token_ids: Some(vec![0, 1]), ..off() },
                none(),
                [4.0, 2.0, NO, NO],
            ),
            ("too short to stop", off(), until(4, &[0], &[3]), [NO, 2.0, -2.0, NO]),
            ("long enough to stop", off(), until(3, &[0], &[3]), [4.0, 2.0, -2.0, 1.0]),
            (
                "only stop tokens are allowed",
                Sampling { allowed_token_ids: Some(vec![0]), ..off() },
                until(4, &[0], &[]),
                [4.0, NO, NO, NO],
            ),
            ("all of them stop", off(), until(4, &[0, 1, 2, 3], &[]), [4.0, 2.0, -2.0, 1.0]),
            ("nothing asked for", off(), none(), [4.0, 2.0, -2.0, 1.0]),
        ];
        for (name, sampling, stop, expected) in cases {
            let sequence = sequence(sampling, stop);
            let mut row = [4.0, 2.0, -2.0, 1.0];
            process(&sequence, None, &[4.0, 2.0, -2.0, 1.0], &mut row);
            assert_eq!(row, expected, "{name}");
            if !is_processed(&sequence) {
                assert_eq!(row, [4.0, 2.0, -2.0, 1.0], "{name}: a row that is left alone would not change");
            }
        }
    }

    #[test]
    fn a_grammar_goes_before_everything_else() {
        const NO: f32 = f32::NEG_INFINITY;
        let raw = [4.0, 2.0, -2.0, 1.0];
        let processed = |sampling: Sampling| {
            let stop = StopConditions { min_tokens: 9, eos_token_ids: vec![3], ..StopConditions::default() };
            let mut row = raw;
            let mask = TokenMask::from_words(vec![0b1010]);
            process(&sequence(sampling, stop), Some(&mask), &raw, &mut row);
            row
        };
        assert_eq!(processed(Sampling::default()), [NO, 2.0, NO, NO], "too short to stop");
        let only = |ids: &[u32]| Sampling { allowed_token_ids: Some(ids.to_vec()), ..Sampling::default() };
        assert_eq!(processed(only(&[0, 1])), [NO, 2.0, NO, NO]);
        assert_eq!(processed(only(&[0, 2])), [NO, 2.0, NO, NO], "nothing would be left");
        assert_eq!(processed(only(&[3])), [NO, NO, NO, 1.0], "it must stop");
    }

    #[test]
    fn the_draw_is_the_place_in_the_output() {
        let mut sequence = sequence(Sampling { seed: 11, ..Sampling::default() }, StopConditions::default());
        let drawn = params(&Draw { sequence: &sequence, ahead: 0 });
        assert_eq!((drawn.seed, drawn.draw), (11, 3));
        assert_eq!(params(&Draw { sequence: &sequence, ahead: 2 }).draw, 5);
        sequence.restart(&mut BlockManager::new(0));
        assert_eq!(params(&Draw { sequence: &sequence, ahead: 0 }).draw, 3);
    }
}
