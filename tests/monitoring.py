#!/usr/bin/env python3
"""Checks the dashboard and the rules of deploy/ with a real Prometheus (promtool and prometheus on PATH).

    python3 tests/monitoring.py [--programs target/release] [--model tests/models/rustdoc-6m] [--seconds 25]

Converts the model to W4/A6, starts the server and Prometheus with the configuration of deploy/, sends requests, and
asks Prometheus for every expression of the dashboard: each must parse and have data.
"""

import argparse
import json
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
# What Grafana puts in; the interval covers several scrapes.
VARIABLES = {"$model": ".*", "$instance": ".*", "$__rate_interval": "10s"}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def get(url):
    with urllib.request.urlopen(url, timeout=10) as response:
        return response.read()


def wait_for(url, process, seconds=30):
    for _ in range(seconds * 10):
        if process.poll() is not None:
            sys.exit(f"{process.args[0]} ended with {process.returncode}")
        try:
            return get(url)
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    sys.exit(f"no answer from {url}")


def send_requests(server, until):
    """Streams of several tokens, so that every histogram has values."""
    while time.monotonic() < until:
        # More than a block of tokens, for the prefix cache, and repeated, for what drafts tokens.
        prompt = "/// Returns the number of elements.\n" * 8
        body = {"prompt": prompt, "max_tokens": 24, "stream": True, "ignore_eos": True}
        request = urllib.request.Request(
            f"{server}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            response.read()


def expressions(dashboard):
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            yield panel["title"], expression


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=pathlib.Path, default=ROOT / "target/release")
    parser.add_argument("--model", default=ROOT / "tests/models/rustdoc-6m")
    parser.add_argument("--seconds", type=float, default=25)
    args = parser.parse_args()

    rules = DEPLOY / "prometheus/rules.yml"
    subprocess.run(["promtool", "check", "rules", rules], check=True)
    subprocess.run(["promtool", "test", "rules", "rules_test.yml"], cwd=rules.parent, check=True)

    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        port, prometheus_port = free_port(), free_port()
        config = (DEPLOY / "prometheus/prometheus.yml").read_text()
        config = config.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
        config = re.sub(r"scrape_interval: \w+", "scrape_interval: 1s", config)
        (folder / "prometheus.yml").write_text(config)
        shutil.copy(rules, folder)
        model = folder / "model"
        convert = [args.programs / "mxconvert", args.model, "--format", "w4a6", "-o", model]
        subprocess.run(convert, check=True, capture_output=True)
        processes = [
            subprocess.Popen(
                [
                    args.programs / "mxserve",
                    model,
                    *("--port", str(port), "--log-level", "error"),
                    *("--speculative-config", '{"method": "ngram", "num_speculative_tokens": 4}'),
                ]
            ),
            subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={folder}/prometheus.yml",
                    f"--storage.tsdb.path={folder}/data",
                    f"--web.listen-address=127.0.0.1:{prometheus_port}",
                    "--log.level=error",
                ]
            ),
        ]
        try:
            server, prometheus = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{prometheus_port}"
            wait_for(f"{server}/health", processes[0])
            wait_for(f"{prometheus}/-/ready", processes[1])
            until = time.monotonic() + args.seconds
            clients = [threading.Thread(target=send_requests, args=(server, until)) for _ in range(4)]
            for client in clients:
                client.start()
            for client in clients:
                client.join()
            failures = check(prometheus)
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()
    if failures:
        sys.exit("\n".join(failures))


def check(prometheus):
    """What is wrong with the dashboard and the rules, one line each."""
    failures, count = [], 0
    dashboard = json.loads((DEPLOY / "grafana/dashboards/mxserve.json").read_text())
    for title, expression in expressions(dashboard):
        count += 1
        try:
            answer = json.loads(get(f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"))
        except urllib.error.HTTPError as error:
            failures.append(f"{title}: {expression}: {error.read().decode()}")
            continue
        values = [float(series["value"][1]) for series in answer["data"]["result"]]
        if not values or any(value != value for value in values):
            failures.append(f"{title}: {expression}: {values}")
    groups = json.loads(get(f"{prometheus}/api/v1/rules"))["data"]["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        if rule["health"] == "err":
            failures.append(f"{rule['name']}: {rule['lastError']}")
    print(f"{count} expressions of the dashboard asked, {len(failures)} without data")
    return failures


if __name__ == "__main__":
    main()
