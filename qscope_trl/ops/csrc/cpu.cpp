// CPU kernels: what happens to a slab of pre-activations between two matrix products, and sparse sums of rows.
//
// The slab (tokens x features of a chunk) is read once while it is still in cache. Rows of tokens run in parallel on
// torch's threads. Built on torch's stable ABI (2.10 and newer); the hot loops are compiled for several instruction
// sets and chosen when the library is loaded.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "order.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define QSCOPE_X86
#include <immintrin.h>
#define QSCOPE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define QSCOPE_CLONES
#endif

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kBlock = 32;
constexpr int kLanes = 16;

inline float widen(uint16_t bf16) { return qscope::float_of(static_cast<uint32_t>(bf16) << 16); }

inline float element(float value) { return value; }
inline float element(uint16_t value) { return widen(value); }
inline float element(Half value) { return static_cast<float>(value); }

// One bit for each of kBlock sums that passes the floor: is above it, or NaN. Written for each instruction set, since no
// compiler makes a bit mask of a loop; the processor's version is chosen when the library is loaded.
#ifdef QSCOPE_X86
__attribute__((target("avx512f"))) uint32_t passing(const float* slab, const float* bias, float floor) {
  const __m512 limit = _mm512_set1_ps(floor);
  const __m512 low = _mm512_add_ps(_mm512_loadu_ps(slab), _mm512_loadu_ps(bias));
  const __m512 high = _mm512_add_ps(_mm512_loadu_ps(slab + 16), _mm512_loadu_ps(bias + 16));
  return _mm512_cmp_ps_mask(low, limit, _CMP_NLE_UQ) |
         static_cast<uint32_t>(_mm512_cmp_ps_mask(high, limit, _CMP_NLE_UQ)) << 16;
}

__attribute__((target("avx512f"))) inline __m512 widen16(const uint16_t* bf16) {
  const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bf16));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(packed), 16));
}

__attribute__((target("avx512f"))) uint32_t passing(const uint16_t* slab, const float* bias, float floor) {
  const __m512 limit = _mm512_set1_ps(floor);
  const __m512 low = _mm512_add_ps(widen16(slab), _mm512_loadu_ps(bias));
  const __m512 high = _mm512_add_ps(widen16(slab + 16), _mm512_loadu_ps(bias + 16));
  return _mm512_cmp_ps_mask(low, limit, _CMP_NLE_UQ) |
         static_cast<uint32_t>(_mm512_cmp_ps_mask(high, limit, _CMP_NLE_UQ)) << 16;
}

__attribute__((target("avx2"))) uint32_t passing(const float* slab, const float* bias, float floor) {
  const __m256 limit = _mm256_set1_ps(floor);
  uint32_t mask = 0;
  for (int j = 0; j < kBlock; j += 8) {
    const __m256 sum = _mm256_add_ps(_mm256_loadu_ps(slab + j), _mm256_loadu_ps(bias + j));
    mask |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(sum, limit, _CMP_NLE_UQ))) << j;
  }
  return mask;
}

__attribute__((target("avx2"))) uint32_t passing(const uint16_t* slab, const float* bias, float floor) {
  const __m256 limit = _mm256_set1_ps(floor);
  uint32_t mask = 0;
  for (int j = 0; j < kBlock; j += 8) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(slab + j));
    const __m256 wide = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(packed), 16));
    const __m256 sum = _mm256_add_ps(wide, _mm256_loadu_ps(bias + j));
    mask |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(sum, limit, _CMP_NLE_UQ))) << j;
  }
  return mask;
}
#define QSCOPE_DEFAULT __attribute__((target("default")))
#else
#define QSCOPE_DEFAULT
#endif

QSCOPE_DEFAULT uint32_t passing(const float* slab, const float* bias, float floor) {
  uint32_t mask = 0;
  for (int j = 0; j < kBlock; ++j) mask |= static_cast<uint32_t>(!(slab[j] + bias[j] <= floor)) << j;
  return mask;
}

QSCOPE_DEFAULT uint32_t passing(const uint16_t* slab, const float* bias, float floor) {
  uint32_t mask = 0;
  for (int j = 0; j < kBlock; ++j) mask |= static_cast<uint32_t>(!(widen(slab[j]) + bias[j] <= floor)) << j;
  return mask;
}

// Calls accept(column, value) for the elements of a row that are above floor() or NaN. The floor may rise meanwhile: up
// to kBlock elements are then still offered that only passed the old one.
template <class T, class Floor, class Accept>
void scan_row(const T* slab, const float* bias, int64_t columns, Floor floor, Accept accept) {
  int64_t start = 0;
  for (; start + kBlock <= columns; start += kBlock) {
    for (uint32_t mask = passing(slab + start, bias + start, floor()); mask != 0; mask &= mask - 1) {
      const int64_t j = start + __builtin_ctz(mask);
      accept(j, element(slab[j]) + bias[j]);
    }
  }
  for (; start < columns; ++start) {
    const float value = element(slab[start]) + bias[start];
    if (!(value <= floor())) accept(start, value);
  }
}

int64_t keep_best(uint64_t* keys, int64_t count, int64_t k) {
  if (count <= k) return count;
  std::nth_element(keys, keys + (k - 1), keys + count, std::greater<uint64_t>());
  return k;
}

template <class T>
void select_rows(const T* slab, int64_t stride, const float* bias, int64_t rows, int64_t columns, int64_t first,
                 uint64_t* keys, int64_t room, int32_t* counts, uint64_t* floors, int64_t k) {
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      uint64_t* mine = keys + row * room;
      int64_t count = counts[row];
      uint64_t least = floors[row];
      // Before k features are known everything enters, -inf too: no value is below NaN's complement.
      float floor = least ? qscope::value_of(least) : std::nanf("");
      scan_row(
          slab + row * stride, bias, columns, [&] { return floor; },
          [&](int64_t column, float value) {
            const uint64_t key = qscope::key_of(value, static_cast<uint32_t>(first + column));
            if (key <= least) return;
            mine[count++] = key;
            if (count == room) {
              count = keep_best(mine, count, k);
              least = mine[k - 1];
              floor = qscope::value_of(least);
            }
          });
      counts[row] = static_cast<int32_t>(count);
      floors[row] = least;
    }
  });
}

// Adds a chunk of features to the running selection. `keys (T, room)`, `room > k`, holds `counts` keys per token, of
// which the best k stay; `floors` is the k-th best once that many are known, else 0.
void select_chunk(const Tensor slab, const Tensor bias, int64_t first, Tensor keys, Tensor counts, Tensor floors,
                  int64_t k) {
  const int64_t rows = slab.size(0), columns = slab.size(1), stride = slab.stride(0), room = keys.size(1);
  STD_TORCH_CHECK(room > k && columns == bias.size(0) && rows <= keys.size(0), "select_chunk: shapes do not fit");
  auto* key_ptr = static_cast<uint64_t*>(keys.mutable_data_ptr());
  auto* count_ptr = static_cast<int32_t*>(counts.mutable_data_ptr());
  auto* floor_ptr = static_cast<uint64_t*>(floors.mutable_data_ptr());
  const auto* bias_ptr = static_cast<const float*>(bias.const_data_ptr());
  if (slab.scalar_type() == ScalarType::Float) {
    select_rows(static_cast<const float*>(slab.const_data_ptr()), stride, bias_ptr, rows, columns, first, key_ptr,
                room, count_ptr, floor_ptr, k);
  } else {
    STD_TORCH_CHECK(slab.scalar_type() == ScalarType::BFloat16, "select_chunk: the slab is fp32 or bf16");
    select_rows(static_cast<const uint16_t*>(slab.const_data_ptr()), stride, bias_ptr, rows, columns, first, key_ptr,
                room, count_ptr, floor_ptr, k);
  }
}

inline float rectified(float value) { return value > 0.0f || value != value ? value : 0.0f; }

void write_row(uint64_t* keys, int64_t count, int64_t k, float* acts, int64_t* indices) {
  count = keep_best(keys, count, k);
  std::sort(keys, keys + count, std::greater<uint64_t>());
  for (int64_t i = 0; i < count; ++i) {
    acts[i] = rectified(qscope::value_of(keys[i]));
    indices[i] = qscope::index_of(keys[i]);
  }
}

// The best k of each token in their order, rectified: `acts (T, k)` fp32, `indices (T, k)` int64.
void finish(Tensor keys, const Tensor counts, int64_t k, Tensor acts, Tensor indices) {
  const int64_t rows = acts.size(0), room = keys.size(1);
  auto* key_ptr = static_cast<uint64_t*>(keys.mutable_data_ptr());
  const auto* count_ptr = static_cast<const int32_t*>(counts.const_data_ptr());
  auto* act_ptr = static_cast<float*>(acts.mutable_data_ptr());
  auto* index_ptr = static_cast<int64_t*>(indices.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, 8, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      write_row(key_ptr + row * room, count_ptr[row], k, act_ptr + row * k, index_ptr + row * k);
  });
}

// Several accumulators, so that the loop vectorises without reordering a sum the compiler must keep.
template <class A, class B>
__attribute__((always_inline)) inline float dot_loop(const A* a, const B* b, int64_t width) {
  float sums[4 * kLanes] = {};
  int64_t start = 0;
  for (; start + 4 * kLanes <= width; start += 4 * kLanes)
    for (int j = 0; j < 4 * kLanes; ++j) sums[j] += element(a[start + j]) * element(b[start + j]);
  for (int j = 0; start + j < width; ++j) sums[j] += element(a[start + j]) * element(b[start + j]);
  for (int half = 2 * kLanes; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
  return sums[0];
}

QSCOPE_CLONES float dot(const float* a, const float* b, int64_t width) { return dot_loop(a, b, width); }
QSCOPE_CLONES float dot(const float* a, const uint16_t* b, int64_t width) { return dot_loop(a, b, width); }
float dot(const float* a, const Half* b, int64_t width) { return dot_loop(a, b, width); }

QSCOPE_CLONES void add_scaled(float* sum, const float* row, float factor, int64_t width) {
  for (int64_t j = 0; j < width; ++j) sum[j] += factor * row[j];
}
QSCOPE_CLONES void add_scaled(float* sum, const uint16_t* row, float factor, int64_t width) {
  for (int64_t j = 0; j < width; ++j) sum[j] += factor * widen(row[j]);
}
void add_scaled(float* sum, const Half* row, float factor, int64_t width) {
  for (int64_t j = 0; j < width; ++j) sum[j] += factor * element(row[j]);
}

// Asks for a row ahead of its use; the rows of a token's candidates lie anywhere in the matrix.
template <class T>
void fetch(const T* row, int64_t width) {
  for (int64_t j = 0; j < width; j += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + j);
}

// Calls f with the matrix's elements at their type.
template <class F>
void with_elements(const Tensor& matrix, F f) {
  const void* data = matrix.const_data_ptr();
  switch (matrix.scalar_type()) {
    case ScalarType::Float: return f(static_cast<const float*>(data));
    case ScalarType::BFloat16: return f(static_cast<const uint16_t*>(data));
    case ScalarType::Half: return f(static_cast<const Half*>(data));
    default: STD_TORCH_CHECK(false, "the matrix is fp32, bf16 or fp16");
  }
}

// Exact values of the kept candidates of a coarse selection, the best k of them, and whether that is certain.
//
// The coarse product is off by at most `error` times its own size. A feature that was not kept is coarsely at most the
// least kept one, v, so its exact value is at most v + error * max(v - bias_min, bias_max - v). If the k-th exact value
// is above that, nothing was missed: `certain` is set. Otherwise, also where anything is NaN or infinite, it is not.
void rescore(const Tensor x, const Tensor W, const Tensor bias, double bias_min, double bias_max, double error,
             Tensor keys, const Tensor counts, int64_t kept, int64_t k, Tensor acts, Tensor indices, Tensor certain) {
  const int64_t rows = acts.size(0), room = keys.size(1), width = x.size(1), features = W.size(0);
  STD_TORCH_CHECK(x.is_contiguous() && W.is_contiguous() && W.size(1) == width, "rescore: shapes do not fit");
  auto* key_ptr = static_cast<uint64_t*>(keys.mutable_data_ptr());
  const auto* count_ptr = static_cast<const int32_t*>(counts.const_data_ptr());
  const auto* bias_ptr = static_cast<const float*>(bias.const_data_ptr());
  auto* act_ptr = static_cast<float*>(acts.mutable_data_ptr());
  auto* index_ptr = static_cast<int64_t*>(indices.mutable_data_ptr());
  auto* certain_ptr = static_cast<bool*>(certain.mutable_data_ptr());
  const auto* x_ptr = static_cast<const uint16_t*>(x.const_data_ptr());
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "rescore: x is bf16");
  with_elements(W, [&](const auto* rows_of_W) {
    torch::stable::parallel_for(0, rows, 4, [&](int64_t begin, int64_t end) {
      std::vector<float> wide(width);
      for (int64_t row = begin; row < end; ++row) {
        uint64_t* mine = key_ptr + row * room;
        const auto margin = [&](double v) { return error * std::max(v - bias_min, bias_max - v); };
        int64_t count = keep_best(mine, count_ptr[row], kept);
        const bool is_all = count == features;
        const double least = qscope::value_of(*std::min_element(mine, mine + count));
        // What cannot reach the k-th candidate even at the far ends of both errors needs no exact value.
        std::nth_element(mine, mine + (k - 1), mine + count, std::greater<uint64_t>());
        const double kth_coarse = qscope::value_of(mine[k - 1]), low = kth_coarse - margin(kth_coarse);
        count = std::partition(mine + k, mine + count, [&](uint64_t key) {
                  const double v = qscope::value_of(key);
                  return !(v + margin(v) < low);
                }) - mine;
        for (int64_t j = 0; j < width; ++j) wide[j] = widen(x_ptr[row * width + j]);
        for (int64_t i = 0; i < count; ++i) {
          const uint32_t index = qscope::index_of(mine[i]);
          if (i + 1 < count) fetch(rows_of_W + qscope::index_of(mine[i + 1]) * width, width);
          const float value = dot(wide.data(), rows_of_W + index * width, width) + bias_ptr[index];
          mine[i] = qscope::key_of(value, index);
        }
        write_row(mine, count, k, act_ptr + row * k, index_ptr + row * k);
        const double kth = qscope::value_of(mine[k - 1]);
        certain_ptr[row] = std::isfinite(kth) && std::isfinite(least) && (is_all || least + margin(least) < kth);
      }
    });
  });
}

// Counts, for the chosen features of each token, the features of a chunk that rank above them.
//
// `values (T, S)` are their pre-activations, `counts (T, S)` int32 the running counts. A feature is decided once its
// count reaches k or if its value is not positive; decided ones are left alone, so their counts are lower bounds.
void count_above(const Tensor slab, const Tensor bias, int64_t first, const Tensor values, const Tensor features,
                 Tensor counts, int64_t k) {
  const int64_t rows = slab.size(0), columns = slab.size(1), stride = slab.stride(0), chosen = features.size(0);
  STD_TORCH_CHECK(slab.scalar_type() == ScalarType::Float, "count_above: the slab is fp32");
  STD_TORCH_CHECK(columns == bias.size(0) && rows <= values.size(0), "count_above: shapes do not fit");
  const auto* slab_ptr = static_cast<const float*>(slab.const_data_ptr());
  const auto* bias_ptr = static_cast<const float*>(bias.const_data_ptr());
  const auto* value_ptr = static_cast<const float*>(values.const_data_ptr());
  const auto* feature_ptr = static_cast<const int64_t*>(features.const_data_ptr());
  auto* count_ptr = static_cast<int32_t*>(counts.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> keys(chosen);
    for (int64_t row = begin; row < end; ++row) {
      int32_t* mine = count_ptr + row * chosen;
      for (int64_t s = 0; s < chosen; ++s)
        keys[s] = qscope::key_of(value_ptr[row * chosen + s], static_cast<uint32_t>(feature_ptr[s]));
      // The lowest feature that is still open decides what is worth looking at; one ulp lower, since equals count too.
      float floor = 0.0f;
      const auto settle = [&] {
        uint64_t least = ~0ull;
        for (int64_t s = 0; s < chosen; ++s)
          if (mine[s] < k && !(value_ptr[row * chosen + s] <= 0.0f)) least = std::min(least, keys[s]);
        floor = least == ~0ull ? INFINITY : std::nextafter(qscope::value_of(least), -INFINITY);
        return least != ~0ull;
      };
      if (!settle()) continue;
      bool open = true;
      scan_row(
          slab_ptr + row * stride, bias_ptr, columns, [&] { return floor; },
          [&](int64_t column, float value) {
            if (!open) return;
            const auto index = static_cast<uint32_t>(first + column);
            const uint64_t key = qscope::key_of(value, index);
            bool decided = false;
            for (int64_t s = 0; s < chosen; ++s) {
              if (mine[s] >= k || key <= keys[s] || index == static_cast<uint32_t>(feature_ptr[s])) continue;
              decided |= ++mine[s] == k;
            }
            if (decided) open = settle();
          });
    }
  });
}

// out[t] = sum_i weights[t, i] * W[indices[t, i]], zero weights skipped. fp32 sums, whatever W holds.
void gather_sum(const Tensor weights, const Tensor indices, const Tensor W, Tensor out) {
  const int64_t rows = weights.size(0), k = weights.size(1), width = W.size(1), features = W.size(0);
  STD_TORCH_CHECK(W.is_contiguous() && out.is_contiguous(), "gather_sum: W and out are contiguous");
  const auto* weight_ptr = static_cast<const float*>(weights.const_data_ptr());
  const auto* index_ptr = static_cast<const int64_t*>(indices.const_data_ptr());
  auto* out_ptr = static_cast<float*>(out.mutable_data_ptr());
  std::atomic<bool> outside{false};
  with_elements(W, [&](const auto* rows_of_W) {
    torch::stable::parallel_for(0, rows, 4, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        float* sum = out_ptr + row * width;
        std::fill(sum, sum + width, 0.0f);
        for (int64_t i = row * k; i < (row + 1) * k; ++i) {
          if (weight_ptr[i] == 0.0f) continue;
          if (index_ptr[i] < 0 || index_ptr[i] >= features) {
            outside = true;
            continue;
          }
          add_scaled(sum, rows_of_W + index_ptr[i] * width, weight_ptr[i], width);
        }
      }
    });
  });
  STD_TORCH_CHECK(!outside, "gather_sum: an index is outside the matrix");
}

bool has_bf16_units() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY(qscope_trl_cpu, m) {
  m.def("select_chunk(Tensor slab, Tensor bias, int first, Tensor(a!) keys, Tensor(b!) counts, Tensor(c!) floors, "
        "int k) -> ()");
  m.def("finish(Tensor(a!) keys, Tensor counts, int k, Tensor(b!) acts, Tensor(c!) indices) -> ()");
  m.def("rescore(Tensor x, Tensor W, Tensor bias, float bias_min, float bias_max, float error, Tensor(a!) keys, "
        "Tensor counts, int kept, int k, Tensor(b!) acts, Tensor(c!) indices, Tensor(d!) certain) -> ()");
  m.def("count_above(Tensor slab, Tensor bias, int first, Tensor values, Tensor features, Tensor(a!) counts, int k) "
        "-> ()");
  m.def("gather_sum(Tensor weights, Tensor indices, Tensor W, Tensor(a!) out) -> ()");
  m.def("has_bf16_units() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(qscope_trl_cpu, CPU, m) {
  m.impl("select_chunk", TORCH_BOX(&select_chunk));
  m.impl("finish", TORCH_BOX(&finish));
  m.impl("rescore", TORCH_BOX(&rescore));
  m.impl("count_above", TORCH_BOX(&count_above));
  m.impl("gather_sum", TORCH_BOX(&gather_sum));
}

STABLE_TORCH_LIBRARY_IMPL(qscope_trl_cpu, CompositeExplicitAutograd, m) {
  m.impl("has_bf16_units", TORCH_BOX(&has_bf16_units));
}
