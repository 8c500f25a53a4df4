#!/usr/bin/env bash
# Makes a virtual environment with torch_xla and the torch it fits, for a machine without accelerators: about 3 GB.
#     tests/xla/make_environment.sh PYTHON DIRECTORY
set -euo pipefail
python=$1 environment=$2
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

for tool in gcc nm; do
    command -v "$tool" > /dev/null || { echo "The XLA environment needs $tool (Debian: apt-get install gcc binutils)." >&2; exit 1; }
done

"$python" -m venv "$environment"
pip=("$environment/bin/python" -m pip install --no-cache-dir --no-deps --quiet)
"${pip[@]}" -r "$root/tests/xla/requirements.txt"
# Everything else that the tests run with, but for what needs another torch, Ray, and datasets with its pandas.
"${pip[@]}" -r <(grep -vE '^(torch|torchao|deepspeed|ray|datasets|pandas)==' "$root/constraints.txt")
"${pip[@]}" --no-build-isolation -e "$root"

# libtorch is linked against CUDA libraries that it never calls here: empty ones, and one with every symbol they lack.
libraries=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib") + "/torch/lib")')
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
touch "$scratch/empty.c"
for name in libcudnn.so.9 libcusparseLt.so.0 libcufile.so.0 libcusparse.so.12 libcufft.so.11 libnccl.so.2 \
    libcurand.so.10 libcublas.so.12 libcublasLt.so.12 libcupti.so.12; do
    gcc -shared -fPIC -Wl,-soname,$name -o "$libraries/$name" "$scratch/empty.c"
done
{
    echo '#include <stdlib.h>'
    for library in cuda nvshmem python cpu; do nm -D --undefined-only "$libraries/libtorch_$library.so"; done \
        | cat - <(nm -D --undefined-only "$libraries/libc10_cuda.so" "$libraries/libtorch.so") \
        | awk 'NF { print $NF }' | sed 's/@.*//' \
        | grep -E '^(nvshmem|cudnn|nccl|cublas|cufft|curand|cusparse|cuFile|cupti|nvJitLink|nvrtc|cusolver)' | sort -u \
        | sed 's/.*/void &(void) { abort(); }/'
} > "$scratch/symbols.c"
gcc -shared -fPIC -Wl,-soname,libnvshmem_host.so.3 -o "$libraries/libnvshmem_host.so.3" "$scratch/symbols.c"

PJRT_DEVICE=CPU CPU_NUM_DEVICES=4 "$environment/bin/python" -c '
import torch, torch_xla, torch_xla.runtime
print("torch", torch.__version__, "torch_xla", torch_xla.__version__, torch_xla.runtime.global_runtime_device_count(), "devices")'
