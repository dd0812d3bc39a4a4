// The CUDA operator's kernels and its sequence of launches on the emulator: a library for
// test_cuda_kernels.py and, with -DSTANDALONE, a program for sanitizers.

#include "cuda_emulator.h"

#include "passes.cuh"
#include "portable.cuh"
#include "tensor_core.cuh"

using namespace cc_attention::cuda;

namespace {

template <typename Engine, typename T>
void run_forward(const Shape& shape, const Plan& plan, const void* const* in, void* const* out) {
  std::vector<Wide<T>> scratch(shape.positions());
  const auto input = [&](int n) { return static_cast<const T*>(in[n]); };
  forward<Engine>(shape, plan, input(0), input(1), input(2), static_cast<T*>(out[0]), static_cast<Wide<T>*>(out[1]),
                  scratch.data(), [](const ForwardPass<T>& pass, Index x, int y) {
                    const emulator::Dim3 grid{static_cast<unsigned>(x), static_cast<unsigned>(y), 1};
                    emulator::launch(grid, Engine::THREADS, Shared<Engine>::BYTES,
                                     [&] { forward_kernel<Engine>(pass); });
                  });
}

template <typename Engine, typename T>
void run_backward(const Shape& shape, const Plan& plan, const void* const* in, void* const* out) {
  std::vector<Wide<T>> delta(shape.positions());
  const auto input = [&](int n) { return static_cast<const T*>(in[n]); };
  const auto output = [&](int n) { return static_cast<T*>(out[n]); };
  backward(
      shape, plan.tile, input(0), input(1), input(2), input(3), input(4), static_cast<const Wide<T>*>(in[5]),
      delta.data(), output(0), output(1), output(2),
      [](const Delta<T>& task, Index blocks) {
        const emulator::Dim3 grid{static_cast<unsigned>(blocks), 1, 1};
        emulator::launch(grid, Delta<T>::THREADS, 0, [&] { delta_kernel(task); });
      },
      [](const BackwardPass<T>& pass, Index x) {
        const emulator::Dim3 grid{static_cast<unsigned>(x), 1, 1};
        emulator::launch(grid, Engine::THREADS, Shared<Engine>::BYTES, [&] { backward_kernel<Engine>(pass); });
      });
}

template <typename Engine, typename T>
void run(bool backward, const Shape& shape, const Plan& plan, const void* const* in, void* const* out) {
  (backward ? run_backward<Engine, T> : run_forward<Engine, T>)(shape, plan, in, out);
}

}  // namespace

// Forward: in = query, key, value; out = out, lse. Backward: in = grad, query, key, value, out, lse;
// out = dquery, dkey, dvalue. Maps are (B,T,H,W,·). Plan: tile, splits.
extern "C" void attention(int backward, int tensor_cores, const char* dtype,
                          const int* sizes,  // B, Cr, C, T, H, W
                          const int* plan_values, const void* const* in, void* const* out) {
  const Shape shape{sizes[0], sizes[1], sizes[2], {sizes[3], sizes[4], sizes[5]}};
  const Plan plan{plan_values[0], plan_values[1]};
  const auto is = [&](const char* name) { return std::strcmp(dtype, name) == 0; };
  if (is("float64")) {
    run<Portable<double>, double>(backward, shape, plan, in, out);
  } else if (is("float32")) {
    (tensor_cores ? run<TensorCore<float>, float> : run<Portable<float>, float>)(backward, shape, plan, in, out);
  } else if (is("float16")) {
    (tensor_cores ? run<TensorCore<Half>, Half> : run<Portable<float>, Half>)(backward, shape, plan, in, out);
  } else {
    (tensor_cores ? run<TensorCore<BFloat16>, BFloat16> : run<Portable<float>, BFloat16>)(backward, shape, plan, in,
                                                                                          out);
  }
}

// The launcher's own plan, to look at: tile, splits. `room`: blocks that the device holds at a time.
extern "C" void plan_of(int tensor_cores, const int* sizes, int room, int* values) {
  const Shape shape{sizes[0], sizes[1], sizes[2], {sizes[3], sizes[4], sizes[5]}};
  const Plan plan = tensor_cores ? plan_for<TensorCore<Half>>(shape, room) : plan_for<Portable<float>>(shape, room);
  values[0] = plan.tile;
  values[1] = plan.splits;
}

#ifdef STANDALONE
// emulated TENSOR_CORES DTYPE B CR C T H W TILE SPLITS: forward and backward on arrays of exactly the size needed.
int main(int argc, char** argv) {
  emulator::require(argc == 11, "ten arguments are needed");
  int numbers[8];
  for (int n = 0; n < 8; ++n) numbers[n] = std::atoi(argv[3 + n]);
  const size_t positions = static_cast<size_t>(numbers[0]) * numbers[3] * numbers[4] * numbers[5];
  const bool half = std::strstr(argv[2], "16") != nullptr;
  const auto map = [&](int channels) {  // some numbers between -1 and 1
    const size_t elements = positions * channels;
    auto* bytes = static_cast<unsigned char*>(std::malloc(elements * (half ? 2 : 4)));
    for (size_t n = 0; n < elements; ++n) {
      const float x = std::sin(static_cast<float>(n));
      unsigned bits = __float_as_uint(x);
      if (std::strcmp(argv[2], "float16") == 0) bits = emulator::float_to_half(x);
      if (std::strcmp(argv[2], "bfloat16") == 0) bits >>= 16;
      std::memcpy(bytes + n * (half ? 2 : 4), &bits, half ? 2 : 4);
    }
    return static_cast<void*>(bytes);
  };
  const int cr = numbers[1], c = numbers[2];
  void *query = map(cr), *key = map(cr), *value = map(c), *grad = map(c), *out = map(c);
  void *dquery = map(cr), *dkey = map(cr), *dvalue = map(c), *lse = std::malloc(positions * sizeof(float));
  const void* forward_in[] = {query, key, value};
  void* forward_out[] = {out, lse};
  const void* backward_in[] = {grad, query, key, value, out, lse};
  void* backward_out[] = {dquery, dkey, dvalue};
  attention(0, std::atoi(argv[1]), argv[2], numbers, numbers + 6, forward_in, forward_out);
  attention(1, std::atoi(argv[1]), argv[2], numbers, numbers + 6, backward_in, backward_out);
  for (void* p : {query, key, value, grad, out, dquery, dkey, dvalue, lse}) std::free(p);
}
#endif
