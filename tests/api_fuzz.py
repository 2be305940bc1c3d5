#!/usr/bin/env python3
"""Sends bad requests to a server and checks that each is answered as one: no 5xx, no lost connection, no growing memory.

    python3 tests/api_fuzz.py [--programs target/release] [--model tests/models/rustdoc-6m] [--requests 100000] [--seed 1]

Starts the server itself. A request is a good one with some of its values, keys or bytes changed, so that most get past
the JSON parser and are refused for what they say; those that happen to be good must be answered with 200. Then come the
ones that no mutation finds: huge bodies, invalid UTF-8, chats of 10,000 messages, deep nesting. Needs nothing but
Python's standard library, and Linux for the memory's size.
"""

import argparse
import collections
import contextlib
import copy
import http.client
import json
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}
TEMPLATE = (
    "{% if tools %}<tool_call>{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": [
    {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}, {"role": "tool", "content": "1"}]
SAMPLING = {
    "n": 1, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1, "stop": ["x"], "stop_token_ids": [5],
    "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "logit_bias": {"5": 1.0},
    "bad_words": ["the"], "allowed_token_ids": [5, 6, 7], "min_tokens": 1, "ignore_eos": False, "prompt_logprobs": 1,
    "include_stop_str_in_output": True, "skip_special_tokens": True, "return_token_ids": True, "truncate_prompt_tokens": 4,
    "return_tokens_as_token_ids": False, "request_id": "r", "stream_options": {"include_usage": True}, "stream": False,
    "priority": 0, "cache_salt": "s", "user": "u",
    "structured_outputs": {"regex": "[0-9]+"},
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {
        "type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}}},
}
SEEDS = [
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 2, "echo": True, "logprobs": 2, "add_special_tokens": True, **SAMPLING}),
    ("/v1/completions", {"prompt": [[5, 6], [7]], "max_tokens": 1}),
    ("/v1/chat/completions", {"messages": CHAT, "max_completion_tokens": 2, "logprobs": True, "top_logprobs": 2, "tools": [TOOL],
        "tool_choice": "auto", "parallel_tool_calls": False, "chat_template_kwargs": {"a": 1}, "add_generation_prompt": True,
        "continue_final_message": False, **SAMPLING}),
    ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}], "instructions": "B",
        "max_output_tokens": 2, "text": {"format": {"type": "text"}}, "tools": [{"type": "function", "name": "f"}],
        "metadata": {"a": "b"}, "store": True, "top_logprobs": 0, "include": [], "previous_response_id": None}),
    ("/v1/embeddings", {"input": ["Hi", "Ho"], "encoding_format": "float", "dimensions": None, "user": "u"}),
    ("/tokenize", {"prompt": "Hi", "add_special_tokens": True, "return_token_strs": True}),
    ("/tokenize", {"messages": CHAT, "tools": [TOOL]}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
    ("/v1/completions/render", {"prompt": ["Hi", "Ho"]}),
    ("/v1/chat/completions/render", {"messages": CHAT}),
]
ODD = [
    None, True, False, 0, 1, -1, 2, 1e308, -1e308, 0.5, 2**31, 2**32, 2**53 + 1, 2**63, -(2**63), 2**64, 10**40, "", " ", "\0", "a",
    "5", "\ud800", "\U0001f980" * 3, "x" * 300, [], [[]], [None], [0], [-1], [4096], [2**40], ["a"], [1, "a"], [[1], "a"], {}, {"a": 1},
    {"type": "object"}, {"type": "text"}, {"type": "x"}, {"$ref": "#/x"}, {"function": {}}, {"role": "user"}, "(", "[", "a{99999}", "start: x",
]
ALLOWED = set(range(200, 201)) | set(range(400, 500))


def places(value, path=()):
    """The paths of all values inside."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def mutated(rng, body):
    body = copy.deepcopy(body)
    # Many fields exclude each other, and the first wrong one is all that counts.
    for key in [key for key in body if key in SAMPLING and rng.random() < 0.85]:
        del body[key]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice([path for path in places(body) if path] or [()])
        if not path:
            break
        parent = body
        for key in path[:-1]:
            parent = parent[key]
        action = rng.random()
        if action < 0.7:
            parent[path[-1]] = copy.deepcopy(rng.choice(ODD))
        elif action < 0.8:
            del parent[path[-1]]
        elif action < 0.9 and isinstance(parent, list):
            parent.extend([parent[path[-1]]] * rng.choice((1, 3, 50)))
        elif isinstance(parent, dict):
            name = rng.choice(list(SAMPLING))
            parent[name] = copy.deepcopy(rng.choice(ODD))
    # A stream would have to be read to its end; `n` and long answers only take time.
    if body.get("stream") is True:
        body["stream"] = False
        body.pop("stream_options", None)
    return body


def cheap(body):
    """Keeps the good ones short."""
    for field in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if isinstance(body.get(field), (int, float)) and body[field] > 4:
            body[field] = 4
    if not any(field in body for field in ("max_tokens", "max_completion_tokens", "max_output_tokens")):
        body["max_tokens"] = body["max_completion_tokens"] = body["max_output_tokens"] = 2
    if isinstance(body.get("n"), int) and body["n"] > 4:
        body["n"] = 10**6
    return body


def encoded(rng, body):
    raw = json.dumps(body).encode()
    if rng.random() < 0.1:
        raw = bytearray(raw)
        for _ in range(rng.choice((1, 2, 8))):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        raw = bytes(raw)
    if rng.random() < 0.03:
        raw = raw[: rng.randrange(len(raw))]
    return raw


class Client:
    def __init__(self, port):
        self.port, self.connection = port, None

    def post(self, path, raw, timeout=60):
        # A server may close a connection that is not in use; only a fresh one that is lost is an error.
        while True:
            fresh = self.connection is None
            if fresh:
                self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
            try:
                self.connection.putrequest("POST", path)
                self.connection.putheader("Content-Type", "application/json")
                self.connection.putheader("Content-Length", str(len(raw)))
                self.connection.endheaders()
                # What is refused for its length is not read to its end.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.connection.send(raw)
                response = self.connection.getresponse()
                return response.status, response.read()
            except (OSError, http.client.HTTPException):
                self.connection.close()
                self.connection = None
                if fresh:
                    raise


def resident_mb(pid):
    return int(re.search(r"VmRSS:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def fuzz(port, pid, requests, seed, threads=8):
    statuses, failures, lock = collections.Counter(), [], threading.Lock()
    done, memory = [0], []

    def work(number):
        rng, client = random.Random(seed * 1000 + number), Client(port)
        for _ in range(requests // threads):
            path, body = rng.choice(SEEDS)
            raw = encoded(rng, cheap(mutated(rng, body)))
            try:
                status, answer = client.post(path, raw)
            except (OSError, http.client.HTTPException) as error:
                status, answer = repr(error), b""
            named = status == 200 or b'"message"' in answer
            with lock:
                statuses[status] += 1
                done[0] += 1
                if done[0] % max(1, requests // 10) == 0:
                    memory.append(resident_mb(pid))
                    print(f"  {done[0]}: {memory[-1]:.0f} MB resident, {dict(statuses)}", flush=True)
                if (status not in ALLOWED or not named) and len(failures) < 20:
                    failures.append((status, path, raw[:500], answer[:300]))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    return failures, memory


def by_hand(port):
    """Requests that mutations do not find; each must be a 4xx."""
    text = json.dumps({"prompt": "a"}).encode()
    deep = b"[" * 100_000
    cases = {
        "50 MB of text": ("/v1/completions", json.dumps({"prompt": "a" * 50_000_000}).encode()),
        "30 MB of text": ("/v1/completions", json.dumps({"prompt": "a b" * 10_000_000}).encode()),
        "invalid UTF-8": ("/v1/completions", text.replace(b"a", b"\xff\xfe")),
        "a lone surrogate": ("/v1/completions", b'{"prompt": "\\ud800"}'),
        "deep nesting": ("/v1/completions", b'{"prompt": ' + deep),
        "a deep schema": ("/v1/completions", b'{"prompt": "a", "structured_outputs": {"json": ' + b'{"items":' * 100 + b"1" + b"}" * 102),
        "a huge grammar": ("/v1/completions", json.dumps({"prompt": "a", "structured_outputs": {"regex": "(a{1000}){1000}{1000}"}}).encode()),
        "many choices": ("/v1/completions", json.dumps({"prompt": "a", "structured_outputs": {"choice": [5] * 100_000}}).encode()),
        "token ids out of range": ("/v1/completions", json.dumps({"prompt": [10**6] * 10}).encode()),
        "10,000 messages": ("/v1/chat/completions", json.dumps({"messages": [{"role": "user", "content": "hello there"}] * 10_000}).encode()),
        "10,000 prompts": ("/v1/completions", json.dumps({"prompt": ["a"] * 10_000}).encode()),
        "a million stops": ("/v1/completions", json.dumps({"prompt": "a", "stop": [""] * 1_000_000}).encode()),
        "nothing": ("/v1/completions", b""),
    }
    failures = []
    for name, (path, raw) in cases.items():
        begin = time.monotonic()
        try:
            status, answer = Client(port).post(path, raw)
        except (OSError, http.client.HTTPException) as error:
            status, answer = repr(error), b""
        print(f"  {name}: {status} after {time.monotonic() - begin:.2f} s {answer[:120].decode(errors='replace')}", flush=True)
        if status not in range(400, 500):
            failures.append((status, name, b"", answer[:300]))
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=pathlib.Path, default=ROOT / "target/release")
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "tests/models/rustdoc-6m")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        template, log = pathlib.Path(folder) / "template.jinja", pathlib.Path(folder) / "log"
        template.write_text(TEMPLATE)
        command = [args.programs / "mxserve", args.model, "--host", "127.0.0.1", "--port", "0", "--chat-template", template,
            "--kv-cache-memory-bytes", str(16 << 20), "--disable-log-requests"]
        with log.open("w") as errors:
            server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            port = next(int(found[1]) for line in server.stdout if (found := re.search(r"http://[^/]*:(\d+)/v1", line)))
            threading.Thread(target=server.stdout.read, daemon=True).start()
            print(f"{args.requests} requests, seed {args.seed}: {resident_mb(server.pid):.0f} MB resident at the start")
            failures, memory = fuzz(port, server.pid, args.requests, args.seed)
            failures += by_hand(port)
            if server.poll() is not None:
                failures.append((server.returncode, "the server ended", b"", log.read_bytes()[-2000:]))
            # Caches and allocators settle in the first tenths.
            if len(memory) >= 10 and memory[9] > memory[2] * 1.15 + 20:
                failures.append((None, f"memory grew from {memory[2]:.0f} to {memory[9]:.0f} MB", b"", b""))
            if (panics := log.read_text().count("panicked")):
                failures.append((None, f"{panics} panics", b"", log.read_bytes()[-2000:]))
        finally:
            server.terminate()
            server.wait(60)
    for failure in failures:
        print("FAILED", *failure)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
