// The steps between statistics: y from x, the sums of the backward pass, and dx. With
//   x^ = (x - mean) / sqrt(var + eps),   z = x^ * scale + bias,   y = phi(z),   scale = |weight| + eps.
#pragma once

#include "activation.cuh"
#include "division.cuh"

namespace libs::cuda {

// One number for each channel, each; weight and bias may be null. Steps read what they need.
template <typename W>
struct Channels {
  const W *mean, *var, *weight, *bias, *mean_dz, *mean_dz_xhat;
  W eps;

  __device__ W scale(int c) const { return weight == nullptr ? W(1) : (weight[c] < 0 ? -weight[c] : weight[c]) + eps; }
  __device__ W offset(int c) const { return bias == nullptr ? W(0) : bias[c]; }
  __device__ W factor(int c) const { return scale(c) / square_root(var[c] + eps); }
};

// The tensors, all of the same layout.
template <typename T>
struct Maps {
  T* x;  // overwritten with y
  const T *grad, *y;
  T* dx;
};

template <typename W>
struct Parameter {
  W param, inverse;
};

template <Activation A, typename T, int V>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    normalize_kernel(Division d, Maps<T> maps, Channels<Wide<T>> channels, Parameter<Wide<T>> phi) {
  using W = Wide<T>;
  LIBS_SHARED_MEMORY(shared);
  const Work work(d);
  W numbers[2][V];
  coefficients(d, work, shared, numbers, [&](int c, W(&values)[2]) {
    values[0] = channels.factor(c);
    values[1] = channels.offset(c) - channels.mean[c] * values[0];
  });
  const auto &factor = numbers[0], &offset = numbers[1];
  for_each<BATCH>(
      work, [&](Index at) { return load<V>(maps.x + at); },
      [&](Pack<T, V> pack, Index at) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          pack.item[i] = T(activated<A>(static_cast<W>(pack.item[i]) * factor[i] + offset[i], phi.param));
        }
        store<V>(maps.x + at, pack);
      });
}

template <typename T, int V>
struct GradAndY {
  Pack<T, V> grad, y;
};

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
  for_each<BATCH / 2>(  // of two tensors
      work, [&](Index at) { return GradAndY<T, V>{load<V>(maps.grad + at), load<V>(maps.y + at)}; },
      [&](const GradAndY<T, V>& pack, Index) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const W y = static_cast<W>(pack.y.item[i]);
          const W dz = static_cast<W>(pack.grad.item[i]) * slope<A>(y, phi.param);
          mine.dz[i] += dz;
          mine.product[i] += dz * (inverted<A>(y, phi.inverse) - bias[0][i]);
        }
      });
  keep(d, work, shared, mine, scratch);
}

template <typename W>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    join_sums_kernel(Division d, const W* scratch, Channels<W> channels, W* sum_dz, W* sum_dz_xhat) {
  join_partials<Sums<W, 1>>(d, scratch, [&](int channel, const Sums<W, 1>& all) {
    sum_dz[channel] = all.dz[0];
    sum_dz_xhat[channel] = all.product[0] / channels.scale(channel);
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
    values[1] = channels.mean_dz[c];
    values[2] = channels.mean_dz_xhat[c] / channels.scale(c);
    values[3] = channels.offset(c);
  });
  const auto &factor = numbers[0], &mean_dz = numbers[1], &mean_product = numbers[2], &bias = numbers[3];
  for_each<BATCH / 2>(
      work, [&](Index at) { return GradAndY<T, V>{load<V>(maps.grad + at), load<V>(maps.y + at)}; },
      [&](const GradAndY<T, V>& pack, Index at) {
        Pack<T, V> dx;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const W y = static_cast<W>(pack.y.item[i]);
          const W dz = static_cast<W>(pack.grad.item[i]) * slope<A>(y, phi.param);
          dx.item[i] =
              T(factor[i] * (dz - mean_dz[i] - (inverted<A>(y, phi.inverse) - bias[i]) * mean_product[i]));
        }
        store<V>(maps.dx + at, dx);
      });
}

}  // namespace libs::cuda
