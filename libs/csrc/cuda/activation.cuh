// The activation y = phi(z), its inverse and its slope.
#pragma once

#include "numbers.cuh"

namespace libs::cuda {

enum class Activation { IDENTITY, LEAKY_RELU, ELU };

template <Activation A, typename W>
__device__ W activated(W z, W param) {
  if constexpr (A == Activation::LEAKY_RELU) return z > 0 ? z : z * param;
  if constexpr (A == Activation::ELU) return z > 0 ? z : param * exp_minus_1(z);
  return z;
}

// z from y; `inverse` is 1 / param.
template <Activation A, typename W>
__device__ W inverted(W y, W inverse) {
  if constexpr (A == Activation::LEAKY_RELU) return y > 0 ? y : y * inverse;
  // Where the exponential has been rounded away, z is not known but finite, and dz is 0.
  if constexpr (A == Activation::ELU) return y > 0 ? y : log_of_1_plus(larger(y * inverse, epsilon(y) - 1));
  return y;
}

// The slope at z, from y.
template <Activation A, typename W>
__device__ W slope(W y, W param) {
  if constexpr (A == Activation::LEAKY_RELU) return y > 0 ? W(1) : param;
  if constexpr (A == Activation::ELU) return y > 0 ? W(1) : y + param;
  return 1;
}

}  // namespace libs::cuda
