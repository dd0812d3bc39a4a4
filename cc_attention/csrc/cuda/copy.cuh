// Copies from global to shared memory, asynchronous from sm_80 on.
#pragma once

#include "line.cuh"

namespace cc_attention::cuda {

struct alignas(16) Bytes16 {
  unsigned word[4];
};

#ifndef CC_ATTENTION_EMULATED
__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
#endif

// 16 bytes, or as many zeros where the source is not to be read: it may then be any address.
__device__ inline void copy_16_bytes(void* shared, const void* global, bool read) {
#if defined(CC_ATTENTION_EMULATED)
  emulator::copy_async(shared, global, read ? 16 : 0);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(read ? 16 : 0)
               : "memory");
#else
  *static_cast<Bytes16*>(shared) = read ? *static_cast<const Bytes16*>(global) : Bytes16{};
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

// Whether rows of the segment can be moved 16 bytes at a time (the stride is a multiple of the channels), with a
// stride that fits 32 bits if counted in 16 bytes.
template <typename T>
__device__ bool is_aligned(const Segment<T>& segment) {
  return segment.channels * sizeof(T) % 16 == 0 && reinterpret_cast<Index>(segment.data) % 16 == 0 &&
         segment.stride * static_cast<Index>(sizeof(T)) >> 36 == 0;
}

// How a thread goes through ROWS positions × COLUMNS channels, 16 bytes at a time: always in the same columns, and
// STEP rows further each time.
template <int ROWS, int COLUMNS, int THREADS, typename T>
struct Walk {
  static constexpr int VECTOR = 16 / static_cast<int>(sizeof(T)), VECTORS = COLUMNS / VECTOR;
  static constexpr int STEP = THREADS / VECTORS, COUNT = ROWS / STEP;
  static_assert(THREADS % VECTORS == 0 && ROWS % STEP == 0, "each thread has equal work");

  int row, column;  // the first of this thread
  int end;          // rows from here on are outside; 0 if the columns are
  T* first;
  unsigned stride;  // in 16 bytes

  __device__ Walk(const Segment<T>& segment, int position, int channel)
      : row(static_cast<int>(threadIdx.x) / VECTORS), column(static_cast<int>(threadIdx.x) % VECTORS * VECTOR) {
    end = channel + column < segment.channels ? segment.positions - position - row : 0;
    stride = static_cast<unsigned>(segment.stride / VECTOR);
    first = segment.data + channel + column + rows(static_cast<unsigned>(position + row));
  }
  __device__ bool inside(int n) const { return n * STEP < end; }
  __device__ T* at(int n) const { return first + rows(n * STEP); }
  // Elements: 32 times 32 bits to 64 bits is one instruction, with a stride of 64 bits it would be six.
  __device__ Index rows(unsigned count) const {
    return static_cast<Index>(static_cast<unsigned long long>(stride) * count * VECTOR);
  }
};

// Of each eight rows in turn one of the first four and one of the others.
__device__ inline int interleaved(int row) { return row / 8 * 8 + row % 4 * 2 + row / 4 % 2; }

// Starts to copy ROWS positions × COLUMNS channels, from the given ones on, into a tile of leading dimension
// LD; what lies beyond the segment becomes zero. `aligned` is is_aligned(segment). (Where elements are converted,
// as half types for CUDA cores, four loads under way hide their latency.)
template <int ROWS, int COLUMNS, int LD, int THREADS, bool INTERLEAVED = false, typename Element, typename T>
__device__ void load_tile(Element* tile, const Segment<const T>& segment, bool aligned, int position, int channel) {
  if constexpr (Same<Element, T>::value) {
    if (aligned) {
      const Walk<ROWS, COLUMNS, THREADS, const T> walk(segment, position, channel);
      static_assert(!INTERLEAVED || walk.STEP % 8 == 0, "the row within its eight is the same in each step");
      Element* to = tile + (INTERLEAVED ? interleaved(walk.row) : walk.row) * LD + walk.column;
#pragma unroll
      for (int n = 0; n < walk.COUNT; ++n) copy_16_bytes(to + n * walk.STEP * LD, walk.at(n), walk.inside(n));
      return;
    }
  }
#pragma unroll(Same<Element, T>::value ? 1 : 4)
  for (int index = threadIdx.x; index < ROWS * COLUMNS; index += THREADS) {
    const int row = index / COLUMNS, column = index % COLUMNS;
    Wide<T> x = 0;
    if (position + row < segment.positions && channel + column < segment.channels) {
      x = widen(segment.data[(position + row) * segment.stride + channel + column]);
    }
    tile[(INTERLEAVED ? interleaved(row) : row) * LD + column] = Narrow<Element>::from(x);
  }
}

// The way back, but for what lies beyond the segment.
template <int ROWS, int COLUMNS, int LD, int THREADS, typename Element, typename T>
__device__ void store_tile(const Segment<T>& segment, bool aligned, const Element* tile, int position, int channel) {
  if constexpr (Same<Element, T>::value) {
    if (aligned) {
      const Walk<ROWS, COLUMNS, THREADS, T> walk(segment, position, channel);
      const Element* from = tile + walk.row * LD + walk.column;
#pragma unroll
      for (int n = 0; n < walk.COUNT; ++n) {
        if (walk.inside(n)) {
          *reinterpret_cast<Bytes16*>(walk.at(n)) = *reinterpret_cast<const Bytes16*>(from + n * walk.STEP * LD);
        }
      }
      return;
    }
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
