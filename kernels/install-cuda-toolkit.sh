#!/usr/bin/env bash
# Installs what compiling the CUDA kernels takes (nvcc 13.0 and, to check the code it makes, cuobjdump) from PyPI
# into a folder: 210 MB, no root, no GPU. Needs Python 3 with pip; nvcc itself needs a C++ compiler.
#
#   kernels/install-cuda-toolkit.sh DIR && export CUDA_HOME=DIR/nvidia/cu13
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 DIR" >&2; exit 2; }
mkdir -p "$1"
dir=$(cd "$1" && pwd)

# The packages of one release that nvcc finds relative to itself; the disassemblers have a release of their own.
packages=(
    nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
    nvidia-cuda-cuobjdump==13.2.86 nvidia-cuda-nvdisasm==13.2.86
)
if [ "$(cat "$dir/packages" 2>/dev/null)" != "${packages[*]}" ]; then
    python3 -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$dir" "${packages[@]}" >&2
    echo "${packages[*]}" >"$dir/packages"
fi
[ -x "$dir/nvidia/cu13/bin/nvcc" ] || { echo "error: no nvcc in $dir/nvidia/cu13/bin" >&2; exit 1; }
echo "export CUDA_HOME=$dir/nvidia/cu13"
