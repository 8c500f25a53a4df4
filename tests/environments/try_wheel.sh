#!/usr/bin/env bash
# Installs a wheel into an environment that holds nothing else, under constraints.txt, and runs the README's first program
# with it from an empty directory.
#     tests/environments/try_wheel.sh PYTHON WHEEL
set -euo pipefail
python=$1 wheel=$(realpath "$2")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$python" -m venv "$scratch/environment"
bin=$scratch/environment/bin
"$bin/python" -m pip --disable-pip-version-check install --quiet -c "$root/constraints.txt" "$wheel"
mkdir "$scratch/empty"
awk '/^```python$/ { inside = 1; next } inside && /^```$/ { exit } inside' "$root/README.md" > "$scratch/program.py"
cd "$scratch/empty"
"$bin/python" "$scratch/program.py"
"$bin/stratagem" --version
"$bin/python" -m stratagem report output/sine
"$bin/python" -c '
import stratagem, sys
assert sys.prefix in stratagem.__file__, stratagem.__file__
print("stratagem", stratagem.__version__, "from", stratagem.__file__)'
