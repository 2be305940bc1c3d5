//! Calls of tools, and what models think before they answer.

use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::support::TestServer;

const CHAT: &str = "/v1/chat/completions";

/// A template in the manner of Qwen's: tools in the system's turn, earlier calls and their results.
const TEMPLATE: &str = "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}\
    Call with <tool_call>{...}</tool_call><|im_end|>\n{% endif %}\
    {% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\
    {% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}:{{ call.function.arguments.city }}</tool_call>{% endfor %}\
    <|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{{ start }}{% endif %}";

async fn server(extra: &str) -> TestServer {
    TestServer::with(|settings, folder| {
        let file = folder.join("template.jinja");
        std::fs::write(&file, format!("{TEMPLATE}{extra}")).unwrap();
        settings.chat_template = Some(file);
    })
    .await
}

fn tools() -> Value {
    let tool = |name: &str, parameters: Value| json!({"type": "function", "function": {"name": name, "parameters": parameters}});
    let city = json!({"type": "object", "properties": {"city": {"$ref": "#/$defs/City"}}, "required": ["city"],
        "additionalProperties": false, "$defs": {"City": {"enum": ["Rome", "Oslo"]}}});
    json!([
        tool("get_weather", city),
        tool("stop_now", json!({"type": "object", "properties": {}, "additionalProperties": false}))
    ])
}

fn body(fields: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "Weather?"}], "tools": tools(), "seed": 2,
        "max_tokens": 200});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

fn check_call(call: &Value) {
    assert_eq!(call["type"], "function");
    assert!(call["id"].as_str().unwrap().starts_with("call_"), "{call}");
    let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    match call["function"]["name"].as_str().unwrap() {
        "get_weather" => assert!(["Rome", "Oslo"].contains(&arguments["city"].as_str().unwrap()), "{call}"),
        "stop_now" => assert_eq!(arguments, json!({})),
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn forced_calls_follow_their_schemas() {
    let server = server("").await;
    for choice in [json!("required"), json!({"type": "function", "function": {"name": "get_weather"}})] {
        let fields = json!({"tool_choice": choice, "n": 3, "parallel_tool_calls": false});
        let answer = server.ok(CHAT, &body(fields)).await;
        for choice in answer["choices"].as_array().unwrap() {
            assert_eq!(
                (&choice["finish_reason"], &choice["message"]["content"]),
                (&json!("tool_calls"), &Value::Null)
            );
            let calls = choice["message"]["tool_calls"].as_array().unwrap();
            assert_eq!(calls.len(), 1);
            check_call(&calls[0]);
        }
    }
}

#[tokio::test]
async fn a_stream_makes_the_same_calls() {
    let server = server("").await;
    let request = body(json!({"tool_choice": {"type": "function", "function": {"name": "get_weather"}}}));
    let whole = server.ok(CHAT, &request).await;
    let events = server.stream(CHAT, request).await;
    let deltas: Vec<&Value> = events.iter().map(|event| &event["choices"][0]["delta"]).collect();
    assert_eq!(deltas[0]["role"], "assistant");
    let parts: Vec<&Value> = deltas.iter().filter_map(|delta| delta["tool_calls"].get(0)).collect();
    let arguments: String = parts.iter().filter_map(|part| part["function"]["arguments"].as_str()).collect();
    let expected = &whole["choices"][0]["message"]["tool_calls"][0]["function"];
    assert_eq!(arguments, expected["arguments"].as_str().unwrap());
    assert_eq!(parts[0]["function"]["name"], expected["name"]);
    assert!(
        parts.iter().all(|part| part["index"] == 0) && parts[1..].iter().all(|part| part.get("id").is_none())
    );
    assert!(parts.len() > 2, "arguments come as they are written");
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
    let said: String = deltas.iter().filter_map(|delta| delta["content"].as_str()).collect();
    assert_eq!(said, "");
}

#[tokio::test]
async fn every_choice_of_a_stream_has_calls_of_its_own() {
    let server = server("").await;
    let request = body(
        json!({"tool_choice": "required", "n": 3, "temperature": 2, "stream_options": {"include_usage": true}}),
    );
    let events = server.stream(CHAT, request).await;
    let mut calls = vec![std::collections::BTreeMap::<u64, (String, String, String)>::new(); 3];
    let mut reasons = vec![Value::Null; 3];
    for choice in events.iter().filter_map(|event| event["choices"].get(0)) {
        let index = choice["index"].as_u64().unwrap() as usize;
        assert!(reasons[index].is_null(), "nothing comes after the end of a choice");
        reasons[index] = choice["finish_reason"].clone();
        for part in choice["delta"]["tool_calls"].as_array().into_iter().flatten() {
            let call = calls[index].entry(part["index"].as_u64().unwrap()).or_default();
            let add = |text: &mut String, part: &Value| text.push_str(part.as_str().unwrap_or_default());
            add(&mut call.0, &part["id"]);
            add(&mut call.1, &part["function"]["name"]);
            add(&mut call.2, &part["function"]["arguments"]);
        }
    }
    assert!(reasons.iter().all(|reason| reason == "tool_calls" || reason == "length"), "{reasons:?}");
    let mut ids = std::collections::BTreeSet::new();
    for (index, calls) in calls.iter().enumerate() {
        assert!(!calls.is_empty() && calls.keys().copied().eq(0..calls.len() as u64), "{calls:?}");
        let complete = if reasons[index] == "length" { calls.len() - 1 } else { calls.len() };
        for (id, name, arguments) in calls.values().take(complete) {
            assert!(ids.insert(id.clone()), "ids are unique");
            check_call(
                &json!({"type": "function", "id": id, "function": {"name": name, "arguments": arguments}}),
            );
        }
    }
    let usage = &events.last().unwrap()["usage"];
    assert_eq!(
        usage["total_tokens"],
        json!(usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap())
    );
}

#[tokio::test]
async fn free_calls_are_found_and_only_where_they_are_wanted() {
    let server = server("").await;
    let text = "Sure. <tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Rome\"}}\n</tool_call>\n\
                <tool_call>\n{\"name\": \"stop_now\", \"arguments\": {}}\n</tool_call>";
    // The model is made to say what a better one would say; it could call at once, too, and is kept from that.
    let first = server.ok("/tokenize", &json!({"prompt": "Sure", "add_special_tokens": false})).await;
    let bias = json!({first["tokens"][0].to_string(): 100});
    let saying = |fields: Value| {
        let mut body = body(fields);
        body["structured_outputs"] = json!({"choice": [text]});
        body["logit_bias"] = bias.clone();
        body
    };
    let answer = server.ok(CHAT, &saying(json!({}))).await;
    let choice = &answer["choices"][0];
    assert_eq!(
        (&choice["finish_reason"], &choice["message"]["content"]),
        (&json!("tool_calls"), &json!("Sure. "))
    );
    let calls = choice["message"]["tool_calls"].as_array().unwrap();
    calls.iter().for_each(check_call);
    assert_eq!(calls.len(), 2);
    let single = server.ok(CHAT, &saying(json!({"parallel_tool_calls": false}))).await;
    assert_eq!(single["choices"][0]["message"]["tool_calls"].as_array().unwrap().len(), 1);
    let none = server.ok(CHAT, &saying(json!({"tool_choice": "none"}))).await;
    assert_eq!(
        (&none["choices"][0]["message"]["content"], &none["choices"][0]["finish_reason"]),
        (&json!(text), &json!("stop"))
    );
    assert!(none["choices"][0]["message"].get("tool_calls").is_none());
}

#[tokio::test]
async fn the_template_hears_of_tools_and_of_earlier_calls() {
    let server = server("").await;
    let messages = json!([{"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "c1", "type": "function",
            "function": {"name": "get_weather", "arguments": "{\"city\": \"Rome\"}"}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"}]);
    let request = body(json!({"messages": messages}));
    let tokens = server.ok("/tokenize", &request).await;
    let prompt = server.ok("/detokenize", &json!({"tokens": tokens["tokens"]})).await;
    let prompt = prompt["prompt"].as_str().unwrap();
    assert!(prompt.contains(r#""name": "get_weather""#), "{prompt}");
    assert!(prompt.contains("<tool_call>get_weather:Rome</tool_call>"), "{prompt}");
    assert!(prompt.contains("<|im_start|>tool\nsunny<|im_end|>"), "{prompt}");
    let rendered = server.ok("/v1/chat/completions/render", &request).await;
    assert_eq!(rendered["token_ids"], tokens["tokens"]);
}

#[tokio::test]
async fn reasoning_is_told_from_the_answer() {
    let server = server("{# <think></think> #}").await;
    let saying = |text: &str, fields: Value| {
        let mut body = body(json!({"tools": null, "structured_outputs": {"choice": [text]}}));
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        body
    };
    let text = "<think>\nThe user wants\n\na word.\n</think>\n\nWord.";
    let message = |answer: &Value| answer["choices"][0]["message"].clone();
    let whole = message(&server.ok(CHAT, &saying(text, json!({}))).await);
    assert_eq!(
        (&whole["reasoning_content"], &whole["content"]),
        (&json!("The user wants\n\na word."), &json!("Word."))
    );
    let events = server.stream(CHAT, saying(text, json!({}))).await;
    let joined = |field: &str| -> String {
        events.iter().filter_map(|event| event["choices"][0]["delta"][field].as_str()).collect()
    };
    assert_eq!(
        (joined("reasoning_content").as_str(), joined("content").as_str()),
        ("The user wants\n\na word.", "Word.")
    );
    // A template that begins the reasoning itself.
    let begun = json!({"chat_template_kwargs": {"start": "<think>\n"}});
    let answer = message(&server.ok(CHAT, &saying("Hm.</think>Word.", begun)).await);
    assert_eq!((&answer["reasoning_content"], &answer["content"]), (&json!("Hm."), &json!("Word.")));
    let silent = message(&server.ok(CHAT, &saying(text, json!({"include_reasoning": false}))).await);
    assert_eq!((silent.get("reasoning_content"), &silent["content"]), (None, &json!("Word.")));
}

#[tokio::test]
async fn tools_that_the_model_cannot_call_are_refused() {
    let server = TestServer::chatty().await;
    let (status, error) = server.post(CHAT, &body(json!({}))).await;
    assert_eq!((status, &error["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("tools")));
    let knowing = self::server("").await;
    for (fields, param) in [
        (json!({"tool_choice": "always"}), "tool_choice"),
        (json!({"tool_choice": "required", "response_format": {"type": "json_object"}}), "response_format"),
        (json!({"tools": null, "tool_choice": "required"}), "tool_choice"),
        (
            json!({"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": 5}}}]}),
            "tools",
        ),
    ] {
        let (status, error) = knowing.post(CHAT, &body(fields)).await;
        assert_eq!((status, &error["error"]["param"]), (StatusCode::BAD_REQUEST, &json!(param)), "{error}");
    }
}

#[tokio::test]
async fn with_a_response_format_there_is_a_call_or_what_it_asks_for() {
    let server = server("").await;
    let format = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object",
        "properties": {"answer": {"enum": ["yes", "no"]}}, "required": ["answer"], "additionalProperties": false}}});
    let bias = |text: &str, bias: i32| {
        let server = &server;
        let request = json!({"prompt": text, "add_special_tokens": false});
        async move {
            let tokens = server.ok("/tokenize", &request).await["tokens"].clone();
            json!({tokens[0].to_string(): bias})
        }
    };
    // Both are open at the beginning; a bias on the first token of the marker decides.
    for (push, calls) in [(100, true), (-100, false)] {
        let fields = json!({"response_format": format, "tool_choice": "auto", "parallel_tool_calls": false, "n": 2,
            "logit_bias": bias("<tool_call>", push).await});
        let answer = server.ok(CHAT, &body(fields)).await;
        for choice in answer["choices"].as_array().unwrap() {
            let message = &choice["message"];
            if calls {
                assert_eq!(
                    (&choice["finish_reason"], &message["content"]),
                    (&json!("tool_calls"), &Value::Null)
                );
                check_call(&message["tool_calls"][0]);
            } else {
                let content: Value = serde_json::from_str(message["content"].as_str().unwrap()).unwrap();
                assert!(["yes", "no"].contains(&content["answer"].as_str().unwrap()), "{message}");
                assert!(message.get("tool_calls").is_none() && choice["finish_reason"] == "stop");
            }
        }
    }
    // Who is to blame is named; what is forced leaves no choice.
    let bad_schema = json!({"type": "json_schema", "json_schema": {"schema": {"type": "what"}}});
    let mut bad_tools = tools();
    bad_tools[0]["function"]["parameters"] = json!({"type": "what"});
    let cases = [
        (json!({"response_format": bad_schema}), "response_format"),
        (json!({"response_format": format, "tools": bad_tools}), "tools"),
        (json!({"response_format": format, "tool_choice": "required"}), "response_format"),
    ];
    for (fields, param) in cases {
        let (status, error) = server.post(CHAT, &body(fields)).await;
        assert_eq!((status, &error["error"]["param"]), (StatusCode::BAD_REQUEST, &json!(param)), "{error}");
    }
    // With no calls wanted, the text is all there is.
    let fields = json!({"response_format": format, "tool_choice": "none"});
    let answer = server.ok(CHAT, &body(fields)).await;
    let content = answer["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(serde_json::from_str::<Value>(content).is_ok(), "{content}");
}
