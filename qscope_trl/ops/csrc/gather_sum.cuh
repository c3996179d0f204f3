// CUDA kernel: weighted sums of chosen rows of a matrix, one token a block; in a fixed order and without atomics.
#pragma once

#include "kernels.cuh"

namespace qscope {

constexpr int gather_sum_shared_bytes() {
  return kThreads * static_cast<int>(sizeof(int64_t) + sizeof(float)) + kWarps * static_cast<int>(sizeof(int));
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

constexpr int gather_sum_tile(int element_size) { return kThreads * (16 / element_size); }

// out[t] = sum_i weights[t, i] * W[indices[t, i]] in the order of i, zero weights skipped. Sums
// are fp32, whatever W holds. The grid is tokens x tiles of gather_sum_tile columns.
template <class T>
__global__ void __launch_bounds__(kThreads, 8)
    gather_sum_kernel(const float* weights, const int64_t* indices, int k, const T* W, int64_t width, float* out) {
  constexpr int kPer = 16 / static_cast<int>(sizeof(T)), kAhead = 8;
  auto* offsets = reinterpret_cast<int64_t*>(shared_memory);
  auto* factors = reinterpret_cast<float*>(offsets + kThreads);
  auto* warp_counts = reinterpret_cast<int*>(factors + kThreads);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t token = blockIdx.x;
  const bool wide = aligned(W) && aligned(out) && width % kPer == 0;
  // A thread takes neighbours where one load fetches them, else columns a block apart, so that a warp's loads are one.
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kThreads * kPer + (wide ? thread * kPer : thread);

  float sums[kPer] = {};
  for (int base = 0; base < k; base += kThreads) {
    const int i = base + thread;
    const float weight = i < k ? weights[token * k + i] : 0.0f;
    const bool counts = weight != 0.0f;
    const unsigned lanes = __ballot_sync(kAllLanes, counts);
    if (lane == 0) warp_counts[warp] = __popc(lanes);
    __syncthreads();
    int place = __popc(lanes & ((1u << lane) - 1)), total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) place += warp_counts[w];
      total += warp_counts[w];
    }
    if (counts) {
      offsets[place] = indices[token * k + i] * width;
      factors[place] = weight;
    }
    __syncthreads();
    if (wide && column < width) {
      const auto load = [&](int j) { return __ldg(reinterpret_cast<const uint4*>(W + offsets[j] + column)); };
      const auto add = [&](uint4 raw, float factor) {
        T elements[kPer];
        memcpy(elements, &raw, sizeof raw);
#pragma unroll
        for (int e = 0; e < kPer; ++e) sums[e] = fmaf(factor, to_float(elements[e]), sums[e]);
      };
      int j = 0;
      for (; j + kAhead <= total; j += kAhead) {
        uint4 raws[kAhead];
#pragma unroll
        for (int a = 0; a < kAhead; ++a) raws[a] = load(j + a);
#pragma unroll
        for (int a = 0; a < kAhead; ++a) add(raws[a], factors[j + a]);
      }
      for (; j < total; ++j) add(load(j), factors[j]);
    } else if (!wide) {
      for (int j = 0; j < total; ++j) {
#pragma unroll
        for (int e = 0; e < kPer; ++e) {
          const int64_t at = column + e * kThreads;
          if (at < width) sums[e] = fmaf(factors[j], to_float(W[offsets[j] + at]), sums[e]);
        }
      }
    }
  }
  float* sum = out + token * width + column;
  if (wide) {
    if (column >= width) return;
#pragma unroll
    for (int e = 0; e < kPer; e += 4)
      *reinterpret_cast<float4*>(sum + e) = make_float4(sums[e], sums[e + 1], sums[e + 2], sums[e + 3]);
  } else {
#pragma unroll
    for (int e = 0; e < kPer; ++e)
      if (column + e * kThreads < width) sum[e * kThreads] = sums[e];
  }
}

}  // namespace qscope
