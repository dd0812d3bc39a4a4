#if defined(__x86_64__)

#include "lines.h"
#include "target.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

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

#endif
