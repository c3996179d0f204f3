// The part of CUDA that the kernels use, on a CPU: include this before their source and they run under g++.
//
// The threads of a block are fibers of one OS thread. A seed decides which one runs next, also at atomics and cached
// loads, so that a missing barrier shows as a wrong result under some seed. What would hang or be undefined on a GPU
// is an error here: threads at different barriers, a barrier that an exited thread never reaches, a partial warp,
// writing past the shared memory that was asked for. Shared memory starts as 0xFF bytes. Left out: memory ordering
// weaker than the order of execution, and more than one block at a time.
#pragma once

#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
  float size;
  if (exponent == 31) {
    size = mantissa ? NAN : INFINITY;
  } else {
    size = exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(static_cast<float>(mantissa), -24);
  }
  return value.bits & 0x8000 ? -size : size;
}

namespace cuda_on_cpu {

constexpr int kMostThreads = 256;
constexpr int kWarp = 32;
constexpr size_t kStack = 64 * 1024;
constexpr size_t kSharedRoom = 64 * 1024;
constexpr unsigned char kPoison = 0xFF, kGuard = 0xA5;

enum class Wait { none, block, any, ballot, shuffle, shuffle_up };

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  std::vector<char> stack;
  uint3 thread;
  bool started, exited;
  Wait wait;
  int line, operand;
  uint64_t value;
};

struct Machine {
  Fiber fibers[kMostThreads];
  Fiber* current = nullptr;
  int threads = 0;
  uint3 block{};
  dim3 grid, dim;
  jmp_buf scheduler;
  std::function<void()> body;
  std::string error;
  uint64_t seed = 0, random = 0;
  int at_barrier = 0, at_warp[kMostThreads / kWarp] = {};
  uint64_t ready[kMostThreads / 64] = {};
  int last = 0;
};

inline Machine machine;

// kSharedRoom bytes. Whoever includes the kernels defines them, in the namespace where those declare them.
inline unsigned char* shared_begin = nullptr;

inline uint64_t draw() {
  machine.random ^= machine.random << 13;
  machine.random ^= machine.random >> 7;
  machine.random ^= machine.random << 17;
  return machine.random;
}

inline int order() { return static_cast<int>(machine.seed % 4); }

inline void set_ready(int id, bool value) {
  const uint64_t bit = 1ull << (id % 64);
  if (value) {
    machine.ready[id / 64] |= bit;
  } else {
    machine.ready[id / 64] &= ~bit;
  }
}

inline bool is_ready(int id) { return machine.ready[id / 64] >> (id % 64) & 1; }

// The next fiber to run, -1 if none can: by seed the lowest first, the highest first, any, or one warp as far as it
// goes before any other.
inline int pick() {
  const int threads = machine.threads;
  if (order() == 0) {
    for (int id = 0; id < threads; ++id)
      if (is_ready(id)) return id;
    return -1;
  }
  if (order() == 1) {
    for (int id = threads - 1; id >= 0; --id)
      if (is_ready(id)) return id;
    return -1;
  }
  if (order() == 3) {
    const int warp = machine.last / kWarp * kWarp, offset = static_cast<int>(draw() % kWarp);
    for (int i = 0; i < kWarp; ++i)
      if (is_ready(warp + (offset + i) % kWarp)) return warp + (offset + i) % kWarp;
  }
  const int offset = static_cast<int>(draw() % threads);
  for (int i = 0; i < threads; ++i)
    if (is_ready((offset + i) % threads)) return (offset + i) % threads;
  return -1;
}

__attribute__((noinline)) inline void leave() {
  if (_setjmp(machine.current->resume) == 0) _longjmp(machine.scheduler, 1);
}

[[noreturn]] inline void fail(const std::string& message) {
  if (machine.error.empty()) machine.error = message;
  _longjmp(machine.scheduler, 1);
}

inline void enter() {
  machine.body();
  machine.current->exited = true;
  _longjmp(machine.scheduler, 1);
}

inline void maybe_yield() {
  if (order() >= 2 && draw() % 4 == 0) leave();
}

// Waits at one line of the source until all that must be there are, and returns what the collective gives this thread.
inline uint64_t wait(Wait kind, int line, uint64_t value, int operand) {
  Fiber& self = *machine.current;
  self.wait = kind;
  self.line = line;
  self.value = value;
  self.operand = operand;
  leave();
  return machine.current->value;
}

inline void check_same(int first, int count) {
  for (int id = first; id < first + count; ++id) {
    const Fiber &one = machine.fibers[first], &other = machine.fibers[id];
    if (one.wait == other.wait && one.line == other.line) continue;
    fail("divergence: thread " + std::to_string(first) + " waits at line " + std::to_string(one.line) + ", thread " +
         std::to_string(id) + " at line " + std::to_string(other.line));
  }
}

inline void release(int first, int count, const uint64_t* results) {
  for (int i = 0; i < count; ++i) {
    machine.fibers[first + i].wait = Wait::none;
    machine.fibers[first + i].value = results[i];
    set_ready(first + i, true);
  }
}

inline void meet_block() {
  check_same(0, machine.threads);
  uint64_t results[kMostThreads], any = 0;
  for (int id = 0; id < machine.threads; ++id) any |= machine.fibers[id].value;
  for (int id = 0; id < machine.threads; ++id) results[id] = any;
  machine.at_barrier = 0;
  release(0, machine.threads, results);
}

inline void meet_warp(int first) {
  check_same(first, kWarp);
  const Fiber* lanes = machine.fibers + first;
  uint64_t results[kWarp], ballot = 0;
  for (int lane = 0; lane < kWarp; ++lane) ballot |= static_cast<uint64_t>(lanes[lane].value != 0) << lane;
  for (int lane = 0; lane < kWarp; ++lane) {
    const int operand = lanes[lane].operand;
    switch (lanes[lane].wait) {
      case Wait::any: results[lane] = ballot != 0; break;
      case Wait::ballot: results[lane] = ballot; break;
      case Wait::shuffle: results[lane] = lanes[operand % kWarp].value; break;
      default: results[lane] = lanes[lane < operand ? lane : lane - operand].value; break;
    }
  }
  machine.at_warp[first / kWarp] = 0;
  release(first, kWarp, results);
}

inline void describe_hang() {
  std::string text = "hang:";
  for (int id = 0; id < machine.threads; ++id) {
    const Fiber& fiber = machine.fibers[id];
    const Fiber& before = machine.fibers[id > 0 ? id - 1 : 0];
    if (id > 0 && fiber.exited == before.exited && (fiber.exited || fiber.line == before.line)) continue;
    text += " from thread " + std::to_string(id);
    text += fiber.exited ? " exited" : " at line " + std::to_string(fiber.line);
  }
  machine.error = text;
}

// Runs until every thread has exited or an error stands.
inline void schedule() {
  machine.at_barrier = 0;
  std::memset(machine.at_warp, 0, sizeof machine.at_warp);
  std::memset(machine.ready, 0, sizeof machine.ready);
  // Not in registers, which longjmp would put back.
  static int exited, id;
  exited = 0;
  for (int i = 0; i < machine.threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.started = fiber.exited = false;
    fiber.wait = Wait::none;
    fiber.thread = {static_cast<unsigned>(i), 0, 0};
    set_ready(i, true);
  }
  while (exited < machine.threads) {
    id = pick();
    if (id < 0) return describe_hang();
    machine.last = id;
    Fiber& next = machine.fibers[id];
    machine.current = &next;
    if (_setjmp(machine.scheduler) == 0) {
      if (next.started) _longjmp(next.resume, 1);
      next.started = true;
      next.stack.resize(kStack);
      getcontext(&next.start);
      next.start.uc_stack.ss_sp = next.stack.data();
      next.start.uc_stack.ss_size = kStack;
      next.start.uc_link = nullptr;
      makecontext(&next.start, reinterpret_cast<void (*)()>(enter), 0);
      setcontext(&next.start);
    }
    if (!machine.error.empty()) return;
    Fiber& back = machine.fibers[id];
    if (back.exited) {
      ++exited;
      set_ready(id, false);
    } else if (back.wait != Wait::none) {
      set_ready(id, false);
      if (back.wait == Wait::block) {
        if (++machine.at_barrier == machine.threads) meet_block();
      } else if (++machine.at_warp[id / kWarp] == kWarp) {
        meet_warp(id / kWarp * kWarp);
      }
    }
    if (!machine.error.empty()) return;
  }
}

// Launches body() for every thread of the grid; false with machine.error set where it would not be well-defined.
inline bool launch(dim3 grid, int threads, int shared_bytes, uint64_t seed, std::function<void()> body) {
  machine.error.clear();
  machine.grid = grid;
  machine.dim = {static_cast<unsigned>(threads), 1, 1};
  machine.threads = threads;
  machine.body = std::move(body);
  machine.seed = seed;
  if (threads % kWarp != 0 || threads > kMostThreads || shared_bytes > static_cast<int>(kSharedRoom) - 1024) {
    machine.error = "the launch does not fit the emulator";
    return false;
  }
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t block = seed % 2 ? blocks - 1 - i : i;
    machine.random = (seed + 1) * 0x9E3779B97F4A7C15ull + block * 0xBF58476D1CE4E5B9ull + 1;
    machine.block = {static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x), 0};
    machine.last = static_cast<int>(draw() % threads);
    std::memset(shared_begin, kPoison, shared_bytes);
    std::memset(shared_begin + shared_bytes, kGuard, kSharedRoom - shared_bytes);
    schedule();
    for (size_t at = shared_bytes; at < kSharedRoom && machine.error.empty(); ++at)
      if (shared_begin[at] != kGuard)
        machine.error = "written past the end of shared memory, byte " + std::to_string(at);
    if (!machine.error.empty()) return false;
  }
  return true;
}

inline void check_mask(unsigned mask) {
  if (mask != 0xFFFFFFFFu) fail("a warp primitive for part of a warp");
}

inline bool block_wait(int line, bool value) { return wait(Wait::block, line, value, 0) != 0; }

inline uint64_t warp_wait(Wait kind, int line, unsigned mask, uint64_t value, int operand) {
  check_mask(mask);
  return wait(kind, line, value, operand);
}

template <class T>
T shuffle(Wait kind, int line, unsigned mask, T value, int operand) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = warp_wait(kind, line, mask, bits, operand);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cuda_on_cpu

#define threadIdx (::cuda_on_cpu::machine.current->thread)
#define blockIdx (::cuda_on_cpu::machine.block)
#define blockDim (::cuda_on_cpu::machine.dim)
#define gridDim (::cuda_on_cpu::machine.grid)

#define __syncthreads() ((void)::cuda_on_cpu::block_wait(__LINE__, false))
#define __syncthreads_or(value) static_cast<int>(::cuda_on_cpu::block_wait(__LINE__, (value) != 0))
#define __any_sync(mask, value) \
  static_cast<int>(::cuda_on_cpu::warp_wait(::cuda_on_cpu::Wait::any, __LINE__, mask, (value) != 0, 0))
#define __ballot_sync(mask, value) \
  static_cast<unsigned>(::cuda_on_cpu::warp_wait(::cuda_on_cpu::Wait::ballot, __LINE__, mask, (value) != 0, 0))
#define __shfl_sync(mask, value, lane) \
  ::cuda_on_cpu::shuffle(::cuda_on_cpu::Wait::shuffle, __LINE__, mask, value, lane)
#define __shfl_up_sync(mask, value, delta) \
  ::cuda_on_cpu::shuffle(::cuda_on_cpu::Wait::shuffle_up, __LINE__, mask, value, delta)

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(unsigned value) { return __builtin_ffs(static_cast<int>(value)); }

template <class T>
T __ldg(const T* from) {
  cuda_on_cpu::maybe_yield();
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T) != 0) cuda_on_cpu::fail("a load that is not aligned");
  return *from;
}

template <class T>
T __ldcg(const T* from) {
  return __ldg(from);
}

template <class T>
T atomicAdd(T* to, T value) {
  cuda_on_cpu::maybe_yield();
  const T before = *to;
  *to = before + value;
  return before;
}

template <class T>
T atomicMax(T* to, T value) {
  cuda_on_cpu::maybe_yield();
  const T before = *to;
  if (value > before) *to = value;
  return before;
}
