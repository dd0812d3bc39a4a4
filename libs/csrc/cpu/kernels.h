// The loops of in-place activated batch normalisation over a piece of a tensor; compiled once for each
// instruction set. With x^ = (x - mean) / sqrt(var + eps): z = x^ * scale + bias, y = activation(z). With a ReLU
// behind the layer, y is z, and the slope of the activation is ReLU's.
//
// A piece is a matrix of `rows` x `columns`, side by side in memory. Channels-last, the columns are the
// channels; otherwise a piece is a plane of one channel. T is what memory holds, W what is computed in.
#pragma once

#include <cstdint>

namespace libs {

enum class Activation { identity, leaky_relu, elu, relu };

template <typename W>
struct ActivationParam {
  Activation kind;
  W param;
};

// Of each channel. Kernels of a plane read element 0 only.
template <typename W>
struct Coefficients {
  const W* factor;         // scale / sqrt(var + eps)
  const W* offset;         // bias - mean * factor
  const W* bias;
  const W* inverse_scale;  // 1 / scale
  const W* mean_dz;
  const W* mean_dz_xhat;
};

template <typename T, typename W>
struct Kernels {
  const char* name;
  // Mean and sum of squared deviations of each column (plane: of all).
  void (*statistics)(bool plane, const T* x, int64_t rows, int64_t columns, W* mean, W* squares);
  void (*normalize)(bool plane, T* x, int64_t rows, int64_t columns, const Coefficients<W>&, ActivationParam<W>);
  // out = relu(z), or relu(z + shortcut) unless that is null; x becomes z.
  void (*normalize_relu)(bool plane, T* x, const T* shortcut, T* out, int64_t rows, int64_t columns,
                         const Coefficients<W>&);
  // dz = grad where z + shortcut > 0, else 0.
  void (*mask)(const T* grad, const T* z, const T* shortcut, T* dz, int64_t size);
  // Sums of dz and of dz * x^ of each column (plane: of all).
  void (*sums)(bool plane, const T* grad, const T* y, int64_t rows, int64_t columns, const Coefficients<W>&,
               ActivationParam<W>, W* sum_dz, W* sum_dz_xhat);
  void (*gradient)(bool plane, const T* grad, const T* y, T* dx, int64_t rows, int64_t columns,
                   const Coefficients<W>&, ActivationParam<W>);
};

// The best that this processor runs.
template <typename T, typename W>
const Kernels<T, W>& kernels();

}  // namespace libs
