// In-place activated batch normalisation on CUDA devices: the four steps for PyTorch, written against LibTorch's
// stable ABI. The schemas are defined in libs/ops.py, the kernels in statistics.cuh and affine.cuh.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "steps.cuh"

namespace {

using namespace libs::cuda;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Given = std::optional<Tensor>;  // weight or bias
using torch::stable::accelerator::DeviceGuard;

// Whether the dimensions follow each other in memory without gaps, the channels in their place or last.
bool dense(const Tensor& x, bool channels_last) {
  int64_t stride = 1;
  const auto follows = [&](int64_t dim) {
    const bool fits = x.size(dim) == 1 || x.stride(dim) == stride;
    stride *= x.size(dim);
    return fits;
  };
  if (channels_last && !follows(1)) return false;
  for (int64_t dim = x.dim() - 1; dim >= 0; --dim)
    if (!(channels_last && dim == 1) && !follows(dim)) return false;
  return true;
}

Shape shape_of(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cuda() && x.dim() >= 2 && x.numel() > 0, "x must be (B,C,...) on a CUDA device, not empty");
  constexpr int64_t LIMIT = std::numeric_limits<int>::max();
  const int64_t batch = x.size(0), channels = x.size(1);
  STD_TORCH_CHECK(channels <= LIMIT, "x must have fewer than 2^31 channels");
  // A single channel is a plane however it is called.
  if (channels > 1 && dense(x, true)) return {x.numel() / channels, static_cast<int>(channels), 1};
  STD_TORCH_CHECK(dense(x, false), "x must be contiguous or channels-last");
  if (channels == 1) return {1, 1, x.numel()};
  STD_TORCH_CHECK(batch * channels <= LIMIT, "x must have fewer than 2^31 planes");
  return {batch, static_cast<int>(channels), x.numel() / (batch * channels)};
}

void check_like(const Tensor& y, const Tensor& grad) {
  bool same = grad.is_cuda() && grad.get_device_index() == y.get_device_index() && grad.dim() == y.dim() &&
              grad.scalar_type() == y.scalar_type();
  for (int64_t dim = 0; same && dim < y.dim(); ++dim)
    same = grad.size(dim) == y.size(dim) && (y.size(dim) == 1 || grad.stride(dim) == y.stride(dim));
  STD_TORCH_CHECK(same, "grad must have the device, shape, strides and dtype of y");
}

template <typename T>
constexpr ScalarType WIDE_TYPE = sizeof(Wide<T>) == 8 ? ScalarType::Double : ScalarType::Float;

// The vectors of C numbers that a step is given, each contiguous for as long as this lives.
template <typename T>
class Vectors {
 public:
  explicit Vectors(const Tensor& x) : x_(x) {}

  const Wide<T>* operator()(const Given& given) {
    if (!given.has_value()) return nullptr;
    STD_TORCH_CHECK(given->is_cuda() && given->get_device_index() == x_.get_device_index() &&
                        given->numel() == x_.size(1) && given->scalar_type() == WIDE_TYPE<T>,
                    "statistics, weight and bias must be on the device of x and hold one ",
                    sizeof(Wide<T>) == 8 ? "double" : "float", " a channel");
    held_.push_back(torch::stable::contiguous(*given));
    return static_cast<const Wide<T>*>(held_.back().const_data_ptr());
  }

 private:
  const Tensor& x_;
  std::vector<Tensor> held_;
};

// All of 16 bytes in a load where every tensor and all its lines begin at a multiple of that.
template <typename T>
Division division_of(const Shape& shape, std::initializer_list<const void*> pointers) {
  constexpr int WHOLE = 16 / sizeof(T);
  bool aligned = (shape.channels_last() ? shape.channels : shape.inner) % WHOLE == 0;
  for (const void* pointer : pointers) aligned = aligned && reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
  return divide(shape, aligned ? WHOLE : 1);
}

Activation activation_of(const std::string& name) {
  if (name == "leaky_relu") return Activation::LEAKY_RELU;
  if (name == "elu") return Activation::ELU;
  STD_TORCH_CHECK(name == "identity", "activation must be leaky_relu, elu or identity; got ", name);
  return Activation::IDENTITY;
}

template <typename W>
Parameter<W> parameter_of(double param) {
  return {static_cast<W>(param), static_cast<W>(1 / param)};
}

template <typename T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <typename T>
Tensor empty_wide(const Tensor& x, int64_t size) {
  return torch::stable::new_empty(x, {size}, WIDE_TYPE<T>);
}

// A function that launches kernels on the device's current stream.
auto launcher(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return [stream](Index blocks, int threads, int bytes, auto kernel, const auto&... arguments) {
    STD_TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "x is too large for one launch: ", blocks, " blocks");
    kernel<<<static_cast<unsigned>(blocks), threads, bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
}

template <typename T_>
struct Type {
  using T = T_;
};

// run(type) with that of the elements of x.
template <typename Run>
auto dispatch(const Tensor& x, Run run) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return run(Type<double>{});
    case ScalarType::Half:
      return run(Type<Half>{});
    case ScalarType::BFloat16:
      return run(Type<BFloat16>{});
    default:
      STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "x must be of a floating-point type");
      return run(Type<float>{});
  }
}

std::tuple<Tensor, Tensor> statistics_cuda(const Tensor& x) {
  const Shape shape = shape_of(x);
  const DeviceGuard guard(x.get_device_index());
  return dispatch(x, [&](auto type) -> std::tuple<Tensor, Tensor> {
    using T = typename decltype(type)::T;
    using W = Wide<T>;
    const Division division = division_of<T>(shape, {x.const_data_ptr()});
    const Tensor scratch = empty_wide<T>(x, scratch_size(division));
    Tensor mean = empty_wide<T>(x, shape.channels), var = empty_wide<T>(x, shape.channels);
    statistics(division, data<T>(x), mutable_data<W>(scratch), mutable_data<W>(mean), mutable_data<W>(var),
               launcher(x));
    return {mean, var};
  });
}

void normalize_cuda(const Tensor& x, const Tensor& mean, const Tensor& var, const Given& weight, const Given& bias,
                    double eps, const std::string& activation, double param) {
  const Shape shape = shape_of(x);
  const DeviceGuard guard(x.get_device_index());
  dispatch(x, [&](auto type) {
    using T = typename decltype(type)::T;
    using W = Wide<T>;
    Vectors<T> vectors(x);
    T* const out = mutable_data<T>(x);
    normalize(Step<T>{division_of<T>(shape, {out}),
                      {out, nullptr, nullptr, nullptr},
                      {vectors(mean), vectors(var), vectors(weight), vectors(bias), nullptr, nullptr,
                       static_cast<W>(eps)},
                      activation_of(activation),
                      parameter_of<W>(param)},
              launcher(x));
  });
}

std::tuple<Tensor, Tensor> sums_cuda(const Tensor& grad, const Tensor& y, const Given& weight, const Given& bias,
                                     double eps, const std::string& activation, double param) {
  const Shape shape = shape_of(y);
  check_like(y, grad);
  const DeviceGuard guard(y.get_device_index());
  return dispatch(y, [&](auto type) -> std::tuple<Tensor, Tensor> {
    using T = typename decltype(type)::T;
    using W = Wide<T>;
    Vectors<T> vectors(y);
    const Division division = division_of<T>(shape, {grad.const_data_ptr(), y.const_data_ptr()});
    const Tensor scratch = empty_wide<T>(y, scratch_size(division));
    Tensor sum_dz = empty_wide<T>(y, shape.channels), sum_dz_xhat = empty_wide<T>(y, shape.channels);
    sums(Step<T>{division,
                 {nullptr, data<T>(grad), data<T>(y), nullptr},
                 {nullptr, nullptr, vectors(weight), vectors(bias), nullptr, nullptr, static_cast<W>(eps)},
                 activation_of(activation),
                 parameter_of<W>(param)},
         mutable_data<W>(scratch), mutable_data<W>(sum_dz), mutable_data<W>(sum_dz_xhat), launcher(y));
    return {sum_dz, sum_dz_xhat};
  });
}

Tensor gradient_cuda(const Tensor& grad, const Tensor& y, const Tensor& var, const Given& weight, const Given& bias,
                     const Tensor& mean_dz, const Tensor& mean_dz_xhat, double eps, const std::string& activation,
                     double param) {
  const Shape shape = shape_of(y);
  check_like(y, grad);
  const DeviceGuard guard(y.get_device_index());
  Tensor result = torch::stable::empty_like(y);
  dispatch(y, [&](auto type) {
    using T = typename decltype(type)::T;
    using W = Wide<T>;
    Vectors<T> vectors(y);
    T* const dx = mutable_data<T>(result);
    gradient(Step<T>{division_of<T>(shape, {grad.const_data_ptr(), y.const_data_ptr(), dx}),
                     {nullptr, data<T>(grad), data<T>(y), dx},
                     {nullptr, vectors(var), vectors(weight), vectors(bias), vectors(mean_dz),
                      vectors(mean_dz_xhat), static_cast<W>(eps)},
                     activation_of(activation),
                     parameter_of<W>(param)},
             launcher(y));
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(libs, CUDA, library) {
  library.impl("statistics", TORCH_BOX(&statistics_cuda));
  library.impl("normalize_", TORCH_BOX(&normalize_cuda));
  library.impl("sums", TORCH_BOX(&sums_cuda));
  library.impl("gradient", TORCH_BOX(&gradient_cuda));
}
