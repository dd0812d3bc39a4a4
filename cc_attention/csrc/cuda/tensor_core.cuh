// The engine for tensor cores (sm_80 and later): tiles of half types, or of fp32 multiplied in TF32.
// (The members of an engine are explained in portable.cuh.)
#pragma once

#include "fragments.cuh"

namespace cc_attention::cuda {

template <typename Element_>
struct TensorCore {
  using Element = Element_;
  using Fragment = Fragments<Element>;
  static constexpr bool AVAILABLE = CC_ATTENTION_TENSOR_CORES;
  static constexpr int TILE = 128;
  static constexpr int THREADS = 256;
  static constexpr int MAX_SHARED = 99 * 1024;  // on sm_86, the least of those with tensor cores for bf16
  static constexpr int BLOCKS_PER_SM = 2;
  // In fp32 the weights take 66 KiB: depths are what is left for the buffers, and that is used to the last byte.
  static constexpr int DEPTH = sizeof(Element) == 2 ? 32 : 8;
  static constexpr int GATHER_DEPTH = sizeof(Element) == 2 ? 64 : 32;
  // Rows start 4 banks further than the last one did (12 in products of fp32): a fragment meets no bank twice.
  static constexpr int PAD = 16 / static_cast<int>(sizeof(Element));
  static constexpr int GROUPS = 8;
  static constexpr int VECTOR = Fragment::VECTOR;
  static constexpr bool INTERLEAVED = Fragment::INTERLEAVED;

  // 4×2 warps, each of 2×4 squares of 16×16 elements. Squares are dealt out in turn, so that warps have
  // equal work when a line fills only part of the tile.
  static constexpr int ROWS = 4, COLUMNS = 16;
  struct Accumulator {
    float value[ROWS][COLUMNS];
  };
  __device__ static int lane() { return static_cast<int>(threadIdx.x % 32); }
  __device__ static int row_square(int m) { return static_cast<int>(threadIdx.x / 64) + 4 * m; }
  __device__ static int column_square(int n) { return static_cast<int>(threadIdx.x / 32) % 2 + 2 * n; }
  __device__ static int row(int i) { return 16 * row_square(i / 2) + Fragment::row(lane(), i % 2); }
  __device__ static int column(int j) { return 16 * column_square(j / 4) + Fragment::column(lane(), j % 4); }
  __device__ static int group() { return static_cast<int>(threadIdx.x / 32) % 2 * 4 + lane() % 4; }

  // Half types round when they are narrowed.
  static constexpr bool ROUNDS = Same<Element, float>::value;
  __device__ static float rounded(float factor) {
#if CC_ATTENTION_TENSOR_CORES
    return __uint_as_float(Fragments<float>::round(factor));
#else
    return factor;
#endif
  }

  // How many of the warp's squares of rows and of columns lie within the counts is settled before the loop. Columns
  // are taken four or two squares at a time: tiles are zero beyond their segment. Narrow loops are unrolled, so that
  // each has 8 products of squares.
  template <bool A_TRANSPOSED, bool B_TRANSPOSED, bool A_ROUNDED>
  __device__ static void multiply(Accumulator& accumulator, const Element* a, int lda, const Element* b, int ldb,
                                  int depth, int rows, int columns) {
    if (16 * row_square(0) >= rows || 16 * column_square(0) >= columns) return;  // the same for all lanes of the warp
    a += 16 * row_square(0) * (A_TRANSPOSED ? 1 : lda);
    b += 16 * column_square(0) * (B_TRANSPOSED ? ldb : 1);
    const bool two_rows = 16 * row_square(1) < rows, four_columns = 16 * column_square(2) < columns;
    if (two_rows) {
      if (four_columns) {
        multiply_squares<2, 4, A_TRANSPOSED, B_TRANSPOSED, A_ROUNDED>(accumulator, a, lda, b, ldb, depth);
      } else {
        multiply_squares<2, 2, A_TRANSPOSED, B_TRANSPOSED, A_ROUNDED>(accumulator, a, lda, b, ldb, depth);
      }
    } else if (four_columns) {
      multiply_squares<1, 4, A_TRANSPOSED, B_TRANSPOSED, A_ROUNDED>(accumulator, a, lda, b, ldb, depth);
    } else {
      multiply_squares<1, 2, A_TRANSPOSED, B_TRANSPOSED, A_ROUNDED>(accumulator, a, lda, b, ldb, depth);
    }
  }

  // The warp's first M×N squares; a and b begin at the first one's row and column.
  template <int M, int N, bool A_TRANSPOSED, bool B_TRANSPOSED, bool A_ROUNDED>
  __device__ static void multiply_squares(Accumulator& accumulator, const Element* a, int lda, const Element* b,
                                          int ldb, int depth) {
#if CC_ATTENTION_TENSOR_CORES
#pragma unroll(8 / (M * N))
    for (int k = 0; k < depth; k += Fragment::STEP) {
      unsigned a_fragment[M][4];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        Fragment::template load<false, A_TRANSPOSED, A_ROUNDED>(a_fragment[m], a + 64 * m * (A_TRANSPOSED ? 1 : lda),
                                                                lda, lane());
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
        unsigned b_fragment[4];
        Fragment::template load<true, !B_TRANSPOSED, true>(b_fragment, b + 32 * n * (B_TRANSPOSED ? ldb : 1), ldb,
                                                           lane());
#pragma unroll
        for (int m = 0; m < M; ++m) {
          Fragment::multiply_add(&accumulator.value[2 * m][4 * n], &accumulator.value[2 * m + 1][4 * n],
                                 a_fragment[m], b_fragment);
        }
      }
      a += Fragment::STEP * (A_TRANSPOSED ? lda : 1);
      b += Fragment::STEP * (B_TRANSPOSED ? 1 : ldb);
    }
#endif
  }
};

}  // namespace cc_attention::cuda
