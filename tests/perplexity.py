#!/usr/bin/env python3
"""Perplexity of a served model on a text, measured as a client does: prompts as token ids, `echo` and `logprobs`.

    python3 tests/perplexity.py TEXT [--server http://127.0.0.1:8000] [--windows 10] [--window 512]

The text is tokenized by the server without special tokens and cut into windows, each scored alone from position 0;
all tokens of a window but the first count. Needs nothing but Python's standard library.
"""

import argparse
import json
import math
import urllib.request


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--server", default="http://127.0.0.1:8000")
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--window", type=int, default=512)
    args = parser.parse_args()

    with urllib.request.urlopen(f"{args.server}/v1/models") as response:
        model = json.load(response)["data"][0]["id"]
    text = open(args.text, encoding="utf-8").read()
    # Enough text for the windows, whatever the tokenizer: no token is longer than a few dozen characters.
    text = text[: args.windows * args.window * 16]
    tokens = post(f"{args.server}/tokenize", {"model": model, "prompt": text, "add_special_tokens": False})["tokens"]
    total = count = 0
    for start in range(0, args.windows * args.window, args.window):
        window = tokens[start : start + args.window]
        if len(window) < args.window:
            raise SystemExit(f"error: {args.text} has only {len(tokens)} tokens")
        body = {"model": model, "prompt": [window], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
        logprobs = post(f"{args.server}/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"]
        total -= sum(logprobs[1 : args.window])
        count += args.window - 1
    print(f"{model}: perplexity {math.exp(total / count):.4f} over {count} tokens")


if __name__ == "__main__":
    main()
