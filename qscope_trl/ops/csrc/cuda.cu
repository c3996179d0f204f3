// The CUDA kernels as torch operations: checks, the current stream, the launch.
//
// Built on torch's stable ABI (2.10 and newer), so one library serves several versions of torch, and loads in a CPU
// build too: nothing of torch's CUDA libraries is linked. The caller makes the tensors' device the current one.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <dlfcn.h>

#include "gather_sum.cuh"
#include "kernels.cuh"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// torch's CUDA library is out of sight for a library that does not link it, so that a weak symbol would stay null, and
// linking it would keep this one from loading in a CPU build. As it is loaded already, it is found by its name.
void* current_stream(const Tensor& tensor) {
  using Get = int32_t (*)(int32_t, void**);
  static const Get get = [] {
    const char* name = "aoti_torch_get_current_cuda_stream";
    void* found = dlsym(RTLD_DEFAULT, name);
    if (found == nullptr)
      if (void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) found = dlsym(library, name);
    return reinterpret_cast<Get>(found);
  }();
  STD_TORCH_CHECK(get != nullptr, "this build of torch has no current CUDA stream");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(tensor.get_device_index(), &stream) == 0, "torch gives no current CUDA stream");
  return stream;
}

// The runtime in this library is not the one in torch: it learns the device here.
cudaStream_t enter(const Tensor& tensor) {
  const cudaError_t error = cudaSetDevice(tensor.get_device_index());
  STD_TORCH_CHECK(error == cudaSuccess, "cudaSetDevice: ", cudaGetErrorString(error));
  return static_cast<cudaStream_t>(current_stream(tensor));
}

void check_launch(const char* name) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(error));
}

void check(const char* name, const Tensor& tensor, ScalarType type, int64_t dims, const Tensor& beside) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == beside.get_device_index(), name,
                  ": the tensors are on one CUDA device");
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.dim() == dims, name, ": a tensor has another type or rank");
}

// Rows that are themselves contiguous, whatever lies between them.
void check_slab(const char* name, const Tensor& slab, const Tensor& bias, int64_t first) {
  check(name, slab, ScalarType::Float, 2, slab);
  check(name, bias, ScalarType::Float, 1, slab);
  STD_TORCH_CHECK(slab.size(1) <= 1 || slab.stride(1) == 1, name, ": the slab's columns are not contiguous");
  STD_TORCH_CHECK(bias.size(0) == slab.size(1) && bias.is_contiguous(), name, ": the bias does not fit the slab");
  // Keys hold 32-bit indices, the kernels count columns in int; a span may reach past the last one.
  STD_TORCH_CHECK(first >= 0 && first + slab.size(1) <= INT32_MAX - qscope::kSpan, name, ": too many features");
  STD_TORCH_CHECK(slab.size(0) <= INT32_MAX, name, ": too many tokens");
}

// Adds a chunk of features to the running selection. `keys (T, k)` is int64, taken as unsigned; zeros to begin with.
void select_chunk(const Tensor slab, const Tensor bias, int64_t first, Tensor keys, int64_t k) {
  check_slab("select_chunk", slab, bias, first);
  check("select_chunk", keys, ScalarType::Long, 2, slab);
  STD_TORCH_CHECK(k >= 1 && k <= qscope::kMaxK, "select_chunk: k is from 1 to 1024");
  const int64_t rows = slab.size(0), columns = slab.size(1);
  STD_TORCH_CHECK(keys.size(0) == rows && keys.size(1) == k && keys.is_contiguous(),
                  "select_chunk: the keys do not fit the slab and k");
  if (rows == 0 || columns == 0) return;
  const cudaStream_t stream = enter(slab);
  const int room = qscope::select_shared_bytes(static_cast<int>(k));
  qscope::select_chunk_kernel<<<static_cast<unsigned>(rows), qscope::kThreads, room, stream>>>(
      static_cast<const float*>(slab.const_data_ptr()), slab.stride(0),
      static_cast<const float*>(bias.const_data_ptr()), static_cast<int>(columns), static_cast<uint32_t>(first),
      static_cast<uint64_t*>(keys.mutable_data_ptr()), static_cast<int>(k));
  check_launch("select_chunk");
}

// The best k of each token in their order, rectified: `acts (T, k)` fp32, `indices (T, k)` int64.
void finish(const Tensor keys, Tensor acts, Tensor indices) {
  check("finish", keys, ScalarType::Long, 2, keys);
  check("finish", acts, ScalarType::Float, 2, keys);
  check("finish", indices, ScalarType::Long, 2, keys);
  const int64_t rows = keys.size(0), k = keys.size(1);
  STD_TORCH_CHECK(k >= 1 && k <= qscope::kMaxK && rows <= INT32_MAX, "finish: k is from 1 to 1024");
  STD_TORCH_CHECK(acts.size(0) == rows && acts.size(1) == k && indices.size(0) == rows && indices.size(1) == k,
                  "finish: shapes do not fit");
  STD_TORCH_CHECK(keys.is_contiguous() && acts.is_contiguous() && indices.is_contiguous(),
                  "finish: a tensor is not contiguous");
  if (rows == 0) return;
  const cudaStream_t stream = enter(keys);
  const int room = qscope::finish_shared_bytes(static_cast<int>(k));
  qscope::finish_kernel<<<static_cast<unsigned>(rows), qscope::kThreads, room, stream>>>(
      static_cast<const uint64_t*>(keys.const_data_ptr()), static_cast<int>(k),
      static_cast<float*>(acts.mutable_data_ptr()), static_cast<int64_t*>(indices.mutable_data_ptr()));
  check_launch("finish");
}

// Counts, for the chosen features of each token, the features of a chunk that rank above them.
//
// `values (T, S)` fp32 are their pre-activations, `features (S,)` int64 their indices, `counts (T, S)` int32 the
// running counts. A count of k or more means decided; nothing is counted where the value is not positive.
void count_above(const Tensor slab, const Tensor bias, int64_t first, const Tensor values, const Tensor features,
                 Tensor counts, int64_t k) {
  check_slab("count_above", slab, bias, first);
  check("count_above", values, ScalarType::Float, 2, slab);
  check("count_above", features, ScalarType::Long, 1, slab);
  check("count_above", counts, ScalarType::Int, 2, slab);
  const int64_t rows = slab.size(0), columns = slab.size(1), chosen = features.size(0);
  STD_TORCH_CHECK(values.size(0) == rows && values.size(1) == chosen && counts.size(0) == rows &&
                      counts.size(1) == chosen && chosen <= INT32_MAX - qscope::kTile,
                  "count_above: shapes do not fit");
  STD_TORCH_CHECK(values.is_contiguous() && features.is_contiguous() && counts.is_contiguous(),
                  "count_above: a tensor is not contiguous");
  STD_TORCH_CHECK(k >= 1 && k <= INT32_MAX, "count_above: k is at least 1");
  if (rows == 0 || columns == 0 || chosen == 0) return;
  const cudaStream_t stream = enter(slab);
  const int room = qscope::count_above_shared_bytes();
  qscope::count_above_kernel<<<static_cast<unsigned>(rows), qscope::kThreads, room, stream>>>(
      static_cast<const float*>(slab.const_data_ptr()), slab.stride(0),
      static_cast<const float*>(bias.const_data_ptr()), static_cast<int>(columns), static_cast<uint32_t>(first),
      static_cast<const float*>(values.const_data_ptr()), static_cast<const int64_t*>(features.const_data_ptr()),
      static_cast<int>(chosen), static_cast<int32_t*>(counts.mutable_data_ptr()), static_cast<int>(k));
  check_launch("count_above");
}

template <class T>
void launch_gather_sum(const Tensor& weights, const Tensor& indices, const Tensor& W, const Tensor& out) {
  const int64_t rows = weights.size(0), k = weights.size(1), width = W.size(1);
  const int64_t tile = qscope::gather_sum_tile(sizeof(T));
  const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>((width + tile - 1) / tile));
  const cudaStream_t stream = enter(weights);
  qscope::gather_sum_kernel<T><<<grid, qscope::kThreads, qscope::gather_sum_shared_bytes(), stream>>>(
      static_cast<const float*>(weights.const_data_ptr()), static_cast<const int64_t*>(indices.const_data_ptr()),
      static_cast<int>(k), static_cast<const T*>(W.const_data_ptr()), width,
      static_cast<float*>(out.mutable_data_ptr()));
  check_launch("gather_sum");
}

// out[t] = sum_i weights[t, i] * W[indices[t, i]], zero weights skipped. fp32 sums, whatever W holds. That the indices
// are rows of W is the caller's word: looking would mean waiting for the device.
void gather_sum(const Tensor weights, const Tensor indices, const Tensor W, Tensor out) {
  check("gather_sum", weights, ScalarType::Float, 2, weights);
  check("gather_sum", indices, ScalarType::Long, 2, weights);
  check("gather_sum", W, W.scalar_type(), 2, weights);
  check("gather_sum", out, ScalarType::Float, 2, weights);
  const int64_t rows = weights.size(0), k = weights.size(1), width = W.size(1);
  STD_TORCH_CHECK(indices.size(0) == rows && indices.size(1) == k && out.size(0) == rows && out.size(1) == width &&
                      rows <= INT32_MAX && k <= INT32_MAX - qscope::kThreads && width <= INT32_MAX / 128,
                  "gather_sum: shapes do not fit");
  STD_TORCH_CHECK(weights.is_contiguous() && indices.is_contiguous() && W.is_contiguous() && out.is_contiguous(),
                  "gather_sum: a tensor is not contiguous");
  if (rows == 0 || width == 0) return;
  switch (W.scalar_type()) {
    case ScalarType::Float: return launch_gather_sum<float>(weights, indices, W, out);
    case ScalarType::BFloat16: return launch_gather_sum<__nv_bfloat16>(weights, indices, W, out);
    case ScalarType::Half: return launch_gather_sum<__half>(weights, indices, W, out);
    default: STD_TORCH_CHECK(false, "gather_sum: W is fp32, bf16 or fp16");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY(qscope_trl_cuda, m) {
  m.def("select_chunk(Tensor slab, Tensor bias, int first, Tensor(a!) keys, int k) -> ()");
  m.def("finish(Tensor keys, Tensor(a!) acts, Tensor(b!) indices) -> ()");
  m.def("count_above(Tensor slab, Tensor bias, int first, Tensor values, Tensor features, Tensor(a!) counts, int k) "
        "-> ()");
  m.def("gather_sum(Tensor weights, Tensor indices, Tensor W, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qscope_trl_cuda, CUDA, m) {
  m.impl("select_chunk", TORCH_BOX(&select_chunk));
  m.impl("finish", TORCH_BOX(&finish));
  m.impl("count_above", TORCH_BOX(&count_above));
  m.impl("gather_sum", TORCH_BOX(&gather_sum));
}
