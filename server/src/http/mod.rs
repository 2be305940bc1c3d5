//! The HTTP API: one endpoint per file, with its fields, its handler and its tests.

mod access_log;
mod app;
mod auth;
mod chat;
mod chat_answer;
mod chat_messages;
mod check;
mod completions;
mod deadline;
mod detokenize;
mod embeddings;
mod error;
mod generation;
mod health;
mod integer;
mod json;
mod load;
mod logprobs;
mod metrics;
mod models;
mod page;
mod prompt;
mod render;
mod request_id;
mod responses;
mod sampling;
mod served;
mod sse;
mod structured_output;
mod tokenize;
mod tokenizer_info;
mod tools;
mod unsupported;
mod usage;
mod version;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{HeaderValue, Method, Uri};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::{get, post};
use tower_http::cors::{AllowHeaders, AllowOrigin, Any, CorsLayer};

pub use app::App;
pub use auth::{ApiKeys, KeyFileError};
pub use error::ApiError;

/// Every route of the server.
pub fn router(app: Arc<App>) -> Router {
    let config = app.config();
    let (max_body_bytes, cors) = (config.max_body_bytes, cors(&config.allowed_origins));
    let page = if config.web_page { page::routes() } else { Router::new() };
    Router::new()
        .merge(page)
        .route("/v1/completions", post(completions::complete))
        .route("/v1/chat/completions", post(chat::chat))
        .route("/v1/completions/render", post(render::completions))
        .route("/v1/chat/completions/render", post(render::chat))
        .route("/v1/embeddings", post(embeddings::embed))
        .route("/v1/responses", post(responses::create))
        .route("/v1/responses/{id}", get(responses::retrieve).delete(responses::delete))
        .route("/v1/responses/{id}/cancel", post(responses::cancel))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(detokenize::detokenize))
        .route("/tokenizer_info", get(tokenizer_info::tokenizer_info))
        .route("/health", get(health::health))
        .route("/ping", get(health::health).post(health::health))
        .route("/version", get(version::version))
        .route("/metrics", get(metrics::metrics))
        .route("/load", get(load::load))
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(max_body_bytes))
        .layer(from_fn_with_state(Arc::clone(&app), deadline::limit))
        .layer(from_fn_with_state(Arc::clone(&app), auth::authorize))
        .layer(from_fn_with_state(Arc::clone(&app), access_log::tell))
        .layer(from_fn(request_id::identify))
        .layer(cors)
        .with_state(app)
}

async fn unknown_route(uri: Uri) -> ApiError {
    ApiError::UnknownRoute(uri.path().to_owned())
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    ApiError::MethodNotAllowed(format!("{method} {}", uri.path()))
}

/// Lets browsers at these origins call; none: no header at all, so that browsers keep to their default.
fn cors(origins: &[String]) -> CorsLayer {
    let layer = CorsLayer::new();
    if origins.is_empty() {
        return layer;
    }
    let allowed = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::from(Any)
    } else {
        AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok()))
    };
    // `*` would not cover Authorization, which the key is in.
    layer
        .allow_origin(allowed)
        .allow_methods(Any)
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([request_id::HEADER])
}

/// Seconds since 1970.
fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
