"""What litellm sends, as its OpenAI and its vLLM providers; the argument is the base URL."""

import json
import sys

import litellm

URL = sys.argv[1]
CHAT = [{"role": "user", "content": "Say something."}]
TOOL = {"type": "function", "function": {"name": "pick", "parameters": {"type": "object", "properties": {
    "a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}}}
litellm.num_retries = 0

for provider in ("openai", "hosted_vllm"):
    at = {"model": f"{provider}/model", "api_base": URL, "api_key": "none"}
    whole = litellm.completion(messages=CHAT, max_tokens=8, temperature=0, **at)
    parts = litellm.completion(messages=CHAT, max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True}, **at)
    parts = list(parts)
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == (whole.choices[0].message.content or ""), (text, whole)
    assert whole.usage.completion_tokens > 0
    called = litellm.completion(messages=CHAT, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, **at)
    assert json.loads(called.choices[0].message.tool_calls[0].function.arguments)["a"] in (1, 2), called
    # No object: litellm may let one have any other properties, too, and a small model never comes to its end.
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [1, 2]}}}
    shaped = litellm.completion(messages=CHAT, response_format=schema, **at)
    assert json.loads(shaped.choices[0].message.content) in (1, 2), shaped
    vectors = litellm.embedding(input=["One", "Two"], **at)
    assert len(vectors.data) == 2
    try:
        litellm.completion(messages=CHAT, top_p=2, **at)
        raise AssertionError("top_p")
    except litellm.BadRequestError as error:
        assert "top_p" in str(error)

text = litellm.text_completion(model="text-completion-openai/model", prompt="Hello", max_tokens=4, api_base=URL, api_key="none")
assert text.choices[0].text is not None
response = litellm.responses(model="openai/model", input="Hello", max_output_tokens=4, api_base=URL, api_key="none")
assert response.output
print("litellm works")
