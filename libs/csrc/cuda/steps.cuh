// The steps as sequences of launches, without any call to CUDA: the caller gives
// launch(blocks, threads, bytes of shared memory, kernel, arguments...), so that the tests run the same
// sequences on a CPU.
#pragma once

#include "affine.cuh"
#include "statistics.cuh"

namespace libs::cuda {

template <typename T>
struct Step {
  Division division;
  Maps<T> maps;
  Channels<Wide<T>> channels;
  Activation activation;
  Parameter<Wide<T>> phi;
};

// Numbers in the scratch memory of statistics and sums.
inline Index scratch_size(const Division& d) { return 2 * d.partials() * d.shape.channels; }

template <int VALUE_>
struct Vector {
  static constexpr int VALUE = VALUE_;
};
template <Activation VALUE_>
struct Phi {
  static constexpr Activation VALUE = VALUE_;
};

// run(vector) with the number of elements of a load as a constant.
template <typename T, typename Run>
void with_vector(const Division& d, Run run) {
  constexpr int WHOLE = 16 / sizeof(T);
  d.vector == WHOLE ? run(Vector<WHOLE>{}) : run(Vector<1>{});
}

// run(phi, vector), likewise.
template <typename T, typename Run>
void with_constants(const Step<T>& step, Run run) {
  with_vector<T>(step.division, [&](auto vector) {
    if (step.activation == Activation::LEAKY_RELU) return run(Phi<Activation::LEAKY_RELU>{}, vector);
    if (step.activation == Activation::ELU) return run(Phi<Activation::ELU>{}, vector);
    if (step.activation == Activation::RELU) return run(Phi<Activation::RELU>{}, vector);
    if (step.activation == Activation::ADD_RELU) return run(Phi<Activation::ADD_RELU>{}, vector);
    run(Phi<Activation::IDENTITY>{}, vector);
  });
}

// Bytes of shared memory: for `count` coefficients of the block's channels, and for join_rows.
template <typename W>
int bytes_of_coefficients(const Division& d, int count) {
  return count * d.columns * d.vector * static_cast<int>(sizeof(W));
}
template <typename Partial>
int bytes_of_join(int threads) {
  return threads / 2 * static_cast<int>(sizeof(Partial));
}

// Blocks of the joining kernels.
inline Index joining_blocks(const Division& d) { return ceil_div(d.shape.channels, JOIN_COLUMNS); }

template <typename T, typename Launch>
void statistics(const Division& d, const T* x, Wide<T>* scratch, const Running<Wide<T>>& running, Wide<T>* result,
                Launch launch) {
  using W = Wide<T>;
  with_vector<T>(d, [&](auto vector) {
    constexpr int V = decltype(vector)::VALUE;
    launch(d.blocks(), d.threads(), bytes_of_join<Moments<W, V>>(d.threads()), statistics_kernel<T, V>, d, x, scratch);
  });
  launch(joining_blocks(d), THREADS, bytes_of_join<Moments<W, 1>>(THREADS), join_statistics_kernel<W>, d,
         static_cast<const W*>(scratch), running, result);
}

template <typename W, typename Launch>
void merge_statistics(const W* parts, int count, int channels, const Running<W>& running, W* result, Launch launch) {
  launch(ceil_div(channels, THREADS), THREADS, 0, merge_statistics_kernel<W>, parts, count, channels, running, result);
}

template <typename T, typename Launch>
void normalize(const Step<T>& step, Launch launch) {
  const Division& d = step.division;
  with_constants(step, [&](auto phi, auto vector) {
    launch(d.blocks(), d.threads(), bytes_of_coefficients<Wide<T>>(d, 2),
           normalize_kernel<decltype(phi)::VALUE, T, decltype(vector)::VALUE>, d, step.maps, step.channels,
           step.phi);
  });
}

template <typename T, typename Launch>
void sums(const Step<T>& step, Wide<T>* scratch, Wide<T>* result, Wide<T>* dweight, Launch launch) {
  using W = Wide<T>;
  const Division& d = step.division;
  with_constants(step, [&](auto phi, auto vector) {
    constexpr int V = decltype(vector)::VALUE;
    launch(d.blocks(), d.threads(),
           larger(bytes_of_coefficients<W>(d, 1), bytes_of_join<Sums<W, V>>(d.threads())),
           sums_kernel<decltype(phi)::VALUE, T, V>, d, step.maps, step.channels, step.phi, scratch);
  });
  launch(joining_blocks(d), THREADS, bytes_of_join<Sums<W, 1>>(THREADS), join_sums_kernel<W>, d,
         static_cast<const W*>(scratch), step.channels, result, dweight);
}

template <typename T, typename Launch>
void gradient(const Step<T>& step, Launch launch) {
  const Division& d = step.division;
  with_constants(step, [&](auto phi, auto vector) {
    // With a shortcut, sums has written dz, and the rest is IDENTITY.
    if constexpr (decltype(phi)::VALUE != Activation::ADD_RELU) {
      launch(d.blocks(), d.threads(), bytes_of_coefficients<Wide<T>>(d, 4),
             gradient_kernel<decltype(phi)::VALUE, T, decltype(vector)::VALUE>, d, step.maps, step.channels,
             step.phi);
    }
  });
}

}  // namespace libs::cuda
