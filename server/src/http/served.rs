//! What requests ask of a model, with errors for clients.

use config::SchedulingPolicy;
use tokio::sync::mpsc::UnboundedReceiver;

use super::check::require_in_vocabulary;
use super::error::ApiError;
use super::sampling::ModelFacts;
use crate::engine::{GenerateRequest, SubmitError, TokenEvent};
use crate::model::ServedModel;
use crate::telemetry::Telemetry;
use crate::tokenizer::{ChatTemplate, Encoded, Tokenizer};

impl ServedModel {
    /// Token ids are below this.
    pub(super) fn vocab_size(&self) -> usize {
        self.engine.info().vocab_size
    }

    /// Most tokens of a sequence, prompt and answer together.
    pub(super) fn max_model_len(&self) -> usize {
        self.engine.info().max_model_len
    }

    /// What sampling fields are checked against.
    pub(super) fn facts(&self) -> ModelFacts<'_> {
        ModelFacts {
            vocab_size: self.vocab_size(),
            max_model_len: self.max_model_len(),
            has_priorities: self.engine.info().scheduling_policy == SchedulingPolicy::Priority,
            tokenizer: self.tokenizer.as_deref(),
            defaults: &self.defaults,
        }
    }

    /// The name by which a request calls this model; the main one when it does not say.
    pub(super) fn resolve_name(&self, asked: Option<&str>) -> Result<&str, ApiError> {
        let name = match asked {
            None => self.names.first(),
            Some(asked) => self.names.iter().find(|name| *name == asked),
        };
        name.map(String::as_str).ok_or_else(|| ApiError::UnknownModel(asked.unwrap_or_default().to_owned()))
    }

    /// Refuses a request of more sequences than this server ever has at a time; waiting would not help it.
    /// `field` is the one that has the prompts.
    pub(super) fn require_capacity(
        &self,
        field: &'static str,
        prompts: usize,
        n: usize,
    ) -> Result<(), ApiError> {
        let most = self.max_sequences;
        if prompts > most {
            let message = format!("{field}: {prompts} prompts; this server takes {most}");
            return Err(ApiError::field(field, message));
        }
        let sequences = prompts.saturating_mul(n);
        if sequences <= most {
            return Ok(());
        }
        let message = format!("n times the prompts are {sequences} sequences; this server takes {most}");
        Err(ApiError::field("n", message))
    }

    /// Gives the engine sequences, all or none; each has a channel.
    pub(super) fn submit(
        &self,
        telemetry: &Telemetry,
        requests: Vec<GenerateRequest>,
    ) -> Result<Vec<UnboundedReceiver<TokenEvent>>, ApiError> {
        self.engine.submit_all(requests).map_err(|error| {
            telemetry.rejected(&error);
            match error {
                SubmitError::ShuttingDown if !self.engine.is_draining() => ApiError::EngineDied,
                error => error.into(),
            }
        })
    }

    /// The tokenizer.
    pub(super) fn tokenizer(&self) -> Result<&Tokenizer, ApiError> {
        self.tokenizer.as_deref().ok_or_else(|| {
            let message = "this model has no tokenizer; it takes token ids, at /v1/completions";
            ApiError::BadRequest { message: message.to_owned(), param: None }
        })
    }

    /// Most token ids that a prompt may be sent with: one that is truncated may be of any length.
    pub(super) fn longest_prompt(&self, truncate: Option<usize>) -> usize {
        if truncate.is_some() { usize::MAX } else { self.max_model_len() }
    }

    /// Refuses, without tokenizing it, a text that would not fit even if it were spelled with the longest tokens.
    pub(super) fn require_possible(&self, field: &'static str, text: &str) -> Result<(), ApiError> {
        let Some(longest) = self.tokenizer.as_deref().map(Tokenizer::longest_token_bytes) else {
            return Ok(());
        };
        let most = self.max_model_len().saturating_mul(longest);
        if text.len() <= most {
            return Ok(());
        }
        let message = format!(
            "{field}: a text of {} bytes cannot fit into this model's context of {} tokens",
            text.len(),
            self.max_model_len()
        );
        Err(ApiError::field(field, message))
    }

    /// Token ids of the text in `field`.
    pub(super) fn encode(
        &self,
        field: &'static str,
        text: &str,
        add_special_tokens: bool,
    ) -> Result<Encoded, ApiError> {
        let tokenizer = self.tokenizer().map_err(|error| ApiError::field(field, error.to_string()))?;
        let encoded = tokenizer
            .encode(text, add_special_tokens)
            .map_err(|error| ApiError::field(field, format!("{field} cannot be tokenized: {error}")))?;
        // A tokenizer may have more tokens than the model has rows.
        require_in_vocabulary(field, &encoded.ids, self.vocab_size())?;
        Ok(encoded)
    }

    /// The chat template.
    pub(super) fn chat_template(&self) -> Result<&ChatTemplate, ApiError> {
        self.chat_template.as_ref().map_err(|why| ApiError::field("messages", why.as_str()))
    }
}
