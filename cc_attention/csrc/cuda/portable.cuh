// The engine for every GPU from sm_50 on: products of tiles on CUDA cores, in fp32 or fp64.
//
// An engine tells how a block of threads multiplies two tiles that lie in shared memory:
//   Element       what tiles in shared memory hold
//   Accumulator   a TILE×TILE result in registers: each thread holds ROWS×COLUMNS of its elements, the
//                 element value[i][j] being that of row(i) and column(j)
//   multiply()    adds a product of two tiles to the accumulator
//   ROUNDS, rounded()  whether multiply() takes rounded factors only, as rounded() makes them. It rounds those of A
//                 itself unless A_ROUNDED; those of B are rounded in any case
//   INTERLEAVED   whether multiply() takes B, where neither is transposed, with its rows interleaved()
//   DEPTH, GATHER_DEPTH  how many channels, or positions, of a sum are in shared memory at a time
//   GROUPS        how many threads share a row; group() is this thread's number among them
//   VECTOR        how many of a thread's consecutive columns are neighbours
//   AVAILABLE     whether the architecture that is compiled for has it
#pragma once

#include "scalar.cuh"

namespace cc_attention::cuda {

template <typename Element_>
struct Portable {
  using Element = Element_;
  static constexpr bool AVAILABLE = true;
  static constexpr int TILE = 64;  // positions of a segment, channels of a chunk
  static constexpr int THREADS = 64;
  static constexpr int MAX_SHARED = 48 * 1024;                          // what every GPU gives a block
  static constexpr int BLOCKS_PER_SM = sizeof(Element) == 4 ? 6 : 4;    // wanted at least
  static constexpr int DEPTH = 32 / static_cast<int>(sizeof(Element));  // one 32-byte sector of a position
  static constexpr int GATHER_DEPTH = 2 * DEPTH;
  static constexpr int PAD = 16 / static_cast<int>(sizeof(Element));    // keeps rows in different banks
  static constexpr int GROUPS = 8;
  static constexpr int VECTOR = 1;
  static constexpr bool INTERLEAVED = false;

  // 8×8 threads of 8×8 elements. Rows go in pairs, which weights that are transposed are loaded in; columns eight
  // apart, so that the loads of a quarter warp along k, 16 bytes each, meet no bank twice.
  static constexpr int ROWS = 8, COLUMNS = 8;
  struct Accumulator {
    Element value[ROWS][COLUMNS];
  };
  __device__ static int row(int i) { return static_cast<int>(threadIdx.x / 8) * 2 + i % 2 + i / 2 * 16; }
  __device__ static int column(int j) { return static_cast<int>(threadIdx.x % 8) + 8 * j; }
  __device__ static int group() { return static_cast<int>(threadIdx.x % 8); }

  static constexpr bool ROUNDS = false;

  // accumulator += A·B over `depth` (rounded up to DEPTH; tiles are padded with zeros). A is stored as
  // A[row][k], or A[k][row] when transposed; B as B[k][column], or B[column][k] when transposed. Rows and
  // columns from the given counts on are not needed.
  template <bool A_TRANSPOSED, bool B_TRANSPOSED, bool>
  __device__ static void multiply(Accumulator& accumulator, const Element* a, int lda, const Element* b, int ldb,
                                  int depth, int rows, int) {
    a += A_TRANSPOSED ? row(0) : row(0) * lda;
    b += B_TRANSPOSED ? column(0) * ldb : column(0);
    if (rows > 48) {  // the same for all threads
      multiply_rows<8, A_TRANSPOSED, B_TRANSPOSED>(accumulator, a, lda, b, ldb, depth);
    } else if (rows > 32) {
      multiply_rows<6, A_TRANSPOSED, B_TRANSPOSED>(accumulator, a, lda, b, ldb, depth);
    } else if (rows > 16) {
      multiply_rows<4, A_TRANSPOSED, B_TRANSPOSED>(accumulator, a, lda, b, ldb, depth);
    } else {
      multiply_rows<2, A_TRANSPOSED, B_TRANSPOSED>(accumulator, a, lda, b, ldb, depth);
    }
  }

  // The thread's first COUNT rows; a and b begin at its first row and column.
  template <int COUNT, bool A_TRANSPOSED, bool B_TRANSPOSED>
  __device__ static void multiply_rows(Accumulator& accumulator, const Element* a, int lda, const Element* b,
                                       int ldb, int depth) {
    constexpr int TERMS = 16 / static_cast<int>(sizeof(Element));  // that lie in a load of 16 bytes
    static_assert(DEPTH % TERMS == 0, "the tile is zero to the last of them");
    using Terms = Pack<Element, TERMS>;
    using Pair = Pack<Element, 2>;
#pragma unroll 1
    for (int k = 0; k < depth; k += TERMS) {
      Terms columns[COLUMNS];
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        if constexpr (B_TRANSPOSED) {
          columns[j] = *reinterpret_cast<const Terms*>(b + 8 * j * ldb + k);
        } else {
#pragma unroll
          for (int t = 0; t < TERMS; ++t) columns[j].item[t] = b[(k + t) * ldb + 8 * j];
        }
      }
#pragma unroll
      for (int i = 0; i < COUNT; i += 2) {
        Terms pair[2];
        if constexpr (A_TRANSPOSED) {
#pragma unroll
          for (int t = 0; t < TERMS; ++t) {
            const Pair both = *reinterpret_cast<const Pair*>(a + (k + t) * lda + 8 * i);
            pair[0].item[t] = both.item[0], pair[1].item[t] = both.item[1];
          }
        } else {
#pragma unroll
          for (int n = 0; n < 2; ++n) pair[n] = *reinterpret_cast<const Terms*>(a + (8 * i + n) * lda + k);
        }
#pragma unroll
        for (int t = 0; t < TERMS; ++t) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) {
              accumulator.value[i + n][j] += pair[n].item[t] * columns[j].item[t];
            }
          }
        }
      }
    }
  }
};

}  // namespace cc_attention::cuda
