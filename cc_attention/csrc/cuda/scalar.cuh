// Number types of the kernels and their conversions, without any toolkit header, so that NVRTC alone (and
// for the tests a plain C++ compiler, see tests/cc_attention/cuda_emulator.h) can compile everything here.
#pragma once

namespace cc_attention::cuda {

using Index = long long;  // of elements and positions: tensors may hold more than 2^31 elements

struct Half {
  unsigned short bits;
};
struct BFloat16 {
  unsigned short bits;
};

// What energies, softmax and sums are computed and kept in.
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

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }

__device__ inline float widen(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

__device__ inline float widen(Half x) {
#ifdef CC_ATTENTION_EMULATED
  return emulator::half_to_float(x.bits);
#else
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#endif
}

template <typename T>
struct Narrow {
  __device__ static T from(Wide<T> x) { return x; }
};

template <>
struct Narrow<Half> {
  __device__ static Half from(float x) {
    Half result;
#ifdef CC_ATTENTION_EMULATED
    result.bits = emulator::float_to_half(x);
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
#endif
    return result;
  }
};

template <>
struct Narrow<BFloat16> {
  __device__ static BFloat16 from(float x) {
    BFloat16 result;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
#else
    unsigned bits = __float_as_uint(x);
    // To nearest, ties to even; a NaN must not be rounded up into an infinity.
    bits = x == x ? bits + 0x7fffu + ((bits >> 16) & 1u) : 0x7fff0000u;
    result.bits = static_cast<unsigned short>(bits >> 16);
#endif
    return result;
  }
};

// N neighbours in memory, loaded and stored in one instruction.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T item[N];
};

// The same number, but the compiler does not know it: what is made of it is not shared with what was made before.
__device__ inline int unknown(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
template <typename T>
__device__ T* unknown(T* x) {  // in global memory
#ifndef CC_ATTENTION_EMULATED
  asm volatile("" : "+l"(x));
  __builtin_assume(__isGlobal(x));
#endif
  return x;
}

__device__ inline float minus_infinity() { return __uint_as_float(0xff800000u); }

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }

template <typename T>
__host__ __device__ constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
__host__ __device__ constexpr T larger(T a, T b) {
  return a < b ? b : a;
}
__host__ __device__ constexpr int ceil_div(int a, int b) { return a / b + (a % b != 0); }

}  // namespace cc_attention::cuda
