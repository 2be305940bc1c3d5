//! `GET /openapi.json`: what this server takes and gives, read off the routes and types that do it.

use std::collections::BTreeMap;

use axum::body::Bytes;
use axum::http::{HeaderName, header};
use axum::response::IntoResponse;
use utoipa::openapi::header::HeaderBuilder;
use utoipa::openapi::path::PathItem;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{
    Content, InfoBuilder, ObjectBuilder, OpenApi, OpenApiBuilder, Ref, RefOr, Response, ResponseBuilder, Type,
};
use utoipa::{IntoResponses, PartialSchema, ToSchema};

use super::chat::{ChatResponse, ChunkChoice};
use super::error::{ApiError, ErrorBody};

const DESCRIPTION: &str = "Serves models in Microscaling (MX) formats over an OpenAI-style API. Requests may have \
    fields that are not listed here: unknown ones are ignored, those that are understood and not supported are \
    refused by name. `null` is the same as absent. A stream that fails has an event with an error, of the form of \
    the other answers' errors, before its end.";

const KEY: &str = "api_key";

/// The document without its paths.
pub(super) fn head() -> OpenApi {
    let info =
        InfoBuilder::new().title("mxserve").version(env!("CARGO_PKG_VERSION")).description(Some(DESCRIPTION));
    OpenApiBuilder::new().info(info.build()).build()
}

/// The document with its paths, as JSON, once they are made fit for OpenAPI.
pub(super) fn finish(mut document: OpenApi) -> Result<Bytes, serde_json::Error> {
    let components = document.components.get_or_insert_default();
    // Only descriptions and responses made by hand refer to these.
    let mut schemas = vec![
        ("ChatCompletionChunk".to_owned(), ChatResponse::<ChunkChoice>::schema()),
        (ChunkChoice::name().into(), ChunkChoice::schema()),
        (ErrorBody::name().into(), ErrorBody::schema()),
    ];
    ChatResponse::<ChunkChoice>::schemas(&mut schemas);
    ErrorBody::schemas(&mut schemas);
    components.schemas.extend(schemas);
    let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer);
    let description = "Needed under `/v1` where the server was started with API keys.";
    components.add_security_scheme(KEY, SecurityScheme::Http(scheme.description(Some(description)).build()));
    let paths = std::mem::take(&mut document.paths.paths);
    document.paths.paths = paths
        .into_iter()
        .map(|(path, mut item)| {
            if path.starts_with("/v1/") {
                guard(&mut item);
            }
            // The router's sign for a parameter with slashes.
            (path.replace("{*", "{"), item)
        })
        .collect();
    serde_json::to_vec(&document).map(Bytes::from)
}

/// Notes that an API key may be needed.
fn guard(item: &mut PathItem) {
    let operations = [&mut item.get, &mut item.post, &mut item.delete];
    for operation in operations.into_iter().flatten() {
        operation.responses.responses.extend(responses([ApiError::Unauthorized]));
        let keyless = SecurityRequirement::default();
        operation.security = Some(vec![keyless, SecurityRequirement::new::<_, [String; 0], String>(KEY, [])]);
    }
}

/// What a `GET` may be answered with instead.
pub(super) struct ReadErrors;

/// The same, where something is looked for.
pub(super) struct LookupErrors;

/// What a request with a body may be answered with instead.
pub(super) struct BodyErrors;

/// The same, where the engine is asked.
pub(super) struct GenerationErrors;

impl IntoResponses for ReadErrors {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        let internal = ApiError::Internal("a bug of the server".to_owned());
        responses([
            ApiError::Loading,
            ApiError::ShuttingDown,
            internal,
            ApiError::Timeout { limit_secs: 600 },
        ])
    }
}

impl IntoResponses for LookupErrors {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        let refused =
            ApiError::BadRequest { message: "what is wrong with the request".to_owned(), param: None };
        let unknown =
            [ApiError::UnknownModel("name".to_owned()), ApiError::UnknownResponse("id".to_owned()), refused];
        let mut all = ReadErrors::responses();
        all.extend(responses(unknown));
        all
    }
}

impl IntoResponses for BodyErrors {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        let mut all = LookupErrors::responses();
        all.extend(responses([
            ApiError::BodyTooLarge { limit: 33_554_432 },
            ApiError::BodyTimeout { limit_secs: 60 },
        ]));
        all
    }
}

impl IntoResponses for GenerationErrors {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        let mut all = BodyErrors::responses();
        all.extend(responses([ApiError::Overloaded { queued: 64 }]));
        all
    }
}

/// Each error with its own status and headers; those of one status share an entry.
fn responses<const N: usize>(errors: [ApiError; N]) -> BTreeMap<String, RefOr<Response>> {
    let mut all: BTreeMap<String, Response> = BTreeMap::new();
    for error in errors {
        let message = format!("For example: {error}.");
        let answer = error.into_response();
        let described = all.entry(answer.status().as_u16().to_string()).or_insert_with(|| {
            let schema = Ref::from_schema_name(ErrorBody::name());
            let mut response =
                ResponseBuilder::new().content("application/json", Content::new(Some(schema))).build();
            for name in answer.headers().keys().filter(|name| !is_about_the_body(name)) {
                let text = ObjectBuilder::new().schema_type(Type::String).build();
                response
                    .headers
                    .insert(name.to_string(), HeaderBuilder::new().schema(Some(text)).build().into());
            }
            response
        });
        if !described.description.is_empty() {
            described.description.push(' ');
        }
        described.description.push_str(&message);
    }
    all.into_iter().map(|(status, response)| (status, response.into())).collect()
}

fn is_about_the_body(name: &HeaderName) -> bool {
    [header::CONTENT_TYPE, header::CONTENT_LENGTH].contains(name)
}
