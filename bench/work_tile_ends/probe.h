static __device__ unsigned long long vsa_probe_sums[16];
