//! `/v1/embeddings`.

use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::support::TestServer;

const PATH: &str = "/v1/embeddings";

fn vectors(answer: &Value) -> Vec<Vec<f64>> {
    let data = answer["data"].as_array().unwrap();
    assert!(
        data.iter().zip(0..).all(|(entry, index)| entry["index"] == index && entry["object"] == "embedding")
    );
    data.iter().map(|entry| serde_json::from_value(entry["embedding"].clone()).unwrap()).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[tokio::test]
async fn all_four_forms_of_input_and_both_encodings() {
    let server = TestServer::start().await;
    let texts = json!(["Returns the length of the vector.", "The weather in Rome"]);
    let answer = server.ok(PATH, &json!({"input": texts})).await;
    assert_eq!((&answer["object"], answer["data"].as_array().unwrap().len()), (&json!("list"), 2));
    let both = vectors(&answer);
    assert!(both.iter().all(|vector| vector.len() == 256 && (dot(vector, vector) - 1.0).abs() < 1e-5));
    let mut ids = Vec::new();
    for text in texts.as_array().unwrap() {
        ids.push(server.ok("/tokenize", &json!({"prompt": text})).await["tokens"].clone());
    }
    let count: usize = ids.iter().map(|ids| ids.as_array().unwrap().len()).sum();
    assert_eq!(
        (&answer["usage"]["prompt_tokens"], &answer["usage"]["total_tokens"]),
        (&json!(count), &json!(count))
    );
    assert_eq!(vectors(&server.ok(PATH, &json!({"input": ids})).await), both);
    for (text, (ids, vector)) in texts.as_array().unwrap().iter().zip(ids.iter().zip(&both)) {
        for input in [text, ids] {
            assert_eq!(
                vectors(&server.ok(PATH, &json!({"input": input, "dimensions": 256})).await),
                std::slice::from_ref(vector)
            );
        }
    }
    let encoded = server.ok(PATH, &json!({"input": texts, "encoding_format": "base64"})).await;
    for (entry, vector) in encoded["data"].as_array().unwrap().iter().zip(&both) {
        use base64::Engine;
        let bytes =
            base64::engine::general_purpose::STANDARD.decode(entry["embedding"].as_str().unwrap()).unwrap();
        let (words, rest) = bytes.as_chunks::<4>();
        assert!(rest.is_empty() && words.len() == vector.len());
        assert!(
            words
                .iter()
                .zip(vector)
                .all(|(word, &x)| (f64::from(f32::from_le_bytes(*word)) - x).abs() < 1e-6)
        );
    }
}

#[tokio::test]
async fn the_more_alike_the_closer() {
    let server = TestServer::start().await;
    let input = json!([
        "Returns the length of the string.",
        "Returns the length of the vector.",
        "unsafe { ptr.cast() }"
    ]);
    for pooling in ["mean", "last"] {
        let vectors = vectors(&server.ok(PATH, &json!({"input": input, "pooling": pooling})).await);
        assert!(dot(&vectors[0], &vectors[1]) > dot(&vectors[0], &vectors[2]), "{pooling}");
    }
    let long = vectors(&server.ok(PATH, &json!({"input": input, "normalize": false})).await);
    assert!(dot(&long[0], &long[0]) > 1.5);
}

#[tokio::test]
async fn what_is_wrong_is_named() {
    let server = TestServer::start().await;
    let cases = [
        (json!({}), "input"),
        (json!({"input": []}), "input"),
        (json!({"input": ""}), "input"),
        (json!({"input": [4096]}), "input"),
        (json!({"input": [[5], "a"]}), "input"),
        (json!({"input": vec![5; 1025]}), "input"),
        (json!({"input": vec!["a"; 5000]}), "input"),
        (json!({"input": "a", "dimensions": 128}), "dimensions"),
        (json!({"input": "a", "encoding_format": "hex"}), "encoding_format"),
        (json!({"input": "a", "pooling": "max"}), "pooling"),
        (json!({"input": "a", "truncate_prompt_tokens": 0}), "truncate_prompt_tokens"),
    ];
    for (body, param) in cases {
        let (status, error) = server.post(PATH, &body).await;
        assert_eq!((status, &error["error"]["param"]), (StatusCode::BAD_REQUEST, &json!(param)), "{error}");
    }
    let body = json!({"input": vec![5; 1025], "truncate_prompt_tokens": -1});
    assert_eq!(server.ok(PATH, &body).await["usage"]["prompt_tokens"], 1024);
}
