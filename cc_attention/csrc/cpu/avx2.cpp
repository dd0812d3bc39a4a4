#if defined(__x86_64__)

#include "lines.h"
#include "target.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

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
