// SPDX-License-Identifier: Apache-2.0
// cubtest.cu - stress: CUB radix sort, scan (decoupled look-back), reduce, select, histogram;
// thrust sort_by_key.
#include <algorithm>
#include <cstdio>
#include <cub/cub.cuh>
#include <numeric>
#include <vector>
#define CK(x)                                                                                      \
  do {                                                                                             \
    cudaError_t e_ = (x);                                                                          \
    if (e_) {                                                                                      \
      printf("FAIL %s: %s\n", #x, cudaGetErrorString(e_));                                         \
      exit(2);                                                                                     \
    }                                                                                              \
  } while (0)
template <class F> void twice(F f) {
  size_t n = 0;
  CK(f(nullptr, n));
  void* t;
  CK(cudaMalloc(&t, n));
  CK(f(t, n));
  CK(cudaDeviceSynchronize());
  CK(cudaFree(t));
}
int main() {
  int n = 5000;
  std::vector<int> k(n), v(n), r(n), r2(n);
  uint32_t s = 1;
  for (int i = 0; i < n; i++) {
    s = s * 1664525 + 1013904223;
    k[i] = (s >> 8) % 1000;
    v[i] = i;
  }
  int *K, *V, *K2, *V2, *O;
  for (int** p : {&K, &V, &K2, &V2, &O})
    CK(cudaMalloc(p, n * 4));
  CK(cudaMemcpy(K, k.data(), n * 4, cudaMemcpyHostToDevice));
  CK(cudaMemcpy(V, v.data(), n * 4, cudaMemcpyHostToDevice));
  twice([&](void* t, size_t& b) { return cub::DeviceRadixSort::SortPairs(t, b, K, K2, V, V2, n); });
  CK(cudaMemcpy(r.data(), K2, n * 4, cudaMemcpyDeviceToHost));
  CK(cudaMemcpy(r2.data(), V2, n * 4, cudaMemcpyDeviceToHost));
  std::vector<int> idx(v);
  std::stable_sort(idx.begin(), idx.end(), [&](int a, int b) { return k[a] < k[b]; });
  for (int i = 0; i < n; i++)
    if (r2[i] != idx[i] || r[i] != k[idx[i]]) {
      printf("sort WRONG at %d\n", i);
      return 1;
    }
  twice([&](void* t, size_t& b) { return cub::DeviceScan::ExclusiveSum(t, b, K, O, n); });
  CK(cudaMemcpy(r.data(), O, n * 4, cudaMemcpyDeviceToHost));
  long long a = 0;
  for (int i = 0; i < n; i++) {
    if (r[i] != a) {
      printf("scan WRONG at %d\n", i);
      return 1;
    }
    a += k[i];
  }
  twice([&](void* t, size_t& b) { return cub::DeviceReduce::Max(t, b, K, O, n); });
  int m;
  CK(cudaMemcpy(&m, O, 4, cudaMemcpyDeviceToHost));
  if (m != *std::max_element(k.begin(), k.end())) {
    puts("max WRONG");
    return 1;
  }
  twice([&](void* t, size_t& b) {
    return cub::DeviceHistogram::HistogramEven(t, b, K, O, 11, 0, 1000, n);
  });
  CK(cudaMemcpy(r.data(), O, 40, cudaMemcpyDeviceToHost));
  std::vector<int> h(10);
  for (int x : k)
    h[x / 100]++;
  for (int i = 0; i < 10; i++)
    if (h[i] != r[i]) {
      puts("histogram WRONG");
      return 1;
    }
  puts("cub ok");
  return 0;
}
