//! `/v1/completions`, not streamed.

use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::support::TestServer;

fn texts(answer: &Value) -> Vec<&str> {
    answer["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap()).collect()
}

fn greedy(fields: Value) -> Value {
    let mut body = json!({"prompt": "Returns the number of", "temperature": 0, "max_tokens": 12});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn the_engine_alone_decides_which_token_ends() {
    let server = TestServer::start().await;
    // Nothing else is allowed, so the end comes before min_tokens and does not end anything.
    let body = json!({"prompt": "a", "allowed_token_ids": [0], "min_tokens": 2, "max_tokens": 5});
    let answer = server.complete(body).await;
    assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");
    assert_eq!(answer["usage"]["completion_tokens"], 3);
    let body = json!({"prompt": "a", "allowed_token_ids": [7], "stop_token_ids": [7], "min_tokens": 2, "max_tokens": 5});
    let answer = server.complete(body).await;
    assert_eq!(answer["choices"][0]["stop_reason"], 7, "{answer}");
    assert_eq!(answer["usage"]["completion_tokens"], 3);
}

#[tokio::test]
async fn prompts_can_be_rendered_alone() {
    let server = TestServer::start().await;
    let rendered = server.ok("/v1/completions/render", &json!({"prompt": ["a", "a vector"]})).await;
    for (index, text) in ["a", "a vector"].iter().enumerate() {
        let tokens = server.ok("/tokenize", &json!({"prompt": text})).await;
        assert_eq!(rendered[index]["token_ids"], tokens["tokens"]);
    }
    let rendered =
        server.ok("/v1/completions/render", &json!({"prompt": [5, 6, 7], "truncate_prompt_tokens": 2})).await;
    assert_eq!(rendered[0]["token_ids"], json!([6, 7]));
}

#[tokio::test]
async fn each_list_has_as_many_alternatives_as_it_was_asked_for() {
    let server = TestServer::start().await;
    let body = json!({"prompt": "a vector of", "max_tokens": 1, "logprobs": 1, "prompt_logprobs": 3, "echo": true,
        "return_tokens_as_token_ids": true});
    let choice = server.choice(body).await;
    for top in choice["logprobs"]["top_logprobs"].as_array().unwrap().iter().skip(1) {
        assert!((1..=2).contains(&top.as_object().unwrap().len()), "the best and the token: {top}");
    }
    for top in choice["prompt_logprobs"].as_array().unwrap().iter().skip(1) {
        assert!((3..=4).contains(&top.as_object().unwrap().len()), "{top}");
    }
}

#[tokio::test]
async fn the_four_forms_of_a_prompt_agree() {
    let server = TestServer::start().await;
    let (a, b) = ("Returns the number of", "Creates a new");
    let tokens = async |text: &str| server.ok("/tokenize", &json!({"prompt": text})).await["tokens"].clone();
    let (ids_a, ids_b) = (tokens(a).await, tokens(b).await);
    let text = server.complete(greedy(json!({"prompt": a}))).await;
    let ids = server.complete(greedy(json!({"prompt": ids_a}))).await;
    let list_of_texts = server.complete(greedy(json!({"prompt": [a, b]}))).await;
    let list_of_ids = server.complete(greedy(json!({"prompt": [ids_a, ids_b]}))).await;
    assert_eq!(texts(&text), texts(&ids));
    assert_eq!(texts(&list_of_texts), texts(&list_of_ids));
    assert_eq!(texts(&list_of_texts)[0], texts(&text)[0]);
    assert_eq!(list_of_texts["choices"][1]["index"], 1);
    let prompt_tokens = ids_a.as_array().unwrap().len() + ids_b.as_array().unwrap().len();
    let usage = json!({"prompt_tokens": prompt_tokens, "completion_tokens": 24, "total_tokens": prompt_tokens + 24,
        "prompt_tokens_details": {"cached_tokens": 0}});
    assert_eq!(list_of_texts["usage"], usage);
    assert_eq!(text["object"], "text_completion");
    assert_eq!(text["model"], "rustdoc-6m");
}

#[tokio::test]
async fn several_answers_per_prompt_have_seeds_of_their_own() {
    let server = TestServer::start().await;
    let sampled =
        |n: usize, seed: i64| json!({"prompt": ["The", "A"], "n": n, "seed": seed, "max_tokens": 8});
    let four = server.complete(sampled(2, 7)).await;
    let indices: Vec<_> = four["choices"].as_array().unwrap().iter().map(|c| c["index"].clone()).collect();
    assert_eq!(indices, [0, 1, 2, 3]);
    assert_ne!(texts(&four)[0], texts(&four)[1]);
    assert_eq!(four["usage"]["completion_tokens"], 32);
    // Prompts count once, not once per answer.
    assert_eq!(four["usage"]["prompt_tokens"], 2);
    // The second answer of a prompt is the first one of the next seed.
    let next = server.complete(sampled(1, 8)).await;
    assert_eq!(texts(&next), [texts(&four)[1], texts(&four)[3]]);
    let random =
        [server.complete(json!({"prompt": "The"})).await, server.complete(json!({"prompt": "The"})).await];
    assert_ne!(texts(&random[0]), texts(&random[1]));
}

#[tokio::test]
async fn the_same_seed_gives_the_same_text_in_a_crowd() {
    let server = TestServer::start().await;
    let body = json!({"prompt": "Returns", "seed": 1234, "max_tokens": 24, "temperature": 1.2});
    let alone = server.choice(body.clone()).await;
    let crowd: Vec<Value> = (0..8)
        .map(
            |i| if i == 4 { body.clone() } else { json!({"prompt": "The ".repeat(i + 1), "max_tokens": 30}) },
        )
        .collect();
    let answers = futures::future::join_all(crowd.into_iter().map(|body| server.choice(body))).await;
    assert_eq!(answers[4]["text"], alone["text"]);
}

/// What lm-eval's local-completions sends and reads.
#[tokio::test]
async fn echo_with_logprobs_as_lm_eval_needs_it() {
    let server = TestServer::start().await;
    let prompt = [24u32, 500, 600, 700];
    let body = json!({"model": "rustdoc-6m", "prompt": [prompt], "temperature": 0, "max_tokens": 1, "logprobs": 1,
        "seed": 1234, "echo": true});
    let choice = server.choice(body).await;
    let logprobs = &choice["logprobs"];
    let token_logprobs = logprobs["token_logprobs"].as_array().unwrap();
    let top_logprobs = logprobs["top_logprobs"].as_array().unwrap();
    for list in ["token_logprobs", "top_logprobs", "tokens", "text_offset"] {
        assert_eq!(logprobs[list].as_array().unwrap().len(), prompt.len() + 1, "{list}");
    }
    assert!(token_logprobs[0].is_null() && top_logprobs[0].is_null());
    for (chosen, top) in token_logprobs.iter().zip(top_logprobs).skip(1) {
        let chosen = chosen.as_f64().unwrap();
        let best = top.as_object().unwrap().values().map(|v| v.as_f64().unwrap()).fold(f64::MIN, f64::max);
        assert!(chosen <= best && chosen < 0.0);
        assert!((1..=2).contains(&top.as_object().unwrap().len()));
    }
    // The generated token is greedy: the best one, and written with the same digits.
    let last = top_logprobs[prompt.len()].as_object().unwrap();
    assert_eq!(last.values().collect::<Vec<_>>(), [&token_logprobs[prompt.len()]]);
    // Tokens and offsets spell the text.
    let text: Vec<char> = choice["text"].as_str().unwrap().chars().collect();
    let offsets: Vec<usize> = serde_json::from_value(logprobs["text_offset"].clone()).unwrap();
    let tokens: Vec<String> = serde_json::from_value(logprobs["tokens"].clone()).unwrap();
    for (token, offset) in tokens.iter().zip(offsets) {
        let there: String = text[offset..].iter().take(token.chars().count()).collect();
        assert_eq!(there, *token);
    }
}

#[tokio::test]
async fn scores_of_a_prompt_do_not_depend_on_how_they_are_asked_for() {
    let server = TestServer::start().await;
    let prompt: Vec<u32> = (0..300).map(|i| 20 + i * 13 % 4000).collect();
    let base = json!({"prompt": [prompt], "temperature": 0, "logprobs": 3, "echo": true});
    let with = |fields: Value| {
        let mut body = base.clone();
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        body
    };
    let scored = server.choice(with(json!({"max_tokens": 0}))).await;
    assert_eq!(scored["finish_reason"], "length");
    let continued = server.choice(with(json!({"max_tokens": 1}))).await;
    let list = |choice: &Value| choice["logprobs"]["token_logprobs"].as_array().unwrap().clone();
    assert_eq!(list(&scored).len(), 300);
    assert_eq!(list(&scored), list(&continued)[..300]);
    let vllm = server.choice(with(json!({"max_tokens": 1, "echo": false, "prompt_logprobs": 0}))).await;
    let positions = vllm["prompt_logprobs"].as_array().unwrap();
    assert!(positions[0].is_null());
    for (at, &id) in prompt.iter().enumerate().skip(1) {
        assert_eq!(positions[at][id.to_string()]["logprob"], list(&scored)[at]);
    }
    assert_eq!(vllm["logprobs"]["tokens"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn stop_strings_end_the_text_where_they_are() {
    let server = TestServer::start().await;
    let whole = server.choice(greedy(json!({"return_token_ids": true}))).await;
    let text = whole["text"].as_str().unwrap();
    // A stop string in the middle that begins and ends inside tokens.
    let chars: Vec<char> = text.chars().collect();
    let stop: String = chars[9..14].iter().collect();
    let before = &text[..text.find(&stop).unwrap()];
    let stopped = server.complete(greedy(json!({"stop": ["never to be seen", stop]}))).await;
    let choice = &stopped["choices"][0];
    assert_eq!((choice["text"].as_str().unwrap(), &choice["finish_reason"]), (before, &json!("stop")));
    assert_eq!(choice["stop_reason"], stop);
    let generated = stopped["usage"]["completion_tokens"].as_u64().unwrap();
    assert!(generated < 12, "{generated}");
    let included = server.choice(greedy(json!({"stop": stop, "include_stop_str_in_output": true}))).await;
    assert_eq!(included["text"].as_str().unwrap(), format!("{before}{stop}"));
    // Not before min_tokens.
    let later = server.choice(greedy(json!({"stop": stop, "min_tokens": 12}))).await;
    assert_eq!((&later["text"], &later["finish_reason"]), (&whole["text"], &json!("length")));
    // The beginning of a stop string that does not come is not lost.
    let tail = format!("{}never", chars.last().unwrap());
    let held = server.choice(greedy(json!({"stop": tail}))).await;
    assert_eq!(held["text"], whole["text"]);
}

#[tokio::test]
async fn stop_tokens_end_the_text_and_are_not_shown() {
    let server = TestServer::start().await;
    let whole = server.choice(greedy(json!({"return_token_ids": true}))).await;
    let ids: Vec<u32> = serde_json::from_value(whole["token_ids"].clone()).unwrap();
    assert_eq!(ids.len(), 12);
    assert_eq!(whole["prompt_token_ids"].as_array().unwrap().len(), 4);
    let at = (1..12).find(|&at| !ids[..at].contains(&ids[at])).unwrap();
    let stopped = server.choice(greedy(json!({"stop_token_ids": [ids[at]], "return_token_ids": true}))).await;
    assert_eq!(stopped["stop_reason"], ids[at]);
    assert_eq!(stopped["finish_reason"], "stop");
    assert_eq!(stopped["token_ids"], json!(ids[..=at]));
    let text = server.ok("/detokenize", &json!({"tokens": ids[..at]})).await;
    assert_eq!(stopped["text"], text["prompt"]);
}

#[tokio::test]
async fn the_end_of_sequence_token_ends_unless_ignored() {
    let server = TestServer::start().await;
    // Token 0 is the model's; a bias makes it the next one.
    let biased = |fields: Value| {
        let mut body = greedy(json!({"logit_bias": {"0": 100}, "max_tokens": 4, "return_token_ids": true}));
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        body
    };
    let ended = server.choice(biased(json!({}))).await;
    assert_eq!(
        (&ended["text"], &ended["finish_reason"], &ended["stop_reason"]),
        (&json!(""), &json!("stop"), &Value::Null)
    );
    assert_eq!(ended["token_ids"], json!([0]));
    let ignored = server.choice(biased(json!({"ignore_eos": true}))).await;
    assert_eq!((&ignored["token_ids"], &ignored["finish_reason"]), (&json!([0, 0, 0, 0]), &json!("length")));
    assert_eq!(ignored["text"], "", "special tokens are skipped");
    let shown = server.choice(biased(json!({"ignore_eos": true, "skip_special_tokens": false}))).await;
    assert_eq!(shown["text"], "<|endoftext|>".repeat(4));
    let later = server.choice(biased(json!({"min_tokens": 3}))).await;
    let ids: Vec<u32> = serde_json::from_value(later["token_ids"].clone()).unwrap();
    assert_eq!(ids.iter().position(|&id| id == 0), Some(3), "{ids:?}");
}

#[tokio::test]
async fn bad_words_are_not_said() {
    let server = TestServer::start().await;
    let body = |bad: &[&str]| {
        json!({"prompt": "Returns the number of", "temperature": 0, "max_tokens": 30, "ignore_eos": true,
            "bad_words": bad, "return_token_ids": true})
    };
    let free = server.choice(body(&[])).await["text"].as_str().unwrap().to_owned();
    let words: Vec<&str> = free
        .split_whitespace()
        .filter(|word| word.len() > 3 && word.chars().all(char::is_alphabetic))
        .collect();
    let (first, last) = (words[0], words[words.len() - 1]);
    assert!(free.contains(&format!(" {first}")), "{free}");
    for bad in [&[first][..], &[last], &[first, last]] {
        let choice = server.choice(body(bad)).await;
        assert_ne!(choice["text"], free);
        // The same letters in other tokens are another word.
        let said: Vec<u64> = serde_json::from_value(choice["token_ids"].clone()).unwrap();
        for word in bad {
            let spelling = json!({"prompt": format!(" {word}"), "add_special_tokens": false});
            let tokens = server.ok("/tokenize", &spelling).await["tokens"].clone();
            let tokens: Vec<u64> = serde_json::from_value(tokens).unwrap();
            assert!(!said.windows(tokens.len()).any(|window| window == tokens), "{word}: {choice}");
        }
    }
}

#[tokio::test]
async fn only_allowed_tokens_are_generated() {
    let server = TestServer::start().await;
    let choice = server
        .choice(
            json!({"prompt": "a", "allowed_token_ids": [5, 9], "max_tokens": 16, "return_token_ids": true}),
        )
        .await;
    let ids: Vec<u32> = serde_json::from_value(choice["token_ids"].clone()).unwrap();
    assert!(ids.len() == 16 && ids.iter().all(|id| [5, 9].contains(id)), "{ids:?}");
}

#[tokio::test]
async fn tokens_can_be_named_by_their_ids() {
    let server = TestServer::start().await;
    let fields =
        json!({"logprobs": 2, "return_tokens_as_token_ids": true, "return_token_ids": true, "max_tokens": 1});
    let choice = server.choice(greedy(fields)).await;
    let name = format!("token_id:{}", choice["token_ids"][0]);
    assert_eq!(choice["logprobs"]["tokens"][0], name);
    let top = choice["logprobs"]["top_logprobs"][0].as_object().unwrap();
    assert!(top.contains_key(&name) && top.keys().all(|key| key.starts_with("token_id:")), "{top:?}");
}

#[tokio::test]
async fn the_context_bounds_prompt_and_answer() {
    let server = TestServer::with(|settings, _| settings.max_model_len = Some(64)).await;
    let prompt = |len: usize| json!({"prompt": vec![100; len], "max_tokens": 1000, "ignore_eos": true});
    let answer = server.complete(prompt(60)).await;
    assert_eq!(answer["usage"]["completion_tokens"], 4);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    let (status, error) = server.post("/v1/completions", &prompt(64)).await;
    assert_eq!((status, &error["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("prompt")));
    let mut truncated = prompt(500);
    truncated["truncate_prompt_tokens"] = json!(-1);
    assert_eq!(server.complete(truncated).await["usage"]["prompt_tokens"], 63);
    let full = json!({"prompt": vec![100; 64], "max_tokens": 0, "echo": true, "logprobs": 0});
    assert_eq!(server.choice(full).await["logprobs"]["tokens"].as_array().unwrap().len(), 64);
}

#[tokio::test]
async fn a_model_without_a_tokenizer_takes_token_ids() {
    let server = TestServer::with(|settings, folder| {
        for file in ["config.json", "generation_config.json", "model.safetensors"] {
            std::fs::copy(format!("{}/{file}", crate::support::MODEL), folder.join(file)).unwrap();
        }
        settings.model = Some(folder.to_owned());
    })
    .await;
    let body = json!({"prompt": [5, 6, 7], "max_tokens": 3, "temperature": 0, "return_token_ids": true, "logprobs": 1});
    let choice = server.choice(body).await;
    assert_eq!(choice["text"], "");
    let ids: Vec<u32> = serde_json::from_value(choice["token_ids"].clone()).unwrap();
    let names: Vec<String> = ids.iter().map(|id| format!("token_id:{id}")).collect();
    assert_eq!(choice["logprobs"]["tokens"], json!(names));
    for (path, body) in [
        ("/v1/completions", json!({"prompt": "text"})),
        ("/v1/completions", json!({"prompt": [5], "stop": "x"})),
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "a"}]})),
        ("/tokenize", json!({"prompt": "text"})),
        ("/detokenize", json!({"tokens": [1]})),
    ] {
        let (status, error) = server.post(path, &body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{path}");
        assert!(error["error"]["message"].as_str().unwrap().contains("no tokenizer"), "{error}");
    }
}

#[tokio::test]
async fn the_models_sampling_defaults_hold_unless_told_otherwise() {
    for (source, expected) in
        [(config::GenerationConfig::Auto, true), (config::GenerationConfig::Vllm, false)]
    {
        let server = TestServer::with(|settings, folder| {
            for file in ["config.json", "tokenizer.json", "model.safetensors"] {
                std::fs::copy(format!("{}/{file}", crate::support::MODEL), folder.join(file)).unwrap();
            }
            std::fs::write(folder.join("generation_config.json"), r#"{"top_k": 1}"#).unwrap();
            settings.model = Some(folder.to_owned());
            settings.generation_config = Some(source);
        })
        .await;
        let greedy = server.choice(json!({"prompt": "The", "max_tokens": 24, "temperature": 0})).await;
        let default = server.choice(json!({"prompt": "The", "max_tokens": 24})).await;
        assert_eq!(greedy["text"] == default["text"], expected, "{source:?}");
    }
}
