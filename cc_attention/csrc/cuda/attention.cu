// Criss-cross attention on CUDA devices: the operator's two kernels for PyTorch, written against LibTorch's
// stable ABI. Schemas, fake kernels and gradients are in cc_attention/ops.py, the algorithm in forward.cuh and
// backward.cuh.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <limits>
#include <tuple>
#include <type_traits>

#include "passes.cuh"
#include "portable.cuh"
#include "tensor_core.cuh"

namespace {

using namespace cc_attention::cuda;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Shape shape_of(const Tensor& query, const Tensor& value) {
  const int64_t dims = query.dim();
  STD_TORCH_CHECK((dims == 4 || dims == 5) && value.dim() == dims,
                  "query and value must be (B,C,H,W) or (B,C,T,H,W)");
  for (int64_t dim = 1; dim < dims; ++dim) {
    STD_TORCH_CHECK(
        query.size(dim) <= std::numeric_limits<int>::max() && value.size(dim) <= std::numeric_limits<int>::max(),
        "channels, frames, height and width must be below 2^31");
  }
  const auto of = [&](int64_t dim) { return static_cast<int>(query.size(dim)); };
  const Size size{dims == 5 ? of(2) : 1, of(dims - 2), of(dims - 1)};
  const Index step = size.frames > 1 ? size.pixels() : size.width;  // the longest between positions of a line
  STD_TORCH_CHECK(step * larger(query.size(1), value.size(1)) >> 32 == 0,
                  "a row of channels, and in a clip a frame, must have fewer than 2^32 elements");
  return {query.size(0), of(1), static_cast<int>(value.size(1)), size};
}

void check_map(const char* name, const Tensor& x, const Tensor& query, int channels) {
  STD_TORCH_CHECK(
      x.is_cuda() && x.get_device_index() == query.get_device_index() && x.scalar_type() == query.scalar_type(), name,
      " must be on the query's CUDA device and of its dtype");
  bool fits = x.dim() == query.dim() && x.size(1) == channels;
  for (int64_t dim = 0; dim < query.dim() && fits; ++dim) fits = dim == 1 || x.size(dim) == query.size(dim);
  STD_TORCH_CHECK(fits, name, " does not fit the other tensors' shapes");
}

MemoryFormat format_of(const Tensor& x) {
  return x.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
}

// A sample as a contiguous ([T,]H,W,C) array. This is the tensor itself where it is channels-last already, be its
// strides in dimensions of size 1 what they may.
Tensor channels_last(const Tensor& x) { return torch::stable::contiguous(x, format_of(x)); }

Tensor empty_map(const Tensor& x) {
  return torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device(), std::nullopt, format_of(x));
}

ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor empty_wide(const Tensor& x) {  // (B,H,W) or (B,T,H,W)
  if (x.dim() == 4) return torch::stable::new_empty(x, {x.size(0), x.size(2), x.size(3)}, wide_type(x));
  return torch::stable::new_empty(x, {x.size(0), x.size(2), x.size(3), x.size(4)}, wide_type(x));
}

template <typename T>
T* data(const Tensor& x) {
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(x.const_data_ptr());
  } else {
    return static_cast<T*>(x.mutable_data_ptr());
  }
}

cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

dim3 grid_of(Index x, int y = 1) {
  STD_TORCH_CHECK(x <= std::numeric_limits<int>::max(), "the map is too large for one launch: ", x, " blocks");
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
}

// Tensor cores serve half types, and fp32 where it may be multiplied in TF32, if the kernel that the driver has
// picked from this binary for the current device was compiled for them: that says both that the device has them
// and that the build knew of it.
template <typename Kernel>
bool has_tensor_cores(Kernel* kernel) {
  cudaFuncAttributes attributes;
  STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  return attributes.ptxVersion >= 80;
}

// A block gets more than 48 KiB of shared memory only where its kernel asks for it.
template <typename Engine, typename Kernel>
void allow_shared_memory(Kernel* kernel) {
  if (Shared<Engine>::BYTES > 48 * 1024) {
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shared<Engine>::BYTES));
  }
}

// How many blocks the device holds at a time. Ask after allow_shared_memory(): a kernel that may not run has none.
template <typename Engine, typename Kernel>
Index room_for(const Tensor& x, Kernel* kernel) {
  int multiprocessors = 0, blocks = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, x.get_device_index()));
  STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, Engine::THREADS,
                                                               Shared<Engine>::BYTES));
  return static_cast<Index>(multiprocessors) * blocks;
}

template <typename Engine, typename T>
void forward_on(const Shape& shape, const Tensor& query, const Tensor& key, const Tensor& value, Tensor& out,
                Tensor& lse) {
  using Number = Wide<T>;
  const cudaStream_t stream = current_stream(query);
  const Tensor scratch = empty_wide(query);
  allow_shared_memory<Engine>(forward_kernel<Engine, T>);
  const Plan plan = plan_for<Engine>(shape, room_for<Engine>(query, forward_kernel<Engine, T>));
  forward<Engine, T>(shape, plan, data<const T>(query), data<const T>(key), data<const T>(value), data<T>(out),
                     data<Number>(lse), data<Number>(scratch),
                     [&](const ForwardPass<T>& pass, Index x, int y) {
                       forward_kernel<Engine>
                           <<<grid_of(x, y), Engine::THREADS, Shared<Engine>::BYTES, stream>>>(pass);
                       STD_CUDA_KERNEL_LAUNCH_CHECK();
                     });
}

template <typename Engine, typename T>
void backward_on(const Shape& shape, const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value,
                 const Tensor& out, const Tensor& lse, Tensor& dquery, Tensor& dkey, Tensor& dvalue) {
  using Number = Wide<T>;
  const cudaStream_t stream = current_stream(query);
  const Tensor delta = empty_wide(query);
  allow_shared_memory<Engine>(backward_kernel<Engine, T>);
  backward<T>(
      shape, Engine::TILE, data<const T>(grad), data<const T>(query), data<const T>(key), data<const T>(value),
      data<const T>(out), data<const Number>(lse), data<Number>(delta), data<T>(dquery), data<T>(dkey),
      data<T>(dvalue),
      [&](const Delta<T>& task, Index x) {
        delta_kernel<<<grid_of(x), Delta<T>::THREADS, 0, stream>>>(task);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      },
      [&](const BackwardPass<T>& pass, Index x) {
        backward_kernel<Engine><<<grid_of(x), Engine::THREADS, Shared<Engine>::BYTES, stream>>>(pass);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      });
}

template <typename T>
struct Type {
  using type = T;
};

// run(Type<T>{}) with the type of the elements of x.
template <typename Run>
void dispatch(const Tensor& x, Run run) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return run(Type<double>{});
    case ScalarType::Float:
      return run(Type<float>{});
    case ScalarType::Half:
      return run(Type<Half>{});
    case ScalarType::BFloat16:
      return run(Type<BFloat16>{});
    default:
      STD_TORCH_CHECK(false, "criss_cross_attention: this dtype is not implemented");
  }
}

std::tuple<Tensor, Tensor> criss_cross_attention(Tensor query, Tensor key, Tensor value, bool tf32) {
  const Shape shape = shape_of(query, value);
  check_map("query", query, query, shape.query_channels);
  check_map("key", key, query, shape.query_channels);
  check_map("value", value, query, shape.channels);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  Tensor out = empty_map(value), lse = empty_wide(value);
  if (shape.positions() == 0) return {out, lse};
  query = channels_last(query), key = channels_last(key), value = channels_last(value);
  dispatch(query, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, double>) {
      if ((sizeof(T) == 2 || tf32) && has_tensor_cores(forward_kernel<TensorCore<T>, T>)) {
        return forward_on<TensorCore<T>, T>(shape, query, key, value, out, lse);
      }
    }
    forward_on<Portable<Wide<T>>, T>(shape, query, key, value, out, lse);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> criss_cross_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value,
                                                                  Tensor out, Tensor lse, bool tf32) {
  const Shape shape = shape_of(query, value);
  check_map("query", query, query, shape.query_channels);
  check_map("key", key, query, shape.query_channels);
  check_map("value", value, query, shape.channels);
  check_map("grad", grad, query, shape.channels);
  check_map("out", out, query, shape.channels);
  STD_TORCH_CHECK(lse.is_cuda() && lse.get_device_index() == query.get_device_index() &&
                      lse.scalar_type() == wide_type(query) && lse.numel() == shape.positions(),
                  "lse must be what the forward operator returned");
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  Tensor dquery = empty_map(query), dkey = empty_map(key), dvalue = empty_map(value);
  if (shape.positions() == 0) return {dquery, dkey, dvalue};
  query = channels_last(query), key = channels_last(key), value = channels_last(value);
  grad = channels_last(grad), out = channels_last(out), lse = torch::stable::contiguous(lse);
  dispatch(query, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, double>) {
      if ((sizeof(T) == 2 || tf32) && has_tensor_cores(backward_kernel<TensorCore<T>, T>)) {
        return backward_on<TensorCore<T>, T>(shape, grad, query, key, value, out, lse, dquery, dkey, dvalue);
      }
    }
    backward_on<Portable<Wide<T>>, T>(shape, grad, query, key, value, out, lse, dquery, dkey, dvalue);
  });
  return {dquery, dkey, dvalue};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cc_attention, CUDA, m) {
  m.impl("criss_cross_attention", TORCH_BOX(&criss_cross_attention));
  m.impl("criss_cross_attention_backward", TORCH_BOX(&criss_cross_attention_backward));
}
