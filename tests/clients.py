#!/usr/bin/env python3
"""Runs the clients that people have, unmodified, against a server: the libraries openai (Python and Node) and litellm, the
evaluations of lm-eval, and the benchmarks guidellm, aiperf and what `vllm bench serve` sends.

    python3 tests/clients.py [NAME...] [--programs target/release] [--model tests/models/rustdoc-6m]

Starts the server itself. Each client is installed from PyPI or npm into target/clients/NAME, once; all together take some
gigabytes, and an hour's patience on a slow machine. NAME: openai, node, litellm, lm-eval, guidellm, aiperf, vllm-bench.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from serving import MODEL, ROOT, free_port, started

HERE = ROOT / "tests/clients"
INSTALLED = ROOT / "target/clients"
# Not every model's own template, if it has one, tells of tools.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\nCall with <tool_call>{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAME = "model"
# Each with the packages that it needs.
PACKAGES = {
    "openai": ["openai>=2"],
    "litellm": ["litellm", "mcp"],
    "lm-eval": ["lm-eval[api]", "transformers"],
    "guidellm": ["guidellm"],
    "aiperf": ["aiperf"],
}


def python(name):
    """The interpreter of an environment that has the client."""
    folder = INSTALLED / name
    program = folder / "bin/python"
    if not (folder / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([program, "-m", "pip", "install", "--quiet", *PACKAGES[name]], check=True)
        (folder / "installed").touch()
    return program


def run(command, seconds=600, **variables):
    """Runs a client, which must not fail; what it says is shown if it does."""
    # No client has any business elsewhere.
    offline = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    done = subprocess.run([str(part) for part in command], env={**os.environ, **offline, **variables}, timeout=seconds,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode != 0:
        sys.exit(f"{' '.join(str(part) for part in command)}\n{done.stdout[-6000:]}\nended with {done.returncode}")
    return done.stdout


def openai(url, model, folder):
    return run([python("openai"), HERE / "openai_python.py", f"{url}/v1"])


def node(url, model, folder):
    installed = INSTALLED / "node"
    if not (installed / "node_modules/openai").exists():
        installed.mkdir(parents=True, exist_ok=True)
        run(["npm", "install", "--silent", "--prefix", installed, "openai"])
    # Node looks for packages beside the script.
    script = shutil.copy(HERE / "openai_node.mjs", installed)
    return run(["node", script, f"{url}/v1"])


def litellm(url, model, folder):
    return run([python("litellm"), HERE / "litellm_client.py", f"{url}/v1"])


def lm_eval(url, model, folder):
    said = []
    for kind, path, tasks in [
        ("local-completions", "completions", "choices,generation,rolling"),
        ("local-chat-completions", "chat/completions", "generation"),
    ]:
        arguments = f"model={NAME},base_url={url}/v1/{path},num_concurrent=4,tokenizer={model},tokenizer_backend=huggingface"
        template = ["--apply_chat_template"] if "chat" in kind else []
        said.append(run([python("lm-eval"), "-m", "lm_eval", "run", "--model", kind, "--model_args", arguments,
            "--include_path", HERE / "lm_eval", "--tasks", tasks, "--limit", "8", *template], OPENAI_API_KEY="none"))
    table = "".join(said)
    for task in ("choices", "generation", "rolling"):
        if f"|{task}" not in table:
            sys.exit(f"{table}\nno result of {task}")
    return table


def guidellm(url, model, folder):
    for endpoint in ("completions", "chat/completions", "responses", "embeddings"):
        output = folder / f"guidellm-{endpoint.replace('/', '-')}.json"
        sizes = "prompt_tokens=24" if endpoint == "embeddings" else "prompt_tokens=24,output_tokens=8"
        run([python("guidellm").parent / "guidellm", "run", "--disable-console",
            "--backend", f"kind=openai_http,target={url},model={NAME},request_format=/v1/{endpoint}",
            "--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=8",
            "--tokenizer", f"kind=huggingface_auto,model={model}", "--data", f"kind=synthetic_text,{sizes}",
            "--output", f"kind=json,path={output}"])
    return run([sys.executable, HERE / "check_report.py", "guidellm", folder])


def aiperf(url, model, folder):
    program = python("aiperf").parent / "aiperf"
    # Offline it takes a folder's path for the name of a repository.
    online = {"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": ""}
    for kind in ("completions", "chat"):
        run([program, "profile", "--model", NAME, "--url", url, "--endpoint-type", kind, "--streaming", "--tokenizer", model,
            "--concurrency", "2", "--request-count", "8", "--isl", "24", "--osl", "8", "--ui", "none",
            "--artifact-dir", folder / kind], **online)
    return run([sys.executable, HERE / "check_report.py", "aiperf", folder])


def vllm_bench(url, model, folder):
    return run([sys.executable, HERE / "vllm_bench.py", url])


CLIENTS = {"openai": openai, "node": node, "litellm": litellm, "lm-eval": lm_eval, "guidellm": guidellm, "aiperf": aiperf,
    "vllm-bench": vllm_bench}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which clients [default: all]")
    parser.add_argument("--programs", type=pathlib.Path, default=ROOT / "target/release")
    parser.add_argument("--model", type=pathlib.Path, default=MODEL)
    args = parser.parse_args()
    if unknown := set(args.names) - set(CLIENTS):
        parser.error(f"no such client: {', '.join(sorted(unknown))}")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        command = [args.programs / "mxserve", args.model, "--host", "127.0.0.1", "--port", port, "--served-model-name", NAME,
            "--disable-log-requests", "--chat-template", folder / "template.jinja"]
        (folder / "template.jinja").write_text(TEMPLATE)
        with started(command, url):
            for client in args.names or CLIENTS:
                begin = time.monotonic()
                said = CLIENTS[client](url, args.model, folder)
                print(f"{client}: {time.monotonic() - begin:.0f} s\n{said}", flush=True)


if __name__ == "__main__":
    main()
