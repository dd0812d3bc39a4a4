// Number types of the kernels and the few functions of them that are needed, without any toolkit header: NVRTC
// alone can compile everything here, and for the tests a plain C++ compiler (see tests/libs/abn_emulated.cpp).
#pragma once

namespace libs::cuda {

using Index = long long;  // tensors may hold more than 2^31 elements

struct Half {
  unsigned short bits;
  Half() = default;
  __device__ explicit Half(float x) {
#ifdef LIBS_EMULATED
    bits = emulator::float_to_half(x);
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
#endif
  }
  __device__ explicit operator float() const {
#ifdef LIBS_EMULATED
    return emulator::half_to_float(bits);
#else
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
#endif
  }
};

struct BFloat16 {
  unsigned short bits;
  BFloat16() = default;
  __device__ explicit BFloat16(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
#else
    // To nearest, ties to even; a NaN stays one, where rounding could make an infinity of it.
    const unsigned word = __float_as_uint(x);
    bits = static_cast<unsigned short>(x == x ? (word + 0x7fffu + (word >> 16 & 1u)) >> 16 : 0x7fffu);
#endif
  }
  __device__ explicit operator float() const { return __uint_as_float(static_cast<unsigned>(bits) << 16); }
};

// What is computed in, and what statistics, weight, bias and sums are held in.
template <typename T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <typename T>
using Wide = typename WideOf<T>::type;

// V neighbours in memory, loaded and stored in one instruction.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T item[V];
};

__device__ inline float square_root(float x) { return sqrtf(x); }
__device__ inline double square_root(double x) { return sqrt(x); }
__device__ inline float exp_minus_1(float x) { return expm1f(x); }
__device__ inline double exp_minus_1(double x) { return expm1(x); }
__device__ inline float log_of_1_plus(float x) { return log1pf(x); }
__device__ inline double log_of_1_plus(double x) { return log1p(x); }

// A distance from 1 that is about lost when T rounds, and that Wide<T> can subtract from 1.
template <typename T>
constexpr float ROUNDING = 0x1p-24f;
template <>
constexpr double ROUNDING<double> = 0x1p-53;
template <>
constexpr float ROUNDING<Half> = 0x1p-12f;
template <>
constexpr float ROUNDING<BFloat16> = 0x1p-9f;

template <typename T>
__host__ __device__ constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
__host__ __device__ constexpr T larger(T a, T b) {
  return a < b ? b : a;
}
__host__ __device__ constexpr Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }

}  // namespace libs::cuda
