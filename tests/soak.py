#!/usr/bin/env python3
"""Many clients for a long time: nothing is lost, mixed up or left behind.

    python3 tests/soak.py [--programs target/release] [--requests 20000] [--clients 64] [-- SERVER FLAGS]

Runs each of some hundred requests alone, then all of them many times over in a crowd where every tenth client leaves
and the others stop for reasons of their own (length, stop strings, stop tokens). Every stream must say what it said
alone, also those that gave way to others and were computed again. At the end the server must be empty, its memory no
larger than after the first tenth, and its counters those of the clients. The last crowd is running when SIGTERM comes:
who was accepted is served to the end.
"""

import argparse
import asyncio
import pathlib
import random
import signal
import sys
import time

from serving import MODEL, ROOT, free_port, heldout_text, metrics, started, stream

KINDS = 200
# Resident memory may grow by this between the first tenth and the end: allocators keep some of what was freed.
GROWTH_BYTES = 16 << 20


def request(index, dice):
    """A request that has one answer, whatever else runs."""
    text = heldout_text()
    # Some prompts begin alike, so that the prefix cache has work.
    start = 500 * (index % 40)
    prompt = text[start : start + dice.randint(10, 700)]
    body = {"prompt": prompt, "max_tokens": dice.randint(1, 48), "seed": index, "return_token_ids": True}
    body["temperature"] = dice.choice([0, 0.7, 1.2])
    match index % 5:
        case 0:
            body["stop"] = dice.choice([["\n\n", "the"], "fn ", ["(", "```"]])
        case 1:
            body["stop_token_ids"] = [dice.randrange(4096) for _ in range(100)]
        case 2:
            body |= {"repetition_penalty": 1.2, "top_p": 0.9}
        case 3:
            body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
        case 4:
            # Short ones that grow: they are admitted side by side, and then there is not room for all.
            body |= {"prompt": prompt[:40], "max_tokens": dice.randint(64, 128), "ignore_eos": True}
    return body


class Soak:
    def __init__(self, port, alone, dice):
        self.port, self.alone, self.dice = port, alone, dice
        self.failures, self.ended, self.left, self.tokens = [], 0, 0, 0

    async def one(self, index):
        body, expected = self.alone[index]
        leaves = self.dice.random() < 0.1
        after = self.dice.randint(1, max(1, len(expected.events_at) - 1)) if leaves else None
        answer = await stream(self.port, body, leave_after=after)
        self.tokens += len(answer.token_ids)
        if leaves and not answer.complete:
            self.left += 1
            right = expected.text.startswith(answer.text) and not answer.error
        else:
            self.ended += 1
            right = answer.complete and not answer.error and (answer.text, answer.token_ids, answer.finish_reason) == (
                expected.text,
                expected.token_ids,
                expected.finish_reason,
            )
        if not right:
            self.failures.append(f"request {index}: {answer} instead of {expected}")

    async def crowd(self, count, clients):
        numbers = iter(range(count))

        async def client():
            for _ in numbers:
                await self.one(self.dice.randrange(len(self.alone)))
                if len(self.failures) > 20:
                    return

        await asyncio.gather(*(client() for _ in range(clients)))


async def drain(port, process, clients):
    """SIGTERM while `clients` streams run; what is wrong with them."""
    url = f"http://127.0.0.1:{port}"
    body = {"prompt": heldout_text()[:200], "max_tokens": 300, "ignore_eos": True, "return_token_ids": True}
    bodies = [body | {"seed": seed} for seed in range(clients)]
    expected = [await stream(port, body) for body in bodies]
    running = [asyncio.create_task(stream(port, body)) for body in bodies]
    accepted = 0
    while accepted < clients:
        await asyncio.sleep(0.05)
        sums, _ = metrics(url)
        accepted = sums["vllm:num_requests_running"] + sums["vllm:num_requests_waiting"]
    process.send_signal(signal.SIGTERM)
    answers = await asyncio.gather(*running)
    whole = [a.complete and a.token_ids == e.token_ids for a, e in zip(answers, expected)]
    code = process.wait()
    print(f"SIGTERM: {sum(whole)} of {clients} running streams ended as they should, exit status {code}")
    failures = [f"after SIGTERM: {answer}" for answer, whole in zip(answers, whole) if not whole]
    return failures if code == 0 else [*failures, f"the server ended with {code}"]


async def run(port, process, args):
    url, dice = f"http://127.0.0.1:{port}", random.Random(args.seed)
    alone = []
    for index in range(KINDS):
        body = request(index, dice)
        answer = await stream(port, body)
        if not answer.complete or answer.error:
            sys.exit(f"alone, request {index} fails: {answer}")
        alone.append((body, answer))
    before, _ = metrics(url)
    soak, start = Soak(port, alone, dice), time.monotonic()
    await soak.crowd(args.requests // 10, args.clients)
    warm, _ = metrics(url)
    await soak.crowd(args.requests - args.requests // 10, args.clients)
    seconds = time.monotonic() - start
    # Those who left just now are noticed at the next step.
    for _ in range(100):
        sums, samples = metrics(url)
        if sums["vllm:num_requests_running"] + sums["vllm:num_requests_waiting"] == 0:
            break
        await asyncio.sleep(0.05)

    failures = soak.failures
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        if sums[name] != 0:
            failures.append(f"{name} is {sums[name]} at the end")
    counted = sums["vllm:request_success_total"] - before["vllm:request_success_total"]
    if counted != args.requests or soak.ended + soak.left != args.requests:
        failures.append(f"{counted} sequences ended, of {soak.ended} + {soak.left} requests")
    aborted = sum(v for k, v in samples.items() if k.startswith("vllm:request_success_total") and '"abort"' in k)
    if aborted > soak.left:
        failures.append(f"{aborted} aborted, and only {soak.left} left")
    grown = sums["process_resident_memory_bytes"] - warm["process_resident_memory_bytes"]
    if grown > GROWTH_BYTES:
        failures.append(f"resident memory grew by {grown / 2**20:.1f} MiB")
    if sums["vllm:num_preemptions_total"] == 0:
        failures.append("no sequence was preempted: this load shows too little")
    share = sums["vllm:prefix_cache_hits_total"] / max(1, sums["vllm:prefix_cache_queries_total"])
    print(
        f"{soak.ended} requests ended and {soak.left} clients left in {seconds:.0f} s ({soak.tokens / seconds:.0f} "
        f"tokens/s), {sums['vllm:num_preemptions_total']:.0f} preemptions, {share:.0%} of prompt tokens from the cache, "
        f"resident memory {sums['process_resident_memory_bytes'] / 2**20:.0f} MiB ({grown / 2**20:+.1f})"
    )

    return failures or await drain(port, process, args.clients)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=pathlib.Path, default=ROOT / "target/release")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--requests", type=int, default=20000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("flags", nargs="*", help="further flags of the server, after --")
    args = parser.parse_args()
    port = free_port()
    # A cache of some ten sequences: there are always some that wait, and now and then one gives way.
    command = [args.programs / "mxserve", args.model, "--port", port, "--host", "127.0.0.1", "--log-level", "error"]
    command += ["--kv-cache-memory-bytes", 3 << 20, "--max-num-seqs", 48, "--shutdown-timeout", 300, *args.flags]
    with started(command, f"http://127.0.0.1:{port}") as process:
        failures = asyncio.run(run(port, process, args))
    sys.exit("\n".join(failures) if failures else None)


if __name__ == "__main__":
    main()
