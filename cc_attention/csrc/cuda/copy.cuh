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
template <typename A>
struct Same<A, const A> {
  static constexpr bool value = true;
};

// Whether rows of the segment can be moved 16 bytes at a time (the stride is a multiple of the channels), with a
// stride whose bytes 32 bits can count.
template <typename Element, typename T>
__device__ bool takes_vectors(const Segment<T>& segment) {
  return Same<Element, T>::value && segment.channels * sizeof(T) % 16 == 0 &&
         reinterpret_cast<Index>(segment.data) % 16 == 0 &&
         segment.stride * static_cast<Index>(sizeof(T)) >> 32 == 0;
}

// Of each eight rows in turn one of the first four and one of the others.
__device__ inline int interleaved(int row) { return row / 8 * 8 + row % 4 * 2 + row / 4 % 2; }

// Moves ROWS positions × COLUMNS channels of a segment to or from tiles of leading dimension LD. A thread always moves
// the same columns, STEP rows further each time, 16 bytes where rows can be moved so, else one element. What is
// the same for all tiles of the segment is worked out once.
template <int ROWS, int COLUMNS, int LD, int THREADS, bool INTERLEAVED, typename Element, typename T>
class Transfer {
  static constexpr int VECTOR = 16 / static_cast<int>(sizeof(T));
  static constexpr int STEP = THREADS * VECTOR / COLUMNS, COUNT = ROWS / STEP;
  static constexpr int SINGLE_STEP = THREADS / COLUMNS, SINGLE_COUNT = ROWS / SINGLE_STEP;
  static_assert(THREADS % COLUMNS == 0 && ROWS % SINGLE_STEP == 0, "each thread has equal work");
  static_assert(!Same<Element, T>::value || (COLUMNS % VECTOR == 0 && ROWS % STEP == 0), "so with vectors");
  static_assert(!INTERLEAVED || STEP % 8 == 0, "the row within its eight is the same in each step");

  bool vectors;
  T* first;           // of this thread, in the segment's first tile
  unsigned stride;    // in bytes, of single elements in elements
  int rows, columns;  // of the segment, from the thread's first on
  int place;          // of the thread's first in a tile

  // 32 times 32 bits to 64 bits is one instruction; with a stride of 64 bits it would be six.
  __device__ Index further(int count) const {
    return static_cast<Index>(static_cast<unsigned long long>(stride) * static_cast<unsigned>(count));
  }
  __device__ T* vector_further(T* pointer, int count) const {
    return reinterpret_cast<T*>(reinterpret_cast<Index>(pointer) + further(count));
  }
  __device__ T* vector_at(int position, int channel) const {
    return vector_further(first + static_cast<unsigned>(channel), position);
  }
  __device__ int rows_inside(int position, int channel) const { return channel < columns ? rows - position : 0; }
  // Where the thread's row n goes, counted in steps.
  template <typename Tile>
  __device__ Tile* vector_in(Tile* tile, int n) const {
    return tile + place + n * STEP * LD;
  }
  __device__ int single_place(int n) const {
    const int row = static_cast<int>(threadIdx.x / COLUMNS) + n * SINGLE_STEP;
    return (INTERLEAVED ? interleaved(row) : row) * LD + static_cast<int>(threadIdx.x % COLUMNS);
  }

 public:
  // `vectors`: 16 bytes at a time, which the segment takes. The stride is less than 2^32 elements.
  __device__ Transfer(const Segment<T>& segment, bool vectors) : vectors(vectors) {
    const int index = static_cast<int>(threadIdx.x) * (vectors ? VECTOR : 1);
    const int row = index / COLUMNS, column = index % COLUMNS;
    stride = static_cast<unsigned>(segment.stride * (vectors ? sizeof(T) : 1));
    first = unknown(segment.data + column + row * segment.stride);  // one address, not a base and an offset
    rows = segment.positions - row;
    columns = segment.channels - column;
    place = (INTERLEAVED ? interleaved(row) : row) * LD + column;
  }

  // Starts to fill the tile from this position and channel on; what lies beyond the segment becomes zero. (Where
  // elements are converted, as half types for CUDA cores, four loads under way hide their latency.)
  __device__ void load(Element* tile, int position, int channel) const {
    const int inside = rows_inside(position, channel);
    if constexpr (Same<Element, T>::value) {
      if (vectors) {
        T* from = vector_at(position, channel);
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
          copy_16_bytes(vector_in(tile, n), vector_further(from, n * STEP), n * STEP < inside);
        }
        return;
      }
    }
    T* from = first + channel + further(position);
#pragma unroll(Same<Element, T>::value ? 1 : 4)
    for (int n = 0; n < SINGLE_COUNT; ++n) {
      const Wide<Element> x = n * SINGLE_STEP < inside ? widen(from[further(n * SINGLE_STEP)]) : 0;
      tile[single_place(n)] = Narrow<Element>::from(x);
    }
  }

  // Replaces each element that this thread loaded, once it is there.
  template <typename Change>
  __device__ void change(Element* tile, Change change) const {
    if (vectors) {
#pragma unroll
      for (int n = 0; n < COUNT; ++n) {
        auto* pack = reinterpret_cast<Pack<Element, VECTOR>*>(vector_in(tile, n));
        Pack<Element, VECTOR> changed = *pack;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) changed.item[i] = change(changed.item[i]);
        *pack = changed;
      }
      return;
    }
#pragma unroll 1
    for (int n = 0; n < SINGLE_COUNT; ++n) tile[single_place(n)] = change(tile[single_place(n)]);
  }

  // The way back, but for what lies beyond the segment.
  __device__ void store(const Element* tile, int position, int channel) const {
    const int inside = rows_inside(position, channel);
    if constexpr (Same<Element, T>::value) {
      if (vectors) {
        T* to = vector_at(position, channel);
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
          if (n * STEP < inside) {
            *reinterpret_cast<Bytes16*>(vector_further(to, n * STEP)) =
                *reinterpret_cast<const Bytes16*>(vector_in(tile, n));
          }
        }
        return;
      }
    }
    T* to = first + channel + further(position);
#pragma unroll 1
    for (int n = 0; n * SINGLE_STEP < smaller(inside, ROWS); ++n) {
      to[further(n * SINGLE_STEP)] = Narrow<T>::from(widen(tile[single_place(n)]));
    }
  }
};

// For each step: load(step, buffer), arrived(step, buffer), then use(step, buffer). There are two buffers of `size`
// elements, so the next step's tiles arrive while this one's are worked on. All threads of the block take part. When
// arrived() is called, what this thread's load() brought is there, when use() is, what all threads' did; both
// may write into the buffer.
template <typename Element, typename Load, typename Arrived, typename Use>
__device__ void pipeline(int steps, Element* buffers, int size, Load load, Arrived arrived, Use use) {
  for (int step = -1; step < steps; ++step) {
    if (step + 1 < steps) load(step + 1, buffers + ((step + 1) & 1) * size);
    close_copy_group();  // perhaps an empty one
    if (step < 0) continue;
    wait_for_all_groups_but_one();
    arrived(step, buffers + (step & 1) * size);
    __syncthreads();  // every thread's copies have arrived
    use(step, buffers + (step & 1) * size);
    __syncthreads();  // every thread is done with this buffer
  }
}

}  // namespace cc_attention::cuda
