//! `/openapi.json`: it is whole, and the server does what it says.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::TestServer;

/// What clients, routers and dashboards ask for.
const ENDPOINTS: [&str; 20] = [
    "delete /v1/responses/{id}",
    "get /health",
    "get /load",
    "get /metrics",
    "get /ping",
    "get /tokenizer_info",
    "get /v1/models",
    "get /v1/models/{id}",
    "get /v1/responses/{id}",
    "get /version",
    "post /detokenize",
    "post /ping",
    "post /tokenize",
    "post /v1/chat/completions",
    "post /v1/chat/completions/render",
    "post /v1/completions",
    "post /v1/completions/render",
    "post /v1/embeddings",
    "post /v1/responses",
    "post /v1/responses/{id}/cancel",
];

/// Every `$ref` inside.
fn references<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
    match value {
        Value::Object(fields) => {
            found.extend(fields.get("$ref").and_then(Value::as_str));
            fields.values().for_each(|value| references(value, found));
        }
        Value::Array(items) => items.iter().for_each(|item| references(item, found)),
        _ => {}
    }
}

#[tokio::test]
async fn every_endpoint_is_documented_and_served() {
    let server = TestServer::chatty().await;
    let (status, document) = server.get("/openapi.json").await;
    assert_eq!(status, StatusCode::OK);
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
    let mut documented = Vec::new();
    let mut ids = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            documented.push(format!("{method} {path}"));
            ids.push(operation["operationId"].as_str().unwrap());
            assert_eq!(operation["security"].is_array(), path.starts_with("/v1/"), "{method} {path}");
            // An id that is none is not found; anything else is the route's own answer.
            let method: Method = method.to_uppercase().parse().unwrap();
            let response = server.send(method, &path.replace("{id}", "x"), "").await;
            let status = response.status().as_u16().to_string();
            assert!(operation["responses"].get(&status).is_some(), "{path}: {status}");
            let text = response.text().await.unwrap();
            assert!(!text.contains("here\""), "{path} is not served: {text}");
        }
    }
    documented.sort();
    assert_eq!(documented, ENDPOINTS);
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), ENDPOINTS.len(), "ids of operations are unique");
    let mut found = Vec::new();
    references(&document, &mut found);
    assert!(found.len() > 50, "{}", found.len());
    for reference in found {
        let path = reference.strip_prefix('#').unwrap();
        assert!(document.pointer(path).is_some(), "{reference} leads nowhere");
    }
}

/// Values just outside the bounds of a field.
fn outside(schema: &Value) -> Vec<Value> {
    let number = |key: &str| schema.get(key).and_then(Value::as_f64);
    let whole = schema["type"].as_array().is_some_and(|types| types.contains(&json!("integer")));
    let value = |x: f64| if whole { json!(x as i64) } else { json!(x) };
    let below = number("minimum").map(|least| value(least - 1.0));
    let above = number("maximum").map(|most| value(most + 1.0));
    let empty_list = number("minItems").map(|_| json!([]));
    let empty_text = number("minLength").map(|_| json!(""));
    let at_least = number("exclusiveMinimum").map(value);
    [below, above, empty_list, empty_text, at_least].into_iter().flatten().collect()
}

#[tokio::test]
async fn the_bounds_are_those_that_are_checked() {
    let server = TestServer::chatty().await;
    let (_, document) = server.get("/openapi.json").await;
    let messages = json!({"messages": [{"role": "user", "content": "a"}], "logprobs": true});
    let requests = [
        ("SamplingFields", "/v1/completions", json!({"prompt": "a"})),
        ("CompletionFields", "/v1/completions", json!({"prompt": "a"})),
        ("ChatFields", "/v1/chat/completions", messages),
        ("ResponseFields", "/v1/responses", json!({"input": "a"})),
        ("EmbeddingFields", "/v1/embeddings", json!({"input": "a"})),
    ];
    let mut tried = 0;
    for (schema, path, body) in requests {
        let fields = document["components"]["schemas"][schema]["properties"].as_object();
        for (field, schema) in fields.unwrap_or_else(|| panic!("{schema}")) {
            for value in outside(schema) {
                let mut body = body.clone();
                body[field] = value;
                let (status, answer) = server.post(path, &body).await;
                let named = answer["error"]["param"].as_str();
                assert_eq!(
                    (status, named),
                    (StatusCode::BAD_REQUEST, Some(field.as_str())),
                    "{body}: {answer}"
                );
                tried += 1;
            }
        }
    }
    assert!(tried > 30, "{tried}");
}

#[tokio::test]
async fn the_examples_are_good_requests() {
    let server = TestServer::chatty().await;
    let (_, document) = server.get("/openapi.json").await;
    let mut tried = 0;
    for (path, item) in document["paths"].as_object().unwrap() {
        let content = &item["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"];
        let Some(reference) = content.as_str() else { continue };
        let schema = document.pointer(&reference[1..]).unwrap();
        let example = schema.get("example").unwrap_or_else(|| panic!("{path}: {schema}"));
        server.ok(path, example).await;
        tried += 1;
    }
    assert_eq!(tried, 8);
}
