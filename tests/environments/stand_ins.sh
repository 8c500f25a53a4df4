#!/usr/bin/env bash
# Makes stand-ins for the CUDA libraries that torch is linked against and never calls on a machine without accelerators:
# 5 GB that needn't be installed. Each is empty, but for one that has every symbol which the others lack.
#     tests/environments/stand_ins.sh ENVIRONMENT
set -euo pipefail
environment=$1

for tool in gcc nm ldd; do
    command -v "$tool" > /dev/null || { echo "A lean torch needs $tool (Debian: apt-get install gcc binutils)." >&2; exit 1; }
done

libraries=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib") + "/torch/lib")')
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

missing() {
    for library in "$libraries"/libc10_cuda.so "$libraries"/libtorch*.so; do ldd "$library"; done \
        | awk '/not found/ { print $1 }' | sort -u
}

missing > "$scratch/missing"
nm -D --undefined-only "$libraries"/libc10_cuda.so "$libraries"/libtorch*.so | awk 'NF == 2 { print $2 }' | sed 's/@.*//' \
    | grep -E '^(nvshmem|cudnn|nccl|cublas|cufft|curand|cusparse|cuFile|cupti|nvJitLink|nvrtc|cusolver)' | sort -u \
    | sed 's/.*/void &(void) { abort(); }/' | cat <(echo '#include <stdlib.h>') - > "$scratch/symbols.c"
touch "$scratch/empty.c"
while read -r name; do
    source=empty
    case $name in libnvshmem_host.*) source=symbols ;; esac
    gcc -w -shared -fPIC -Wl,-soname,"$name" -o "$libraries/$name" "$scratch/$source.c"
done < "$scratch/missing"
[ -z "$(missing)" ] || { echo "torch in $environment still lacks $(missing)." >&2; exit 1; }
