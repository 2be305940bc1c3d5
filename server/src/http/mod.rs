//! The HTTP API: one endpoint per file, with its fields, its handler and its tests.

mod access_log;
mod app;
mod auth;
mod chat;
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
mod openapi;
mod page;
mod path_id;
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
use axum::body::Bytes;
use axum::extract::DefaultBodyLimit;
use axum::http::{HeaderValue, Method, Uri, header};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::get;
use tower_http::cors::{AllowHeaders, AllowOrigin, Any, CorsLayer};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub use app::App;
pub use auth::{ApiKeys, KeyFileError};
pub use error::ApiError;

/// Every endpoint of the API: the router and `/openapi.json` are made of this list.
fn api() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::with_openapi(openapi::head())
        .routes(routes!(completions::complete))
        .routes(routes!(chat::chat))
        .routes(routes!(render::completions))
        .routes(routes!(render::chat))
        .routes(routes!(embeddings::embed))
        .routes(routes!(responses::create))
        .routes(routes!(responses::retrieve, responses::delete))
        .routes(routes!(responses::cancel))
        .routes(routes!(models::list))
        .routes(routes!(models::one))
        .routes(routes!(tokenize::tokenize))
        .routes(routes!(detokenize::detokenize))
        .routes(routes!(tokenizer_info::tokenizer_info))
        .routes(routes!(health::health))
        .routes(routes!(health::ping, health::post_ping))
        .routes(routes!(version::version))
        .routes(routes!(metrics::metrics))
        .routes(routes!(load::load))
}

/// Every route of the server.
pub fn router(app: Arc<App>) -> Router {
    let config = app.config();
    let (max_body_bytes, cors) = (config.max_body_bytes, cors(&config.allowed_origins));
    let page = if config.web_page { page::routes() } else { Router::new() };
    let (api, document) = api().split_for_parts();
    // Nothing in it can fail to be written; a server without its document still serves.
    let document = openapi::finish(document).unwrap_or_else(|error| {
        tracing::error!("/openapi.json cannot be written: {error}");
        Bytes::new()
    });
    let document = || async { ([(header::CONTENT_TYPE, "application/json")], document) };
    api.merge(page)
        .route("/openapi.json", get(document))
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
