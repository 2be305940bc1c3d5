#!/usr/bin/env python3
"""Two replicas behind routers that users run: vllm-router and smg, both from PyPI, each by round robin and by cache.

    pip install vllm-router smg
    python3 tests/routers.py [--programs target/release] [--routers FOLDER OF vllm-router AND smg]

Streams through each router say what a replica says when it is asked directly. Then one replica is killed: only streams
that it was serving may fail, all others and all that come later are whole.
"""

import argparse
import asyncio
import contextlib
import pathlib
import shutil
import sys

from serving import MODEL, ROOT, free_port, heldout_text, metrics, started, stream

POLICIES = ["round_robin", "cache_aware"]
STREAMS = 16


def replica(args, port):
    command = [args.programs / "mxserve", args.model, "--port", port, "--host", "127.0.0.1", "--threads", 1]
    # A cache for all streams at once: the replica that is left takes over the work of the other.
    return [*command, "--served-model-name", "model", "--log-level", "error", "--kv-cache-memory-bytes", 64 << 20]


def router(program, policy, port, workers):
    launch = ["launch"] if program.name == "smg" else []
    command = [program, *launch, "--host", "127.0.0.1", "--port", port, "--policy", policy, "--worker-urls", *workers]
    # Replicas that are gone are noticed soon, and a request that reached none is sent to another.
    command += ["--health-check-interval-secs", 1, "--health-failure-threshold", 1, "--retry-max-retries", 5]
    return [*command, "--prometheus-port", free_port(), "--log-level", "error"]


def bodies(count, max_tokens):
    text = heldout_text()
    for index in range(count):
        # Families of prompts that begin alike, for the routers that care.
        start = 2000 * (index % 4)
        prompt = text[start : start + 300] + text[50 * index : 50 * index + 40]
        yield {
            "model": "model",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "seed": index,
            "ignore_eos": True,
            "return_token_ids": True,
        }


def running(port):
    return metrics(f"http://127.0.0.1:{port}")[0]["vllm:num_requests_running"]


def served(port):
    return metrics(f"http://127.0.0.1:{port}")[0]["vllm:request_success_total"]


async def all_whole(port, requests, expected, what, failures):
    answers = await asyncio.gather(*(stream(port, body) for body in requests))
    for answer, right in zip(answers, expected):
        if not answer.complete or answer.text != right.text:
            failures.append(f"{what}: {answer} instead of {right}")
    return answers


async def check(name, router_port, ports, doomed):
    failures = []
    short, long = list(bodies(2 * STREAMS, 24)), list(bodies(STREAMS, 400))
    direct = [await stream(ports[0], body) for body in short]
    direct_long = [await stream(ports[0], body) for body in long]
    before = [served(port) for port in ports]
    await all_whole(router_port, short, direct, "through the router", failures)
    shares = [int(served(port) - count) for port, count in zip(ports, before)]
    if sum(shares) != len(short):
        failures.append(f"{sum(shares)} requests arrived, not {len(short)}")

    tasks = [asyncio.create_task(stream(router_port, body)) for body in long]
    counts = [0, 0]
    # All run, on both replicas unless the router sent all to one.
    while sum(counts) < len(long):
        await asyncio.sleep(0.02)
        counts = [running(port) for port in ports]
        if all(task.done() for task in tasks):
            failures.append("the streams ended before the replica could be killed")
            break
    doomed.kill()
    answers = await asyncio.gather(*tasks)
    broken = 0
    for answer, right in zip(answers, direct_long):
        if answer.complete and answer.text == right.text:
            continue
        broken += 1
        # What came before the end was right.
        if not right.text.startswith(answer.text):
            failures.append(f"mixed up: {answer} instead of {right}")
    if broken > counts[1]:
        failures.append(f"{broken} streams broke, and the killed replica had {counts[1]:.0f}")

    await all_whole(router_port, short, direct, "after the replica was killed", failures)
    print(
        f"{name}: {len(short)} streams over the replicas as {shares[0]} + {shares[1]}; of {len(long)} long ones, "
        f"{counts[1]:.0f} were on the killed replica and {broken} broke; {len(short)} later ones, "
        f"{len(failures)} failures"
    )
    return [f"{name}: {failure}" for failure in failures]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=pathlib.Path, default=ROOT / "target/release")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--routers", help="folder of the routers' programs; default: PATH")
    args = parser.parse_args()
    failures = []
    for program in ("vllm-router", "smg"):
        found = shutil.which(program, path=args.routers)
        if not found:
            sys.exit(f"{program} is not installed: pip install {program}")
        for policy in POLICIES:
            with contextlib.ExitStack() as stack:
                ports, processes = [free_port(), free_port()], []
                for port in ports:
                    url = f"http://127.0.0.1:{port}"
                    processes.append(stack.enter_context(started(replica(args, port), url)))
                port = free_port()
                workers = [f"http://127.0.0.1:{port}" for port in ports]
                command = router(pathlib.Path(found), policy, port, workers)
                stack.enter_context(started(command, f"http://127.0.0.1:{port}"))
                failures += asyncio.run(check(f"{program} {policy}", port, ports, processes[1]))
    sys.exit("\n".join(failures) if failures else None)


if __name__ == "__main__":
    main()
