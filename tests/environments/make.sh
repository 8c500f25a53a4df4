#!/usr/bin/env bash
# Makes a virtual environment with another torch or Python than those of .venv, for a machine without accelerators: about
# 3 GB. NAME.txt beside this file says what it has of its own; everything else is as in constraints.txt.
#     tests/environments/make.sh PYTHON DIRECTORY NAME
set -euo pipefail
python=$1 environment=$2 name=$3
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)

"$python" -m venv "$environment"
# Without dependencies: torch names 5 GB of CUDA libraries, which stand_ins.sh replaces.
pip=("$environment/bin/python" -m pip --disable-pip-version-check install --no-cache-dir --no-deps --quiet)
"${pip[@]}" -r "$here/$name.txt"
# Everything else that the tests run with, but for DeepSpeed, which is built for one torch, Ray, and datasets with its
# pandas; torchao needs a newer torch than XLA does.
left_out='torch|deepspeed|ray|datasets|pandas'
[ "$name" != xla ] || left_out+='|torchao'
"${pip[@]}" -r <(grep -vE "^($left_out)==" "$root/constraints.txt")
"${pip[@]}" --no-build-isolation -e "$root"
"$here/stand_ins.sh" "$environment"
"$environment/bin/python" -c '
import platform, torch
print("Python", platform.python_version(), "torch", torch.__version__)'
