//! Log-probabilities on the wire: the form of completions, that of chats, and vLLM's of prompts.

use kernels::TokenLogprobs;
use serde::{Serialize, Serializer};
use utoipa::ToSchema;

use crate::tokenizer::Tokenizer;

/// What stands for minus infinity, which JSON does not have; vLLM's value.
const LOWEST: f32 = -9999.0;

/// How tokens are named.
#[derive(Debug, Clone, Copy)]
pub(super) struct TokenNames<'a> {
    tokenizer: Option<&'a Tokenizer>,
}

impl<'a> TokenNames<'a> {
    /// By their text, or `token_id:N` when asked for or when the model has no tokenizer.
    pub(super) fn new(tokenizer: Option<&'a Tokenizer>, as_ids: bool) -> Self {
        Self { tokenizer: tokenizer.filter(|_| !as_ids) }
    }

    fn name(self, id: u32) -> String {
        self.tokenizer.map_or_else(|| format!("token_id:{id}"), |tokenizer| tokenizer.token_text(id))
    }

    fn bytes(self, id: u32) -> Option<Vec<u8>> {
        self.tokenizer.map(|tokenizer| tokenizer.token_bytes(id))
    }
}

/// Minus infinity as a number. NaN never comes here: its request is given up where the engine's answer is read.
fn finite(logprob: f32) -> f32 {
    if logprob == f32::NEG_INFINITY { LOWEST } else { logprob }
}

/// The `k` most likely tokens, best first, and `target` behind them if it is not among them. Its value is the one that
/// is reported for it alone, so that clients can compare the two.
fn with_target(target: u32, logprobs: &TokenLogprobs, k: usize) -> impl Iterator<Item = (u32, f32)> {
    let best = &logprobs.top[..k.min(logprobs.top.len())];
    let outside = !best.iter().any(|&(id, _)| id == target);
    let value = move |id, other| if id == target { logprobs.logprob } else { other };
    let top = best.iter().map(move |&(id, logprob)| (id, finite(value(id, logprob))));
    top.chain(outside.then_some((target, finite(logprobs.logprob))))
}

/// `logprobs` of a completion: parallel lists, an entry per token.
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
pub(super) struct CompletionLogprobs {
    text_offset: Vec<usize>,
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<String>,
    #[schema(value_type = Vec<Option<HashMap<String, f32>>>)]
    top_logprobs: Vec<Option<ByToken<f32>>>,
}

/// A JSON object with an entry per token, in this order.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ByToken<T>(Vec<(String, T)>);

impl<T> ByToken<T> {
    /// Adds an entry, unless the token has one.
    fn insert(&mut self, token: String, value: T) {
        if !self.0.iter().any(|(other, _)| *other == token) {
            self.0.push((token, value));
        }
    }
}

impl<T: Serialize> Serialize for ByToken<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(token, value)| (token, value)))
    }
}

impl CompletionLogprobs {
    /// Adds a token that begins at character `offset`, with at most `k` alternatives; `None` for the first token of a prompt, which nothing precedes.
    pub(super) fn push(
        &mut self,
        id: u32,
        offset: usize,
        logprobs: Option<&TokenLogprobs>,
        k: usize,
        names: TokenNames<'_>,
    ) {
        self.text_offset.push(offset);
        self.tokens.push(names.name(id));
        self.token_logprobs.push(logprobs.map(|l| finite(l.logprob)));
        self.top_logprobs.push(logprobs.map(|l| {
            let mut top = ByToken(Vec::new());
            for (id, logprob) in with_target(id, l, k) {
                // Of two tokens with one text the better stays: who looks for the best one finds it.
                top.insert(names.name(id), logprob);
            }
            top
        }));
    }

    /// Adds what follows.
    pub(super) fn append(&mut self, mut next: Self) {
        self.text_offset.append(&mut next.text_offset);
        self.token_logprobs.append(&mut next.token_logprobs);
        self.tokens.append(&mut next.tokens);
        self.top_logprobs.append(&mut next.top_logprobs);
    }
}

/// `logprobs` of a chat: a list of tokens, each with its alternatives.
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
pub(super) struct ChatLogprobs {
    content: Vec<ChatToken>,
}

#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
struct ChatToken {
    #[serde(flatten)]
    token: NamedToken,
    top_logprobs: Vec<NamedToken>,
}

#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
struct NamedToken {
    token: String,
    logprob: f32,
    bytes: Option<Vec<u8>>,
}

impl NamedToken {
    fn new(id: u32, logprob: f32, names: TokenNames<'_>) -> Self {
        Self { token: names.name(id), logprob: finite(logprob), bytes: names.bytes(id) }
    }
}

impl ChatLogprobs {
    /// Its entries, as JSON.
    pub(super) fn entries(&self) -> Vec<serde_json::Value> {
        // Numbers and texts can always be written.
        self.content.iter().filter_map(|token| serde_json::to_value(token).ok()).collect()
    }

    /// Adds a token.
    pub(super) fn push(&mut self, id: u32, logprobs: &TokenLogprobs, names: TokenNames<'_>) {
        let top = logprobs.top.iter().map(|&(id, logprob)| NamedToken::new(id, logprob, names));
        self.content.push(ChatToken {
            token: NamedToken::new(id, logprobs.logprob, names),
            top_logprobs: top.collect(),
        });
    }

    /// Adds what follows.
    pub(super) fn append(&mut self, mut next: Self) {
        self.content.append(&mut next.content);
    }
}

/// vLLM's `prompt_logprobs`: for each prompt token an object by token id, `null` for the first.
pub(super) type PromptLogprobs = Vec<Option<ByToken<RankedToken>>>;

/// An entry of [`PromptLogprobs`].
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub(super) struct RankedToken {
    logprob: f32,
    rank: u32,
    decoded_token: String,
}

/// Log-probabilities of `prompt`'s tokens 1.., as [`PromptLogprobs`], with at most `k` alternatives.
pub(super) fn prompt_logprobs(
    prompt: &[u32],
    logprobs: &[TokenLogprobs],
    k: usize,
    names: TokenNames<'_>,
) -> PromptLogprobs {
    let ranked = |id: u32, logprob: f32, rank: u32| RankedToken {
        logprob: finite(logprob),
        rank,
        decoded_token: names.name(id),
    };
    let position = |(&id, l): (&u32, &TokenLogprobs)| {
        let mut tokens = ByToken(Vec::new());
        tokens.insert(id.to_string(), ranked(id, l.logprob, l.rank));
        for (&(other, logprob), rank) in l.top.iter().take(k).zip(1..) {
            tokens.insert(other.to_string(), ranked(other, logprob, rank));
        }
        Some(tokens)
    };
    let scored = prompt.iter().skip(1).zip(logprobs).map(position);
    std::iter::once(None).chain(scored).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn logprobs(logprob: f32, top: &[(u32, f32)]) -> TokenLogprobs {
        TokenLogprobs { logprob, rank: 3, top: top.to_vec() }
    }

    #[test]
    fn the_best_and_the_chosen_are_there() {
        let names = TokenNames::new(None, false);
        let mut list = CompletionLogprobs::default();
        list.push(1, 0, None, 1, names);
        list.push(7, 4, Some(&logprobs(-3.0, &[(5, -0.5), (6, -0.6)])), 1, names);
        list.push(5, 6, Some(&logprobs(-0.5, &[(5, -0.50001)])), 1, names);
        list.push(9, 6, Some(&logprobs(f32::NEG_INFINITY, &[])), 1, names);
        let expected = json!({
            "text_offset": [0, 4, 6, 6],
            "token_logprobs": [null, -3.0, -0.5, -9999.0],
            "tokens": ["token_id:1", "token_id:7", "token_id:5", "token_id:9"],
            "top_logprobs": [null, {"token_id:5": -0.5, "token_id:7": -3.0}, {"token_id:5": -0.5},
                {"token_id:9": -9999.0}],
        });
        assert_eq!(serde_json::to_value(list).unwrap(), expected);
    }

    #[test]
    fn the_same_value_is_written_the_same() {
        let mut list = CompletionLogprobs::default();
        list.push(7, 0, Some(&logprobs(-10.025801, &[])), 0, TokenNames::new(None, false));
        let text = serde_json::to_string(&list).unwrap();
        assert_eq!(text.matches("-10.025801").count(), 2, "clients compare the two: {text}");
        assert_eq!(text.matches("-10.0258").count(), 2, "{text}");
    }

    #[test]
    fn of_two_tokens_with_one_text_the_better_stays() {
        let tokenizer = crate::tokenizer::tests::rustdoc();
        let broken: Vec<u32> =
            (0..300).filter(|&id| tokenizer.token_text(id) == "\u{FFFD}").take(2).collect();
        let [a, b] = broken[..] else { panic!("byte tokens") };
        let mut list = CompletionLogprobs::default();
        list.push(b, 0, Some(&logprobs(-4.0, &[(a, -1.0)])), 1, TokenNames::new(Some(&tokenizer), false));
        assert_eq!(list.top_logprobs, [Some(ByToken(vec![("\u{FFFD}".to_owned(), -1.0)]))]);
    }

    #[test]
    fn prompts_have_ranks() {
        let names = TokenNames::new(None, false);
        let list = prompt_logprobs(&[4, 7], &[logprobs(-3.0, &[(5, -0.5), (7, -3.0), (8, -4.0)])], 2, names);
        let expected = json!([null, {
            "7": {"logprob": -3.0, "rank": 3, "decoded_token": "token_id:7"},
            "5": {"logprob": -0.5, "rank": 1, "decoded_token": "token_id:5"}}]);
        assert_eq!(serde_json::to_value(list).unwrap(), expected);
    }

    #[test]
    fn chats_have_bytes() {
        let tokenizer = crate::tokenizer::tests::rustdoc();
        let id = tokenizer.encode("é", false).unwrap().ids[0];
        let mut list = ChatLogprobs::default();
        list.push(id, &logprobs(-1.0, &[(id, -1.0)]), TokenNames::new(Some(&tokenizer), false));
        let value = serde_json::to_value(list).unwrap();
        assert_eq!(value["content"][0]["bytes"], json!(tokenizer.token_bytes(id)));
        assert_eq!(value["content"][0]["top_logprobs"][0]["logprob"], json!(-1.0f32));
    }
}
