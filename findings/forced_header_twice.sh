#!/usr/bin/env bash
# nvcc 13.0.88 (wheels of PyPI). A header that is forced into a file by -Xcompiler -include,HEADER
# is there twice: nvcc preprocesses the file with it, and gives the option to the host's compiler
# once more with the result, where the header's guard is no longer defined. A header that defines
# anything ends in "redefinition". nvcc's own -include, and g++ with the option twice, are right.
# SpargeAttention builds with -Xcompiler -include,cassert, "to fix errors with newer toolkits":
# <cassert> declares alone up to GCC 11, and defines functions from GCC 12 on, where no file of it
# can be compiled any more. No GPU is needed to see it; g++ must be there.
# Seen: the program compiles with -include; with -Xcompiler -include it does not, nor does <cassert>
# with GCC 12 or later.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 \
  nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
root=$(echo "$folder"/env/lib/python3*/site-packages/nvidia/cu13)
cd "$folder"
cat >once.h <<'HEADER'
#ifndef ONCE_H
#define ONCE_H
inline int once() { return 1; }
#endif
HEADER
echo 'int main() { return once(); }' >program.cu
echo '__global__ void kernel(const int *x) { assert(*x == 0); }' >kernel.cu
compile() {
  "$root/bin/nvcc" -arch=sm_90 -I. -I "$root/include" -c "$@" -o out.o >said 2>&1
}
refused() {
  if compile "$@"; then
    echo "it has changed: nvcc ${*:2} compiles $1" >&2
    exit 1
  fi
  grep -m1 "redefinition of" said
}
g++ -x c++ -I. -include once.h -include once.h -c program.cu -o out.o
echo "g++ twice: compiles"
compile program.cu -include once.h
compile kernel.cu -include cassert
echo "nvcc -include: compiles"
seen=$(refused program.cu -Xcompiler -include,once.h)
echo "nvcc -Xcompiler -include: $seen"
if [[ $(g++ -dumpversion | cut -d. -f1) -ge 12 ]]; then
  seen=$(refused kernel.cu -Xcompiler -include,cassert)
  echo "nvcc -Xcompiler -include,cassert: $seen"
fi
