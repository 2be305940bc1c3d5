//! The Responses API's bodies for `/openapi.json`. They are put together as JSON; a test holds both to the same fields.
#![expect(dead_code, reason = "nothing is made of these types but their schemas")]

use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::request::ResponseFields;
use crate::http::sampling::SamplingFields;
use crate::http::tools::{ToolChoice, ToolType};

/// The body of a request for a response: what a chat may have, but for `n`, and these; unknown fields are accepted.
#[derive(ToSchema)]
#[schema(example = json!({"input": "What is 2 + 2?", "max_output_tokens": 16}))]
pub(super) struct ResponseRequest {
    /// A name of the served model [default: its first].
    model: Option<String>,
    #[serde(flatten)]
    fields: ResponseFields,
    #[serde(flatten)]
    sampling: SamplingFields,
}

/// A text of the user, or a conversation.
#[derive(ToSchema)]
#[serde(untagged)]
pub(super) enum ResponseInput {
    Text(String),
    Items(Vec<InputItem>),
}

/// A message, a call that the model made, what came of it, or what the model thought, which is left out.
#[derive(ToSchema)]
#[serde(untagged)]
pub(super) enum InputItem {
    Message(InputMessage),
    Call(InputCall),
    CallOutput(InputCallOutput),
    Reasoning(InputReasoning),
}

#[derive(ToSchema)]
pub(super) struct InputMessage {
    r#type: Option<InputMessageType>,
    role: String,
    content: InputContent,
}

#[derive(ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum InputMessageType {
    Message,
}

/// Text, or its parts.
#[derive(ToSchema)]
#[serde(untagged)]
pub(super) enum InputContent {
    Text(String),
    Parts(Vec<InputPart>),
}

#[derive(ToSchema)]
pub(super) struct InputPart {
    r#type: InputPartType,
    text: String,
}

#[derive(ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum InputPartType {
    InputText,
    OutputText,
    Text,
}

#[derive(ToSchema)]
pub(super) struct InputCall {
    r#type: InputCallType,
    call_id: String,
    name: String,
    /// The text of a JSON object.
    arguments: String,
}

#[derive(ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum InputCallType {
    FunctionCall,
}

#[derive(ToSchema)]
pub(super) struct InputCallOutput {
    r#type: InputCallOutputType,
    call_id: String,
    output: String,
}

#[derive(ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum InputCallOutputType {
    FunctionCallOutput,
}

#[derive(ToSchema)]
pub(super) struct InputReasoning {
    r#type: InputReasoningType,
}

#[derive(ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum InputReasoningType {
    Reasoning,
}

/// A tool that the model may call: the fields of a function beside the type.
#[derive(ToSchema)]
#[schema(example = json!({"type": "function", "name": "now", "parameters": {"type": "object"}}))]
pub(super) struct ResponseTool {
    r#type: ToolType,
    /// Without white space.
    #[schema(min_length = 1, max_length = 256)]
    name: String,
    description: Option<String>,
    /// The JSON schema of its arguments [default: any object].
    #[schema(value_type = Option<Object>)]
    parameters: Option<Map<String, Value>>,
}

/// The form of the text.
#[derive(ToSchema)]
pub(super) struct TextFormat {
    r#type: TextFormatType,
    /// Only people read it.
    name: Option<String>,
    /// Needed with type `json_schema`.
    #[schema(value_type = Option<Object>)]
    schema: Option<Map<String, Value>>,
}

#[derive(ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum TextFormatType {
    Text,
    JsonObject,
    JsonSchema,
}

/// What else an answer is to have.
#[derive(ToSchema)]
pub(super) enum Include {
    #[serde(rename = "message.output_text.logprobs")]
    Logprobs,
    /// There is nothing encrypted here: it changes nothing.
    #[serde(rename = "reasoning.encrypted_content")]
    EncryptedReasoning,
}

/// What happens to a conversation that is too long: it is refused.
#[derive(ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Truncation {
    Disabled,
}

/// A response, complete or not.
#[derive(ToSchema)]
#[schema(as = Response)]
pub(super) struct ResponseObject {
    id: String,
    #[schema(example = "response")]
    object: String,
    /// Seconds since 1970.
    created_at: u64,
    status: Status,
    background: bool,
    #[schema(required)]
    error: Option<ResponseError>,
    #[schema(required)]
    incomplete_details: Option<IncompleteDetails>,
    #[schema(required)]
    instructions: Option<String>,
    #[schema(required)]
    max_output_tokens: Option<usize>,
    model: String,
    output: Vec<OutputItem>,
    parallel_tool_calls: bool,
    #[schema(required)]
    previous_response_id: Option<String>,
    reasoning: ReasoningSettings,
    store: bool,
    #[schema(required)]
    temperature: Option<f32>,
    text: TextSettings,
    tool_choice: ToolChoice,
    tools: Vec<ResponseTool>,
    #[schema(required)]
    top_p: Option<f32>,
    truncation: Truncation,
    /// Once the response is complete.
    #[schema(required)]
    usage: Option<ResponseUsage>,
    #[schema(value_type = Object)]
    metadata: Map<String, Value>,
}

#[derive(ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Status {
    InProgress,
    Completed,
    Incomplete,
    Failed,
    Cancelled,
}

#[derive(ToSchema)]
pub(super) struct ResponseError {
    #[schema(example = "server_error")]
    code: String,
    message: String,
}

#[derive(ToSchema)]
pub(super) struct IncompleteDetails {
    #[schema(example = "max_output_tokens")]
    reason: String,
}

#[derive(ToSchema)]
pub(super) struct ReasoningSettings {
    #[schema(required)]
    effort: Option<String>,
    #[schema(required)]
    summary: Option<String>,
}

#[derive(ToSchema)]
pub(super) struct TextSettings {
    format: TextFormat,
}

/// A message, a call of a tool, or what the model thought.
#[derive(ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum OutputItem {
    Message { id: String, role: String, status: Status, content: Vec<OutputText> },
    FunctionCall { id: String, call_id: String, name: String, arguments: String, status: Status },
    Reasoning { id: String, summary: Vec<Value>, content: Vec<ReasoningText>, status: Status },
}

#[derive(ToSchema)]
pub(super) struct OutputText {
    #[schema(example = "output_text")]
    r#type: String,
    text: String,
    annotations: Vec<Value>,
    /// Of the text's tokens, if asked for; each as in a chat.
    logprobs: Vec<Value>,
}

#[derive(ToSchema)]
pub(super) struct ReasoningText {
    #[schema(example = "reasoning_text")]
    r#type: String,
    text: String,
}

#[derive(ToSchema)]
pub(super) struct ResponseUsage {
    input_tokens: usize,
    input_tokens_details: InputDetails,
    output_tokens: usize,
    output_tokens_details: OutputDetails,
    total_tokens: usize,
}

#[derive(ToSchema)]
pub(super) struct InputDetails {
    cached_tokens: usize,
}

#[derive(ToSchema)]
pub(super) struct OutputDetails {
    reasoning_tokens: usize,
}

/// A response that is gone.
#[derive(ToSchema)]
pub(super) struct DeletedResponse {
    id: String,
    #[schema(example = "response")]
    object: String,
    deleted: bool,
}
