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
    if (count == 0) {  // then nothing is squared that may be large: not even the distance to a mean of 0
      *this = other;
      return;
    }
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

// Running statistics, which move towards those of a batch; or null.
template <typename W>
struct Running {
  W *mean, *var;
  W momentum;

  __device__ void update(int channel, W batch_mean, W batch_var, W count) const {
    if (mean == nullptr) return;
    mean[channel] = moved(mean[channel], batch_mean);
    var[channel] = moved(var[channel], batch_var * count / (count - 1));
  }
  __device__ W moved(W from, W to) const {  // as Tensor.lerp_ computes it
    return momentum < W(0.5) ? from + momentum * (to - from) : to - (to - from) * (1 - momentum);
  }
};

// result: means, variances and the number of elements of a channel, 2 channels + 1.
template <typename W>
__device__ void publish(int channel, int channels, W mean, W var, W count, const Running<W>& running, W* result) {
  result[channel] = mean;
  result[channels + channel] = var;
  if (channel == 0) result[2 * channels] = count;
  running.update(channel, mean, var, count);
}

template <typename W>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    join_statistics_kernel(Division d, const W* scratch, Running<W> running, W* result) {
  join_partials<Moments<W, 1>>(d, scratch, [&](int channel, const Moments<W, 1>& all) {
    const W count = static_cast<W>(d.shape.outer * d.shape.inner);
    publish(channel, d.shape.channels, all.mean[0], all.squares[0] / all.count, count, running, result);
  });
}

// The statistics of a batch from those of its parts (count, 2 channels + 1).
template <typename W>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    merge_statistics_kernel(const W* parts, int count, int channels, Running<W> running, W* result) {
  const int channel = static_cast<int>(blockIdx.x) * THREADS + static_cast<int>(threadIdx.x);
  if (channel >= channels) return;
  const auto number = [&](int part, int i) { return parts[static_cast<Index>(part) * (2 * channels + 1) + i]; };
  W total = 0, mean = 0, var = 0;
  for (int part = 0; part < count; ++part) {
    total += number(part, 2 * channels);
    mean += number(part, channel) * number(part, 2 * channels);
  }
  mean /= total;
  for (int part = 0; part < count; ++part) {
    const W delta = number(part, channel) - mean;
    var += (number(part, channels + channel) + delta * delta) * number(part, 2 * channels);
  }
  publish(channel, channels, mean, var / total, total, running, result);
}

}  // namespace libs::cuda
