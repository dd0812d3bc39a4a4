// What a warp does on tensor cores (sm_80 and later): 16×16 squares of a product, summed in fp32, from 16-bit
// elements or from fp32 ones that are rounded to TF32 (8 bits of exponent, 10 of mantissa).
//
// Everything rests on mma.sync, whose layout of matrices over a warp's registers is documented (PTX ISA, "Matrix
// Fragments for mma.m16n8k16" and "... mma.m16n8k8"), unlike that of the wmma classes in mma.h: so the softmax
// can work on the registers, and no header is needed.
#pragma once

#include "copy.cuh"
#include "scalar.cuh"

namespace cc_attention::cuda {

#if defined(CC_ATTENTION_EMULATED) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800)
#define CC_ATTENTION_TENSOR_CORES 1
#else
#define CC_ATTENTION_TENSOR_CORES 0
#endif

#if CC_ATTENTION_TENSOR_CORES
// ldmatrix, four 8×8 matrices of 16-bit elements: lane 8m + r points at row r of matrix m (16 bytes, aligned), lane l
// receives as fragment[m] the elements (l/4, 2(l%4)) and (l/4, 2(l%4) + 1) of matrix m or of its transpose.
template <bool TRANSPOSED>
__device__ void load_matrices(unsigned (&fragment)[4], const void* row) {
#ifdef CC_ATTENTION_EMULATED
  emulator::load_matrices(fragment, row, TRANSPOSED);
#else
  const unsigned address = shared_address(row);
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}
#endif

// Both operands of a square are (16, STEP): A[row][k] and B[column][k]. "Place" is the row or the column.
//   STEP             terms of the sum that one call of multiply_add() adds
//   VECTOR           how many of a lane's consecutive columns are neighbours
//   row(i), column(j)  a lane holds 2×4 elements of a square: where element i, j is
//   load()           an operand of STEP terms from a tile of leading dimension ld: tile[place][k] or, with
//                    TRANSPOSED, tile[k][place]. The registers are in the instruction's order: of A places first,
//                    of B (IS_B) the terms first, which puts side by side what one instruction takes. ROUNDED: the
//                    tile holds what the instruction takes
//   INTERLEAVED      whether a transposed tile beside one that is not has its rows interleaved()
//   multiply_add()   upper (i = 0) and lower (i = 1) += A · Bᵀ
template <typename Element>
struct Fragments {  // Half and BFloat16
  static constexpr int STEP = 16, VECTOR = 2;
  static constexpr bool INTERLEAVED = false;
  __device__ static int row(int lane, int i) { return lane / 4 + 8 * i; }
  __device__ static int column(int lane, int j) { return lane % 4 * 2 + j / 2 * 8 + j % 2; }

#if CC_ATTENTION_TENSOR_CORES
  // Four 8×8 matrices. A: places 0 to 7 and 8 to 15 of the first eight k, then of the others. B: the first and
  // the other eight k of places 0 to 7, then of 8 to 15.
  template <bool IS_B, bool TRANSPOSED, bool>
  __device__ static void load(unsigned (&fragment)[4], const Element* tile, int ld, int lane) {
    const int first = lane / 8 % 2 * 8, second = lane / 16 * 8, within = lane % 8;
    const int place = IS_B ? second : first, k = IS_B ? first : second;  // where the lane's matrix begins
    const Element* row = TRANSPOSED ? tile + (k + within) * ld + place : tile + (place + within) * ld + k;
    load_matrices<TRANSPOSED>(fragment, row);
  }

  __device__ static void multiply_add(float* upper, float* lower, const unsigned (&a)[4], const unsigned (&b)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // eight columns each
      float *c = upper + 2 * half, *d = lower + 2 * half;
#if defined(CC_ATTENTION_EMULATED)
      emulator::multiply_add<16>({c, c + 1, d, d + 1}, {a[0], a[1], a[2], a[3], b[2 * half], b[2 * half + 1]},
                                 [](uint64_t bits) { return widen(Element{static_cast<unsigned short>(bits)}); });
#else
#define CC_ATTENTION_MMA(TYPE)                                     \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE       \
      ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(d[0]), "+f"(d[1])             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[2 * half]), "r"(b[2 * half + 1]))
      if constexpr (Same<Element, Half>::value) {
        CC_ATTENTION_MMA("f16");
      } else {
        CC_ATTENTION_MMA("bf16");
      }
#undef CC_ATTENTION_MMA
#endif
    }
  }
#endif  // CC_ATTENTION_TENSOR_CORES
};

// mma.m16n8k8: ldmatrix brings 4 neighbours of a row as it would bring 8 of 16 bits. It cannot transpose them: of a
// transposed tile a lane loads its elements one by one, the terms t and t + 4 (t = lane%4) from the rows 2t and 2t + 1.
// With rows that start 4 banks further than the last one did, the lanes so meet no bank twice. Two transposed tiles
// agree on which term is which; beside one that is not, a tile has its rows interleaved() when it is loaded.
template <>
struct Fragments<float> {
  static constexpr int STEP = 8, VECTOR = 2;
  static constexpr bool INTERLEAVED = true;
  __device__ static int row(int lane, int i) { return lane / 4 + 8 * i; }
  __device__ static int column(int lane, int j) { return lane % 4 * 2 + j / 2 * 8 + j % 2; }

#if CC_ATTENTION_TENSOR_CORES
  // To nearest, ties away from zero; the tensor cores themselves would cut the last 13 bits off.
  __device__ static unsigned round(float x) {
#ifdef CC_ATTENTION_EMULATED
    return emulator::round_to_tf32(x);
#else
    unsigned bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
#endif
  }

  template <bool IS_B, bool TRANSPOSED, bool ROUNDED>
  __device__ static void load(unsigned (&fragment)[4], const float* tile, int ld, int lane) {
    if constexpr (TRANSPOSED) {
      const float* first = tile + lane % 4 * 2 * ld + lane / 4;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int p = IS_B ? n / 2 : n % 2, t = IS_B ? n % 2 : n / 2;  // the eight places and the four terms
        fragment[n] = __float_as_uint(first[t * ld + 8 * p]);
      }
    } else {
      const int first = lane / 8 % 2, second = lane / 16;
      const int place = 8 * (IS_B ? second : first) + lane % 8, k = 4 * (IS_B ? first : second);
      load_matrices<false>(fragment, tile + place * ld + k);
    }
    if constexpr (!ROUNDED) {
#pragma unroll
      for (int n = 0; n < 4; ++n) fragment[n] = round(__uint_as_float(fragment[n]));
    }
  }

  __device__ static void multiply_add(float* upper, float* lower, const unsigned (&a)[4], const unsigned (&b)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // eight columns each
      float *c = upper + 2 * half, *d = lower + 2 * half;
#ifdef CC_ATTENTION_EMULATED
      emulator::multiply_add<8>({c, c + 1, d, d + 1}, {a[0], a[1], a[2], a[3], b[2 * half], b[2 * half + 1]},
                                emulator::tf32_to_float);
#else
      asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
          "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(d[0]), "+f"(d[1])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[2 * half]), "r"(b[2 * half + 1]));
#endif
    }
  }
#endif  // CC_ATTENTION_TENSOR_CORES
};

}  // namespace cc_attention::cuda
