
python3 list.py "$@"
nvcc -std=c++20 -O2 -gencode=arch=compute_90a,code=sm_90a -diag-suppress 177 -I../../csrc main.cu $(for x in "$@"; do echo $x.o; done) -cudart static -o pairs -ldl
