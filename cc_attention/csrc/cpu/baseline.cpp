#include "lines.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

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
