// Criss-cross attention, backward. With P the attention, δ = Σ_c grad ∘ out and energies E:
//   P = exp(E - lse),   dP = grad · valueᵀ,   dE = P ∘ (dP - δ),
//   dvalue = Pᵀ · grad,   dquery = dE · key,   dkey = dEᵀ · query.
//
// A pass takes some queries and some keys of each line of one axis, and one block all of that for a line: no
// two blocks write to the same place, so there are no atomics and the order of sums is fixed. The gradients
// are summed over passes in their own dtype, within a pass in fp32 (fp64).
#pragma once

#include "tile.cuh"

namespace cc_attention::cuda {

template <typename T>
struct BackwardPass {
  const T* grad;   // (B,T,H,W,C), as value and dvalue
  const T* query;  // (B,T,H,W,Cr), as key, dquery and dkey
  const T* key;
  const T* value;
  const Wide<T>* lse;  // (B,T,H,W)
  const Wide<T>* delta;
  T* dquery;
  T* dkey;
  T* dvalue;
  Size size;
  int query_channels, channels;
  Axis axis;
  int query_begin, query_end, key_begin, key_end;  // of each line
  bool first_for_queries, first_for_keys;          // their gradients hold nothing yet
};

template <typename Engine, typename T>
__device__ Target<Engine, T> target_of(const Segment<T>& to, bool overwrite) {
  Target<Engine, T> target{to, overwrite, {}};
#pragma unroll
  for (int i = 0; i < Engine::ROWS; ++i) target.share[i] = 1;
  return target;
}

// What a block works on: the queries and keys of the pass in one line (blockIdx.x).
struct BackwardWork {
  Span queries, keys;

  template <typename T>
  __device__ BackwardWork(const BackwardPass<T>& pass, int line)
      : queries(span_of(pass.axis, pass.size, line, pass.query_begin, pass.query_end)),
        keys(span_of(pass.axis, pass.size, line, pass.key_begin, pass.key_end)) {}
};

// P becomes resident, and dvalue grows.
template <typename Engine, typename T>
__device__ void attention_and_dvalue(const BackwardPass<T>& pass, const Shared<Engine>& shared,
                                     const BackwardWork& work) {
  const auto& [queries, keys] = work;
  typename Engine::Accumulator part;
  products<Engine, T>(part, shared, queries.of(pass.query, pass.query_channels),
                      keys.of(pass.key, pass.query_channels));
#pragma unroll
  for (int i = 0; i < Engine::ROWS; ++i) {
    const int row = Engine::row(i);
    const Wide<T> lse = row < queries.length ? pass.lse[queries.position(row)] : 0;
#pragma unroll
    for (int j = 0; j < Engine::COLUMNS; ++j) {
      const int column = Engine::column(j);
      const bool own = pass.axis != Axis::ROW && pass.query_begin + row == pass.key_begin + column;
      const bool attends = row < queries.length && column < keys.length && !own;
      part.value[i][j] = attends ? exponential(part.value[i][j] - lse) : 0;
    }
  }
  keep_weights(shared, part);  // P, exact: dE is made of it
  gather<Engine, true, false>(shared, queries.of(pass.grad, pass.channels),
                              target_of<Engine>(keys.of(pass.dvalue, pass.channels), pass.first_for_keys), 0,
                              pass.channels);
}

// dE takes the place of P, and dquery and dkey grow.
template <typename Engine, typename T>
__device__ void dquery_and_dkey(const BackwardPass<T>& pass, const Shared<Engine>& shared, const BackwardWork& work) {
  const auto& [queries, keys] = work;
  typename Engine::Accumulator part;
  products<Engine, T>(part, shared, queries.of(pass.grad, pass.channels), keys.of(pass.value, pass.channels));  // dP
#pragma unroll
  for (int i = 0; i < Engine::ROWS; ++i) {
    const int row = Engine::row(i);
    const Wide<T> delta = row < queries.length ? pass.delta[queries.position(row)] : 0;
#pragma unroll
    for (int j = 0; j < Engine::COLUMNS; ++j) {
      // Each thread reads and replaces the weights that it has written itself.
      const auto attention = shared.weights[row * Shared<Engine>::LD + Engine::column(j)];
      part.value[i][j] = widen(attention) * (part.value[i][j] - delta);
    }
  }
  round<Engine>(part);
  keep_weights(shared, part);  // dE
  gather<Engine, false, true>(shared, keys.of(pass.key, pass.query_channels),
                              target_of<Engine>(queries.of(pass.dquery, pass.query_channels), pass.first_for_queries),
                              0, pass.query_channels);
  gather<Engine, true, true>(shared, queries.of(pass.query, pass.query_channels),
                             target_of<Engine>(keys.of(pass.dkey, pass.query_channels), pass.first_for_keys), 0,
                             pass.query_channels);
}

template <typename Engine, typename T>
__device__ void backward_block(const BackwardPass<T>& pass, void* memory) {
  const Shared<Engine> shared(memory);
  const int block = static_cast<int>(blockIdx.x);
  attention_and_dvalue(pass, shared, BackwardWork(pass, block));
  // Worked out again: to keep addresses in registers meanwhile, gather() would have to spill others.
  dquery_and_dkey(pass, shared, BackwardWork(pass, unknown(block)));
}

template <typename Engine, typename T>
__global__ __launch_bounds__(Engine::THREADS, Engine::BLOCKS_PER_SM) void backward_kernel(BackwardPass<T> pass) {
  CC_ATTENTION_SHARED_MEMORY(memory);
  if constexpr (Engine::AVAILABLE) backward_block<Engine>(pass, memory);
}

// δ of each position, one warp for each.
template <typename T>
struct Delta {
  static constexpr int THREADS = 128;
  static constexpr int POSITIONS = THREADS / 32;  // of a block
  const T* grad;                                  // (B,T,H,W,C), as out
  const T* out;
  Wide<T>* delta;  // (B,T,H,W)
  Index positions;
  int channels;
};

template <typename T>
__global__ __launch_bounds__(Delta<T>::THREADS) void delta_kernel(Delta<T> task) {
  constexpr int VECTOR = 16 / static_cast<int>(sizeof(T));
  const int lane = static_cast<int>(threadIdx.x % 32);
  const Index position = static_cast<Index>(blockIdx.x) * Delta<T>::POSITIONS + threadIdx.x / 32;
  if (position >= task.positions) return;  // the whole warp
  const T* grad = task.grad + position * task.channels;
  const T* out = task.out + position * task.channels;
  Wide<T> sum = 0;
  const bool aligned = (reinterpret_cast<Index>(task.grad) | reinterpret_cast<Index>(task.out)) % 16 == 0;
  if (aligned && task.channels % VECTOR == 0) {
    for (int c = lane * VECTOR; c < task.channels; c += 32 * VECTOR) {
      const auto a = *reinterpret_cast<const Pack<T, VECTOR>*>(grad + c);
      const auto b = *reinterpret_cast<const Pack<T, VECTOR>*>(out + c);
      for (int n = 0; n < VECTOR; ++n) sum += widen(a.item[n]) * widen(b.item[n]);
    }
  } else {
    for (int c = lane; c < task.channels; c += 32) sum += widen(grad[c]) * widen(out[c]);
  }
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (lane == 0) task.delta[position] = sum;
}

}  // namespace cc_attention::cuda
