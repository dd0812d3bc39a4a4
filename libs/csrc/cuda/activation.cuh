// The activation y = phi(z), its inverse and its slope. With a ReLU behind the layer (RELU; ADD_RELU where a
// shortcut is added before it) memory holds z, and the slope is ReLU's.
#pragma once

#include "numbers.cuh"

namespace libs::cuda {

enum class Activation { IDENTITY, LEAKY_RELU, ELU, RELU, ADD_RELU };

__host__ __device__ constexpr bool has_relu(Activation a) { return a == Activation::RELU || a == Activation::ADD_RELU; }


template <Activation A, typename W>
__device__ W activated(W z, W param) {
  if constexpr (A == Activation::LEAKY_RELU) return z > 0 ? z : z * param;
  if constexpr (A == Activation::ELU) return z > 0 ? z : param * exp_minus_1(z);
  return z;
}

// z from y, which memory holds as T; `inverse` is 1 / param.
template <Activation A, typename T, typename W>
__device__ W inverted(W y, W inverse) {
  if constexpr (A == Activation::LEAKY_RELU) return y > 0 ? y : y * inverse;
  // Where y has been rounded to -param, z is about the logarithm of that rounding, or less.
  if constexpr (A == Activation::ELU) return y > 0 ? y : log_of_1_plus(larger(y * inverse, W(ROUNDING<T>) - 1));
  return y;
}

// The slope at z, from y; with ADD_RELU, from z + shortcut.
template <Activation A, typename W>
__device__ W slope(W y, W param) {
  if constexpr (A == Activation::LEAKY_RELU) return y > 0 ? W(1) : param;
  if constexpr (A == Activation::ELU) return y > 0 ? W(1) : y + param;
  if constexpr (has_relu(A)) return y <= 0 ? W(0) : W(1);
  return 1;
}

}  // namespace libs::cuda
