// CUDA kernels: what happens to a slab of pre-activations between two matrix products.
//
// Every kernel gives one token to one block. The running selection of a token is the best k keys of order.h seen so
// far, descending, with 0 for slots nothing is known for yet. It is exact after every chunk, whatever the chunks hold:
// the shared buffer has room for a whole span, so no input makes it overflow. Plain CUDA C++ without torch or CUB, so
// that the same source also runs on the tests' emulator. Left out: tensor cores; the products are the caller's.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <cstring>

#include "order.h"

namespace qscope {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Columns between two barriers: 16 a thread, four 16-byte loads in flight each.
constexpr int kEach = 16;
constexpr int kSpan = kThreads * kEach;

// Survivors that may wait for those of later spans, so that a launch mostly merges once. At most one a thread.
constexpr int kWaiting = kThreads;
static_assert(kWaiting <= kThreads, "merge_few gives a thread one new key");

constexpr int kMaxK = 1024;
constexpr int kBins = 256;
constexpr int kTile = 256;

static_assert(2 * kBins * sizeof(uint32_t) == kBins * sizeof(uint64_t), "both histograms fit where the kept keys go");

// Dynamic, so that a small k leaves room for more blocks; below 48 KB also at the largest k.
extern __shared__ __align__(16) unsigned char shared_memory[];

QSCOPE_INLINE constexpr int select_kept_room(int k) { return k > kBins ? k : kBins; }

constexpr int select_shared_bytes(int k) {
  return static_cast<int>(sizeof(uint64_t)) * (k + kWaiting + kSpan + select_kept_room(k)) + 16;
}

constexpr int finish_shared_bytes(int k) { return static_cast<int>(sizeof(uint64_t)) * k; }

constexpr int count_above_shared_bytes() {
  return kTile * static_cast<int>(2 * sizeof(uint64_t) + 4 * sizeof(int)) + 16 + 16;
}

static_assert(select_shared_bytes(kMaxK) < 48 * 1024, "more shared memory would need an opt-in at every launch");

__device__ __forceinline__ bool aligned(const void* pointer) {
  return (reinterpret_cast<uintptr_t>(pointer) & 15u) == 0;
}

// An empty slot as a key of its own, below all real keys, whose upper half is never 0. With it the keys at hand are
// distinct and at least k, also while fewer are known.
__device__ __forceinline__ uint64_t filled(uint64_t key, int slot) {
  return key != 0 ? key : static_cast<uint64_t>(slot);
}

__device__ __forceinline__ uint64_t emptied(uint64_t key) { return (key >> 32) != 0 ? key : 0; }

__device__ __forceinline__ int count_greater(const uint64_t* keys, int count, uint64_t key) {
  int above = 0;
#pragma unroll 4
  for (int i = 0; i < count; ++i) above += keys[i] > key;
  return above;
}

__device__ __forceinline__ int count_greater_sorted(const uint64_t* descending, int count, uint64_t key) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (descending[middle] > key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The first of `mine` places that this thread may fill behind `*count`. All lanes of the warp call it together; one
// atomic for all of them, none where nobody asks.
__device__ __forceinline__ int reserve(int mine, int* count) {
  if (!__any_sync(kAllLanes, mine)) return 0;
  const int lane = threadIdx.x % 32;
  int until = mine;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(kAllLanes, until, step);
    if (lane >= step) until += before;
  }
  int base = 0;
  if (lane == 31) base = atomicAdd(count, until);
  return __shfl_sync(kAllLanes, base, 31) + until - mine;
}

__device__ __forceinline__ int column_of(int element) {
  return (element / 4 * kThreads + static_cast<int>(threadIdx.x)) * 4 + element % 4;
}

// Loads this thread's pre-activations of a span of which `left` columns exist; a bit for each that does.
__device__ __forceinline__ uint32_t load_span(const float* slab, const float* bias, int left, bool wide,
                                              float (&values)[kEach]) {
  if (wide && left >= kSpan) {
    float4 fours[kEach / 4];
    // The slab is read once and bypasses L1, where the bias stays for the tokens to come.
#pragma unroll
    for (int q = 0; q < kEach / 4; ++q) fours[q] = __ldcg(reinterpret_cast<const float4*>(slab + column_of(4 * q)));
#pragma unroll
    for (int q = 0; q < kEach / 4; ++q) {
      const float4 add = __ldg(reinterpret_cast<const float4*>(bias + column_of(4 * q)));
      values[4 * q] = fours[q].x + add.x;
      values[4 * q + 1] = fours[q].y + add.y;
      values[4 * q + 2] = fours[q].z + add.z;
      values[4 * q + 3] = fours[q].w + add.w;
    }
    return (1u << kEach) - 1;
  }
  uint32_t present = 0;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int column = column_of(e);
    values[e] = 0.0f;
    if (column < left) {
      values[e] = slab[column] + bias[column];
      present |= 1u << e;
    }
  }
  return present;
}

// The elements of a span that may rank above a key of value `floor`. Equals stay in: their index decides.
__device__ __forceinline__ uint32_t at_least(const float (&values)[kEach], uint32_t present, float floor) {
  uint32_t passed = 0;
#pragma unroll
  for (int e = 0; e < kEach; ++e) passed |= static_cast<uint32_t>(!(values[e] < floor)) << e;
  return passed & present;
}

// A key such that exactly k of the keys are not below it. Radix select from the top digit down; it ends as soon as a
// digit's keys are all needed. `bins` are two histograms of zeros, used by turns so that one can be cleared meanwhile.
__device__ __forceinline__ uint64_t bound_of_best(const uint64_t* keys, int count, int k, uint32_t* bins) {
  const int thread = threadIdx.x, lane = thread % 32;
  uint64_t prefix = 0;
  uint32_t need = k;
  for (int shift = 56;; shift -= 8) {
    uint32_t* mine = bins + (shift / 8 % 2) * kBins;
    uint32_t* next = bins + (shift / 8 % 2 ^ 1) * kBins;
    for (int i = thread; i < count; i += kThreads) {
      const uint64_t key = keys[i];
      // Two shifts: at the top digit one by 64 would be undefined.
      if ((key >> shift >> 8) == prefix) atomicAdd(&mine[(key >> shift) & (kBins - 1)], 1u);
    }
    __syncthreads();
    // Every warp searches for itself, which saves handing the result around.
    constexpr int kBinsEach = kBins / 32;
    const uint32_t* top = mine + (kBins - 1) - lane * kBinsEach;
    uint32_t total = 0;
#pragma unroll
    for (int b = 0; b < kBinsEach; ++b) total += top[-b];
    uint32_t until = total;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t before = __shfl_up_sync(kAllLanes, until, step);
      if (lane >= step) until += before;
    }
    uint32_t above = until - total, size = 0;
    int digit = 0;
    const bool here = above < need && need <= until;
    if (here) {
      for (int b = 0; b < kBinsEach; ++b) {
        size = top[-b];
        digit = kBins - 1 - (lane * kBinsEach + b);
        if (above + size >= need) break;
        above += size;
      }
    }
    const int source = __ffs(__ballot_sync(kAllLanes, here)) - 1;
    need -= __shfl_sync(kAllLanes, above, source);
    size = __shfl_sync(kAllLanes, size, source);
    prefix = prefix << 8 | static_cast<uint32_t>(__shfl_sync(kAllLanes, digit, source));
    if (size == need || shift == 0) return prefix << shift;
    for (int i = thread; i < kBins; i += kThreads) next[i] = 0;
    __syncthreads();
  }
}

// Merges at most one new key a thread into a descending selection: each finds its place by counting.
__device__ __forceinline__ void merge_few(uint64_t* state, int k, uint64_t* pool, int count) {
  const int thread = threadIdx.x;
  const uint64_t* fresh = pool + k;
  for (int i = thread; i < k; i += kThreads) pool[i] = state[i];
  const uint64_t mine = thread < count ? fresh[thread] : 0;
  int place = thread < count ? count_greater(fresh, count, mine) : k;
  __syncthreads();
  for (int i = thread; i < k; i += kThreads) {
    const int moved = i + count_greater(fresh, count, pool[i]);
    if (moved > i && moved < k) state[moved] = pool[i];
  }
  if (place < k) place += count_greater_sorted(pool, k, mine);
  if (place < k) state[place] = mine;
}

// The same for any number of new keys: the best k first, then their order.
__device__ __forceinline__ void merge_many(uint64_t* state, int k, uint64_t* pool, int fresh, uint64_t* kept,
                                           int* kept_count) {
  const int thread = threadIdx.x, count = k + fresh;
  auto* bins = reinterpret_cast<uint32_t*>(kept);
  for (int i = thread; i < k; i += kThreads) pool[i] = filled(state[i], i);
  for (int i = thread; i < 2 * kBins; i += kThreads) bins[i] = 0;
  __syncthreads();
  const uint64_t bound = bound_of_best(pool, count, k, bins);
  if (thread == 0) *kept_count = 0;
  __syncthreads();
  for (int base = 0; base < count; base += kThreads) {
    const int i = base + thread;
    const bool best = i < count && pool[i] >= bound;
    const int place = reserve(best, kept_count);
    if (best) kept[place] = pool[i];
  }
  __syncthreads();
  for (int i = thread; i < k; i += kThreads) state[count_greater(kept, k, kept[i])] = emptied(kept[i]);
}

// Adds a chunk of features to the running selection `keys (rows, k)`. Each feature comes in one chunk only.
__global__ void __launch_bounds__(kThreads, 10)
    select_chunk_kernel(const float* slab, int64_t stride, const float* bias, int columns, uint32_t first,
                        uint64_t* keys, int k) {
  auto* pool = reinterpret_cast<uint64_t*>(shared_memory);
  uint64_t* fresh = pool + k;
  uint64_t* kept = fresh + kWaiting + kSpan;
  auto* count = reinterpret_cast<int*>(kept + select_kept_room(k));
  const float* row = slab + blockIdx.x * stride;
  uint64_t* state = keys + static_cast<int64_t>(blockIdx.x) * k;
  const bool wide = aligned(row) && aligned(bias);

  uint64_t least = state[k - 1];
  if (threadIdx.x == 0) *count = 0;
  __syncthreads();
  bool waiting = false;
  for (int start = 0; start < columns; start += kSpan) {
    float values[kEach];
    const uint32_t present = load_span(row + start, bias + start, columns - start, wide, values);
    // While fewer than k are known the value is NaN, below which nothing is.
    uint32_t passed = at_least(values, present, value_of(least));
    if (passed != 0) {
#pragma unroll
      for (int e = 0; e < kEach; ++e)
        if (key_of(values[e], first + start + column_of(e)) <= least) passed &= ~(1u << e);
    }
    int place = reserve(__popc(passed), count);
    if (passed != 0) {
#pragma unroll
      for (int e = 0; e < kEach; ++e)
        if (passed >> e & 1u) fresh[place++] = key_of(values[e], first + start + column_of(e));
    }
    const bool last = columns - start <= kSpan;
    const bool grew = __syncthreads_or(passed != 0);
    waiting |= grew;
    if (!(last ? waiting : grew)) continue;
    const int found = *count;
    // Nobody may add to the count while others still read it.
    if (!last) __syncthreads();
    if (!last && found <= kWaiting) continue;
    if (found <= kWaiting) {
      merge_few(state, k, pool, found);
    } else {
      merge_many(state, k, pool, found, kept, count);
    }
    if (last) return;
    if (threadIdx.x == 0) *count = 0;
    waiting = false;
    __syncthreads();
    least = state[k - 1];
  }
}

// The best k of each token in their order, rectified: `acts (rows, k)` and `indices (rows, k)`. The keys may come in
// any order here. Slots that were never filled give 0 and index 0.
__global__ void __launch_bounds__(kThreads) finish_kernel(const uint64_t* keys, int k, float* acts, int64_t* indices) {
  auto* mine = reinterpret_cast<uint64_t*>(shared_memory);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * k;
  for (int i = threadIdx.x; i < k; i += kThreads) mine[i] = filled(keys[row + i], i);
  __syncthreads();
  for (int i = threadIdx.x; i < k; i += kThreads) {
    const uint64_t key = mine[i];
    const int64_t place = row + count_greater(mine, k, key);
    const float value = value_of(key);
    const bool known = emptied(key) != 0;
    acts[place] = known && !(value <= 0.0f) ? value : 0.0f;
    indices[place] = known ? index_of(key) : 0;
  }
}

// Counts, for the chosen features of each token, the features of a chunk that rank above them.
//
// `values (rows, chosen)` are their pre-activations, `counts (rows, chosen)` the running counts. A feature is open
// while its count is below k and its value may be positive; only open ones are counted, and a count that reached k may
// stop anywhere. The open ones are sorted, so that a column finds by bisection how many of them it is above and adds
// to one bin. A column never counts for its own feature, whose value may differ in the last bit between two products:
// where it would, the count starts one lower.
__global__ void __launch_bounds__(kThreads, 8)
    count_above_kernel(const float* slab, int64_t stride, const float* bias, int columns, uint32_t first,
                       const float* values, const int64_t* features, int chosen, int32_t* counts, int k) {
  auto* found = reinterpret_cast<uint64_t*>(shared_memory);
  uint64_t* sorted = found + kTile;
  auto* found_slots = reinterpret_cast<int*>(sorted + kTile);
  int* slots = found_slots + kTile;
  int* starts = slots + kTile;
  int* bins = starts + kTile;  // kTile + 1 of them
  int* open_count = bins + kTile + 4;
  int* live_count = open_count + 1;
  const int thread = threadIdx.x;
  const float* row = slab + blockIdx.x * stride;
  const float* row_values = values + static_cast<int64_t>(blockIdx.x) * chosen;
  int32_t* row_counts = counts + static_cast<int64_t>(blockIdx.x) * chosen;
  const bool wide = aligned(row) && aligned(bias);

  for (int tile = 0; tile < chosen; tile += kTile) {
    __syncthreads();
    if (thread == 0) *open_count = 0;
    for (int i = thread; i <= kTile; i += kThreads) bins[i] = 0;
    __syncthreads();
    for (int base = 0; base < kTile; base += kThreads) {
      const int slot = tile + base + thread;
      const bool is_open = slot < chosen && row_counts[slot] < k && !(row_values[slot] <= 0.0f);
      const int place = reserve(is_open, open_count);
      if (is_open) {
        found[place] = key_of(row_values[slot], static_cast<uint32_t>(features[slot]));
        found_slots[place] = slot;
      }
    }
    __syncthreads();
    const int open = *open_count;
    if (open == 0) continue;
    for (int i = thread; i < open; i += kThreads) {
      const uint64_t key = found[i];
      int place = 0;
      // A feature chosen twice has equal keys; their position keeps the places apart.
      for (int j = 0; j < open; ++j) place += found[j] > key || (found[j] == key && j < i);
      const int slot = found_slots[i];
      const int64_t own = features[slot] - static_cast<int64_t>(first);
      int start = row_counts[slot];
      if (own >= 0 && own < columns) start -= key_of(row[own] + bias[own], index_of(key)) > key;
      sorted[place] = key;
      slots[place] = slot;
      starts[place] = start;
    }
    __syncthreads();
    // bins[p] counts the columns that p of the open features rank above or equal.
    const auto total = [&](int place) {
      int sum = starts[place];
      for (int p = 0; p <= place; ++p) sum += bins[p];
      return sum;
    };
    int live = open;
    for (int start = 0; start < columns; start += kSpan) {
      float span[kEach];
      const uint32_t present = load_span(row + start, bias + start, columns - start, wide, span);
      const uint32_t passed = at_least(span, present, value_of(sorted[live - 1]));
      if (passed != 0) {
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          if (!(passed >> e & 1u)) continue;
          const uint64_t key = key_of(span[e], first + start + column_of(e));
          const int place = count_greater_sorted(sorted, live, key - 1);
          if (place < live) atomicAdd(&bins[place], 1);
        }
      }
      if (!__syncthreads_or(passed != 0) || columns - start <= kSpan) continue;
      // The lowest feature that is still open decides what is worth looking at.
      if (thread == 0) *live_count = 0;
      __syncthreads();
      for (int i = thread; i < live; i += kThreads)
        if (total(i) < k) atomicMax(live_count, i + 1);
      __syncthreads();
      live = *live_count;
      if (live == 0) break;
    }
    for (int i = thread; i < open; i += kThreads) row_counts[slots[i]] = total(i);
  }
}

}  // namespace qscope
