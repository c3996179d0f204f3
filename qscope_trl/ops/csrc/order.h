// The total order of features at a token, as one unsigned number: value descending, then index ascending.
//
// A key holds the value's bits, mapped so that they compare as unsigned integers, above the complement of the index.
// Keys of one token are distinct, so every selection by keys has exactly one result. NaN ranks above all values, as in
// torch.topk; -0 and +0 are equal. Key 0 means "none": no value maps to it.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define QSCOPE_INLINE __host__ __device__ __forceinline__
#else
#define QSCOPE_INLINE inline
#endif

namespace qscope {

QSCOPE_INLINE uint32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

QSCOPE_INLINE float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

QSCOPE_INLINE uint32_t ordered_bits(float value) {
  if (value != value) return 0xFFFFFFFFu;
  const uint32_t bits = value == 0.0f ? 0u : bits_of(value);
  return (bits & 0x80000000u) ? ~bits : (bits | 0x80000000u);
}

QSCOPE_INLINE uint64_t key_of(float value, uint32_t index) {
  return (static_cast<uint64_t>(ordered_bits(value)) << 32) | static_cast<uint32_t>(~index);
}

QSCOPE_INLINE uint32_t index_of(uint64_t key) { return ~static_cast<uint32_t>(key); }

QSCOPE_INLINE float value_of(uint64_t key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  if (ordered == 0xFFFFFFFFu) return float_of(0x7FC00000u);
  return float_of((ordered & 0x80000000u) ? (ordered & 0x7FFFFFFFu) : ~ordered);
}

}  // namespace qscope
