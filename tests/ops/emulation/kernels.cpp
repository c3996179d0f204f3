// The CUDA kernels behind plain C functions, run by the emulator; and a few faulty ones, to know that it tells.
//
// Every function returns whether the launch was well-defined; emulation_error() says what was not.
#include "cuda_on_cpu.h"

#include "../../../qscope_trl/ops/csrc/gather_sum.cuh"
#include "../../../qscope_trl/ops/csrc/kernels.cuh"

namespace qscope {

unsigned char shared_memory[cuda_on_cpu::kSharedRoom];

}  // namespace qscope

namespace {

using cuda_on_cpu::launch;

const bool placed = [] {
  cuda_on_cpu::shared_begin = qscope::shared_memory;
  return true;
}();

dim3 one_each(int64_t rows) { return {static_cast<unsigned>(rows), 1, 1}; }

template <class T>
bool gather_sum(int64_t rows, const float* weights, const int64_t* indices, int k, const void* W, int64_t width,
                float* out, uint64_t seed) {
  const int64_t tile = qscope::gather_sum_tile(sizeof(T));
  const dim3 grid{static_cast<unsigned>(rows), static_cast<unsigned>((width + tile - 1) / tile), 1};
  return launch(grid, qscope::kThreads, qscope::gather_sum_shared_bytes(), seed, [=] {
    qscope::gather_sum_kernel<T>(weights, indices, k, static_cast<const T*>(W), width, out);
  });
}

void faulty(int which, int* out) {
  auto* shared = reinterpret_cast<int*>(qscope::shared_memory);
  const int thread = threadIdx.x;
  switch (which) {
    case 0:  // an exited thread
      if (thread == 5) return;
      __syncthreads();
      break;
    case 1:  // two barriers for one
      if (thread < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case 2:  // half a warp
      if (thread % 32 < 16) (void)__any_sync(0xFFFFFFFFu, 1);
      break;
    case 3:  // past the end
      shared[32] = 1;
      break;
    case 4:  // no barrier between the writer and its readers
      if (thread == 64) shared[0] = 7;
      out[thread] = shared[0];
      break;
    default:  // never written
      out[thread] = shared[0];
  }
}

}  // namespace

extern "C" {

const char* emulation_error() { return cuda_on_cpu::machine.error.c_str(); }

bool emulate_faulty(int which, int* out, uint64_t seed) {
  return launch(one_each(1), 128, 128, seed, [=] { faulty(which, out); });
}

bool emulate_select_chunk(const float* slab, int64_t rows, int64_t stride, const float* bias, int columns,
                          uint32_t first, uint64_t* keys, int k, uint64_t seed) {
  return launch(one_each(rows), qscope::kThreads, qscope::select_shared_bytes(k), seed, [=] {
    qscope::select_chunk_kernel(slab, stride, bias, columns, first, keys, k);
  });
}

bool emulate_finish(const uint64_t* keys, int64_t rows, int k, float* acts, int64_t* indices, uint64_t seed) {
  return launch(one_each(rows), qscope::kThreads, qscope::finish_shared_bytes(k), seed,
                [=] { qscope::finish_kernel(keys, k, acts, indices); });
}

bool emulate_count_above(const float* slab, int64_t rows, int64_t stride, const float* bias, int columns,
                         uint32_t first, const float* values, const int64_t* features, int chosen, int32_t* counts,
                         int k, uint64_t seed) {
  return launch(one_each(rows), qscope::kThreads, qscope::count_above_shared_bytes(), seed, [=] {
    qscope::count_above_kernel(slab, stride, bias, columns, first, values, features, chosen, counts, k);
  });
}

// `type` is 0 for fp32, 1 for bf16, 2 for fp16.
bool emulate_gather_sum(const float* weights, int64_t rows, const int64_t* indices, int k, const void* W, int type,
                        int64_t width, float* out, uint64_t seed) {
  if (type == 0) return gather_sum<float>(rows, weights, indices, k, W, width, out, seed);
  if (type == 1) return gather_sum<__nv_bfloat16>(rows, weights, indices, k, W, width, out, seed);
  return gather_sum<__half>(rows, weights, indices, k, W, width, out, seed);
}
}
