// The engine for every GPU from sm_50 on: products of tiles on CUDA cores, in fp32 or fp64.
//
// An engine tells how a block of threads multiplies two tiles that lie in shared memory:
//   Element       what tiles in shared memory hold
//   Accumulator   a TILE×TILE result in registers: each thread holds ROWS×COLUMNS of its elements, the
//                 element value[i][j] being that of row(i) and column(j)
//   multiply()    adds a product of two tiles to the accumulator
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

  // 8×8 threads of 8×8 elements: 16 loads from shared memory feed 64 multiply-adds.
  static constexpr int ROWS = 8, COLUMNS = 8;
  struct Accumulator {
    Element value[ROWS][COLUMNS];
  };
  __device__ static int row(int i) { return static_cast<int>(threadIdx.x) / 8 + 8 * i; }
  __device__ static int column(int j) { return static_cast<int>(threadIdx.x) % 8 + 8 * j; }
  __device__ static int group() { return static_cast<int>(threadIdx.x) % 8; }

  // accumulator += A·B over `depth` (rounded up to DEPTH; tiles are padded with zeros). A is stored as
  // A[row][k], or A[k][row] when transposed; B as B[k][column], or B[column][k] when transposed. Rows and
  // columns from the given counts on are not needed.
  template <bool A_TRANSPOSED, bool B_TRANSPOSED>
  __device__ static void multiply(Accumulator& accumulator, const Element* a, int lda, const Element* b, int ldb,
                                  int depth, int rows, int) {
    for (int start = 0; start < depth; start += DEPTH) {
#pragma unroll 4
      for (int step = 0; step < DEPTH; ++step) {
        const int k = start + step;
        Element column_values[COLUMNS];
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
          column_values[j] = B_TRANSPOSED ? b[column(j) * ldb + k] : b[k * ldb + column(j)];
        }
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
          if (8 * i >= rows) continue;  // the same for all threads
          const Element row_value = A_TRANSPOSED ? a[k * lda + row(i)] : a[row(i) * lda + k];
#pragma unroll
          for (int j = 0; j < COLUMNS; ++j) accumulator.value[i][j] += row_value * column_values[j];
        }
      }
    }
  }
};

}  // namespace cc_attention::cuda
