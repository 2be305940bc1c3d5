#!/usr/bin/env python3
"""Compares mxserve with llama.cpp on this machine's processor, side by side.

    python3 -m pip install cmake numpy torch transformers sentencepiece
    cargo build --release -p server -p converter
    tests/llama_cpp.py [--smollm2 FOLDER]

llama.cpp is built natively from the source package of llama-cpp-python. Each of its types meets the MX format of about
the same size, with the same kind of output head on both sides (Q8_0 and MXINT8), in turns, A B A B:

- the shape of Llama-3.2-1B with random weights: a prompt of 512 tokens, and generation;
- SmolLM2-135M (--smollm2: the BF16 checkpoint of HuggingFaceTB/SmolLM2-135M), and then both servers over HTTP, measured
  by `mxserve bench --url`: one stream, and sixteen.

Prints medians and ratios (above 1: mxserve is faster). Nothing else should run meanwhile.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tarfile
import time
import urllib.request
from pathlib import Path

# The source package, and with it the version of llama.cpp.
PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
REPOSITORY = Path(__file__).resolve().parent.parent

# llama.cpp's type -> the schemes that meet it. The first has 8-bit activations, as llama.cpp has them without saying
# so; the second leaves activations as they are.
PAIRS = {
    "mxfp4": ["mxfp4:mxint8", "mxfp4"],
    "q6_k": ["mxfp6:mxint8", "mxfp6"],
    "q8_0": ["mxint8:mxint8", "mxint8"],
    "bf16": ["bf16"],
}
PEER_HEAD = "q8_0"

LLAMA_1B = dict(hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, dim=64, vocab=128_256)


def head(scheme):
    """The scheme of the output head beside `scheme`: MXINT8, with 8-bit activations where the layers have them."""
    return "mxint8:mxint8" if ":" in scheme else "mxint8"


def run(*command, **options):
    """Runs a command to its end; what it prints is shown when it fails."""
    command = [str(part) for part in command]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


# llama.cpp and its models


def build(work, jobs):
    """Downloads and builds llama.cpp; returns (its sources, its programs)."""
    name = f"{PACKAGE.replace('-', '_')}-{VERSION}"
    source, programs = work / name / "vendor" / "llama.cpp", work / "build" / "bin"
    if not source.is_dir():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE]
        run(*pip, "--dest", work, f"{PACKAGE}=={VERSION}")
        with tarfile.open(work / f"{name}.tar.gz") as archive:
            archive.extractall(work, filter="data")
    if not (programs / "llama-server").is_file():
        print(f"building llama.cpp of {PACKAGE} {VERSION}", flush=True)
        flags = ["CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", "GGML_OPENMP=ON", "BUILD_SHARED_LIBS=OFF",
                 "LLAMA_CURL=OFF", "LLAMA_OPENSSL=OFF", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF"]
        run("cmake", "-S", source, "-B", work / "build", *(f"-D{flag}" for flag in flags))
        targets = ["llama-bench", "llama-quantize", "llama-server"]
        run("cmake", "--build", work / "build", f"-j{jobs}", "--target", *targets)
    return source, programs


def quantized(programs, original, kind):
    """`original` in llama.cpp's type `kind`, its embedding and head in Q8_0."""
    path = original.with_name(original.name.replace("bf16", kind))
    if not path.is_file():
        types = ["--tensor-type", f".*={kind}", "--output-tensor-type", PEER_HEAD]
        run(programs / "llama-quantize", *types, "--token-embedding-type", PEER_HEAD, original, path, PEER_HEAD)
    return path


def random_llama_1b(source, path):
    """Writes Llama-3.2-1B with random BF16 weights and no vocabulary."""
    sys.path.insert(0, str(source / "gguf-py"))
    import gguf
    import numpy as np

    shape = argparse.Namespace(**LLAMA_1B)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(131_072)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.dim)
    writer.add_rope_freq_base(500_000.0)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("no_vocab")

    # Of a prime length, so that no two rows are alike.
    normal = np.random.default_rng(0).standard_normal(1_000_003, dtype=np.float32) * np.float32(0.02)
    pool = (normal.view(np.uint32) >> 16).astype(np.uint16)

    def matrix(name, rows, cols):
        bits = np.resize(pool, rows * cols).reshape(rows, cols)
        writer.add_tensor(f"{name}.weight", bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)

    def norm(name):
        writer.add_tensor(f"{name}.weight", np.ones(shape.hidden, dtype=np.float32))

    matrix("token_embd", shape.vocab, shape.hidden)
    for layer in range(shape.layers):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm")
        norm(f"{block}.ffn_norm")
        matrix(f"{block}.attn_q", shape.heads * shape.dim, shape.hidden)
        matrix(f"{block}.attn_k", shape.kv_heads * shape.dim, shape.hidden)
        matrix(f"{block}.attn_v", shape.kv_heads * shape.dim, shape.hidden)
        matrix(f"{block}.attn_output", shape.hidden, shape.heads * shape.dim)
        matrix(f"{block}.ffn_gate", shape.intermediate, shape.hidden)
        matrix(f"{block}.ffn_up", shape.intermediate, shape.hidden)
        matrix(f"{block}.ffn_down", shape.hidden, shape.intermediate)
    norm("output_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Models:
    """A model's files for both sides, made when asked for."""

    def __init__(self, options, source, programs):
        self.options, self.source, self.programs = options, source, programs

    def peer(self, model, kind):
        """The GGUF file of `model` in llama.cpp's type `kind`."""
        original = self.options.work / f"{model}-bf16.gguf"
        if not original.is_file():
            unfinished = original.with_suffix(".part")
            if model == "llama-1b":
                random_llama_1b(self.source, unfinished)
            else:
                convert = [sys.executable, self.source / "convert_hf_to_gguf.py", self.options.smollm2]
                paths = {**os.environ, "PYTHONPATH": str(self.source / "gguf-py")}
                run(*convert, "--outtype", "bf16", "--outfile", unfinished, env=paths)
            unfinished.rename(original)
        return original if kind == "bf16" else quantized(self.programs, original, kind)

    def ours(self, model, scheme):
        """Arguments of `mxserve bench` for `model` in `scheme`."""
        if model == "llama-1b":
            formats = [] if scheme == "bf16" else ["--format", scheme, "--head-format", head(scheme)]
            return ["--shape", model, *formats]
        return [self.folder(scheme)]

    def folder(self, scheme):
        """The checkpoint of SmolLM2-135M in `scheme`."""
        if scheme == "bf16":
            return self.options.smollm2
        folder = self.options.work / f"smollm2-135m-{scheme}-head-{head(scheme)}".replace(":", "-")
        if not folder.is_dir():
            layer = ["--layer", f"lm_head={head(scheme)}"]
            run(self.options.mxconvert, self.options.smollm2, "-f", scheme, *layer, "-o", folder)
        return folder


# Offline


def llama_bench(options, programs, path, threads):
    """{test: tokens per second} of one run."""
    lengths = ["-p", options.prompt, "-n", options.gen, "-r", 1]
    records = json.loads(run(programs / "llama-bench", "-m", path, *lengths, "-t", threads, "-o", "json"))
    return {("pp" if record["n_prompt"] else "tg"): record["avg_ts"] for record in records}


def mxserve_bench(options, model, threads):
    """{test: tokens per second} of one run; "read": weights per second over a plain read of as many threads."""
    lengths = ["-p", options.prompt, "-n", options.gen, "-r", 1]
    records = json.loads(run(options.mxserve, "bench", *model, *lengths, "-t", threads, "-o", "json"))
    figures = {("pp" if record["n_prompt"] else "tg"): record["tokens_per_sec"]["median"] for record in records}
    reads = [record for record in records if record["read_bytes_per_sec"]]
    return figures | {"read": record["weight_bytes_per_sec"] / record["read_bytes_per_sec"] for record in reads}


def in_turns(rounds, sides):
    """Runs each of `sides` ({name: run}) in turn, `rounds` times; returns {name: {figure: median}}."""
    results = {name: [] for name in sides}
    for _ in range(rounds):
        for name, measure in sides.items():
            results[name].append(measure())
    return {
        name: {figure: statistics.median(one[figure] for one in runs) for figure in runs[0]}
        for name, runs in results.items()
    }


def compare_offline(options, models, programs, model):
    """Prints a line for each pair and number of threads."""
    print(f"\n{model}: tokens per second, median of {options.rounds}; llama.cpp / mxserve, ratio\n")
    print(f"| llama.cpp | mxserve | threads | pp{options.prompt} | tg{options.gen} | of a plain read |\n|---|---|---|---|---|---|")
    for kind in options.types:
        for threads in options.threads:
            path = models.peer(model, kind)
            sides = {"peer": lambda: llama_bench(options, programs, path, threads)}
            for scheme in PAIRS[kind]:
                arguments = models.ours(model, scheme)
                sides[scheme] = lambda arguments=arguments: mxserve_bench(options, arguments, threads)
            medians = in_turns(options.rounds, sides)
            peer = medians.pop("peer")
            for scheme, ours in medians.items():
                cells = [f"{peer[t]:.1f} / {ours[t]:.1f} = {ours[t] / peer[t]:.2f}" for t in ("pp", "tg")]
                cells.append(f"{100 * ours['read']:.0f} %")
                print(f"| {kind} | {scheme} | {threads} | {' | '.join(cells)} |", flush=True)


# Over HTTP


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A server process, for a `with` block; it is there when the block begins."""

    def __init__(self, *command, port):
        self.command, self.url = [str(part) for part in command], f"http://127.0.0.1:{port}"

    def __enter__(self):
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(self.command, stdin=quiet, stdout=quiet, stderr=quiet)
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return self
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.process.kill()
                    sys.exit(f"{' '.join(self.command)} does not serve")
                time.sleep(0.1)

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()

    def measure(self, options, streams, seed):
        """One load of `mxserve bench --url`."""
        load = ["--concurrency", streams, "--input-len", options.http_input, "--output-len", options.http_output]
        record = json.loads(run(options.mxserve, "bench", "--url", self.url, *load, "--seed", seed, "-o", "json"))[0]
        return {
            "output tokens/s": record["output_tokens_per_sec"],
            "in + out tokens/s": record["total_tokens_per_sec"],
            "first token, median ms": record["time_to_first_token_secs"]["p50"] * 1e3,
        }


def llama_server(programs, path, threads, streams):
    port = free_port()
    command = [programs / "llama-server", "-m", path, "--port", port, "-t", threads, "-np", streams]
    return Server(*command, "-c", 1024 * streams, port=port)


def mxserve(options, folder, threads):
    port = free_port()
    command = [options.mxserve, folder, "--host", "127.0.0.1", "--port", port, "--threads", threads]
    return Server(*command, "--device", "cpu", "--disable-log-requests", port=port)


def compare_http(options, models, programs):
    """Prints a line for each pair, number of threads and of streams."""
    print(f"\nsmollm2-135m over HTTP: prompts of {options.http_input} words, answers of {options.http_output} tokens, "
          f"median of {options.rounds}; llama-server / mxserve, ratio\n")
    print("| llama-server | mxserve | threads | streams | output tokens/s | in + out tokens/s | first token, median ms |")
    print("|---|---|---|---|---|---|---|")
    for kind in options.types:
        for threads in options.threads:
            for streams in options.streams:
                # What differs between the rounds is the prompts: no server has seen them before.
                seeds = {"peer": iter(range(1000)), "ours": iter(range(1000))}
                peer = llama_server(programs, models.peer("smollm2-135m", kind), threads, streams)
                scheme = PAIRS[kind][0]
                with peer, mxserve(options, models.folder(scheme), threads) as ours:
                    for server in (peer, ours):
                        server.measure(options, streams, seed=12_345)
                    medians = in_turns(options.rounds, {
                        "peer": lambda: peer.measure(options, streams, next(seeds["peer"])),
                        "ours": lambda: ours.measure(options, streams, next(seeds["ours"])),
                    })
                cells = []
                for figure, a in medians["peer"].items():
                    b = medians["ours"][figure]
                    cells.append(f"{a:.1f} / {b:.1f} = {(a / b if figure.endswith('ms') else b / a):.2f}")
                print(f"| {kind} | {scheme} | {threads} | {streams} | {' | '.join(cells)} |", flush=True)


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path, help="BF16 checkpoint of SmolLM2-135M; without it, only llama-1b runs")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "target" / "llama.cpp", help="for builds and models")
    parser.add_argument("--mxserve", type=Path, default=REPOSITORY / "target" / "release" / "mxserve")
    parser.add_argument("--mxconvert", type=Path, default=REPOSITORY / "target" / "release" / "mxconvert")
    parser.add_argument("--parts", nargs="+", default=["llama-1b", "smollm2-135m", "http"],
                        choices=["llama-1b", "smollm2-135m", "http"])
    parser.add_argument("--types", nargs="+", default=list(PAIRS), choices=PAIRS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, os.cpu_count() or 1])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--gen", type=int, default=128)
    parser.add_argument("--http-input", type=int, default=110, help="words of each prompt")
    parser.add_argument("--http-output", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="of the build")
    return parser.parse_args()


def main():
    chosen = options()
    chosen.work.mkdir(parents=True, exist_ok=True)
    source, programs = build(chosen.work, chosen.jobs)
    models = Models(chosen, source, programs)
    for part in chosen.parts:
        if part == "llama-1b":
            compare_offline(chosen, models, programs, part)
        elif chosen.smollm2 is None:
            print(f"\n{part}: not run, for want of --smollm2")
        elif part == "smollm2-135m":
            compare_offline(chosen, models, programs, part)
        else:
            compare_http(chosen, models, programs)


if __name__ == "__main__":
    main()
