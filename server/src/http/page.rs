//! The web page at `/`: a playground and the server's figures. Its files (`server/page/`) are part of the program, and
//! it asks nobody but this server.

use std::sync::Arc;

use axum::Router;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use sha2::{Digest, Sha256};

use super::App;

/// Only this server's own files and answers; no frames, no forms, nothing inline.
const CONTENT_SECURITY_POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
);

/// A file of the page.
struct File {
    path: &'static str,
    content_type: HeaderValue,
    text: &'static str,
}

macro_rules! files {
    ($($path:literal = $name:literal $content_type:literal;)*) => {
        [$(File {
            path: $path,
            content_type: HeaderValue::from_static($content_type),
            text: include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/page/", $name)),
        }),*]
    };
}

/// Paths are relative in the page, so that it works below a prefix of a reverse proxy.
fn files() -> [File; 15] {
    files! {
        "/" = "index.html" "text/html; charset=utf-8";
        "/page/icon.svg" = "icon.svg" "image/svg+xml";
        "/page/base.css" = "base.css" "text/css; charset=utf-8";
        "/page/playground.css" = "playground.css" "text/css; charset=utf-8";
        "/page/server.css" = "server.css" "text/css; charset=utf-8";
        "/page/main.js" = "main.js" "text/javascript; charset=utf-8";
        "/page/api.js" = "api.js" "text/javascript; charset=utf-8";
        "/page/requests.js" = "requests.js" "text/javascript; charset=utf-8";
        "/page/playground.js" = "playground.js" "text/javascript; charset=utf-8";
        "/page/turn.js" = "turn.js" "text/javascript; charset=utf-8";
        "/page/tokens.js" = "tokens.js" "text/javascript; charset=utf-8";
        "/page/live.js" = "live.js" "text/javascript; charset=utf-8";
        "/page/metrics.js" = "metrics.js" "text/javascript; charset=utf-8";
        "/page/format.js" = "format.js" "text/javascript; charset=utf-8";
        "/page/chart.js" = "chart.js" "text/javascript; charset=utf-8";
    }
}

/// A route per file.
pub(super) fn routes() -> Router<Arc<App>> {
    files().into_iter().fold(Router::new(), |routes, file| {
        // Browsers ask again each time, and are told when they have this version.
        let digest: String = Sha256::digest(file.text).iter().map(|byte| format!("{byte:02x}")).collect();
        let tag = format!("\"{digest}\"");
        let (path, file) = (file.path, Arc::new((file, tag)));
        routes.route(
            path,
            get(move |headers: HeaderMap| std::future::ready(answer(&file.0, &file.1, &headers))),
        )
    })
}

fn answer(file: &File, tag: &str, headers: &HeaderMap) -> Response {
    let known = headers.get(header::IF_NONE_MATCH).is_some_and(|value| value.as_bytes() == tag.as_bytes());
    let mut response =
        if known { StatusCode::NOT_MODIFIED.into_response() } else { file.text.into_response() };
    let answer = response.headers_mut();
    answer.insert(header::CONTENT_TYPE, file.content_type.clone());
    answer.insert(header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY);
    answer.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    answer.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    answer.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    if let Ok(tag) = HeaderValue::from_str(tag) {
        answer.insert(header::ETAG, tag);
    }
    response
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use regex::Regex;

    use super::*;

    /// Every file that another one names is there, every file is named, and nothing is asked of another server.
    #[test]
    fn the_page_is_complete_and_self_contained() {
        let named = Regex::new(r#"(?:from "\./|(?:src|href)="page/)([\w.]+)""#).unwrap();
        let files = files();
        let there: BTreeSet<&str> =
            files.iter().filter_map(|file| file.path.strip_prefix("/page/")).collect();
        let wanted: BTreeSet<&str> = files
            .iter()
            .flat_map(|file| named.captures_iter(file.text))
            .map(|c| c.get(1).unwrap().as_str())
            .collect();
        assert_eq!(there, wanted);
        for file in &files {
            // The name of a format, not an address.
            let text = file.text.replace("http://www.w3.org/2000/svg", "");
            assert!(!text.contains("http://") && !text.contains("https://"), "{}", file.path);
            assert!(
                !text.contains(" style=") && !text.contains(" onclick="),
                "{}: the policy forbids it",
                file.path
            );
        }
    }

    #[test]
    fn a_browser_that_has_a_file_is_not_sent_it_again() {
        let files = files();
        let mut headers = HeaderMap::new();
        assert_eq!(answer(&files[0], "\"a\"", &headers).status(), StatusCode::OK);
        headers.insert(header::IF_NONE_MATCH, HeaderValue::from_static("\"a\""));
        assert_eq!(answer(&files[0], "\"a\"", &headers).status(), StatusCode::NOT_MODIFIED);
        assert_eq!(answer(&files[0], "\"b\"", &headers).status(), StatusCode::OK);
    }
}
