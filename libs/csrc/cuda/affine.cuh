// The steps between statistics: y from x, the sums of the backward pass, and dx. With
//   x^ = (x - mean) / sqrt(var + eps),   z = x^ * scale + bias,   y = phi(z),   scale = |weight| + eps.
#pragma once

#include "activation.cuh"
#include "division.cuh"

namespace libs::cuda {

// Of each channel; weight, bias and sums may be null. Steps read what they need.
template <typename W>
struct Channels {
  const W* statistics;  // means, variances, and the number of elements of a channel: 2 count + 1
  const W *weight, *bias;
  const W* sums;  // of dz and of dz * x^, of each part of the batch: (parts, 2 count)
  W eps;
  int count, parts;

  __device__ W scale(int c) const { return weight == nullptr ? W(1) : (weight[c] < 0 ? -weight[c] : weight[c]) + eps; }
  __device__ W sign(int c) const { return weight == nullptr || weight[c] > 0 ? W(1) : W(weight[c] < 0 ? -1 : 0); }
  __device__ W offset(int c) const { return bias == nullptr ? W(0) : bias[c]; }
  __device__ W factor(int c) const { return scale(c) / square_root(statistics[count + c] + eps); }

  // Means over all parts; 0 in inference, where there are no sums.
  __device__ W mean_dz(int c) const { return mean_sum(c); }
  __device__ W mean_dz_xhat(int c) const { return mean_sum(count + c); }
  __device__ W mean_sum(int i) const {
    if (sums == nullptr) return 0;
    W sum = 0;
    for (int part = 0; part < parts; ++part) sum += sums[static_cast<Index>(part) * 2 * count + i];
    return sum / statistics[2 * count];
  }
};

// The tensors, all of the same layout.
template <typename T>
struct Maps {
  T* x;  // overwritten with y
  const T *grad, *y;
  T* dx;  // with ADD_RELU, dz
  const T* shortcut;
  T* out;  // relu(z) or relu(z + shortcut)
};

template <typename W>
struct Parameter {
  W param, inverse;
};

// Vectors of one or two tensors (the second may be null), and of the shortcut with ADD_RELU.
template <Activation A, typename T, int V>
struct Read {
  Pack<T, V> first, second;
  __device__ Wide<T> sum(T z, int) const { return static_cast<Wide<T>>(z); }
};
template <typename T, int V>
struct Read<Activation::ADD_RELU, T, V> {
  Pack<T, V> first, second, shortcut;
  __device__ Wide<T> sum(T z, int i) const { return static_cast<Wide<T>>(z) + static_cast<Wide<T>>(shortcut.item[i]); }
};

template <Activation A, typename T, int V>
__device__ Read<A, T, V> read(const T* first, const T* second, const T* shortcut, Index at) {
  Read<A, T, V> result{};
  result.first = load<V>(first + at);
  if (second != nullptr) result.second = load<V>(second + at);
  if constexpr (A == Activation::ADD_RELU) result.shortcut = load<V>(shortcut + at);
  return result;
}

template <Activation A, typename T, int V>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    normalize_kernel(Division d, Maps<T> maps, Channels<Wide<T>> channels, Parameter<Wide<T>> phi) {
  using W = Wide<T>;
  LIBS_SHARED_MEMORY(shared);
  const Work work(d);
  W numbers[2][V];
  coefficients(d, work, shared, numbers, [&](int c, W(&values)[2]) {
    values[0] = channels.factor(c);
    values[1] = channels.offset(c) - channels.statistics[c] * values[0];
  });
  const auto &factor = numbers[0], &offset = numbers[1];
  for_each<A == Activation::ADD_RELU ? BATCH / 2 : BATCH>(
      work, [&](Index at) { return read<A, T, V>(maps.x, nullptr, maps.shortcut, at); },
      [&](Read<A, T, V> pack, Index at) {
        Pack<T, V> out;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          T& y = pack.first.item[i];
          y = T(activated<A>(static_cast<W>(y) * factor[i] + offset[i], phi.param));
          if constexpr (has_relu(A)) {
            const W sum = pack.sum(y, i);
            out.item[i] = T(sum <= 0 ? W(0) : sum);
          }
        }
        store<V>(maps.x + at, pack.first);
        if constexpr (has_relu(A)) store<V>(maps.out + at, out);
      });
}

// Of N channels, or of N parts of one: the sums of dz and of dz * (z - bias), which is dz * x^ * scale.
template <typename W, int N>
struct Sums {
  W dz[N], product[N];

  __device__ void join(const Sums& other) {
#pragma unroll
    for (int i = 0; i < N; ++i) dz[i] += other.dz[i], product[i] += other.product[i];
  }

  __device__ Sums<W, 1> joined() const {
    Sums<W, 1> all{};
#pragma unroll
    for (int i = 0; i < N; ++i) all.join({{dz[i]}, {product[i]}});
    return all;
  }

  __device__ void keep(int i, W* first, Index second) const { first[0] = dz[i], first[second] = product[i]; }
  __device__ static Sums kept(Index, W dz, W product) { return {{dz}, {product}}; }
};

template <Activation A, typename T, int V>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    sums_kernel(Division d, Maps<T> maps, Channels<Wide<T>> channels, Parameter<Wide<T>> phi, Wide<T>* scratch) {
  using W = Wide<T>;
  LIBS_SHARED_MEMORY(shared);
  const Work work(d);
  W bias[1][V];
  coefficients(d, work, shared, bias, [&](int c, W(&values)[1]) { values[0] = channels.offset(c); });
  Sums<W, V> mine{};
  for_each<A == Activation::ADD_RELU ? BATCH / 4 : BATCH / 2>(  // of several tensors
      work, [&](Index at) { return read<A, T, V>(maps.grad, maps.y, maps.shortcut, at); },
      [&](Read<A, T, V> pack, Index at) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const W y = static_cast<W>(pack.second.item[i]);
          const W dz = static_cast<W>(pack.first.item[i]) * slope<A>(pack.sum(pack.second.item[i], i), phi.param);
          if constexpr (A == Activation::ADD_RELU) pack.first.item[i] = T(dz);
          mine.dz[i] += dz;
          mine.product[i] += dz * (inverted<A, T>(y, phi.inverse) - bias[0][i]);
        }
        if constexpr (A == Activation::ADD_RELU) store<V>(maps.dx + at, pack.first);
      });
  keep(d, work, shared, mine, scratch);
}

// sums: of dz and of dz * x^ (2 count); dweight: the weight's gradient.
template <typename W>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    join_sums_kernel(Division d, const W* scratch, Channels<W> channels, W* sums, W* dweight) {
  join_partials<Sums<W, 1>>(d, scratch, [&](int channel, const Sums<W, 1>& all) {
    const W sum_dz_xhat = all.product[0] / channels.scale(channel);
    sums[channel] = all.dz[0];
    sums[channels.count + channel] = sum_dz_xhat;
    dweight[channel] = sum_dz_xhat * channels.sign(channel);
  });
}

// dx = factor * (dz - mean_dz - x^ * mean_dz_xhat), where x^ = (z - bias) / scale.
template <Activation A, typename T, int V>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    gradient_kernel(Division d, Maps<T> maps, Channels<Wide<T>> channels, Parameter<Wide<T>> phi) {
  using W = Wide<T>;
  LIBS_SHARED_MEMORY(shared);
  const Work work(d);
  W numbers[4][V];
  coefficients(d, work, shared, numbers, [&](int c, W(&values)[4]) {
    values[0] = channels.factor(c);
    values[1] = channels.mean_dz(c);
    values[2] = channels.mean_dz_xhat(c) / channels.scale(c);
    values[3] = channels.offset(c);
  });
  const auto &factor = numbers[0], &mean_dz = numbers[1], &mean_product = numbers[2], &bias = numbers[3];
  for_each<BATCH / 2>(
      work, [&](Index at) { return read<A, T, V>(maps.grad, maps.y, maps.shortcut, at); },
      [&](const Read<A, T, V>& pack, Index at) {
        Pack<T, V> dx;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const W y = static_cast<W>(pack.second.item[i]);
          const W dz = static_cast<W>(pack.first.item[i]) * slope<A>(y, phi.param);
          dx.item[i] =
              T(factor[i] * (dz - mean_dz[i] - (inverted<A, T>(y, phi.inverse) - bias[i]) * mean_product[i]));
        }
        store<V>(maps.dx + at, dx);
      });
}

}  // namespace libs::cuda
