// Mean and biased variance of each channel, in one reading.
#pragma once

#include "division.cuh"

namespace libs::cuda {

// Of N channels, or of N parts of one, each of `count` elements: mean and sum of squared deviations from it.
template <typename W, int N>
struct Moments {
  W count;
  W mean[N], squares[N];

  // Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
  __device__ void join(const Moments& other) {
    if (other.count == 0) return;
    const W total = count + other.count, share = other.count / total;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const W delta = other.mean[i] - mean[i];
      mean[i] += delta * share;
      squares[i] += other.squares[i] + delta * delta * (count * share);
    }
    count = total;
  }

  __device__ Moments<W, 1> joined() const {
    Moments<W, 1> all{};
#pragma unroll
    for (int i = 0; i < N; ++i) all.join({count, {mean[i]}, {squares[i]}});
    return all;
  }

  __device__ void keep(int i, W* first, Index second) const { first[0] = mean[i], first[second] = squares[i]; }
  __device__ static Moments kept(Index count, W mean, W squares) { return {static_cast<W>(count), {mean}, {squares}}; }
};

// A thread sums deviations from its first elements and their squares: they are exact where the mean is large
// beside the standard deviation. A first element may be far off, but then its own deviation is a part of the
// result: at most about the thread's number of elements times the rounding of one is lost to cancellation.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS, RESIDENT) statistics_kernel(Division d, const T* x, Wide<T>* scratch) {
  using W = Wide<T>;
  LIBS_SHARED_MEMORY(shared);
  const Work work(d);
  Moments<W, V> mine{};
  if (work.begin < work.end) {
    const Pack<T, V> first = load<V>(x + work.begin);
    W sum[V] = {}, square[V] = {};
    for_each<BATCH>(
        work, [&](Index at) { return load<V>(x + at); },
        [&](const Pack<T, V>& pack, Index) {
          mine.count += 1;
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const W deviation = static_cast<W>(pack.item[i]) - static_cast<W>(first.item[i]);
            sum[i] += deviation;
            square[i] += deviation * deviation;
          }
        });
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const W mean = sum[i] / mine.count;
      mine.mean[i] = static_cast<W>(first.item[i]) + mean;
      mine.squares[i] = square[i] - sum[i] * mean;
    }
  }
  keep(d, work, shared, mine, scratch);
}

template <typename W>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    join_statistics_kernel(Division d, const W* scratch, W* mean, W* var) {
  join_partials<Moments<W, 1>>(d, scratch, [&](int channel, const Moments<W, 1>& all) {
    mean[channel] = all.mean[0];
    var[channel] = all.squares[0] / all.count;
  });
}

}  // namespace libs::cuda
