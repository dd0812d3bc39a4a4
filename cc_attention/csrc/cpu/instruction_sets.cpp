// The same source is compiled for several instruction sets, a file each, of which the processor's best is taken at
// run time: one binary runs everywhere and is fast everywhere.

#include "lines.h"

#include <cstdlib>
#include <cstring>

namespace cc_attention {

namespace avx512 {
template <typename T>
const LineKernels<T>& kernels();
}
namespace avx2 {
template <typename T>
const LineKernels<T>& kernels();
}
namespace baseline {
template <typename T>
const LineKernels<T>& kernels();
}

template <typename T>
const LineKernels<T>& line_kernels() {
  static const LineKernels<T>& best = []() -> const LineKernels<T>& {
#if defined(__x86_64__)
    const char* wish = std::getenv("CC_ATTENTION_KERNELS");
    const auto at_most = [wish](const char* name) { return !wish || !std::strcmp(wish, name); };
    __builtin_cpu_init();
    if (at_most("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return avx512::kernels<T>();
    if ((at_most("avx512") || at_most("avx2")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      return avx2::kernels<T>();
#endif
    return baseline::kernels<T>();
  }();
  return best;
}

template const LineKernels<float>& line_kernels<float>();
template const LineKernels<double>& line_kernels<double>();

}  // namespace cc_attention
