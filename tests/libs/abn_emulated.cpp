// The steps' CUDA kernels and their sequences of launches on the emulator: a library for
// test_cuda_kernels.py and, with -DSTANDALONE, a program for sanitizers.

#define LIBS_EMULATED 1
#include "cuda_emulator.h"

#include "steps.cuh"

using namespace libs::cuda;

namespace {

template <typename T>
void run(const char* name, const Division& d, Activation activation, const double* settings, const void* const* in,
         void* const* out) {
  using W = Wide<T>;
  const auto start = [](Index blocks, int threads, int bytes, auto kernel, const auto&... arguments) {
    emulator::launch({static_cast<unsigned>(blocks), 1, 1}, static_cast<unsigned>(threads),
                     static_cast<size_t>(bytes), [&] { kernel(arguments...); });
  };
  const auto map = [&](int n) { return static_cast<const T*>(in[n]); };
  const auto vector = [&](int n) { return static_cast<const W*>(in[n]); };
  const auto result = [&](int n) { return static_cast<W*>(out[n]); };
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  const W eps = static_cast<W>(settings[0]), param = static_cast<W>(settings[1]);
  // Exactly as large as promised, so that AddressSanitizer sees any access beyond.
  std::vector<W> scratch(scratch_size(d), static_cast<W>(NAN));
  const Parameter<W> phi{param, 1 / param};
  const int count = d.shape.channels, parts = static_cast<int>(settings[2]);
  const bool moves = std::strstr(name, "statistics") != nullptr && out[1] != nullptr;
  const Running<W> running{moves ? result(1) : nullptr, moves ? result(2) : nullptr, static_cast<W>(0.1)};
  const auto maps = [&](T* x, const void* grad, const void* y, T* dx, const void* shortcut, T* rectified) {
    return Maps<T>{x, static_cast<const T*>(grad), static_cast<const T*>(y), dx, static_cast<const T*>(shortcut),
                   rectified};
  };
  const auto writable = [&](int n) { return static_cast<T*>(out[n]); };
  if (is("statistics")) {
    statistics(d, map(0), scratch.data(), running, result(0), start);
  } else if (is("merge_statistics")) {
    merge_statistics(vector(0), parts, count, running, result(0), start);
  } else if (is("normalize_") || is("normalize_relu_")) {
    const bool relu = is("normalize_relu_");
    const void* const shortcut = relu ? in[3] : nullptr;
    normalize(Step<T>{d, maps(writable(0), nullptr, nullptr, nullptr, shortcut, relu ? writable(1) : nullptr),
                      {vector(0), vector(1), vector(2), nullptr, eps, count, 0},
                      relu ? (shortcut ? Activation::ADD_RELU : Activation::RELU) : activation, phi},
              start);
  } else if (is("sums")) {
    sums(Step<T>{d, maps(nullptr, in[0], in[1], nullptr, nullptr, nullptr),
                 {nullptr, vector(2), vector(3), nullptr, eps, count, 0}, activation, phi},
         scratch.data(), result(0), result(1), start);
  } else if (is("sums_add_relu")) {
    sums(Step<T>{d, maps(nullptr, in[0], in[1], writable(2), in[2], nullptr),
                 {nullptr, vector(3), vector(4), nullptr, eps, count, 0}, Activation::ADD_RELU, phi},
         scratch.data(), result(0), result(1), start);
  } else {
    emulator::require(is("gradient"), "there is no such step");
    gradient(Step<T>{d, maps(nullptr, in[0], in[1], writable(0), nullptr, nullptr),
                     {vector(2), vector(4), vector(5), vector(3), eps, count, parts}, activation, phi},
             start);
  }
}

}  // namespace

// The tensors that an operator in libs/ops.py takes, in their order, are the inputs, and what it returns are the
// outputs, with these exceptions: x of normalize_ and normalize_relu_ is the first output, and running statistics
// are the last two. Optional ones may be null. Sizes: outer, channels, inner, elements of a load, threads of a
// block, blocks. Settings: eps, param, parts of the batch.
extern "C" void abn_step(const char* name, const char* dtype, const char* activation, const int* sizes,
                         const double* settings, const void* const* in, void* const* out) {
  const auto is = [&](const char* other) { return std::strcmp(dtype, other) == 0; };
  const Division d = divide({sizes[0], sizes[1], sizes[2]}, sizes[3], sizes[4], sizes[5]);
  const Activation kind = activation[0] == 'l'   ? Activation::LEAKY_RELU
                          : activation[0] == 'e' ? Activation::ELU
                          : activation[0] == 'r' ? Activation::RELU
                                                 : Activation::IDENTITY;
  (is("float64")   ? run<double>
   : is("float32") ? run<float>
   : is("float16") ? run<Half>
                   : run<BFloat16>)(name, d, kind, settings, in, out);
}

// How the launcher divides: threads side by side and below each other, lines of a part, parts, groups.
extern "C" void abn_division(const long long* sizes, int vector, long long* result) {
  const Division d = divide({sizes[0], static_cast<int>(sizes[1]), sizes[2]}, vector);
  const long long values[] = {d.columns, d.rows, d.each, d.parts, d.groups};
  std::copy(values, values + 5, result);
}

#ifdef STANDALONE
// emulated DTYPE ACTIVATION OUTER CHANNELS INNER VECTOR THREADS BLOCKS: all steps on arrays of exactly the size
// needed.
int main(int argc, char** argv) {
  emulator::require(argc == 9, "eight arguments are needed");
  int sizes[6];
  for (int n = 0; n < 6; ++n) sizes[n] = std::atoi(argv[3 + n]);
  const double settings[] = {1e-5, 0.01, 2};
  const size_t channels = static_cast<size_t>(sizes[1]), elements = sizes[0] * channels * sizes[2];
  const bool half = std::strstr(argv[1], "16") != nullptr;
  const auto map = [&](float scale) {
    auto* bytes = static_cast<unsigned char*>(std::malloc(elements * (half ? 2 : 4)));
    for (size_t n = 0; n < elements; ++n) {
      const float x = scale * std::sin(static_cast<float>(n));
      unsigned bits = __float_as_uint(x);
      if (std::strcmp(argv[1], "float16") == 0) bits = emulator::float_to_half(x);
      if (std::strcmp(argv[1], "bfloat16") == 0) bits >>= 16;
      std::memcpy(bytes + n * (half ? 2 : 4), &bits, half ? 2 : 4);
    }
    return static_cast<void*>(bytes);
  };
  void *x = map(2), *grad = map(1), *shortcut = map(1), *dx = map(0), *dz = map(0), *rectified = map(0);
  std::vector<float> statistics(2 * channels + 1), parts(2 * statistics.size(), 1.0f), running(channels),
      weight(channels, -0.5f), bias(channels, 0.1f), sums(4 * channels), dweight(channels);
  const auto step = [&](const char* name, std::initializer_list<const void*> in, std::initializer_list<void*> out) {
    abn_step(name, argv[1], argv[2], sizes, settings, in.begin(), out.begin());
  };
  step("statistics", {x}, {statistics.data(), running.data(), running.data()});
  step("merge_statistics", {parts.data()}, {statistics.data(), nullptr, nullptr});
  step("normalize_", {statistics.data(), weight.data(), bias.data()}, {x, nullptr});
  step("normalize_relu_", {statistics.data(), weight.data(), bias.data(), shortcut}, {x, rectified});
  step("sums", {grad, x, weight.data(), bias.data()}, {sums.data(), dweight.data()});
  step("sums_add_relu", {grad, x, shortcut, weight.data(), bias.data()}, {sums.data(), dweight.data(), dz});
  step("gradient", {grad, x, statistics.data(), sums.data(), weight.data(), bias.data()}, {dx, nullptr});
  for (void* p : {x, grad, shortcut, dx, dz, rectified}) std::free(p);
}
#endif
