#!/usr/bin/env python3
"""Ten times more clients than the server has places: who is turned away hears so at once, who is accepted is served
as fast as without them.

    python3 tests/overload.py [--programs target/release] [--seconds 20]

Fills the server's places, running and waiting, with clients that ask again as soon as they are answered, and measures.
Then ten times as many do the same, those who are turned away after a short pause.
"""

import argparse
import asyncio
import pathlib
import sys
import time

from serving import MODEL, ROOT, free_port, heldout_text, metrics, quantile, started, stream

RUNNING, WAITING = 8, 8
TIMES = 10
# Seconds before a client that was turned away asks again. `Retry-After` says more; these are the impatient ones.
PAUSE = 0.5
# A 429 may take this long, and requests this many times longer than without the crowd.
REFUSAL_SECS, SLOWDOWN = 0.25, 1.5


async def client(port, number, until, accepted, refused, failures):
    text, count = heldout_text(), 0
    while time.monotonic() < until:
        start = (97 * number + 13 * count) % 20000
        body = {"prompt": text[start : start + 200], "max_tokens": 32, "ignore_eos": True, "return_token_ids": True}
        answer = await stream(port, body)
        count += 1
        if answer.status == 200 and answer.complete and len(answer.token_ids) == 32:
            accepted.append(answer)
        elif answer.status == 429:
            refused.append(answer)
            await asyncio.sleep(PAUSE)
        else:
            failures.append(f"{answer}")


async def crowd(port, clients, seconds):
    accepted, refused, failures = [], [], []
    until = time.monotonic() + seconds
    await asyncio.gather(*(client(port, i, until, accepted, refused, failures) for i in range(clients)))
    times = [answer.seconds for answer in accepted]
    first = [answer.events_at[0] for answer in accepted]
    print(
        f"{clients} clients: {len(accepted)} served, in {quantile(times, 0.5):.3f} s (p50) and "
        f"{quantile(times, 0.99):.3f} s (p99), first token after {quantile(first, 0.5):.3f} s and "
        f"{quantile(first, 0.99):.3f} s; {len(refused)} turned away"
    )
    return accepted, refused, failures


async def run(port, args):
    await crowd(port, RUNNING + WAITING, 2)
    usual, refused, failures = await crowd(port, RUNNING + WAITING, args.seconds)
    if refused:
        failures.append(f"{len(refused)} were turned away though there was a place for all")
    accepted, refused, more = await crowd(port, TIMES * (RUNNING + WAITING), args.seconds)
    failures += more
    refusals = [answer.seconds for answer in refused]
    print(f"429 after {quantile(refusals, 0.5) * 1e3:.1f} ms (p50) and {quantile(refusals, 0.99) * 1e3:.1f} ms (p99)")
    if quantile(refusals, 0.99) > REFUSAL_SECS or not refused:
        failures.append("429s are slow, or there were none")
    before, after = (quantile([answer.seconds for answer in answers], 0.5) for answers in (usual, accepted))
    if after > SLOWDOWN * before:
        failures.append(f"requests took {after:.3f} s instead of {before:.3f} s")
    _, samples = metrics(f"http://127.0.0.1:{port}")
    counted = sum(v for k, v in samples.items() if "admission_rejections" in k and "queue_full" in k)
    if counted != len(refused):
        failures.append(f"{counted} rejections counted, and {len(refused)} heard")
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=pathlib.Path, default=ROOT / "target/release")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--seconds", type=float, default=20)
    args = parser.parse_args()
    port = free_port()
    command = [args.programs / "mxserve", args.model, "--port", port, "--host", "127.0.0.1", "--log-level", "error"]
    command += ["--max-num-seqs", RUNNING, "--max-num-queued-reqs", WAITING]
    with started(command, f"http://127.0.0.1:{port}"):
        failures = asyncio.run(run(port, args))
    sys.exit("\n".join(failures) if failures else None)


if __name__ == "__main__":
    main()
