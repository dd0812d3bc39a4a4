#if defined(__x86_64__)

#include "kernels.h"
#include "target.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>

namespace libs::avx2 {
constexpr const char* NAME = "AVX2";
TARGET_BEGIN("avx2,fma,f16c")
#include "loops.inc"
TARGET_END
}  // namespace libs::avx2

#endif
