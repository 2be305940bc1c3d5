"""The requests of `vllm bench serve` (vllm/benchmarks/lib/endpoint_request_func.py), without vLLM; the argument is the URL."""

import json
import sys
import urllib.request

URL = sys.argv[1]
COMMON = {"model": "model", "temperature": 0.0, "repetition_penalty": 1.0, "stream": True, "stream_options": {"include_usage": True},
    "ignore_eos": True}
REQUESTS = [
    ("/v1/completions", {**COMMON, "prompt": "Hello", "max_tokens": 8, "logprobs": None}),
    ("/v1/chat/completions", {**COMMON, "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
        "max_completion_tokens": 8}),
]

for path, body in REQUESTS:
    headers = {"Content-Type": "application/json", "Authorization": "Bearer none", "x-request-id": "bench-0"}
    request = urllib.request.Request(URL + path, json.dumps(body).encode(), headers)
    text, usage, first = "", None, None
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers["Content-Type"] == "text/event-stream"
        for message in answer.read().decode().strip().split("\n\n"):
            # Comments are not for the client.
            if message.startswith(":"):
                continue
            data = message.removeprefix("data: ")
            if data == "[DONE]":
                break
            data = json.loads(data)
            if choices := data.get("choices"):
                first = first if first is not None else data
                text += choices[0].get("text") or choices[0].get("delta", {}).get("content") or ""
            elif data.get("usage"):
                usage = data["usage"]
        else:
            raise AssertionError("no [DONE]")
    assert first and usage["completion_tokens"] == 8, (path, text, usage)
print("the requests of `vllm bench serve` are answered")
