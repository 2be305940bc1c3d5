"""README.md says what this folder and .ci/run do: its commands, its links, its files."""

import pathlib
import re
import sys

root = pathlib.Path(__file__).resolve().parent.parent
readme = (root / "README.md").read_text()
errors = []

for command in ("cargo run --release --bin mxserve -- demo", "cargo test --release --workspace"):
    if command not in readme:
        errors.append(f"README.md does not show `{command}`")
if "cargo test --release --workspace" not in (root / ".ci" / "run").read_text():
    errors.append(".ci/run does not run README's test command")

# Links to files, and paths in the table of what to edit where.
for path in re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", readme) + re.findall(r"`((?:[a-z_]+/)+[a-z_0-9.]*)`", readme):
    if not (root / path).exists():
        errors.append(f"README.md names {path}, which does not exist")

for word in re.findall(r"\b[A-Z]+_[A-Z_]+\b", readme):
    if not word.startswith("MXSERVE_") and word != "CUDA_HOME":
        errors.append(f"README.md still has the placeholder {word}")

for error in errors:
    print(f"error: {error}", file=sys.stderr)
sys.exit(bool(errors))
