#!/usr/bin/env python3
"""Checks the metrics under load, and the dashboard and the rules of deploy/ with a real Prometheus (promtool and
prometheus on PATH).

    python3 tests/monitoring.py [--programs target/release] [--model tests/models/rustdoc-6m] [--seconds 25]

Converts the model to W4A6, and starts a server with few places and a small KV cache and Prometheus with the
configuration of deploy/. Then come more clients than there are places. What the server counts must be what they saw; and
each expression of the dashboard must have data.
"""

import argparse
import asyncio
import collections
import contextlib
import itertools
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request

from serving import MODEL, ROOT, free_port, heldout_text, metrics, started, stream

DEPLOY = ROOT / "deploy"
# What Grafana puts in; the interval covers several scrapes.
VARIABLES = {"$model": ".*", "$instance": ".*", "$__rate_interval": "60s"}
RUNNING, WAITING, CLIENTS = 6, 4, 14
# 512 tokens, not enough for all that run: they take them from each other.
KV_CACHE_BYTES = 3 << 19


def get(url):
    with urllib.request.urlopen(url, timeout=10) as response:
        return response.read()


def bodies():
    """Requests whose tokens a client can count: they end by length or by a token, not in the middle of one."""
    text = heldout_text()
    for number in itertools.count():
        start = 400 * (number % 30)
        # Every third is one that was there before, as far as the prefix cache is concerned.
        prompt = text[start : start + 300] if number % 3 else "/// Returns the number of elements.\n" * 8
        body = {"prompt": prompt, "max_tokens": 4 + 9 * (number % 12), "stream_options": {"include_usage": True}}
        match number % 4:
            case 0:
                body |= {"temperature": 0, "ignore_eos": True}
            case 1:
                body |= {"seed": number, "stop_token_ids": list(range(100, 400))}
            case 2:
                body |= {"seed": number, "frequency_penalty": 0.5, "ignore_eos": True}
        yield body


class Load:
    """Clients, and what they saw."""

    def __init__(self, port):
        self.port, self.bodies = port, bodies()
        self.whole, self.refused, self.failures = [], 0, []
        self.most = collections.Counter()

    async def client(self, until, leaves):
        for count in itertools.count():
            if time.monotonic() > until:
                return
            answer = await stream(self.port, next(self.bodies), leave_after=3 if leaves and count % 8 == 0 else None)
            if answer.status == 429:
                self.refused += 1
                await asyncio.sleep(0.2)
            elif answer.status == 200 and answer.complete and not answer.error:
                self.whole.append(answer)
            elif not leaves:
                self.failures.append(f"{answer}")

    async def watch(self, until):
        while time.monotonic() < until:
            sums, _ = await asyncio.to_thread(metrics, f"http://127.0.0.1:{self.port}")
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
                self.most[name] = max(self.most[name], sums[f"vllm:{name}"])
            await asyncio.sleep(0.05)

    async def run(self, seconds, leaves=False):
        until = time.monotonic() + seconds
        await asyncio.gather(self.watch(until), *(self.client(until, leaves) for _ in range(CLIENTS)))
        # Those who left just now are noticed at the next step.
        url = f"http://127.0.0.1:{self.port}"
        while (idle := metrics(url))[0]["vllm:num_requests_running"] + idle[0]["vllm:num_requests_waiting"]:
            await asyncio.sleep(0.05)
        return idle


def compare(before, after, load):
    """Holds what the server counted between two scrapes to what the clients of `load` saw."""
    failures = list(load.failures)
    (sums_before, samples_before), (sums, samples) = before, after
    delta = lambda name: sums[f"vllm:{name}"] - sums_before[f"vllm:{name}"]

    def equal(what, counted, seen, within=1e-6):
        if abs(counted - seen) > within * max(abs(counted), abs(seen), 1):
            failures.append(f"{what}: the server has {counted}, the clients saw {seen}")

    def labelled(name, label):
        pick = lambda all_: sum(v for k, v in all_.items() if k.startswith(f"vllm:{name}{{") and label in k)
        return pick(samples) - pick(samples_before)

    usage = lambda key: sum(answer.usage[key] for answer in load.whole)
    prompt, generated, count = usage("prompt_tokens"), usage("completion_tokens"), len(load.whole)
    cached = sum(answer.usage["prompt_tokens_details"]["cached_tokens"] for answer in load.whole)
    reasons = collections.Counter(answer.finish_reason for answer in load.whole)
    equal("prompt_tokens", delta("prompt_tokens_total"), prompt)
    equal("generation_tokens", delta("generation_tokens_total"), generated)
    equal("prefix_cache_queries", delta("prefix_cache_queries_total"), prompt)
    equal("prefix_cache_hits", delta("prefix_cache_hits_total"), cached)
    for reason in ("stop", "length", "abort", "error"):
        equal(f"request_success {reason}", labelled("request_success_total", f'"{reason}"'), reasons[reason])
    equal("admission_rejections", labelled("admission_rejections_total", '"queue_full"'), load.refused)
    for name in ("e2e_request_latency_seconds", "time_to_first_token_seconds", "request_queue_time_seconds"):
        equal(f"{name}_count", delta(f"{name}_count"), count)
    equal("request_prompt_tokens", delta("request_prompt_tokens_sum"), prompt)
    equal("request_generation_tokens", delta("request_generation_tokens_sum"), generated)
    # A step may bring several tokens, of which one is the next.
    if not 0 < delta("inter_token_latency_seconds_count") <= generated - count:
        failures.append(f"{delta('inter_token_latency_seconds_count')} gaps between {generated} tokens of {count}")
    phases = [delta(f"request_{phase}_time_seconds_sum") for phase in ("queue", "prefill", "decode")]
    equal("decode", phases[2], delta("inter_token_latency_seconds_sum"))
    equal("phases", sum(phases), delta("e2e_request_latency_seconds_sum"), within=0.01)
    first = delta("time_to_first_token_seconds_sum")
    equal("first token", first, phases[0] + phases[1], within=0.01)
    # Clients see the same a little later.
    seen = (sum(answer.seconds for answer in load.whole), sum(answer.events_at[0] for answer in load.whole))
    for name, counted, saw in zip(("e2e", "first token"), (delta("e2e_request_latency_seconds_sum"), first), seen):
        if not 0.5 * saw < counted < saw:
            failures.append(f"{name}: {counted:.2f} s, and the clients saw {saw:.2f} s")
    computed = prompt - cached + generated - count
    if delta("iteration_tokens_total_sum") < computed:
        failures.append(f"steps of {delta('iteration_tokens_total_sum')} tokens in all, less than {computed}")
    drafted = [delta(f"spec_decode_num_{name}_total") for name in ("drafts", "draft_tokens", "accepted_tokens")]
    if not 0 < drafted[0] <= drafted[1] or not 0 < drafted[2] <= drafted[1]:
        failures.append(f"drafts, their tokens, those accepted: {drafted}")
    most = load.most
    if most["num_requests_running"] > RUNNING or most["num_requests_waiting"] > RUNNING + WAITING:
        failures.append(f"more than there are places: {dict(most)}")
    if not 0 < most["kv_cache_usage_perc"] <= 1 or sums["vllm:kv_cache_usage_perc"] != 0:
        failures.append(f"KV cache: {most['kv_cache_usage_perc']} at most, {sums['vllm:kv_cache_usage_perc']} at the end")
    if not delta("num_preemptions_total") or not load.refused or not cached:
        failures.append("nobody was preempted, turned away or found in the cache: this load shows too little")
    print(
        f"{count} requests, {prompt:.0f} prompt tokens ({cached:.0f} cached), {generated:.0f} generated, {load.refused} "
        f"turned away, {delta('num_preemptions_total'):.0f} preemptions, {drafted[2]:.0f} of {drafted[1]:.0f} drafted "
        f"tokens accepted: {len(failures)} differences from the metrics"
    )
    return failures


def expressions(dashboard):
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            yield panel["title"], expression


def query(prometheus, expression):
    answer = json.loads(get(f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"))
    return [float(series["value"][1]) for series in answer["data"]["result"]]


def check_dashboard(prometheus):
    """What is wrong with the dashboard and the rules, one line each."""
    failures, count = [], 0
    dashboard = json.loads((DEPLOY / "grafana/dashboards/mxserve.json").read_text())
    for title, expression in expressions(dashboard):
        count += 1
        try:
            values = query(prometheus, expression)
        except urllib.error.HTTPError as error:
            failures.append(f"{title}: {expression}: {error.read().decode()}")
            continue
        if not values or any(value != value for value in values):
            failures.append(f"{title}: {expression}: {values}")
    groups = json.loads(get(f"{prometheus}/api/v1/rules"))["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    failures += [f"{rule['name']}: {rule['lastError']}" for rule in rules if rule["health"] == "err"]
    print(f"{count} expressions of the dashboard and {len(rules)} rules asked: {len(failures)} without data")
    return failures


async def check(port, prometheus, seconds):
    url = f"http://127.0.0.1:{port}"
    # First without the clients that leave in the middle: what was generated for them, only the server knows.
    before, counted = metrics(url), Load(port)
    failures = compare(before, await counted.run(seconds / 2), counted)
    watched = asyncio.create_task(Load(port).run(seconds / 2, leaves=True))
    await asyncio.sleep(seconds / 2)
    # While they are there: rates are over the last seconds.
    failures += await asyncio.to_thread(check_dashboard, prometheus)
    sums, samples = await watched
    if not any("abort" in name and value for name, value in samples.items()):
        failures.append("clients left, and no sequence was aborted")
    total = "vllm:generation_tokens_total"
    for _ in range(50):
        scraped = query(prometheus, total)
        if scraped == [sums[total]]:
            break
        await asyncio.sleep(0.1)
    else:
        failures.append(f"{total}: Prometheus has {scraped}, the server {sums[total]}")
    return failures


@contextlib.contextmanager
def running_prometheus(folder, port, url):
    """Prometheus as deploy/ configures it, for a server at `port`, with scrapes each second."""
    config = (DEPLOY / "prometheus/prometheus.yml").read_text()
    config = config.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    (folder / "prometheus.yml").write_text(re.sub(r"scrape_interval: \w+", "scrape_interval: 1s", config))
    shutil.copy(DEPLOY / "prometheus/rules.yml", folder)
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address={url.removeprefix('http://')}", "--log.level=error"]
    process = subprocess.Popen(command)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                get(f"{url}/-/ready")
                break
            if process.poll() is not None:
                sys.exit(f"prometheus ended with {process.returncode}")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=pathlib.Path, default=ROOT / "target/release")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--seconds", type=float, default=25)
    args = parser.parse_args()

    rules = DEPLOY / "prometheus/rules.yml"
    subprocess.run(["promtool", "check", "rules", rules], check=True)
    subprocess.run(["promtool", "test", "rules", "rules_test.yml"], cwd=rules.parent, check=True)

    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        model = folder / "model"
        convert = [args.programs / "mxconvert", args.model, "--format", "w4a6", "-o", model]
        subprocess.run(convert, check=True, capture_output=True)
        port, prometheus = free_port(), f"http://127.0.0.1:{free_port()}"
        command = [args.programs / "mxserve", model, "--port", port, "--host", "127.0.0.1", "--log-level", "error"]
        command += ["--max-num-seqs", RUNNING, "--max-num-queued-reqs", WAITING]
        command += ["--kv-cache-memory-bytes", KV_CACHE_BYTES]
        command += ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 4}']
        with started(command, f"http://127.0.0.1:{port}"), running_prometheus(folder, port, prometheus):
            failures = asyncio.run(check(port, prometheus, args.seconds))
    sys.exit("\n".join(failures) if failures else None)


if __name__ == "__main__":
    main()
