//! `POST /v1/embeddings`: the served model's final hidden states, pooled over each input.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::UnboundedReceiver;
use utoipa::ToSchema;

use super::App;
use super::check::{out_of_range, require};
use super::error::ApiError;
use super::json::JsonBody;
use super::openapi::GenerationErrors;
use super::prompt::{Prompt, PromptOptions, PromptSchema, parse_prompts};
use super::request_id::RequestId;
use super::usage::Usage;
use crate::engine::{
    FinishReason, GenerateRequest, Pooling, Sampling, Scheduling, StopConditions, TokenEvent,
};
use crate::model::ServedModel;
use crate::telemetry::{Outcome, Recorder, Telemetry};

const FIELD: &str = "input";

/// The body of a request for embeddings; unknown fields are accepted.
#[derive(ToSchema)]
#[schema(example = json!({"input": ["One text.", "Another."]}))]
#[expect(dead_code, reason = "the input is parsed by hand; this is the whole, for the document")]
pub(super) struct EmbeddingRequest {
    input: PromptSchema,
    #[serde(flatten)]
    fields: EmbeddingFields,
}

/// The fields but for the input.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct EmbeddingFields {
    /// A name of the served model [default: its first].
    model: Option<String>,
    /// Numbers, or the Base64 of their little-endian 32-bit floats [default: float].
    encoding_format: Option<EncodingFormat>,
    /// Has to be the model's hidden size: its embeddings cannot be cut.
    #[serde(default, deserialize_with = "super::integer::optional")]
    dimensions: Option<usize>,
    /// How the hidden states of an input's tokens become one [default: mean].
    pooling: Option<PoolingField>,
    /// Whether embeddings have length 1 [default: true].
    normalize: Option<bool>,
    /// Keep only this many of an input's last tokens; -1: as many as the context holds.
    #[serde(default, deserialize_with = "super::integer::optional")]
    #[schema(minimum = -1)]
    truncate_prompt_tokens: Option<i64>,
    /// Whether the tokenizer adds special tokens to a text [default: true].
    add_special_tokens: Option<bool>,
    /// Lower runs first, where the server has `--scheduling-policy priority`; else 0.
    #[serde(default, deserialize_with = "super::integer::optional")]
    priority: Option<i64>,
    /// Cached prefixes are shared among requests with the same salt only.
    #[schema(min_length = 1)]
    cache_salt: Option<String>,
    /// The answer's id, as in the header `X-Request-Id`, which wins.
    request_id: Option<String>,
}

#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum EncodingFormat {
    Float,
    Base64,
}

#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum PoolingField {
    Mean,
    Last,
}

/// The embeddings, in the order of the inputs.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct EmbeddingResponse {
    id: String,
    #[schema(example = "list")]
    object: &'static str,
    /// Seconds since 1970.
    created: u64,
    model: String,
    data: Vec<Embedding>,
    usage: Usage,
}

#[derive(Debug, Serialize, ToSchema)]
struct Embedding {
    #[schema(example = "embedding")]
    object: &'static str,
    /// Of the input.
    index: usize,
    embedding: Vector,
}

/// Numbers, or the Base64 of their little-endian 32-bit floats.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
enum Vector {
    Numbers(Vec<f32>),
    Base64(String),
}

/// `POST /v1/embeddings`: a vector for each input.
#[utoipa::path(
    post,
    path = "/v1/embeddings",
    operation_id = "createEmbedding",
    request_body = EmbeddingRequest,
    responses((status = 200, description = "The vectors.", body = EmbeddingResponse), GenerationErrors)
)]
pub(super) async fn embed(
    State(app): State<Arc<App>>,
    request_id: RequestId,
    mut body: JsonBody,
) -> Result<Json<EmbeddingResponse>, ApiError> {
    let model = Arc::clone(app.model()?);
    let fields: EmbeddingFields = body.read()?;
    let input = body.take(FIELD);
    request_id.adopt(fields.request_id.as_deref());
    let name = model.resolve_name(fields.model.as_deref())?.to_owned();
    let hidden_size = model.engine.info().hidden_size;
    require(
        "dimensions",
        fields.dimensions.is_none_or(|dimensions| dimensions == hidden_size),
        &format!("{hidden_size}, or absent: this model's embeddings cannot be cut"),
    )?;
    let scheduling = model.facts().scheduling(fields.priority, fields.cache_salt)?;
    let truncate = truncate(fields.truncate_prompt_tokens, model.max_model_len())?;
    let options = PromptOptions {
        add_special_tokens: fields.add_special_tokens.unwrap_or(true),
        truncate,
        echo: false,
        field: FIELD,
    };
    let preparing = Arc::clone(&model);
    let inputs: Vec<Prompt> = app
        .off_the_reactor(move || {
            let given = parse_prompts(input, FIELD, preparing.longest_prompt(truncate))?;
            given.into_iter().map(|input| input.prepare(&preparing, options)).collect()
        })
        .await?;
    model.require_capacity(FIELD, inputs.len(), 1)?;
    let too_long = inputs.iter().position(|input| input.ids.len() > model.max_model_len());
    if let Some(at) = too_long {
        let message = format!(
            "{FIELD}[{at}] has {} tokens; this model's context holds {}",
            inputs[at].ids.len(),
            model.max_model_len()
        );
        return Err(ApiError::field(FIELD, message));
    }
    let id = format!("embd-{request_id}");
    let pooling = match fields.pooling.unwrap_or(PoolingField::Mean) {
        PoolingField::Mean => Pooling::Mean,
        PoolingField::Last => Pooling::Last,
    };
    let usage = Usage::new(inputs.iter().map(|input| input.ids.len()).sum());
    let requests = requests(&id, inputs, pooling, &scheduling);
    let mut recorder = Recorder::new(&model.names[0], &requests, usage.prompt_tokens());
    recorder.write_to(request_id.record());
    let channels = model.submit(app.telemetry(), requests)?;
    let normalize = fields.normalize.unwrap_or(true);
    let mut data = Vec::with_capacity(channels.len());
    let mut unfinished = Unfinished { telemetry: app.telemetry(), sequences: channels.len() };
    for (index, channel) in channels.into_iter().enumerate() {
        let vector = receive(channel).await.and_then(|vector| checked(vector, &model));
        unfinished.next(if vector.is_ok() { Outcome::Length } else { Outcome::Error });
        let vector = vector?;
        recorder.finished("length");
        let vector = if normalize { normalized(vector) } else { vector };
        let embedding = match fields.encoding_format {
            Some(EncodingFormat::Base64) => Vector::Base64(base64_of(&vector)),
            Some(EncodingFormat::Float) | None => Vector::Numbers(vector),
        };
        data.push(Embedding { object: "embedding", index, embedding });
    }
    Ok(Json(EmbeddingResponse { id, object: "list", created: super::unix_time(), model: name, data, usage }))
}

fn truncate(asked: Option<i64>, max_model_len: usize) -> Result<Option<usize>, ApiError> {
    match asked {
        None => Ok(None),
        Some(-1) => Ok(Some(max_model_len)),
        Some(k) => {
            usize::try_from(k).ok().filter(|k| (1..=max_model_len).contains(k)).map(Some).ok_or_else(|| {
                out_of_range("truncate_prompt_tokens", "-1, or from 1 to the context's length")
            })
        }
    }
}

fn requests(
    id: &str,
    inputs: Vec<Prompt>,
    pooling: Pooling,
    scheduling: &Scheduling,
) -> Vec<GenerateRequest> {
    let request = |(index, input): (usize, Prompt)| GenerateRequest {
        id: format!("{id}-{index}"),
        prompt: input.ids,
        sampling: Sampling::default(),
        stop: StopConditions::default(),
        scheduling: scheduling.clone(),
        logprobs: None,
        prompt_logprobs: None,
        pooling: Some(pooling),
    };
    inputs.into_iter().enumerate().map(request).collect()
}

/// Counts how the sequences of a request end: those that are left when it is dropped are given up.
struct Unfinished<'a> {
    telemetry: &'a Telemetry,
    sequences: usize,
}

impl Unfinished<'_> {
    fn next(&mut self, outcome: Outcome) {
        self.sequences -= 1;
        self.telemetry.finished(outcome);
    }
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        (0..self.sequences).for_each(|_| self.telemetry.finished(Outcome::Abort));
    }
}

/// The vector that the engine sends.
async fn receive(mut events: UnboundedReceiver<TokenEvent>) -> Result<Vec<f32>, ApiError> {
    let mut vector = None;
    while let Some(event) = events.recv().await {
        match event {
            TokenEvent::Embedding(pooled) => vector = Some(pooled),
            TokenEvent::Finished { reason: FinishReason::Aborted, .. } => return Err(ApiError::ShuttingDown),
            TokenEvent::Finished { .. } => break,
            TokenEvent::Prompt { .. } | TokenEvent::Token { .. } => {}
        }
    }
    vector.ok_or(ApiError::EngineDied)
}

/// Refuses what is no vector: the model computed NaN.
fn checked(vector: Vec<f32>, model: &ServedModel) -> Result<Vec<f32>, ApiError> {
    if vector.iter().any(|x| !x.is_finite()) {
        tracing::error!(
            model = model.root,
            "the model's hidden states are not numbers: the answer is given up"
        );
        return Err(ApiError::Internal("the model's hidden states are not numbers".to_owned()));
    }
    Ok(vector)
}

/// The vector of length 1 in the same direction; the zero vector has none and stays.
fn normalized(vector: Vec<f32>) -> Vec<f32> {
    let length = vector.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    if length == 0.0 {
        return vector;
    }
    vector.into_iter().map(|x| (f64::from(x) / length) as f32).collect()
}

fn base64_of(vector: &[f32]) -> String {
    let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
    STANDARD.encode(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors() {
        assert_eq!(normalized(vec![3.0, 4.0]), [0.6, 0.8]);
        assert_eq!(normalized(vec![0.0]), [0.0]);
        assert_eq!(base64_of(&[1.0, -2.0]), "AACAPwAAAMA=");
    }

    #[test]
    fn truncation() {
        assert_eq!(truncate(Some(-1), 64), Ok(Some(64)));
        assert_eq!(truncate(Some(64), 64), Ok(Some(64)));
        assert!(truncate(Some(0), 64).is_err() && truncate(Some(65), 64).is_err());
    }
}
