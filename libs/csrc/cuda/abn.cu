// In-place activated batch normalisation on CUDA devices: the steps for PyTorch, written against LibTorch's
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
using Given = std::optional<Tensor>;
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

void check_like(const Tensor& y, const Tensor& other, const char* name) {
  bool same = other.is_cuda() && other.get_device_index() == y.get_device_index() && other.dim() == y.dim() &&
              other.scalar_type() == y.scalar_type();
  for (int64_t dim = 0; same && dim < y.dim(); ++dim)
    same = other.size(dim) == y.size(dim) && (y.size(dim) == 1 || other.stride(dim) == y.stride(dim));
  STD_TORCH_CHECK(same, name, " must have the device, shape, strides and dtype of the normalised tensor");
}

template <typename W>
constexpr ScalarType WIDE_TYPE = sizeof(W) == 8 ? ScalarType::Double : ScalarType::Float;

template <typename W>
void check_vector(const Tensor& x, const Tensor& vector, int64_t least) {
  STD_TORCH_CHECK(vector.is_cuda() && vector.get_device_index() == x.get_device_index() && vector.numel() >= least &&
                      vector.scalar_type() == WIDE_TYPE<W>,
                  "statistics, sums, weight and bias must be on the device of x and hold one ",
                  sizeof(W) == 8 ? "double" : "float", " a channel");
}

// The vectors that a step is given, each contiguous for as long as this lives.
template <typename T>
class Vectors {
 public:
  explicit Vectors(const Tensor& x) : x_(x) {}

  // At least so many numbers for each channel.
  const Wide<T>* operator()(const Given& given, int64_t each = 1) {
    if (!given.has_value()) return nullptr;
    check_vector<Wide<T>>(x_, *given, each * x_.size(1));
    STD_TORCH_CHECK(each > 1 || given->numel() == x_.size(1), "weight and bias must hold one number a channel");
    held_.push_back(torch::stable::contiguous(*given));
    return static_cast<const Wide<T>*>(held_.back().const_data_ptr());
  }

  Channels<Wide<T>> channels(const Given& statistics, const Given& weight, const Given& bias, double eps,
                             const Given& sums = std::nullopt) {
    const int count = static_cast<int>(x_.size(1));
    const int parts = sums.has_value() ? static_cast<int>(sums->numel() / (2 * count)) : 0;
    STD_TORCH_CHECK(!sums.has_value() || sums->numel() % (2 * count) == 0, "sums must be (P, 2 C)");
    return {(*this)(statistics, 2), (*this)(weight), (*this)(bias), (*this)(sums, 2), static_cast<Wide<T>>(eps),
            count, parts};
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
  if (name == "relu") return Activation::RELU;
  STD_TORCH_CHECK(name == "identity", "activation must be leaky_relu, elu, relu or identity; got ", name);
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
  return torch::stable::new_empty(x, {size}, WIDE_TYPE<Wide<T>>);
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

// Running statistics that are moved in place; they must be contiguous for that.
template <typename W>
Running<W> running_of(const Tensor& x, const Given& mean, const Given& var, double momentum, int64_t channels) {
  if (!mean.has_value() || !var.has_value()) return {nullptr, nullptr, 0};
  for (const Given& given : {mean, var}) {
    check_vector<W>(x, *given, channels);
    STD_TORCH_CHECK(given->is_contiguous(), "running statistics must be contiguous");
  }
  return {mutable_data<W>(*mean), mutable_data<W>(*var), static_cast<W>(momentum)};
}

Tensor statistics_cuda(const Tensor& x, const Given& running_mean, const Given& running_var, double momentum) {
  const Shape shape = shape_of(x);
  const DeviceGuard guard(x.get_device_index());
  return dispatch(x, [&](auto type) {
    using T = typename decltype(type)::T;
    using W = Wide<T>;
    const Division division = division_of<T>(shape, {x.const_data_ptr()});
    const Tensor scratch = empty_wide<T>(x, scratch_size(division));
    Tensor result = empty_wide<T>(x, 2 * static_cast<int64_t>(shape.channels) + 1);
    statistics(division, data<T>(x), mutable_data<W>(scratch),
               running_of<W>(x, running_mean, running_var, momentum, shape.channels), mutable_data<W>(result),
               launcher(x));
    return result;
  });
}

Tensor merge_statistics_cuda(const Tensor& given, const Given& running_mean, const Given& running_var,
                             double momentum) {
  STD_TORCH_CHECK(given.is_cuda() && given.dim() == 2 && given.size(1) % 2 == 1, "parts must be (P, 2 C + 1)");
  const DeviceGuard guard(given.get_device_index());
  const Tensor parts = torch::stable::contiguous(given);
  const int count = static_cast<int>(parts.size(0)), channels = static_cast<int>(parts.size(1) / 2);
  const auto run = [&](auto type) {
    using W = typename decltype(type)::T;
    check_vector<W>(parts, parts, 1);
    Tensor result = empty_wide<W>(parts, parts.size(1));
    merge_statistics(data<W>(parts), count, channels,
                     running_of<W>(parts, running_mean, running_var, momentum, channels), mutable_data<W>(result),
                     launcher(parts));
    return result;
  };
  return parts.scalar_type() == ScalarType::Double ? run(Type<double>{}) : run(Type<float>{});
}

// normalize_ without `out`; otherwise normalize_relu_, perhaps with a shortcut.
void normalize_any(const Tensor& x, const Tensor& statistics, const Given& weight, const Given& bias, double eps,
                   Activation activation, double param, const Given& shortcut, const Given& out) {
  const Shape shape = shape_of(x);
  if (shortcut.has_value()) check_like(x, *shortcut, "shortcut");
  const DeviceGuard guard(x.get_device_index());
  dispatch(x, [&](auto type) {
    using T = typename decltype(type)::T;
    Vectors<T> vectors(x);
    T* const y = mutable_data<T>(x);
    T* const rectified = out.has_value() ? mutable_data<T>(*out) : nullptr;
    const T* const added = shortcut.has_value() ? data<T>(*shortcut) : nullptr;
    normalize(Step<T>{division_of<T>(shape, {y, rectified, added}),
                      {y, nullptr, nullptr, nullptr, added, rectified},
                      vectors.channels(statistics, weight, bias, eps),
                      activation,
                      parameter_of<Wide<T>>(param)},
              launcher(x));
  });
}

void normalize_cuda(const Tensor& x, const Tensor& statistics, const Given& weight, const Given& bias, double eps,
                    const std::string& activation, double param) {
  STD_TORCH_CHECK(activation != "relu", "normalize_relu_ serves the activation relu");
  normalize_any(x, statistics, weight, bias, eps, activation_of(activation), param, std::nullopt, std::nullopt);
}

Tensor normalize_relu_cuda(const Tensor& x, const Tensor& statistics, const Given& weight, const Given& bias,
                           const Given& shortcut, double eps) {
  const Tensor out = torch::stable::empty_like(x);
  const Activation activation = shortcut.has_value() ? Activation::ADD_RELU : Activation::RELU;
  normalize_any(x, statistics, weight, bias, eps, activation, 1, shortcut, out);
  return out;
}

// sums, or with a shortcut sums_add_relu, which writes dz as well.
std::tuple<Tensor, Tensor> sums_any(const Tensor& grad, const Tensor& y, const Given& weight, const Given& bias,
                                    double eps, Activation activation, double param, const Given& shortcut,
                                    const Given& dz) {
  const Shape shape = shape_of(y);
  check_like(y, grad, "grad");
  if (shortcut.has_value()) check_like(y, *shortcut, "shortcut");
  const DeviceGuard guard(y.get_device_index());
  return dispatch(y, [&](auto type) -> std::tuple<Tensor, Tensor> {
    using T = typename decltype(type)::T;
    using W = Wide<T>;
    Vectors<T> vectors(y);
    T* const masked = dz.has_value() ? mutable_data<T>(*dz) : nullptr;
    const T* const added = shortcut.has_value() ? data<T>(*shortcut) : nullptr;
    const Division division = division_of<T>(shape, {grad.const_data_ptr(), y.const_data_ptr(), masked, added});
    const Tensor scratch = empty_wide<T>(y, scratch_size(division));
    Tensor result = empty_wide<T>(y, 2 * static_cast<int64_t>(shape.channels));
    Tensor dweight = empty_wide<T>(y, shape.channels);
    sums(Step<T>{division,
                 {nullptr, data<T>(grad), data<T>(y), masked, added, nullptr},
                 vectors.channels(std::nullopt, weight, bias, eps),
                 activation,
                 parameter_of<W>(param)},
         mutable_data<W>(scratch), mutable_data<W>(result), mutable_data<W>(dweight), launcher(y));
    return {result, dweight};
  });
}

std::tuple<Tensor, Tensor> sums_cuda(const Tensor& grad, const Tensor& y, const Given& weight, const Given& bias,
                                     double eps, const std::string& activation, double param) {
  return sums_any(grad, y, weight, bias, eps, activation_of(activation), param, std::nullopt, std::nullopt);
}

std::tuple<Tensor, Tensor, Tensor> sums_add_relu_cuda(const Tensor& grad, const Tensor& z, const Tensor& shortcut,
                                                      const Given& weight, const Given& bias, double eps) {
  const Tensor dz = torch::stable::empty_like(z);
  const auto [result, dweight] = sums_any(grad, z, weight, bias, eps, Activation::ADD_RELU, 1, shortcut, dz);
  return {result, dweight, dz};
}

Tensor gradient_cuda(const Tensor& grad, const Tensor& y, const Tensor& statistics, const Given& sums,
                     const Given& weight, const Given& bias, double eps, const std::string& activation,
                     double param) {
  const Shape shape = shape_of(y);
  check_like(y, grad, "grad");
  STD_TORCH_CHECK(!sums.has_value() || statistics.numel() == 2 * y.size(1) + 1,
                  "means need the number of elements at the end of the statistics");
  const DeviceGuard guard(y.get_device_index());
  Tensor result = torch::stable::empty_like(y);
  dispatch(y, [&](auto type) {
    using T = typename decltype(type)::T;
    Vectors<T> vectors(y);
    T* const dx = mutable_data<T>(result);
    gradient(Step<T>{division_of<T>(shape, {grad.const_data_ptr(), y.const_data_ptr(), dx}),
                     {nullptr, data<T>(grad), data<T>(y), dx, nullptr, nullptr},
                     vectors.channels(statistics, weight, bias, eps, sums),
                     activation_of(activation),
                     parameter_of<Wide<T>>(param)},
             launcher(y));
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(libs, CUDA, library) {
  library.impl("statistics", TORCH_BOX(&statistics_cuda));
  library.impl("merge_statistics", TORCH_BOX(&merge_statistics_cuda));
  library.impl("normalize_", TORCH_BOX(&normalize_cuda));
  library.impl("normalize_relu_", TORCH_BOX(&normalize_relu_cuda));
  library.impl("sums", TORCH_BOX(&sums_cuda));
  library.impl("sums_add_relu", TORCH_BOX(&sums_add_relu_cuda));
  library.impl("gradient", TORCH_BOX(&gradient_cuda));
}
