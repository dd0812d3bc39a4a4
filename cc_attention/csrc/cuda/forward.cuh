// Criss-cross attention, forward: out[u] = Σ_i softmax_i(query[u] · key[i]) value[i] over the row and the
// column of u and, in a clip, the line through time (paper, section 3.2), the own position once: the row has it,
// the others leave it out.
//
// A pass adds the contribution of some keys of each line of one axis. Between passes `out` is the result over
// the keys seen so far, and lse = log Σ exp(energy) over them. With the energies e of a pass
//   lse' = log(exp(lse) + Σ exp(e)),   out' = exp(lse - lse') out + Σ exp(e - lse') value.
// So a line of any length needs no memory but out and lse; energies never leave the multiprocessor. Where all
// energies were -inf so far, lse is -inf and out is 0; if they are to the end, the result is NaN, as a softmax's.
#pragma once

#include "tile.cuh"

namespace cc_attention::cuda {

template <typename T>
struct ForwardPass {
  const T* query;  // (B,T,H,W,Cr), as key
  const T* key;
  const T* value;  // (B,T,H,W,C), as out
  T* out;
  // (B,T,H,W). Two buffers: blocks that work on different channels of the same line all read the old one.
  const Wide<T>* lse_before;
  Wide<T>* lse_after;
  Size size;
  int query_channels, channels;
  Axis axis;
  int tile;                // queries of a block
  int key_begin, key_end;  // of each line
  int channels_per_block;  // a multiple of TILE
  bool first;              // out and lse hold nothing yet
  bool last;               // no other pass follows for these positions
};

// One number of each row from all threads: each brings its part for its own rows and gets the whole.
template <typename Engine, typename Number, typename Combine>
__device__ void combine_row(Number (&part)[Engine::ROWS], Number* memory, Combine combine) {
  for (int i = 0; i < Engine::ROWS; ++i) memory[Engine::row(i) * Engine::GROUPS + Engine::group()] = part[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Engine::ROWS; ++i) {
    const Number* row = memory + Engine::row(i) * Engine::GROUPS;
    part[i] = row[0];
#pragma unroll 1  // more loads under way would want registers that the energies take
    for (int g = 1; g < Engine::GROUPS; ++g) part[i] = combine(part[i], row[g]);
  }
}

// Energies become weights exp(e - lse'), lse becomes lse', and old_share exp(lse - lse'). Rows from `rows` on may
// become anything.
template <typename Engine, typename Number>
__device__ void softmax(typename Engine::Accumulator& energies, Number (&lse)[Engine::ROWS],
                        Number (&old_share)[Engine::ROWS], int rows, bool last, void* memory) {
  Number* maxima = static_cast<Number*>(memory);
  Number* sums = maxima + Engine::TILE * Engine::GROUPS;
  constexpr int NEEDED = 2 * Engine::TILE * Engine::GROUPS * sizeof(Number);
  static_assert(NEEDED <= 2 * Shared<Engine>::BUFFER * sizeof(typename Engine::Element), "they fit the buffers");
  Number maximum[Engine::ROWS], sum[Engine::ROWS];
#pragma unroll
  for (int i = 0; i < Engine::ROWS; ++i) {
    maximum[i] = lse[i];
#pragma unroll
    for (int j = 0; j < Engine::COLUMNS; ++j) maximum[i] = larger(maximum[i], energies.value[i][j]);
  }
  combine_row<Engine>(maximum, maxima, [](Number a, Number b) { return larger(a, b); });
#pragma unroll
  for (int i = 0; i < Engine::ROWS; ++i) {
    if (!last && maximum[i] == minus_infinity()) maximum[i] = 0;  // -inf - (-inf) would be NaN already
    old_share[i] = exponential(lse[i] - maximum[i]);
    lse[i] = maximum[i];
    sum[i] = 0;
    if (Engine::row(i) >= rows) continue;  // saves exponentials, and keeps those of different rows apart: registers
#pragma unroll
    for (int j = 0; j < Engine::COLUMNS; ++j) {
      energies.value[i][j] = exponential(energies.value[i][j] - maximum[i]);
      sum[i] += energies.value[i][j];
    }
  }
  combine_row<Engine>(sum, sums, [](Number a, Number b) { return a + b; });
#pragma unroll
  for (int i = 0; i < Engine::ROWS; ++i) {
    const Number total = old_share[i] + sum[i], scale = total == 0 ? 0 : 1 / total;
    lse[i] += logarithm(total);
    old_share[i] *= scale;
#pragma unroll
    for (int j = 0; j < Engine::COLUMNS; ++j) energies.value[i][j] *= scale;
  }
  __syncthreads();  // the memory may be used again
}

// What a block works on: a tile of queries of one line (blockIdx.x), and the keys of the pass.
struct ForwardWork {
  int query_begin;
  Span queries, keys;

  template <typename T>
  __device__ ForwardWork(const ForwardPass<T>& pass, int block) {
    const int length = pass.size.length(pass.axis), tiles = ceil_div(length, pass.tile);
    const int line = block / tiles;
    query_begin = block % tiles * pass.tile;
    const auto span = [&](int begin, int end) {
      return span_of(pass.axis, pass.size, line, begin, end);
    };
    queries = span(query_begin, smaller(query_begin + pass.tile, length));
    keys = span(pass.key_begin, pass.key_end);
  }
};

// Energies become weights and resident; the rest is for the target and lse.
template <typename Engine, typename T>
__device__ void attend(const ForwardPass<T>& pass, const Shared<Engine>& shared, const ForwardWork& work,
                       Wide<T> (&lse)[Engine::ROWS], Wide<T> (&old_share)[Engine::ROWS]) {
  typename Engine::Accumulator weights;
  products<Engine, T>(weights, shared, work.queries.of(pass.query, pass.query_channels),
                      work.keys.of(pass.key, pass.query_channels));
#pragma unroll
  for (int i = 0; i < Engine::ROWS; ++i) {
    const int row = Engine::row(i);
    const bool seen = !pass.first && row < work.queries.length;
    lse[i] = seen ? pass.lse_before[work.queries.position(row)] : minus_infinity();
    const int own = pass.axis == Axis::ROW ? -1 : work.query_begin + row - pass.key_begin;
#pragma unroll
    for (int j = 0; j < Engine::COLUMNS; ++j) {
      const int column = Engine::column(j);
      if (column >= work.keys.length || column == own) weights.value[i][j] = minus_infinity();
    }
  }
  // Where a query has no key in this pass (a column of one position), the maximum is the old lse, each weight is
  // exp(-inf) = 0 and the old share exactly 1.
  softmax<Engine>(weights, lse, old_share, work.queries.length, pass.last, shared.buffers);
  round<Engine>(weights);
  keep_weights(shared, weights);
}

// Some of the channels (blockIdx.y).
template <typename Engine, typename T>
__device__ void forward_block(const ForwardPass<T>& pass, void* memory) {
  const Shared<Engine> shared(memory);
  Wide<T> lse[Engine::ROWS];
  Target<Engine, T> target;
  attend(pass, shared, ForwardWork(pass, static_cast<int>(blockIdx.x)), lse, target.share);

  // Worked out again: to keep addresses in registers meanwhile, the softmax would have to spill others.
  const ForwardWork work(pass, unknown(static_cast<int>(blockIdx.x)));
  target.to = work.queries.of(pass.out, pass.channels);
  target.overwrite = pass.first;
#pragma unroll
  for (int i = 0; i < Engine::ROWS; ++i) {
    const int row = Engine::row(i);
    if (row < work.queries.length && Engine::group() == 0 && blockIdx.y == 0) {
      pass.lse_after[work.queries.position(row)] = lse[i];
    }
  }
  const int channel_begin = static_cast<int>(blockIdx.y) * pass.channels_per_block;
  const int channel_end = smaller(channel_begin + pass.channels_per_block, pass.channels);
  gather<Engine, false, true>(shared, work.keys.of(pass.value, pass.channels), target, channel_begin, channel_end);
}

template <typename Engine, typename T>
__global__ __launch_bounds__(Engine::THREADS, Engine::BLOCKS_PER_SM) void forward_kernel(ForwardPass<T> pass) {
  CC_ATTENTION_SHARED_MEMORY(memory);
  if constexpr (Engine::AVAILABLE) forward_block<Engine>(pass, memory);
}

}  // namespace cc_attention::cuda
