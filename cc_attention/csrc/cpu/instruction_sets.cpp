// The same source compiled for several instruction sets, of which the processor's best is taken at run time:
// one binary runs everywhere and is fast everywhere. (-march=native would not run on an older machine, and
// GCC's target_clones cannot give each set a tile of its own size.)

#include "lines.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__clang__)
#define TARGET_PRAGMA(x) _Pragma(#x)
#define TARGET_BEGIN(features) TARGET_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define TARGET_END TARGET_PRAGMA(clang attribute pop)
#else
#define TARGET_PRAGMA(x) _Pragma(#x)
#define TARGET_BEGIN(features) TARGET_PRAGMA(GCC push_options) TARGET_PRAGMA(GCC target(features))
#define TARGET_END TARGET_PRAGMA(GCC pop_options)
#endif

#if defined(__x86_64__)

// 32 registers of 64 bytes: 6 x 4 sums, 4 vectors of B and a factor.
namespace cc_attention::avx512 {
constexpr const char* NAME = "AVX-512";
constexpr int VECTOR_BYTES = 64, TILE_ROWS = 6, TILE_VECTORS = 4;
TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma")
#include "simd.inc"
#include "matrix.inc"
#include "line_kernels.inc"
TARGET_END
}  // namespace cc_attention::avx512

// 16 registers of 32 bytes: 6 x 2 sums, 2 vectors of B and a factor.
namespace cc_attention::avx2 {
constexpr const char* NAME = "AVX2";
constexpr int VECTOR_BYTES = 32, TILE_ROWS = 6, TILE_VECTORS = 2;
TARGET_BEGIN("avx2,fma")
#include "simd.inc"
#include "matrix.inc"
#include "line_kernels.inc"
TARGET_END
}  // namespace cc_attention::avx2

#endif

// What every processor of the architecture has: SSE2 (16 registers of 16 bytes), NEON (32 of them).
namespace cc_attention::baseline {
constexpr const char* NAME = "baseline";
#if defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, TILE_ROWS = 6, TILE_VECTORS = 4;
#else
constexpr int VECTOR_BYTES = 16, TILE_ROWS = 4, TILE_VECTORS = 2;
#endif
#include "simd.inc"
#include "matrix.inc"
#include "line_kernels.inc"
}  // namespace cc_attention::baseline

namespace cc_attention {

template <typename T>
const LineKernels<T>& line_kernels() {
  static const LineKernels<T>& best = []() -> const LineKernels<T>& {
#if defined(__x86_64__)
    const char* wish = std::getenv("CC_ATTENTION_KERNELS");
    const auto at_most = [wish](const char* name) { return !wish || !std::strcmp(wish, name); };
    __builtin_cpu_init();
    if (at_most("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return avx512::kernels<T>;
    if ((at_most("avx512") || at_most("avx2")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      return avx2::kernels<T>;
#endif
    return baseline::kernels<T>;
  }();
  return best;
}

template const LineKernels<float>& line_kernels<float>();
template const LineKernels<double>& line_kernels<double>();

}  // namespace cc_attention
