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

namespace libs::avx512 {
constexpr const char* NAME = "AVX-512";
TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#include "loops.inc"
TARGET_END
}  // namespace libs::avx512

#endif
