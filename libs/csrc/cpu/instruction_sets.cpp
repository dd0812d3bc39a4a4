// The same loops compiled for several instruction sets, of which the processor's best is taken at run time: one
// binary runs everywhere and is fast everywhere.

#include "kernels.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>

#define TARGET_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define TARGET_BEGIN(features) \
  TARGET_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define TARGET_END TARGET_PRAGMA(clang attribute pop)
#else
#define TARGET_BEGIN(features) TARGET_PRAGMA(GCC push_options) TARGET_PRAGMA(GCC target(features))
#define TARGET_END TARGET_PRAGMA(GCC pop_options)
#endif

#if defined(__x86_64__)

namespace libs::avx512 {
constexpr const char* NAME = "AVX-512";
TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#include "loops.inc"
TARGET_END
}  // namespace libs::avx512

namespace libs::avx2 {
constexpr const char* NAME = "AVX2";
TARGET_BEGIN("avx2,fma,f16c")
#include "loops.inc"
TARGET_END
}  // namespace libs::avx2

#endif

namespace libs::baseline {
constexpr const char* NAME = "baseline";
#include "loops.inc"
}  // namespace libs::baseline

namespace libs {

template <typename T, typename W>
const Kernels<T, W>& kernels() {
  static const Kernels<T, W>& best = []() -> const Kernels<T, W>& {
#if defined(__x86_64__)
    const char* wish = std::getenv("LIBS_KERNELS");
    const auto at_most = [wish](const char* name) { return !wish || !std::strcmp(wish, name); };
    __builtin_cpu_init();
    if (at_most("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return avx512::table<T, W>;
    if ((at_most("avx512") || at_most("avx2")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      return avx2::table<T, W>;
#endif
    return baseline::table<T, W>;
  }();
  return best;
}

template const Kernels<float, float>& kernels<float, float>();
template const Kernels<double, double>& kernels<double, double>();
template const Kernels<torch::headeronly::BFloat16, float>& kernels<torch::headeronly::BFloat16, float>();
template const Kernels<torch::headeronly::Half, float>& kernels<torch::headeronly::Half, float>();

}  // namespace libs
