#!/usr/bin/env python3
"""What chunked prefill, prefix caching and speculative decoding do to the times that users feel.

    python3 tests/latency.py MODEL [--programs target/release] [--only chunks|prefix|drafts] [-- SERVER FLAGS]

MODEL is best an instruct model. Prints three tables:
chunks   time between tokens of running streams while long prompts arrive, with chunks and without
prefix   time to the first token of a long prompt that is new, and that was there before
drafts   tokens per second of an answer that copies from its prompt, and of one that does not, with drafts and without;
         the answers must be equal
"""

import argparse
import asyncio
import json
import pathlib
import sys
import urllib.request

from serving import ROOT, free_port, heldout_text, quantile, started, stream

STREAMS, STREAM_TOKENS = 4, 160
LONG_PROMPTS, LONG_TOKENS, LONG_EVERY_SECS = 4, 2000, 1.0
PREFIX_TOKENS, REPETITIONS = 1500, 5
DRAFTS = '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}'
# Loop-free text, of which a small model copies well.
CODE = '''use std::fs;

/// One line of an inventory: what it is, how many there are, and the price of one in cents.
pub struct Item {
    pub name: String,
    pub quantity: u32,
    pub price_cents: u64,
}

/// Reads an inventory from a file with one item per line: name, quantity, price, separated by commas.
pub fn read_inventory(path: &str) -> Result<Vec<Item>, Box<dyn std::error::Error>> {
    let mut items = Vec::new();
    for line in fs::read_to_string(path)?.lines() {
        let mut fields = line.split(',');
        let name = fields.next().ok_or("no name")?.trim().to_string();
        let quantity = fields.next().ok_or("no quantity")?.trim().parse()?;
        let price_cents = fields.next().ok_or("no price")?.trim().parse()?;
        items.push(Item { name, quantity, price_cents });
    }
    Ok(items)
}
'''


def server(args, flags):
    """A command for a server, and its port."""
    port = free_port()
    command = [args.programs / "mxserve", args.model, "--port", port, "--host", "127.0.0.1", "--log-level", "error"]
    return [*command, *flags, *args.flags], port


def measure(args, flags, what):
    command, port = server(args, flags)
    with started(command, f"http://127.0.0.1:{port}"):
        return asyncio.run(what(port))


def ids(port, count):
    """That many token ids of text."""
    body = json.dumps({"prompt": heldout_text()[: 8 * count]}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/tokenize", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        tokens = json.load(response)["tokens"]
    if len(tokens) < count:
        sys.exit(f"the text has {len(tokens)} tokens, and {count} are needed")
    return tokens[:count]


def gaps(answer):
    return [later - earlier for earlier, later in zip(answer.events_at, answer.events_at[1:])]


def milliseconds(values):
    return " | ".join(f"{quantile(values, q) * 1e3:.1f}" for q in (0.5, 0.9, 0.99, 1.0))


def chunks(args):
    async def run(port, arrivals):
        text = heldout_text()
        longs = ids(port, LONG_TOKENS * LONG_PROMPTS)
        body = {"max_tokens": STREAM_TOKENS, "ignore_eos": True, "temperature": 0}
        streams = [stream(port, body | {"prompt": text[200 * i :][:200]}) for i in range(STREAMS)]

        async def long(number):
            await asyncio.sleep(0.5 + number * LONG_EVERY_SECS)
            prompt = longs[number * LONG_TOKENS :][:LONG_TOKENS]
            return await stream(port, {"prompt": prompt, "max_tokens": 1, "temperature": 0})

        answers, arrived = await asyncio.gather(
            asyncio.gather(*streams), asyncio.gather(*(long(number) for number in range(arrivals)))
        )
        for answer in [*answers, *arrived]:
            if not answer.complete:
                sys.exit(f"failed: {answer}")
        return [gap for answer in answers for gap in gaps(answer)], [answer.events_at[0] for answer in arrived]

    print(f"{STREAMS} streams; {LONG_PROMPTS} prompts of {LONG_TOKENS} tokens, one every {LONG_EVERY_SECS} s\n")
    print("| | between tokens p50, ms | p90 | p99 | most | first token of a long prompt p50, s |")
    print("|---|---|---|---|---|---|")
    for name, flags, arrivals in [
        ("no long prompts", [], 0),
        ("in chunks (default)", [], LONG_PROMPTS),
        ("each in one step", ["--max-num-batched-tokens", LONG_TOKENS + 2 * STREAMS], LONG_PROMPTS),
    ]:
        between, first = measure(args, flags, lambda port: run(port, arrivals))
        print(f"| {name} | {milliseconds(between)} | {f'{quantile(first, 0.5):.2f}' if first else ''} |", flush=True)


def prefix(args):
    async def run(port):
        cold, warm = [], []
        tokens = ids(port, PREFIX_TOKENS)
        for number in range(REPETITIONS):
            # Another first token: nothing of it was there before.
            prompt = [tokens[number + 1], *tokens[1:]]
            for times in (cold, warm):
                answer = await stream(port, {"prompt": prompt, "max_tokens": 1, "temperature": 0})
                if not answer.complete:
                    sys.exit(f"failed: {answer}")
                times.append(answer.events_at[0])
        return cold, warm

    print(f"First token of a prompt of {PREFIX_TOKENS} tokens, ms, median of {REPETITIONS}\n")
    print("| | new | again |\n|---|---|---|")
    for name, flags in [("prefix caching", []), ("without", ["--no-enable-prefix-caching"])]:
        cold, warm = measure(args, flags, run)
        print(f"| {name} | {quantile(cold, 0.5) * 1e3:.1f} | {quantile(warm, 0.5) * 1e3:.1f} |", flush=True)


def drafts(args):
    copy = f"Repeat this program exactly, without any comment:\n```rust\n{CODE}```"
    tell = "Tell me a story about a lighthouse keeper who finds a map."

    async def run(port):
        rates, texts = [], []
        for prompt in (copy, tell):
            message = [{"role": "user", "content": prompt}]
            body = {"messages": message, "max_tokens": 200, "temperature": 0, "return_token_ids": True}
            best = None
            for _ in range(REPETITIONS):
                answer = await stream(port, body, path="/v1/chat/completions")
                if not answer.complete:
                    sys.exit(f"failed: {answer}")
                seconds = answer.events_at[-1] - answer.events_at[0]
                best = min(best or seconds, seconds)
            rates.append((len(answer.token_ids) - 1) / best)
            texts.append(answer.text)
        return rates, texts

    print(f"Tokens per second after the first, best of {REPETITIONS}\n")
    print("| | copies its prompt | tells a story |\n|---|---|---|")
    texts = {}
    for name, flags in [("no drafts", []), ("drafts of 4", ["--speculative-config", DRAFTS])]:
        rates, texts[name] = measure(args, flags, run)
        print(f"| {name} | {rates[0]:.1f} | {rates[1]:.1f} |", flush=True)
    if texts["no drafts"] != texts["drafts of 4"]:
        sys.exit(f"drafts changed an answer: {texts}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--programs", type=pathlib.Path, default=ROOT / "target/release")
    parser.add_argument("--only", choices=["chunks", "prefix", "drafts"])
    parser.add_argument("flags", nargs="*", help="further flags of the server, after --")
    args = parser.parse_args()
    for name, part in [("chunks", chunks), ("prefix", prefix), ("drafts", drafts)]:
        if args.only in (None, name):
            part(args)
            print()


if __name__ == "__main__":
    main()
