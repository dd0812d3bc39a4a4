// In-place activated batch normalisation on the CPU: the steps of libs/ops.py, registered with PyTorch's
// dispatcher.

#include "kernels.h"
#include "pieces.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace libs {
namespace {

using torch::headeronly::ScalarType;

template <typename W>
constexpr ScalarType wide_type = ScalarType::Float;
template <>
constexpr ScalarType wide_type<double> = ScalarType::Double;

// The numbers of a contiguous tensor, at least `least` of them.
template <typename W>
const W* numbers(const Tensor& given, int64_t least) {
  STD_TORCH_CHECK(given.is_cpu() && given.numel() >= least && given.scalar_type() == wide_type<W> &&
                      given.is_contiguous(),
                  "statistics, sums, weight and bias must be contiguous and hold one ",
                  sizeof(W) == 8 ? "double" : "float", " a channel");
  return static_cast<const W*>(given.const_data_ptr());
}

// A vector of C numbers that somebody gave, or the same number for each channel.
template <typename W>
std::vector<W> vector_of(const std::optional<Tensor>& given, int64_t channels, W otherwise) {
  std::vector<W> values(channels, otherwise);
  if (!given.has_value()) return values;
  const Tensor contiguous = torch::stable::contiguous(*given);
  STD_TORCH_CHECK(contiguous.numel() == channels, "weight and bias must hold one number a channel");
  const W* data = numbers<W>(contiguous, channels);
  std::copy(data, data + channels, values.begin());
  return values;
}

Activation activation_of(const std::string& name) {
  if (name == "leaky_relu") return Activation::leaky_relu;
  if (name == "elu") return Activation::elu;
  if (name == "relu") return Activation::relu;
  STD_TORCH_CHECK(name == "identity", "activation must be leaky_relu, elu, relu or identity; got ", name);
  return Activation::identity;
}

template <typename W>
struct Settings {
  Settings(int64_t channels, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
           const std::string& activation, double param)
      : scale(vector_of<W>(weight, channels, 1)),
        bias(vector_of<W>(bias, channels, 0)),
        inverse_scale(channels),
        activation{activation_of(activation), static_cast<W>(param)} {
    for (int64_t c = 0; c < channels; ++c) {
      if (weight.has_value()) scale[c] = std::abs(scale[c]) + static_cast<W>(eps);
      inverse_scale[c] = 1 / scale[c];
    }
  }
  std::vector<W> scale, bias, inverse_scale;
  ActivationParam<W> activation;
};

// scale / sqrt(var + eps), where the variances follow the means.
template <typename W>
std::vector<W> factor_of(const Settings<W>& settings, const Tensor& statistics, double eps) {
  const int64_t channels = static_cast<int64_t>(settings.scale.size());
  const W* var = numbers<W>(statistics, 2 * channels) + channels;
  std::vector<W> factor(channels);
  for (int64_t c = 0; c < channels; ++c) factor[c] = settings.scale[c] / std::sqrt(var[c] + static_cast<W>(eps));
  return factor;
}

template <typename W>
Tensor empty_vector(int64_t count) {
  const int64_t size[] = {count};
  return torch::stable::empty({size, 1}, wide_type<W>);
}

template <typename W>
W* mutable_numbers(const Tensor& x) {
  return static_cast<W*>(x.mutable_data_ptr());
}

// As Tensor.lerp_ computes it, with one rounding for the product and the sum.
template <typename W>
W lerp(W from, W to, W weight) {
  return std::abs(weight) < W(0.5) ? std::fma(weight, to - from, from) : std::fma(weight - 1, to - from, to);
}

// Running statistics, where given, move towards those of a batch.
template <typename W>
void update(const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var, const W* statistics,
            int64_t channels, double momentum) {
  if (!running_mean.has_value() || !running_var.has_value()) return;
  numbers<W>(*running_mean, channels), numbers<W>(*running_var, channels);
  W *means = mutable_numbers<W>(*running_mean), *variances = mutable_numbers<W>(*running_var);
  const W *mean = statistics, *var = statistics + channels, count = statistics[2 * channels];
  for (int64_t c = 0; c < channels; ++c) {
    means[c] = lerp(means[c], mean[c], static_cast<W>(momentum));
    variances[c] = lerp(variances[c], var[c] * count / (count - 1), static_cast<W>(momentum));
  }
}

template <typename W>
Coefficients<W> from_channel(const Coefficients<W>& c, int64_t channel) {
  const auto at = [channel](const W* p) { return p ? p + channel : nullptr; };
  return {at(c.factor), at(c.offset), at(c.bias), at(c.inverse_scale), at(c.mean_dz), at(c.mean_dz_xhat)};
}

template <typename T, typename W>
Tensor statistics(const Tensor& x, const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var,
                  double momentum) {
  const Layout layout = layout_of(x);
  const Pieces pieces(layout, sizeof(T));
  const int64_t width = pieces.width(), channels = layout.channels;
  std::vector<W> means(pieces.count * width), squares(pieces.count * width);
  const T* data = static_cast<const T*>(x.const_data_ptr());
  for_all(pieces, [&](int64_t index, const Pieces::Piece& piece) {
    kernels<T, W>().statistics(layout.plane(), data + piece.offset, piece.rows, piece.columns, &means[index * width],
                               &squares[index * width]);
  });
  // The pieces' means and squared deviations, joined one after another (Chan et al., 1979).
  std::vector<double> count(channels), mean(channels), square(channels);
  for (int64_t index = 0; index < pieces.count; ++index) {
    const Pieces::Piece piece = pieces[index];
    const double more = static_cast<double>(layout.plane() ? piece.size() : piece.rows);
    for (int64_t i = 0; i < width; ++i) {
      const int64_t c = piece.channel + i;
      const double delta = means[index * width + i] - mean[c], total = count[c] + more;
      mean[c] += delta * more / total;
      square[c] += squares[index * width + i] + delta * delta * count[c] * more / total;
      count[c] = total;
    }
  }
  const Tensor result = empty_vector<W>(2 * channels + 1);
  W* out = mutable_numbers<W>(result);
  for (int64_t c = 0; c < channels; ++c) {
    out[c] = static_cast<W>(mean[c]);
    out[channels + c] = static_cast<W>(square[c] / count[c]);
  }
  out[2 * channels] = static_cast<W>(x.numel() / channels);
  update(running_mean, running_var, out, channels, momentum);
  return result;
}

template <typename W>
Tensor merge_statistics(const Tensor& parts, const std::optional<Tensor>& running_mean,
                        const std::optional<Tensor>& running_var, double momentum) {
  const int64_t count = parts.size(0), width = parts.size(1), channels = width / 2;
  const W* part = numbers<W>(parts, count * width);
  const Tensor result = empty_vector<W>(width);
  W* out = mutable_numbers<W>(result);
  W total = 0;
  for (int64_t p = 0; p < count; ++p) total += part[p * width + 2 * channels];
  for (int64_t c = 0; c < channels; ++c) {
    W mean = 0, var = 0;
    for (int64_t p = 0; p < count; ++p) mean += part[p * width + c] * part[p * width + 2 * channels];
    mean /= total;
    for (int64_t p = 0; p < count; ++p) {
      const W delta = part[p * width + c] - mean;
      var += (part[p * width + channels + c] + delta * delta) * part[p * width + 2 * channels];
    }
    out[c] = mean;
    out[channels + c] = var / total;
  }
  out[2 * channels] = total;
  update(running_mean, running_var, out, channels, momentum);
  return result;
}

// What normalisation multiplies by and adds, from statistics that may end after the variances.
template <typename W>
struct Affine {
  Affine(const Settings<W>& settings, const Tensor& statistics, double eps)
      : factor(factor_of(settings, statistics, eps)), offset(factor.size()) {
    const W* mean = numbers<W>(statistics, 2 * static_cast<int64_t>(factor.size()));
    for (size_t c = 0; c < factor.size(); ++c) offset[c] = settings.bias[c] - mean[c] * factor[c];
  }
  Coefficients<W> coefficients() const { return {factor.data(), offset.data(), nullptr, nullptr, nullptr, nullptr}; }
  std::vector<W> factor, offset;
};

template <typename T, typename W>
void normalize(const Tensor& x, const Tensor& statistics, const std::optional<Tensor>& weight,
               const std::optional<Tensor>& bias, double eps, const std::string& activation, double param) {
  const Layout layout = layout_of(x);
  const Settings<W> settings(layout.channels, weight, bias, eps, activation, param);
  const Affine<W> affine(settings, statistics, eps);
  T* data = static_cast<T*>(x.mutable_data_ptr());
  for_all(Pieces(layout, sizeof(T)), [&](int64_t, const Pieces::Piece& piece) {
    kernels<T, W>().normalize(layout.plane(), data + piece.offset, piece.rows, piece.columns,
                              from_channel(affine.coefficients(), piece.channel), settings.activation);
  });
}

template <typename T, typename W>
Tensor normalize_relu(const Tensor& x, const Tensor& statistics, const std::optional<Tensor>& weight,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& shortcut, double eps) {
  const Layout layout = layout_of(x);
  if (shortcut.has_value()) check_like(x, *shortcut, "shortcut");
  const Affine<W> affine(Settings<W>(layout.channels, weight, bias, eps, "relu", 0), statistics, eps);
  const Tensor result = torch::stable::empty_like(x);
  T *data = static_cast<T*>(x.mutable_data_ptr()), *out = static_cast<T*>(result.mutable_data_ptr());
  const T* added = shortcut.has_value() ? static_cast<const T*>(shortcut->const_data_ptr()) : nullptr;
  for_all(Pieces(layout, sizeof(T)), [&](int64_t, const Pieces::Piece& piece) {
    kernels<T, W>().normalize_relu(layout.plane(), data + piece.offset, added ? added + piece.offset : nullptr,
                                   out + piece.offset, piece.rows, piece.columns,
                                   from_channel(affine.coefficients(), piece.channel));
  });
  return result;
}

// Sums and the weight's gradient; where there is a shortcut, the gradient behind the ReLU is written to dz first.
template <typename T, typename W>
std::tuple<Tensor, Tensor> sums(const Tensor& grad, const Tensor& y, const std::optional<Tensor>& weight,
                                const std::optional<Tensor>& bias, double eps, const std::string& activation,
                                double param, const Tensor* shortcut = nullptr, const Tensor* dz = nullptr) {
  const Layout layout = layout_of(y);
  check_like(y, grad, "grad");
  if (shortcut) check_like(y, *shortcut, "shortcut");
  const int64_t channels = layout.channels;
  const Settings<W> settings(channels, weight, bias, eps, activation, param);
  const Coefficients<W> all{nullptr, nullptr, settings.bias.data(), settings.inverse_scale.data(), nullptr, nullptr};
  const Pieces pieces(layout, 2 * sizeof(T));
  const int64_t width = pieces.width();
  std::vector<W> firsts(pieces.count * width), seconds(pieces.count * width);
  const T *grads = static_cast<const T*>(grad.const_data_ptr()), *outs = static_cast<const T*>(y.const_data_ptr());
  const T* added = shortcut ? static_cast<const T*>(shortcut->const_data_ptr()) : nullptr;
  T* masked = dz ? static_cast<T*>(dz->mutable_data_ptr()) : nullptr;
  for_all(pieces, [&](int64_t index, const Pieces::Piece& piece) {
    const T* slopes = grads + piece.offset;
    if (added) {
      kernels<T, W>().mask(slopes, outs + piece.offset, added + piece.offset, masked + piece.offset, piece.size());
      slopes = masked + piece.offset;
    }
    kernels<T, W>().sums(layout.plane(), slopes, outs + piece.offset, piece.rows, piece.columns,
                         from_channel(all, piece.channel), settings.activation, &firsts[index * width],
                         &seconds[index * width]);
  });
  std::vector<double> first(channels), second(channels);
  for (int64_t index = 0; index < pieces.count; ++index)
    for (int64_t i = 0; i < width; ++i) {
      first[pieces[index].channel + i] += firsts[index * width + i];
      second[pieces[index].channel + i] += seconds[index * width + i];
    }
  const Tensor result = empty_vector<W>(2 * channels), dweight = empty_vector<W>(channels);
  W *out = mutable_numbers<W>(result), *slope = mutable_numbers<W>(dweight);
  const std::vector<W> signs = vector_of<W>(weight, channels, 1);
  for (int64_t c = 0; c < channels; ++c) {
    out[c] = static_cast<W>(first[c]);
    out[channels + c] = static_cast<W>(second[c]);
    slope[c] = out[channels + c] * static_cast<W>((signs[c] > 0) - (signs[c] < 0));
  }
  return {result, dweight};
}

template <typename T, typename W>
Tensor gradient(const Tensor& grad, const Tensor& y, const Tensor& statistics, const std::optional<Tensor>& sums,
                const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
                const std::string& activation, double param) {
  const Layout layout = layout_of(y);
  check_like(y, grad, "grad");
  const int64_t channels = layout.channels;
  const Settings<W> settings(channels, weight, bias, eps, activation, param);
  const std::vector<W> factor = factor_of(settings, statistics, eps);
  std::vector<W> means(2 * channels);
  if (sums.has_value()) {  // of one or several parts
    const W *part = numbers<W>(*sums, 2 * channels), count = numbers<W>(statistics, 2 * channels + 1)[2 * channels];
    const int64_t parts = sums->numel() / (2 * channels);
    STD_TORCH_CHECK(sums->numel() % (2 * channels) == 0, "sums must be (P, 2 C)");
    for (int64_t i = 0; i < 2 * channels; ++i) {
      for (int64_t p = 0; p < parts; ++p) means[i] += part[p * 2 * channels + i];
      means[i] /= count;
    }
  }
  const Coefficients<W> all{factor.data(), nullptr,      settings.bias.data(), settings.inverse_scale.data(),
                            means.data(),  means.data() + channels};
  const Tensor dx = torch::stable::empty_like(y);
  const T *grads = static_cast<const T*>(grad.const_data_ptr()), *outs = static_cast<const T*>(y.const_data_ptr());
  T* result = static_cast<T*>(dx.mutable_data_ptr());
  for_all(Pieces(layout, 3 * sizeof(T)), [&](int64_t, const Pieces::Piece& piece) {
    kernels<T, W>().gradient(layout.plane(), grads + piece.offset, outs + piece.offset, result + piece.offset,
                             piece.rows, piece.columns, from_channel(all, piece.channel), settings.activation);
  });
  return dx;
}

template <typename T_, typename W_>
struct Types {
  using T = T_;
  using W = W_;
};

// run(types) with those of the elements of x and of what is computed.
template <typename Run>
auto dispatch(const Tensor& x, const Run& run) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return run(Types<double, double>());
    case ScalarType::BFloat16:
      return run(Types<torch::headeronly::BFloat16, float>());
    case ScalarType::Half:
      return run(Types<torch::headeronly::Half, float>());
    default:
      STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "x must be of a floating-point type");
      return run(Types<float, float>());
  }
}

#define TYPED(name) name<typename decltype(types)::T, typename decltype(types)::W>

using Given = std::optional<Tensor>;

Tensor statistics_cpu(const Tensor& x, const Given& running_mean, const Given& running_var, double momentum) {
  return dispatch(x, [&](auto types) { return TYPED(statistics)(x, running_mean, running_var, momentum); });
}

Tensor merge_statistics_cpu(const Tensor& parts, const Given& running_mean, const Given& running_var,
                            double momentum) {
  STD_TORCH_CHECK(parts.dim() == 2 && parts.size(1) % 2 == 1, "parts must be (P, 2 C + 1)");
  return parts.scalar_type() == ScalarType::Double
             ? merge_statistics<double>(parts, running_mean, running_var, momentum)
             : merge_statistics<float>(parts, running_mean, running_var, momentum);
}

void normalize_cpu(const Tensor& x, const Tensor& statistics, const Given& weight, const Given& bias, double eps,
                   const std::string& activation, double param) {
  dispatch(x, [&](auto types) { TYPED(normalize)(x, statistics, weight, bias, eps, activation, param); });
}

Tensor normalize_relu_cpu(const Tensor& x, const Tensor& statistics, const Given& weight, const Given& bias,
                          const Given& shortcut, double eps) {
  return dispatch(x, [&](auto types) { return TYPED(normalize_relu)(x, statistics, weight, bias, shortcut, eps); });
}

std::tuple<Tensor, Tensor> sums_cpu(const Tensor& grad, const Tensor& y, const Given& weight, const Given& bias,
                                    double eps, const std::string& activation, double param) {
  return dispatch(y, [&](auto types) { return TYPED(sums)(grad, y, weight, bias, eps, activation, param); });
}

std::tuple<Tensor, Tensor, Tensor> sums_add_relu_cpu(const Tensor& grad, const Tensor& z, const Tensor& shortcut,
                                                     const Given& weight, const Given& bias, double eps) {
  const Tensor dz = torch::stable::empty_like(z);
  const auto [result, dweight] = dispatch(
      z, [&](auto types) { return TYPED(sums)(grad, z, weight, bias, eps, "identity", 0, &shortcut, &dz); });
  return {result, dweight, dz};
}

Tensor gradient_cpu(const Tensor& grad, const Tensor& y, const Tensor& statistics, const Given& sums,
                    const Given& weight, const Given& bias, double eps, const std::string& activation, double param) {
  return dispatch(y, [&](auto types) {
    return TYPED(gradient)(grad, y, statistics, sums, weight, bias, eps, activation, param);
  });
}

}  // namespace
}  // namespace libs

// The schemas are defined in Python (ops.py), so that they are there without this library as well.
STABLE_TORCH_LIBRARY_IMPL(libs, CPU, library) {
  library.impl("statistics", TORCH_BOX(&libs::statistics_cpu));
  library.impl("merge_statistics", TORCH_BOX(&libs::merge_statistics_cpu));
  library.impl("normalize_", TORCH_BOX(&libs::normalize_cpu));
  library.impl("normalize_relu_", TORCH_BOX(&libs::normalize_relu_cpu));
  library.impl("sums", TORCH_BOX(&libs::sums_cpu));
  library.impl("sums_add_relu", TORCH_BOX(&libs::sums_add_relu_cpu));
  library.impl("gradient", TORCH_BOX(&libs::gradient_cpu));
}

// Looked for in the file before it is loaded: a binary of other sources is not used (native.py).
extern "C" __attribute__((visibility("default"))) const char libs_sources[] = CSRC_HASH;

extern "C" __attribute__((visibility("default"))) const char* libs_instruction_set() {
  return libs::kernels<float, float>().name;
}
