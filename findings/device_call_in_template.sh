#!/usr/bin/env bash
# nvcc 13.0.88 (wheels of PyPI). A host function that calls a __device__ function is an error, but
# not where the host function is a template and the callee depends on its argument: then nvcc says
# nothing, with -Werror all-warnings too, and compiles the callee for the host as a call of exit(1).
# The program ends there with code 1, without a message, a signal or a CUDA error; from Python it is
# the interpreter that ends. No GPU is needed to see it.
# Seen: the plain call is refused; the template compiles, prints "before" and ends with code 1.
# The symbol "exit" among the undefined ones of an object file tells it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 \
  nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
root=$(echo "$folder"/env/lib/python3*/site-packages/nvidia/cu13)
program() {
  cat <<CUDA
#include <cstdio>
struct Kernel { __device__ static int blocks(int tiles) { return (tiles + 3) / 4; } };
$1
int blocks_of(int tiles) { return Kernel::blocks(tiles); }
int main() {
  std::puts("before");
  std::fflush(stdout);
  std::printf("%d blocks\n", blocks_of$2(10));
}
CUDA
}
compile() {
  "$root/bin/nvcc" -std=c++20 -arch=sm_90 -Werror all-warnings -I "$root/include" \
    -L "$root/lib" "$folder/$1.cu" -o "$folder/$1" 2>&1
}
program "" "" > "$folder/plain.cu"
program "template <class Kernel>" "<Kernel>" > "$folder/template.cu"
"$root/bin/nvcc" --version | grep release
if said=$(compile plain); then refused=0; else refused=1; fi
grep -m1 "is not allowed" <<< "$said" || refused=0
compile template
code=0
out=$("$folder/template") || code=$?
echo "plain call refused: $refused; template: printed '$out', ended with code $code"
[[ $refused == 1 && $out == before && $code == 1 ]] || { echo "the behaviour has changed"; exit 1; }
