#!/usr/bin/env python3
"""Single-stream speed of a server: time to the first token, and tokens per second after it.

    python3 tests/decode_speed.py [--server http://127.0.0.1:8000] [--tokens 128] [--runs 5] [--repeat]

With --repeat the prompt is a text that is written a second time, as in editing: what speculative decoding is for.
Prints the median of the runs (one more warms up). Needs nothing but Python's standard library.
"""

import argparse
import json
import statistics
import time
import urllib.request


PROMPT = "Once upon a time"
RECORDS = "\n".join(f'{{"id": {n}, "name": "item {n * n % 97}", "price": {n * 37 % 1000}.{n:02}}}' for n in range(12))


def run(server, prompt, tokens):
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(
        f"{server}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    start, arrivals = time.perf_counter(), []
    with urllib.request.urlopen(request) as response:
        for line in response:
            if line.startswith(b"data: {"):
                arrivals.append(time.perf_counter())
    return arrivals[0] - start, (len(arrivals) - 1) / (arrivals[-1] - arrivals[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://127.0.0.1:8000")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--repeat", action="store_true")
    args = parser.parse_args()
    prompt = f"{RECORDS}\n\nThe same records again:\n\n{RECORDS[:60]}" if args.repeat else PROMPT
    runs = [run(args.server, prompt, args.tokens) for _ in range(args.runs + 1)][1:]
    first, rate = (statistics.median(column) for column in zip(*runs))
    print(f"first token after {first * 1e3:.1f} ms, then {rate:.1f} tokens/s (median of {args.runs})")


if __name__ == "__main__":
    main()
