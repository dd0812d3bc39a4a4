// The same loops are compiled for several instruction sets, a file each, of which the processor's best is taken at run
// time: one binary runs everywhere and is fast everywhere.

#include "kernels.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdlib>
#include <cstring>

namespace libs {

namespace avx512 {
template <typename T, typename W>
const Kernels<T, W>& kernels();
}
namespace avx2 {
template <typename T, typename W>
const Kernels<T, W>& kernels();
}
namespace baseline {
template <typename T, typename W>
const Kernels<T, W>& kernels();
}

template <typename T, typename W>
const Kernels<T, W>& kernels() {
  static const Kernels<T, W>& best = []() -> const Kernels<T, W>& {
#if defined(__x86_64__)
    const char* wish = std::getenv("LIBS_KERNELS");
    const auto at_most = [wish](const char* name) { return !wish || !std::strcmp(wish, name); };
    __builtin_cpu_init();
    if (at_most("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return avx512::kernels<T, W>();
    if ((at_most("avx512") || at_most("avx2")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      return avx2::kernels<T, W>();
#endif
    return baseline::kernels<T, W>();
  }();
  return best;
}

template const Kernels<float, float>& kernels<float, float>();
template const Kernels<double, double>& kernels<double, double>();
template const Kernels<torch::headeronly::BFloat16, float>& kernels<torch::headeronly::BFloat16, float>();
template const Kernels<torch::headeronly::Half, float>& kernels<torch::headeronly::Half, float>();

}  // namespace libs
