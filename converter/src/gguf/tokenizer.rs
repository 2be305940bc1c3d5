//! `tokenizer.json` and its companions from GGUF metadata: byte-level BPE (`tokenizer.ggml.model` = `gpt2`).

use serde_json::{Map, Value, json};

use super::{Metadata, integer};

/// Token types of GGUF (`gguf.TokenType`).
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// How Llama 3 splits text before BPE.
const LLAMA3_SPLIT: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| \
                            ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
/// How Qwen 2 splits text before BPE.
const QWEN2_SPLIT: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| \
                           ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

/// The tokenizer's files.
#[derive(Debug)]
pub(crate) struct TokenizerFiles {
    /// `tokenizer.json`.
    pub(crate) tokenizer: Value,
    /// `tokenizer_config.json`, the chat template included.
    pub(crate) config: Value,
    /// `special_tokens_map.json`.
    pub(crate) special_tokens: Value,
}

/// Rebuilds the tokenizer; the error says why it cannot be.
pub(super) fn build(metadata: &Metadata<'_>) -> Result<TokenizerFiles, String> {
    let model = metadata.string("tokenizer.ggml.model")?;
    if model != "gpt2" {
        return Err(format!("tokenizer model '{model}' is not supported; known: gpt2"));
    }
    let tokens = metadata.strings("tokenizer.ggml.tokens")?;
    let types = metadata.array("tokenizer.ggml.token_type")?;
    if types.len() != tokens.len() {
        return Err(
            "metadata tokenizer.ggml.token_type and tokenizer.ggml.tokens differ in length".to_owned()
        );
    }
    let split = Split::of(metadata)?;
    let added: Vec<Value> = (0_u64..)
        .zip(tokens.iter().zip(types))
        .filter_map(|(id, (token, kind))| {
            let kind = integer(kind).filter(|kind| matches!(*kind, CONTROL | USER_DEFINED))?;
            Some(json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": kind == CONTROL,
            }))
        })
        .collect();
    let vocabulary: Map<String, Value> =
        (0_u64..).zip(&tokens).map(|(id, token)| ((*token).to_owned(), id.into())).collect();
    // Byte-level pieces hold no space, so the space between the two parts is the only one.
    let merges = metadata
        .strings("tokenizer.ggml.merges")?
        .into_iter()
        .map(|merge| match merge.split_once(' ') {
            Some((left, right)) if !right.contains(' ') => Ok(json!([left, right])),
            _ => Err(format!("metadata tokenizer.ggml.merges: '{merge}' is no pair")),
        })
        .collect::<Result<Vec<Value>, String>>()?;
    let special = Special::of(metadata, &tokens)?;
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": split.normalizer,
        "pre_tokenizer": split.pre_tokenizer,
        "post_processor": special.post_processor(metadata.flag("tokenizer.ggml.add_bos_token")),
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": split.ignore_merges, "vocab": vocabulary, "merges": merges,
        },
    });
    let special_tokens = special.map();
    let mut config = json!({
        "added_tokens_decoder": decoder(&added),
        "add_prefix_space": metadata.flag("tokenizer.ggml.add_space_prefix"),
        "chat_template": metadata.optional("tokenizer.chat_template").and_then(|v| v.to_string().ok()),
        "clean_up_tokenization_spaces": false,
        "model_max_length": metadata.integer("llama.context_length")?,
        "tokenizer_class": split.class,
        "vocab_size": tokens.len(),
    });
    if let (Some(config), Some(special)) = (config.as_object_mut(), special_tokens.as_object()) {
        config.extend(special.clone());
    }
    Ok(TokenizerFiles { tokenizer, config, special_tokens })
}

/// `added_tokens_decoder`: the added tokens by id.
fn decoder(added: &[Value]) -> Map<String, Value> {
    added
        .iter()
        .filter_map(|token| {
            let mut fields = token.as_object()?.clone();
            let id = fields.shift_remove("id")?;
            Some((id.to_string(), Value::Object(fields)))
        })
        .collect()
}

/// What happens to text before BPE.
struct Split {
    normalizer: Value,
    pre_tokenizer: Value,
    ignore_merges: bool,
    class: &'static str,
}

impl Split {
    fn of(metadata: &Metadata<'_>) -> Result<Self, String> {
        let gpt2 = || {
            json!({
                "type": "ByteLevel", "add_prefix_space": metadata.flag("tokenizer.ggml.add_space_prefix"),
                "trim_offsets": true, "use_regex": true,
            })
        };
        let by_regex = |regex: &str| {
            json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false},
                {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
            ]})
        };
        let plain = |pre_tokenizer: Value| Self {
            normalizer: Value::Null,
            pre_tokenizer,
            ignore_merges: false,
            class: "GPT2Tokenizer",
        };
        let name = match metadata.optional("tokenizer.ggml.pre") {
            Some(_) => metadata.string("tokenizer.ggml.pre")?,
            None => "default",
        };
        match name {
            // llama.cpp: \p{N} split on its own, then the GPT-2 regular expression.
            "smollm" => Ok(plain(json!({"type": "Sequence", "pretokenizers": [
                {"type": "Digits", "individual_digits": true}, gpt2(),
            ]}))),
            "gpt-2" | "default" => Ok(plain(gpt2())),
            "llama-bpe" => Ok(Self {
                ignore_merges: true,
                class: "PreTrainedTokenizerFast",
                ..plain(by_regex(LLAMA3_SPLIT))
            }),
            "qwen2" => Ok(Self {
                normalizer: json!({"type": "NFC"}),
                class: "Qwen2Tokenizer",
                ..plain(by_regex(QWEN2_SPLIT))
            }),
            other => Err(format!(
                "pre-tokenizer '{other}' is not supported; known: default, gpt-2, smollm, llama-bpe, qwen2"
            )),
        }
    }
}

/// The special tokens' texts.
struct Special<'a> {
    bos: Option<(u64, &'a str)>,
    eos: Option<&'a str>,
    unk: Option<&'a str>,
    pad: Option<&'a str>,
}

impl<'a> Special<'a> {
    fn of(metadata: &Metadata<'_>, tokens: &[&'a str]) -> Result<Self, String> {
        let token = |name: &str| -> Result<Option<(u64, &'a str)>, String> {
            let key = format!("tokenizer.ggml.{name}_token_id");
            let Some(id) = metadata.optional_integer(&key)? else { return Ok(None) };
            let text = usize::try_from(id).ok().and_then(|id| tokens.get(id));
            text.map(|text| Some((id, *text))).ok_or_else(|| format!("metadata {key}: no token {id}"))
        };
        let text = |name: &str| token(name).map(|t| t.map(|(_, text)| text));
        Ok(Self { bos: token("bos")?, eos: text("eos")?, unk: text("unknown")?, pad: text("padding")? })
    }

    fn map(&self) -> Value {
        let bos = self.bos.map(|(_, text)| text);
        let special: Vec<&str> = [bos, self.eos].into_iter().flatten().collect();
        json!({
            "bos_token": bos,
            "eos_token": self.eos,
            "unk_token": self.unk,
            "pad_token": self.pad,
            "additional_special_tokens": special,
        })
    }

    /// Puts the BOS token in front where the model wants that.
    fn post_processor(&self, add_bos: bool) -> Value {
        let Some((id, text)) = self.bos.filter(|_| add_bos) else { return Value::Null };
        let bos = json!({"SpecialToken": {"id": text, "type_id": 0}});
        let a = json!({"Sequence": {"id": "A", "type_id": 0}});
        let b = json!({"Sequence": {"id": "B", "type_id": 1}});
        let second_bos = json!({"SpecialToken": {"id": text, "type_id": 1}});
        let special_tokens: Map<String, Value> =
            [(text.to_owned(), json!({"id": text, "ids": [id], "tokens": [text]}))].into_iter().collect();
        json!({
            "type": "TemplateProcessing",
            "single": [bos, a],
            "pair": [bos, a, second_bos, b],
            "special_tokens": special_tokens,
        })
    }
}
