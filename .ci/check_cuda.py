#!/usr/bin/env python3
"""Checks the machine code of the CUDA kernels that a build embeds: tensor-core instructions where they are meant to be,
no local memory anywhere.

usage: check_cuda.py OUT_DIR...   (folders with the .fatbin files of kernels/build.rs)
"""
import os
import re
import subprocess
import sys
from pathlib import Path

# Instruction -> files (by prefix) of which at least one must have it: BF16 and FP8 wgmma.
REQUIRED = {"HGMMA": "gemm-prefill", "QGMMA": "gemm-prefill"}
FORBIDDEN = re.compile(r"\b(STL|LDL)\b")


def tool() -> str:
    home = os.environ.get("CUDA_HOME")
    return str(Path(home) / "bin" / "cuobjdump") if home else "cuobjdump"


def dump(fatbin: Path, what: str) -> str:
    return subprocess.run([tool(), what, str(fatbin)], check=True, capture_output=True, text=True).stdout


def check(fatbin: Path, found: set[str]) -> list[str]:
    errors = []
    sass = dump(fatbin, "--dump-sass")
    function = None
    for line in sass.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            function = match.group(1)
        elif FORBIDDEN.search(line):
            errors.append(f"{fatbin.name}: {function}: local memory: {line.strip()}")
    for instruction, prefix in REQUIRED.items():
        if fatbin.name.startswith(prefix) and re.search(rf"\b{instruction}\b", sass):
            found.add(instruction)
    for name, usage in re.findall(r"Function (\S+):\s*\n\s*(.*)", dump(fatbin, "--dump-resource-usage")):
        for key in ("STACK", "LOCAL"):
            if (size := re.search(rf"\b{key}:(\d+)", usage)) and size.group(1) != "0":
                errors.append(f"{fatbin.name}: {name}: {key}:{size.group(1)}")
    return errors


def main() -> int:
    fatbins = sorted(fatbin for out in sys.argv[1:] for fatbin in Path(out).glob("*.fatbin"))
    if not fatbins:
        print("error: no kernels to check", file=sys.stderr)
        return 1
    found: set[str] = set()
    errors = [error for fatbin in fatbins for error in check(fatbin, found)]
    errors += [f"no {name} in {REQUIRED[name]}*" for name in sorted(REQUIRED.keys() - found)]
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    print(f"{len(fatbins)} files of kernels, {len(errors)} errors")
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
