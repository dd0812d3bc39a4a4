// In-place activated batch normalisation on the CPU: registers the four steps with PyTorch's dispatcher.

#include "kernels.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace libs {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// How (B,C,...) lies in memory: as rows of C channels, or as B * C planes of one channel each.
struct Layout {
  int64_t channels, planes, rows, columns;
  bool plane() const { return planes > 0; }
};

// Whether the dimensions, listed from the outermost inwards, follow each other in memory without gaps.
bool dense(const Tensor& x, const std::vector<int64_t>& order) {
  int64_t stride = 1;
  for (auto dim = order.rbegin(); dim != order.rend(); ++dim) {
    if (x.size(*dim) != 1 && x.stride(*dim) != stride) return false;
    stride *= x.size(*dim);
  }
  return true;
}

Layout layout_of(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 2 && x.numel() > 0, "x must be (B,C,...) on the CPU and not empty");
  const int64_t channels = x.size(1), others = x.numel() / channels;
  std::vector<int64_t> usual{0, 1}, last{0};
  for (int64_t dim = 2; dim < x.dim(); ++dim) {
    usual.push_back(dim);
    last.push_back(dim);
  }
  last.push_back(1);
  if (dense(x, last)) return {channels, 0, others, channels};
  STD_TORCH_CHECK(dense(x, usual), "x must be contiguous or channels-last");
  return {channels, x.size(0) * channels, 1, others / x.size(0)};
}

void check_like(const Tensor& x, const Tensor& other, const char* name) {
  bool same = other.is_cpu() && other.dim() == x.dim() && other.scalar_type() == x.scalar_type();
  for (int64_t dim = 0; same && dim < x.dim(); ++dim)
    same = other.size(dim) == x.size(dim) && (x.size(dim) == 1 || other.stride(dim) == x.stride(dim));
  STD_TORCH_CHECK(same, name, " must have the shape, strides and dtype of y");
}

template <typename W>
constexpr ScalarType wide_type = ScalarType::Float;
template <>
constexpr ScalarType wide_type<double> = ScalarType::Double;

// A vector of C numbers that somebody gave, or the same number for each channel.
template <typename W>
std::vector<W> vector_of(const std::optional<Tensor>& given, int64_t channels, W otherwise) {
  std::vector<W> values(channels, otherwise);
  if (!given.has_value()) return values;
  STD_TORCH_CHECK(given->is_cpu() && given->numel() == channels && given->scalar_type() == wide_type<W>,
                  "statistics, weight and bias must hold one ", sizeof(W) == 8 ? "double" : "float", " a channel");
  const Tensor contiguous = torch::stable::contiguous(*given);
  const W* data = static_cast<const W*>(contiguous.const_data_ptr());
  std::copy(data, data + channels, values.begin());
  return values;
}

template <typename W>
struct Settings {
  Settings(int64_t channels, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
           const std::string& activation, double param)
      : scale(vector_of<W>(weight, channels, 1)),
        bias(vector_of<W>(bias, channels, 0)),
        inverse_scale(channels),
        activation{activation == "leaky_relu" ? Activation::leaky_relu
                   : activation == "elu"      ? Activation::elu
                                              : Activation::identity,
                   static_cast<W>(param)} {
    for (int64_t c = 0; c < channels; ++c) {
      if (weight.has_value()) scale[c] = std::abs(scale[c]) + static_cast<W>(eps);
      inverse_scale[c] = 1 / scale[c];
    }
  }
  std::vector<W> scale, bias, inverse_scale;
  ActivationParam<W> activation;
};

template <typename W>
std::vector<W> factor_of(const Settings<W>& settings, const Tensor& var, double eps) {
  std::vector<W> factor = vector_of<W>(var, static_cast<int64_t>(settings.scale.size()), 0);
  for (size_t c = 0; c < factor.size(); ++c) factor[c] = settings.scale[c] / std::sqrt(factor[c] + static_cast<W>(eps));
  return factor;
}

template <typename W>
Tensor tensor_of(const std::vector<W>& values) {
  const int64_t size[] = {static_cast<int64_t>(values.size())};
  Tensor tensor = torch::stable::empty({size, 1}, wide_type<W>);
  std::copy(values.begin(), values.end(), static_cast<W*>(tensor.mutable_data_ptr()));
  return tensor;
}

// Pieces of about 128 KiB, which stay in the L2 cache between two looks at them. Where they begin does not depend
// on the number of threads, nor does any sum.
struct Pieces {
  Pieces(const Layout& layout, int64_t element_size) : layout(layout) {
    constexpr int64_t bytes = 128 * 1024;
    const int64_t size = std::max<int64_t>(1, bytes / element_size);
    if (layout.plane()) {
      each = std::min(size, layout.columns);
      of_plane = (layout.columns + each - 1) / each;
      count = layout.planes * of_plane;
    } else {
      each = std::max<int64_t>(1, size / std::max<int64_t>(1, layout.columns));
      count = (layout.rows + each - 1) / each;
    }
  }
  struct Piece {
    int64_t offset, rows, columns, channel;
    int64_t size() const { return rows * columns; }
  };
  Piece operator[](int64_t index) const {
    if (!layout.plane()) {
      const int64_t begin = index * each;
      return {begin * layout.columns, std::min(each, layout.rows - begin), layout.columns, 0};
    }
    const int64_t plane = index / of_plane, begin = index % of_plane * each;
    return {plane * layout.columns + begin, 1, std::min(each, layout.columns - begin), plane % layout.channels};
  }
  // Numbers that a kernel gives for a piece: one for each channel in it.
  int64_t width() const { return layout.plane() ? 1 : layout.columns; }

  Layout layout;
  int64_t each = 0, of_plane = 1, count = 0;
};

template <typename Body>
void for_all(const Pieces& pieces, const Body& body) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), pieces.count);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t index; (index = next++) < pieces.count;) body(index, pieces[index]);
  });
}

template <typename W>
Coefficients<W> from_channel(const Coefficients<W>& c, int64_t channel) {
  const auto at = [channel](const W* p) { return p ? p + channel : nullptr; };
  return {at(c.factor), at(c.offset), at(c.bias), at(c.inverse_scale), at(c.mean_dz), at(c.mean_dz_xhat)};
}

template <typename T, typename W>
std::tuple<Tensor, Tensor> statistics(const Tensor& x) {
  const Layout layout = layout_of(x);
  const Pieces pieces(layout, sizeof(T));
  const int64_t width = pieces.width();
  std::vector<W> means(pieces.count * width), squares(pieces.count * width);
  const T* data = static_cast<const T*>(x.const_data_ptr());
  for_all(pieces, [&](int64_t index, const Pieces::Piece& piece) {
    kernels<T, W>().statistics(layout.plane(), data + piece.offset, piece.rows, piece.columns, &means[index * width],
                               &squares[index * width]);
  });
  // The pieces' means and squared deviations, joined one after another (Chan et al., 1979).
  std::vector<double> count(layout.channels), mean(layout.channels), square(layout.channels);
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
  std::vector<W> averages(mean.begin(), mean.end()), variances(layout.channels);
  for (int64_t c = 0; c < layout.channels; ++c) variances[c] = static_cast<W>(square[c] / count[c]);
  return {tensor_of(averages), tensor_of(variances)};
}

template <typename T, typename W>
void normalize(const Tensor& x, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
               const std::optional<Tensor>& bias, double eps, const std::string& activation, double param) {
  const Layout layout = layout_of(x);
  const Settings<W> settings(layout.channels, weight, bias, eps, activation, param);
  const std::vector<W> factor = factor_of(settings, var, eps), means = vector_of<W>(mean, layout.channels, 0);
  std::vector<W> offset(layout.channels);
  for (int64_t c = 0; c < layout.channels; ++c) offset[c] = settings.bias[c] - means[c] * factor[c];
  const Coefficients<W> all{factor.data(), offset.data(), nullptr, nullptr, nullptr, nullptr};
  T* data = static_cast<T*>(x.mutable_data_ptr());
  for_all(Pieces(layout, sizeof(T)), [&](int64_t, const Pieces::Piece& piece) {
    kernels<T, W>().normalize(layout.plane(), data + piece.offset, piece.rows, piece.columns,
                              from_channel(all, piece.channel), settings.activation);
  });
}

template <typename T, typename W>
std::tuple<Tensor, Tensor> sums(const Tensor& grad, const Tensor& y, const std::optional<Tensor>& weight,
                                const std::optional<Tensor>& bias, double eps, const std::string& activation,
                                double param) {
  const Layout layout = layout_of(y);
  check_like(y, grad, "grad");
  const Settings<W> settings(layout.channels, weight, bias, eps, activation, param);
  const Coefficients<W> all{nullptr, nullptr, settings.bias.data(), settings.inverse_scale.data(), nullptr, nullptr};
  const Pieces pieces(layout, 2 * sizeof(T));
  const int64_t width = pieces.width();
  std::vector<W> firsts(pieces.count * width), seconds(pieces.count * width);
  const T *grads = static_cast<const T*>(grad.const_data_ptr()), *outs = static_cast<const T*>(y.const_data_ptr());
  for_all(pieces, [&](int64_t index, const Pieces::Piece& piece) {
    kernels<T, W>().sums(layout.plane(), grads + piece.offset, outs + piece.offset, piece.rows, piece.columns,
                         from_channel(all, piece.channel), settings.activation, &firsts[index * width],
                         &seconds[index * width]);
  });
  std::vector<double> first(layout.channels), second(layout.channels);
  for (int64_t index = 0; index < pieces.count; ++index)
    for (int64_t i = 0; i < width; ++i) {
      first[pieces[index].channel + i] += firsts[index * width + i];
      second[pieces[index].channel + i] += seconds[index * width + i];
    }
  return {tensor_of(std::vector<W>(first.begin(), first.end())),
          tensor_of(std::vector<W>(second.begin(), second.end()))};
}

template <typename T, typename W>
Tensor gradient(const Tensor& grad, const Tensor& y, const Tensor& var, const std::optional<Tensor>& weight,
                const std::optional<Tensor>& bias, const Tensor& mean_dz, const Tensor& mean_dz_xhat, double eps,
                const std::string& activation, double param) {
  const Layout layout = layout_of(y);
  check_like(y, grad, "grad");
  const Settings<W> settings(layout.channels, weight, bias, eps, activation, param);
  const std::vector<W> factor = factor_of(settings, var, eps), first = vector_of<W>(mean_dz, layout.channels, 0),
                       second = vector_of<W>(mean_dz_xhat, layout.channels, 0);
  const Coefficients<W> all{factor.data(), nullptr,      settings.bias.data(), settings.inverse_scale.data(),
                            first.data(),  second.data()};
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

std::tuple<Tensor, Tensor> statistics_cpu(const Tensor& x) {
  return dispatch(x, [&](auto types) { return TYPED(statistics)(x); });
}

void normalize_cpu(const Tensor& x, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
                   const std::optional<Tensor>& bias, double eps, const std::string& activation, double param) {
  dispatch(x, [&](auto types) { TYPED(normalize)(x, mean, var, weight, bias, eps, activation, param); });
}

std::tuple<Tensor, Tensor> sums_cpu(const Tensor& grad, const Tensor& y, const std::optional<Tensor>& weight,
                                    const std::optional<Tensor>& bias, double eps, const std::string& activation,
                                    double param) {
  return dispatch(y, [&](auto types) { return TYPED(sums)(grad, y, weight, bias, eps, activation, param); });
}

Tensor gradient_cpu(const Tensor& grad, const Tensor& y, const Tensor& var, const std::optional<Tensor>& weight,
                    const std::optional<Tensor>& bias, const Tensor& mean_dz, const Tensor& mean_dz_xhat, double eps,
                    const std::string& activation, double param) {
  return dispatch(y, [&](auto types) {
    return TYPED(gradient)(grad, y, var, weight, bias, mean_dz, mean_dz_xhat, eps, activation, param);
  });
}

}  // namespace
}  // namespace libs

// The schemas are defined in Python (ops.py), so that they are there without this library as well.
STABLE_TORCH_LIBRARY_IMPL(libs, CPU, library) {
  library.impl("statistics", TORCH_BOX(&libs::statistics_cpu));
  library.impl("normalize_", TORCH_BOX(&libs::normalize_cpu));
  library.impl("sums", TORCH_BOX(&libs::sums_cpu));
  library.impl("gradient", TORCH_BOX(&libs::gradient_cpu));
}

// Looked for in the file before it is loaded: a binary of other sources is not used (native.py).
extern "C" __attribute__((visibility("default"))) const char libs_sources[] = CSRC_HASH;

extern "C" __attribute__((visibility("default"))) const char* libs_instruction_set() {
  return libs::kernels<float, float>().name;
}
