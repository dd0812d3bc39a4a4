// Criss-cross attention on the CPU: registers the kernels of lines.h with PyTorch's dispatcher.

#include "lines.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <tuple>

namespace cc_attention {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
constexpr ScalarType scalar_type = ScalarType::Float;
template <>
constexpr ScalarType scalar_type<double> = ScalarType::Double;

Tensor empty_images(int64_t batch, const Tensor& like, ScalarType dtype) {
  const int64_t size[] = {batch, like.size(1), like.size(2), like.size(3)};
  return torch::stable::empty({size, 4}, dtype, std::nullopt, like.device(), std::nullopt, MemoryFormat::ChannelsLast);
}

// One image of (B,C,H,W) as (1,C,H,W), channels-last and of type T: a view where x is already like that.
template <typename T>
Tensor image_of(const Tensor& x, int64_t index) {
  Tensor alias = x;  // narrow() of this interface takes no const reference
  const Tensor image = torch::stable::narrow(alias, 0, index, 1);
  const Tensor converted = torch::stable::to(image, scalar_type<T>, std::nullopt, std::nullopt, std::nullopt, false,
                                             false, MemoryFormat::ChannelsLast);
  return torch::stable::contiguous(converted, MemoryFormat::ChannelsLast);
}

// Where the results of one image are computed: in the result itself where T is its type, else beside it.
template <typename T>
class ResultImage {
 public:
  ResultImage(const Tensor& results, int64_t index) : results_(results), place_(narrow(index)), image_(place_) {
    if (results.scalar_type() != scalar_type<T>) image_ = empty_images(1, results, scalar_type<T>);
  }
  T* data() { return static_cast<T*>(image_.mutable_data_ptr()); }
  void store() {
    if (image_.scalar_type() != place_.scalar_type()) torch::stable::copy_(place_, image_);
  }

 private:
  Tensor narrow(int64_t index) { return torch::stable::narrow(results_, 0, index, 1); }
  Tensor results_, place_, image_;
};

template <typename T>
const T* data_of(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

// Runs body(line, scratch) for all lines. Each thread takes the next line that is left; lines do not depend on
// each other, so the result does not depend on who takes which.
template <typename T, typename Body>
void for_all_lines(int64_t lines, int64_t scratch_size, const Body& body) {
  constexpr int64_t cache_line = 64 / sizeof(T);
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), lines);
  const int64_t stride = (scratch_size + cache_line - 1) / cache_line * cache_line;
  const int64_t size[] = {threads * stride};
  const Tensor memory = torch::stable::empty({size, 1}, scalar_type<T>);  // counted by PyTorch's profiler
  T* scratch = static_cast<T*>(memory.mutable_data_ptr());
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t line; (line = next++) < lines;) body(line, scratch + thread * stride);
  });
}

struct Shape {
  int64_t batch, reduced, channels, height, width;
  bool empty() const { return batch * height * width == 0; }
  Line row() const { return {width, reduced, channels, 1, true}; }
  Line column() const { return {height, reduced, channels, width, false}; }
};

// Python has checked the arguments and said what is wrong with them; this is the last line before memory.
Shape checked(const Tensor& query, const Tensor& key, const Tensor& value) {
  const auto same = [](const Tensor& x, const Tensor& y) {
    bool equal = x.dim() == 4 && y.dim() == 4 && x.is_cpu() && y.is_cpu() && x.scalar_type() == y.scalar_type();
    for (int64_t dim : {0, 2, 3}) equal = equal && x.size(dim) == y.size(dim);
    return equal;
  };
  STD_TORCH_CHECK(same(query, key) && same(query, value) && query.size(1) == key.size(1),
                  "query, key and value do not fit together");
  return {query.size(0), query.size(1), value.size(1), query.size(2), query.size(3)};
}

template <typename T>
void forward_image(const Shape& shape, const Forward<T>& image) {
  const LineKernels<T>& kernels = line_kernels<T>();
  const Line row = shape.row(), column = shape.column();
  for_all_lines<T>(shape.height, kernels.forward_scratch(row), [&](int64_t y, T* scratch) {
    const int64_t q = y * shape.width * shape.reduced, v = y * shape.width * shape.channels;
    kernels.forward(
        row, {image.query + q, image.key + q, image.value + v, image.out + v, image.lse + y * shape.width}, scratch);
  });
  for_all_lines<T>(shape.width, kernels.forward_scratch(column), [&](int64_t x, T* scratch) {
    const int64_t q = x * shape.reduced, v = x * shape.channels;
    kernels.forward(column, {image.query + q, image.key + q, image.value + v, image.out + v, image.lse + x}, scratch);
  });
}

template <typename T>
void backward_image(const Shape& shape, const Backward<T>& image) {
  const LineKernels<T>& kernels = line_kernels<T>();
  const auto line_at = [&](int64_t pixel) -> Backward<T> {
    const int64_t q = pixel * shape.reduced, v = pixel * shape.channels;
    return {image.grad + v,    image.query + q,     image.key + q,    image.value + v, image.out + v, image.lse + pixel,
            image.delta + pixel, image.dquery + q, image.dkey + q, image.dvalue + v};
  };
  const Line row = shape.row(), column = shape.column();
  for_all_lines<T>(shape.height, kernels.backward_scratch(row), [&](int64_t y, T* scratch) {
    kernels.backward(row, line_at(y * shape.width), scratch);
  });
  for_all_lines<T>(shape.width, kernels.backward_scratch(column),
                   [&](int64_t x, T* scratch) { kernels.backward(column, line_at(x), scratch); });
}

// T is what is computed in: fp32 for half types.
template <typename T>
std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value) {
  const Shape shape = checked(query, key, value);
  const Tensor out = empty_images(shape.batch, value, value.scalar_type());
  const int64_t size[] = {shape.batch, shape.height, shape.width};
  const Tensor lse = torch::stable::empty({size, 3}, scalar_type<T>);
  for (int64_t index = 0; index < shape.batch && !shape.empty(); ++index) {
    const Tensor q = image_of<T>(query, index), k = image_of<T>(key, index), v = image_of<T>(value, index);
    ResultImage<T> result(out, index);
    T* lse_image = static_cast<T*>(lse.mutable_data_ptr()) + index * shape.height * shape.width;
    forward_image<T>(shape, {data_of<T>(q), data_of<T>(k), data_of<T>(v), result.data(), lse_image});
    result.store();
  }
  return {out, lse};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                                            const Tensor& value, const Tensor& out, const Tensor& lse) {
  const Shape shape = checked(query, key, value);
  checked(query, key, grad);
  checked(query, key, out);
  const int64_t pixels = shape.height * shape.width;
  STD_TORCH_CHECK(grad.size(1) == shape.channels && out.size(1) == shape.channels &&
                      lse.numel() == shape.batch * pixels && lse.scalar_type() == scalar_type<T> && lse.is_cpu(),
                  "grad, out and lse are not those of this forward pass");
  const Tensor dquery = empty_images(shape.batch, query, query.scalar_type());
  const Tensor dkey = empty_images(shape.batch, key, key.scalar_type());
  const Tensor dvalue = empty_images(shape.batch, value, value.scalar_type());
  const Tensor lse_all = torch::stable::contiguous(lse);
  const int64_t size[] = {pixels};
  const Tensor delta = torch::stable::empty({size, 1}, scalar_type<T>);
  for (int64_t index = 0; index < shape.batch && !shape.empty(); ++index) {
    const Tensor q = image_of<T>(query, index), k = image_of<T>(key, index), v = image_of<T>(value, index);
    const Tensor g = image_of<T>(grad, index), o = image_of<T>(out, index);
    ResultImage<T> dq(dquery, index), dk(dkey, index), dv(dvalue, index);
    backward_image<T>(shape, {data_of<T>(g), data_of<T>(q), data_of<T>(k), data_of<T>(v), data_of<T>(o),
                              data_of<T>(lse_all) + index * pixels, static_cast<T*>(delta.mutable_data_ptr()),
                              dq.data(), dk.data(), dv.data()});
    dq.store();
    dk.store();
    dv.store();
  }
  return {dquery, dkey, dvalue};
}

// TF32 is a matter of GPUs.
std::tuple<Tensor, Tensor> forward_cpu(const Tensor& query, const Tensor& key, const Tensor& value, bool /*tf32*/) {
  return query.scalar_type() == ScalarType::Double ? forward<double>(query, key, value)
                                                   : forward<float>(query, key, value);
}

std::tuple<Tensor, Tensor, Tensor> backward_cpu(const Tensor& grad, const Tensor& query, const Tensor& key,
                                                const Tensor& value, const Tensor& out, const Tensor& lse,
                                                bool /*tf32*/) {
  return query.scalar_type() == ScalarType::Double ? backward<double>(grad, query, key, value, out, lse)
                                                   : backward<float>(grad, query, key, value, out, lse);
}

}  // namespace
}  // namespace cc_attention

// The schemas are defined in Python (ops.py), so that they are there without this library as well.
STABLE_TORCH_LIBRARY_IMPL(cc_attention, CPU, library) {
  library.impl("criss_cross_attention", TORCH_BOX(&cc_attention::forward_cpu));
  library.impl("criss_cross_attention_backward", TORCH_BOX(&cc_attention::backward_cpu));
}

// Looked for in the file before it is loaded: a binary of other sources is not used (native.py).
extern "C" __attribute__((visibility("default"))) const char cc_attention_sources[] = CSRC_HASH;

extern "C" __attribute__((visibility("default"))) const char* cc_attention_instruction_set() {
  return cc_attention::line_kernels<float>().name;
}
