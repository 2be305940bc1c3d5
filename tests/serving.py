"""Servers and streaming clients for the scripts of this folder; standard library only."""

import asyncio
import contextlib
import dataclasses
import json
import pathlib
import re
import socket
import subprocess
import sys
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODEL = ROOT / "tests/models/rustdoc-6m"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def healthy(url):
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


@contextlib.contextmanager
def started(command, url, seconds=60):
    """Runs a program until the block ends; enters it when the program is healthy."""
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + seconds
        while not healthy(url):
            if process.poll() is not None:
                sys.exit(f"{command[0]} ended with {process.returncode}")
            if time.monotonic() > until:
                sys.exit(f"{command[0]} is not healthy after {seconds} s")
            time.sleep(0.05)
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()


def metrics(url):
    """Sums of the samples by metric name, and the samples by name and labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        text = response.read().decode()
    sums, samples = {}, {}
    for name, labels, value in re.findall(r"^([\w:]+)(\{[^}]*\})? (\S+)$", text, re.MULTILINE):
        sums[name] = sums.get(name, 0.0) + float(value)
        samples[name + labels] = float(value)
    return sums, samples


@dataclasses.dataclass
class Answer:
    """What came of a request."""

    status: int = 0
    text: str = ""
    token_ids: list = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    # Whether the last event was the stream's end, as it must be unless the client left.
    complete: bool = False
    error: str = ""
    usage: dict = dataclasses.field(default_factory=dict)
    # Seconds from the request to the status, and to each event that has tokens.
    status_at: float = 0.0
    events_at: list = dataclasses.field(default_factory=list)
    seconds: float = 0.0


async def stream(port, body, leave_after=None, path="/v1/completions"):
    """Streams one request of 127.0.0.1:port; leaves after `leave_after` events. Errors are in the answer."""
    answer, start = Answer(), time.monotonic()
    payload = json.dumps({**body, "stream": True}).encode()
    writer = None
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n".encode() + payload)
        await writer.drain()
        answer.status = int((await reader.readline()).split()[1])
        answer.status_at = time.monotonic() - start
        while (await reader.readline()).strip():
            pass
        if answer.status != 200:
            answer.error = (await reader.read()).decode(errors="replace")
            return answer
        # The lines between the data are chunk sizes and empty ones.
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                answer.complete = True
                continue
            take(answer, json.loads(line[6:]), time.monotonic() - start)
            if leave_after is not None and len(answer.events_at) >= leave_after:
                break
    except (OSError, IndexError, ValueError, asyncio.IncompleteReadError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    finally:
        answer.seconds = time.monotonic() - start
        if writer:
            writer.close()
    return answer


def take(answer, event, now):
    if "error" in event:
        answer.error = json.dumps(event["error"])
    answer.usage = event.get("usage") or answer.usage
    for choice in event.get("choices", []):
        answer.events_at.append(now)
        answer.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
        answer.token_ids += choice.get("token_ids") or []
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason


def heldout_text():
    """Text that the bundled model was not trained on."""
    return (MODEL / "heldout.txt").read_text()


def quantile(values, q):
    values = sorted(values)
    return values[min(len(values) - 1, int(q * len(values)))] if values else float("nan")
