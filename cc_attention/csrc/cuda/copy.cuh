// Copies from global to shared memory, asynchronous from sm_80 on.
#pragma once

#include "line.cuh"

namespace cc_attention::cuda {

struct alignas(16) Bytes16 {
  unsigned word[4];
};

#ifndef CC_ATTENTION_EMULATED
__device__ inline unsigned shared_address(const void* pointer) {
  unsigned long long address;
  asm("cvta.to.shared.u64 %0, %1;" : "=l"(address) : "l"(pointer));
  return static_cast<unsigned>(address);
}
#endif

__device__ inline void copy_16_bytes(void* shared, const void* global) {
#if defined(CC_ATTENTION_EMULATED)
  emulator::copy_async(shared, global, 16);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
#else
  *static_cast<Bytes16*>(shared) = *static_cast<const Bytes16*>(global);
#endif
}

// The copies that this thread started since the last call form a group.
__device__ inline void close_copy_group() {
#if defined(CC_ATTENTION_EMULATED)
  emulator::close_copy_group();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait for this thread's groups but the newest.
__device__ inline void wait_for_all_groups_but_one() {
#if defined(CC_ATTENTION_EMULATED)
  emulator::wait_for_all_groups_but_one();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group 1;" ::: "memory");
#endif
}

template <typename A, typename B>
struct Same {
  static constexpr bool value = false;
};
template <typename A>
struct Same<A, A> {
  static constexpr bool value = true;
};

// Whether rows of the segment can be moved 16 bytes at a time (the stride is a multiple of the channels).
template <typename T>
__device__ bool is_aligned(const Segment<T>& segment) {
  return segment.channels * sizeof(T) % 16 == 0 && reinterpret_cast<Index>(segment.data) % 16 == 0;
}

// Starts to copy ROWS positions × COLUMNS channels, from the given ones on, into a tile of leading dimension
// LD; what lies beyond the segment becomes zero. (Loops are unrolled as far as registers allow it on tensor
// cores; where elements are converted, as half types for CUDA cores, four loads under way hide their latency.)
template <int ROWS, int COLUMNS, int LD, int THREADS, typename Element, typename T>
__device__ void load_tile(Element* tile, const Segment<const T>& segment, int position, int channel) {
  constexpr int VECTOR = 16 / static_cast<int>(sizeof(T)), VECTORS = COLUMNS / VECTOR;
  if (Same<Element, T>::value && is_aligned(segment)) {
#pragma unroll 2
    for (int index = threadIdx.x; index < ROWS * VECTORS; index += THREADS) {
      const int row = index / VECTORS, column = index % VECTORS * VECTOR;
      Element* to = tile + row * LD + column;
      if (position + row < segment.positions && channel + column < segment.channels) {
        copy_16_bytes(to, segment.data + (position + row) * segment.stride + channel + column);
      } else {
        *reinterpret_cast<Bytes16*>(to) = Bytes16{};
      }
    }
    return;
  }
#pragma unroll(Same<Element, T>::value ? 1 : 4)
  for (int index = threadIdx.x; index < ROWS * COLUMNS; index += THREADS) {
    const int row = index / COLUMNS, column = index % COLUMNS;
    Wide<T> x = 0;
    if (position + row < segment.positions && channel + column < segment.channels) {
      x = widen(segment.data[(position + row) * segment.stride + channel + column]);
    }
    tile[row * LD + column] = Narrow<Element>::from(x);
  }
}

// The way back, but for what lies beyond the segment.
template <int ROWS, int COLUMNS, int LD, int THREADS, typename Element, typename T>
__device__ void store_tile(const Segment<T>& segment, const Element* tile, int position, int channel) {
  constexpr int VECTOR = 16 / static_cast<int>(sizeof(T)), VECTORS = COLUMNS / VECTOR;
  if (Same<Element, T>::value && is_aligned(segment)) {
#pragma unroll 2
    for (int index = threadIdx.x; index < ROWS * VECTORS; index += THREADS) {
      const int row = index / VECTORS, column = index % VECTORS * VECTOR;
      if (position + row < segment.positions && channel + column < segment.channels) {
        *reinterpret_cast<Bytes16*>(segment.data + (position + row) * segment.stride + channel + column) =
            *reinterpret_cast<const Bytes16*>(tile + row * LD + column);
      }
    }
    return;
  }
#pragma unroll 1
  for (int index = threadIdx.x; index < ROWS * COLUMNS; index += THREADS) {
    const int row = index / COLUMNS, column = index % COLUMNS;
    if (position + row < segment.positions && channel + column < segment.channels) {
      segment.data[(position + row) * segment.stride + channel + column] =
          Narrow<T>::from(widen(tile[row * LD + column]));
    }
  }
}

// For each step: load(step, buffer), then use(step, buffer). There are two buffers of `size` elements, so the
// next step's tiles arrive while this one's are worked on. All threads of the block take part, and when use()
// is called what load() brought is there; use() may write into its buffer.
template <typename Element, typename Load, typename Use>
__device__ void pipeline(int steps, Element* buffers, int size, Load load, Use use) {
  for (int step = -1; step < steps; ++step) {
    if (step + 1 < steps) load(step + 1, buffers + (step + 1) % 2 * size);
    close_copy_group();  // perhaps an empty one
    if (step < 0) continue;
    wait_for_all_groups_but_one();
    __syncthreads();  // every thread's copies have arrived
    use(step, buffers + step % 2 * size);
    __syncthreads();  // every thread is done with this buffer
  }
}

}  // namespace cc_attention::cuda
