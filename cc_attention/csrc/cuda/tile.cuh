// What the passes do with tiles, on either engine: products of two segments, sums of a segment's values with
// weights, and results added to global memory.
#pragma once

#include "copy.cuh"
#include "line.cuh"

#ifdef CC_ATTENTION_EMULATED
#define CC_ATTENTION_SHARED_MEMORY(name) void* name = emulator::shared_memory()
#else
#define CC_ATTENTION_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace cc_attention::cuda {

// A block's shared memory: the resident weights (attention or gradient of energies) and two buffers that
// tiles pass through.
template <typename Engine>
struct Shared {
  using Element = typename Engine::Element;
  static constexpr int LD = Engine::TILE + Engine::PAD;           // of the weights and of tiles of values
  static constexpr int PRODUCT_LD = Engine::DEPTH + Engine::PAD;  // of tiles that are multiplied in products()
  static constexpr int WEIGHTS = Engine::TILE * LD;
  static constexpr int BUFFER = larger(2 * Engine::TILE * PRODUCT_LD, Engine::GATHER_DEPTH* LD);
  static constexpr int BYTES = (WEIGHTS + 2 * BUFFER) * static_cast<int>(sizeof(Element));
  static_assert(BYTES <= Engine::MAX_SHARED, "the tile is too large");

  Element* weights;
  Element* buffers;

  __device__ explicit Shared(void* memory)
      : weights(static_cast<Element*>(memory)), buffers(static_cast<Element*>(memory) + WEIGHTS) {}
};

template <typename Engine>
__device__ void clear(typename Engine::Accumulator& accumulator) {
#pragma unroll
  for (int i = 0; i < Engine::ROWS; ++i) {
#pragma unroll
    for (int j = 0; j < Engine::COLUMNS; ++j) accumulator.value[i][j] = 0;
  }
}

// result = x · yᵀ: the products of each position of x with each of y, summed over the channels.
template <typename Engine, typename T>
__device__ void products(typename Engine::Accumulator& result, const Shared<Engine>& shared,
                         const Segment<const T>& x, const Segment<const T>& y) {
  using Element = typename Engine::Element;
  constexpr int LD = Shared<Engine>::PRODUCT_LD, SECOND = Engine::TILE * LD;
  using Tiles = Transfer<Engine::TILE, Engine::DEPTH, LD, Engine::THREADS, false, Element, const T>;
  const bool vectors = takes_vectors<Element>(x) && takes_vectors<Element>(y);
  const Tiles x_tiles(x, vectors), y_tiles(y, vectors);
  clear<Engine>(result);
  pipeline(
      ceil_div(x.channels, Engine::DEPTH), shared.buffers, Shared<Engine>::BUFFER,
      [&](int step, Element* buffer) {
        const int channel = step * Engine::DEPTH;
        x_tiles.load(buffer, 0, channel);
        y_tiles.load(buffer + SECOND, 0, channel);
      },
      [&](int, Element* buffer) {
        if constexpr (Engine::ROUNDS) {
          x_tiles.change(buffer, Engine::rounded);
          y_tiles.change(buffer + SECOND, Engine::rounded);
        }
      },
      [&](int step, const Element* buffer) {
        const int depth = smaller(Engine::DEPTH, x.channels - step * Engine::DEPTH);
        Engine::template multiply<false, true, true>(result, buffer, LD, buffer + SECOND, LD, depth, x.positions,
                                                     y.positions);
      });
}

// Writes the accumulator's rows from `begin` on, at most COUNT, into a tile.
template <typename Engine, int COUNT>
__device__ void put_rows(typename Engine::Element* tile, const typename Engine::Accumulator& accumulator, int begin) {
  using Element = typename Engine::Element;
  constexpr int VECTOR = Engine::VECTOR;
#pragma unroll
  for (int i = 0; i < Engine::ROWS; ++i) {
    const int row = Engine::row(i) - begin;
    if (row < 0 || row >= COUNT) continue;
#pragma unroll
    for (int j = 0; j < Engine::COLUMNS; j += VECTOR) {
      Pack<Element, VECTOR> pack;
#pragma unroll
      for (int n = 0; n < VECTOR; ++n) pack.item[n] = Narrow<Element>::from(accumulator.value[i][j + n]);
      *reinterpret_cast<Pack<Element, VECTOR>*>(tile + row * Shared<Engine>::LD + Engine::column(j)) = pack;
    }
  }
}

// The accumulator becomes the resident weights, which other threads may read after the next barrier.
template <typename Engine>
__device__ void keep_weights(const Shared<Engine>& shared, const typename Engine::Accumulator& accumulator) {
  put_rows<Engine, Engine::TILE>(shared.weights, accumulator, 0);
}

// Rounds what will be factors of products and nothing else.
template <typename Engine>
__device__ void round(typename Engine::Accumulator& factors) {
  if constexpr (Engine::ROUNDS) {
#pragma unroll
    for (int i = 0; i < Engine::ROWS; ++i) {
#pragma unroll
      for (int j = 0; j < Engine::COLUMNS; ++j) factors.value[i][j] = Engine::rounded(factors.value[i][j]);
    }
  }
}

// Where a sum goes: to = share · to + sum, with one share for each of the thread's rows. With `overwrite` the
// old contents do not matter, whatever they are.
template <typename Engine, typename T>
struct Target {
  Segment<T> to;
  bool overwrite;
  Wide<T> share[Engine::ROWS];
};

// target ← weights · values, or weightsᵀ · values, for the channels in [channel_begin, channel_end). The begin
// is a multiple of TILE, the end too unless it is the last channel's. ROUNDED: the weights were round()ed.
//
// A chunk of TILE channels at a time, the old contents pass through the buffers first, then the values, then
// the result: all that is read or written in global memory is whole rows of a tile.
template <typename Engine, bool TRANSPOSED, bool ROUNDED, typename T>
__device__ void gather(const Shared<Engine>& shared, const Segment<const T>& values, const Target<Engine, T>& target,
                       int channel_begin, int channel_end) {
  using Element = typename Engine::Element;
  constexpr int LD = Shared<Engine>::LD, DEPTH = Engine::GATHER_DEPTH;
  const Segment<T>& to = target.to;
  const int old_steps = target.overwrite ? 0 : ceil_div(to.positions, DEPTH);
  const int steps = old_steps + ceil_div(values.positions, DEPTH);  // of a chunk
  const int chunks = ceil_div(channel_end - channel_begin, Engine::TILE);
  constexpr bool INTERLEAVED = Engine::INTERLEAVED && !TRANSPOSED;
  const bool vectors = takes_vectors<Element>(to) && takes_vectors<Element>(values);
  const Transfer<DEPTH, Engine::TILE, LD, Engine::THREADS, false, Element, T> result_tiles(to, vectors);
  const Transfer<DEPTH, Engine::TILE, LD, Engine::THREADS, INTERLEAVED, Element, const T> value_tiles(values, vectors);
  typename Engine::Accumulator sum;
  struct Counter {
    int channel, place;
    __device__ Counter next(int steps) const {
      return place + 1 == steps ? Counter{channel + Engine::TILE, 0} : Counter{channel, place + 1};
    }
  };
  Counter now{channel_begin - Engine::TILE, steps - 1}, loaded = now;  // the last step used, and loaded
  pipeline(
      chunks * steps, shared.buffers, Shared<Engine>::BUFFER,
      [&](int, Element* buffer) {
        loaded = loaded.next(steps);
        if (loaded.place < old_steps) {
          result_tiles.load(buffer, loaded.place * DEPTH, loaded.channel);
        } else {
          value_tiles.load(buffer, (loaded.place - old_steps) * DEPTH, loaded.channel);
        }
      },
      [&](int, Element* buffer) {
        now = now.next(steps);
        if constexpr (Engine::ROUNDS) {
          if (now.place >= old_steps) value_tiles.change(buffer, Engine::rounded);
        }
      },
      [&](int, Element* buffer) {
        const auto [channel, place] = now;
        if (place == 0) {
          clear<Engine>(sum);
          asm volatile("");  // a branch: otherwise each step has 64 selections
        }
        if (place < old_steps) {
#pragma unroll
          for (int i = 0; i < Engine::ROWS; ++i) {
            const int row = Engine::row(i) - place * DEPTH;
            if (row < 0 || row >= DEPTH) continue;
#pragma unroll
            for (int j = 0; j < Engine::COLUMNS; ++j) {
              sum.value[i][j] = target.share[i] * widen(buffer[row * LD + Engine::column(j)]);
            }
          }
          return;
        }
        const int position = (place - old_steps) * DEPTH;
        const Element* weights = shared.weights + position * (TRANSPOSED ? LD : 1);
        Engine::template multiply<TRANSPOSED, false, ROUNDED>(
            sum, weights, LD, buffer, LD, smaller(DEPTH, values.positions - position), to.positions,
            smaller(Engine::TILE, channel_end - channel));
        if (place + 1 < steps) return;
        for (int begin = 0; begin < to.positions; begin += DEPTH) {
          __syncthreads();  // every thread is done with what the buffer held
          put_rows<Engine, DEPTH>(buffer, sum, begin);
          __syncthreads();
          result_tiles.store(buffer, begin, channel);
        }
      });
}

}  // namespace cc_attention::cuda
