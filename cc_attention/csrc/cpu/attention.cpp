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

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
constexpr ScalarType scalar_type = ScalarType::Float;
template <>
constexpr ScalarType scalar_type<double> = ScalarType::Double;

// A sample is an image (C,H,W) or a clip (C,T,H,W), in memory (H,W,C) or (T,H,W,C).
MemoryFormat channels_last(const Tensor& x) {
  return x.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
}

Tensor empty_samples(int64_t batch, const Tensor& like, ScalarType dtype) {
  int64_t size[5] = {batch};
  for (int64_t dim = 1; dim < like.dim(); ++dim) size[dim] = like.size(dim);
  return torch::stable::empty({size, static_cast<size_t>(like.dim())}, dtype, std::nullopt, like.device(),
                              std::nullopt, channels_last(like));
}

// One sample of a batch, channels-last and of type T: a view where x is already like that.
template <typename T>
Tensor sample_of(const Tensor& x, int64_t index) {
  Tensor alias = x;  // narrow() of this interface takes no const reference
  const Tensor sample = torch::stable::narrow(alias, 0, index, 1);
  const Tensor converted = torch::stable::to(sample, scalar_type<T>, std::nullopt, std::nullopt, std::nullopt, false,
                                             false, channels_last(x));
  return torch::stable::contiguous(converted, channels_last(x));
}

// Where the results of one sample are computed: in the result itself where T is its type, else beside it.
template <typename T>
class ResultSample {
 public:
  ResultSample(const Tensor& results, int64_t index) : results_(results), place_(narrow(index)), sample_(place_) {
    if (results.scalar_type() != scalar_type<T>) sample_ = empty_samples(1, results, scalar_type<T>);
  }
  T* data() { return static_cast<T*>(sample_.mutable_data_ptr()); }
  void store() {
    if (sample_.scalar_type() != place_.scalar_type()) torch::stable::copy_(place_, sample_);
  }

 private:
  Tensor narrow(int64_t index) { return torch::stable::narrow(results_, 0, index, 1); }
  Tensor results_, place_, sample_;
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
  int64_t batch, reduced, channels, frames, height, width;  // an image is one frame
  int64_t pixels() const { return height * width; }
  int64_t positions() const { return frames * pixels(); }  // of a sample
  bool empty() const { return batch * positions() == 0; }
  Line row() const { return {width, reduced, channels, 1, true, false}; }
  Line column() const { return {height, reduced, channels, width, false, frames == 1}; }
  Line through_time() const { return {frames, reduced, channels, pixels(), false, true}; }
};

// Python has checked the arguments and reported faults; this check only guards memory accesses.
Shape checked(const Tensor& query, const Tensor& key, const Tensor& value) {
  const int64_t dims = query.dim();
  const auto same = [dims](const Tensor& x, const Tensor& y) {
    bool equal = x.dim() == dims && y.dim() == dims && x.is_cpu() && y.is_cpu() && x.scalar_type() == y.scalar_type();
    for (int64_t dim = 0; dim < dims && equal; ++dim) equal = dim == 1 || x.size(dim) == y.size(dim);
    return equal;
  };
  STD_TORCH_CHECK((dims == 4 || dims == 5) && same(query, key) && same(query, value) && query.size(1) == key.size(1),
                  "query, key and value do not fit together");
  return {query.size(0), query.size(1), value.size(1), dims == 5 ? query.size(2) : 1, query.size(dims - 2),
          query.size(dims - 1)};
}

// Runs kernel(line, pointers, scratch) along each axis of a sample: rows, then columns of each frame, then lines
// through time. `at` gives the pointers of a line by the number of its first position.
template <typename T, typename Kernel, typename At>
void for_all_axes(const Shape& shape, int64_t (*scratch_size)(const Line&), const Kernel& kernel, const At& at) {
  const auto run = [&](const Line& line, int64_t lines, int64_t start, int64_t stride) {
    for_all_lines<T>(lines, scratch_size(line),
                     [&](int64_t index, T* scratch) { kernel(line, at(start + index * stride), scratch); });
  };
  for (int64_t frame = 0; frame < shape.frames; ++frame) {
    run(shape.row(), shape.height, frame * shape.pixels(), shape.width);
    run(shape.column(), shape.width, frame * shape.pixels(), 1);
  }
  if (shape.frames > 1) run(shape.through_time(), shape.pixels(), 0, 1);
}

template <typename T>
void forward_sample(const Shape& shape, const Forward<T>& sample) {
  const LineKernels<T>& kernels = line_kernels<T>();
  for_all_axes<T>(shape, kernels.forward_scratch, kernels.forward, [&](int64_t position) -> Forward<T> {
    const int64_t q = position * shape.reduced, v = position * shape.channels;
    return {sample.query + q, sample.key + q, sample.value + v, sample.out + v, sample.lse + position};
  });
}

template <typename T>
void backward_sample(const Shape& shape, const Backward<T>& sample) {
  const LineKernels<T>& kernels = line_kernels<T>();
  for_all_axes<T>(shape, kernels.backward_scratch, kernels.backward, [&](int64_t position) -> Backward<T> {
    const int64_t q = position * shape.reduced, v = position * shape.channels;
    return {sample.grad + v,       sample.query + q,      sample.key + q,        sample.value + v,  sample.out + v,
            sample.lse + position, sample.delta + position, sample.dquery + q, sample.dkey + q, sample.dvalue + v};
  });
}

// T is what is computed in: fp32 for half types.
template <typename T>
std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value) {
  const Shape shape = checked(query, key, value);
  const Tensor out = empty_samples(shape.batch, value, value.scalar_type());
  const int64_t image[] = {shape.batch, shape.height, shape.width};
  const int64_t clip[] = {shape.batch, shape.frames, shape.height, shape.width};
  const auto size = value.dim() == 4 ? IntHeaderOnlyArrayRef(image, 3) : IntHeaderOnlyArrayRef(clip, 4);
  const Tensor lse = torch::stable::empty(size, scalar_type<T>);
  for (int64_t index = 0; index < shape.batch && !shape.empty(); ++index) {
    const Tensor q = sample_of<T>(query, index), k = sample_of<T>(key, index), v = sample_of<T>(value, index);
    ResultSample<T> result(out, index);
    T* lse_sample = static_cast<T*>(lse.mutable_data_ptr()) + index * shape.positions();
    forward_sample<T>(shape, {data_of<T>(q), data_of<T>(k), data_of<T>(v), result.data(), lse_sample});
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
  STD_TORCH_CHECK(grad.size(1) == shape.channels && out.size(1) == shape.channels &&
                      lse.numel() == shape.batch * shape.positions() && lse.scalar_type() == scalar_type<T> && lse.is_cpu(),
                  "grad, out and lse are not those of this forward pass");
  const Tensor dquery = empty_samples(shape.batch, query, query.scalar_type());
  const Tensor dkey = empty_samples(shape.batch, key, key.scalar_type());
  const Tensor dvalue = empty_samples(shape.batch, value, value.scalar_type());
  const Tensor lse_all = torch::stable::contiguous(lse);
  const int64_t size[] = {shape.positions()};
  const Tensor delta = torch::stable::empty({size, 1}, scalar_type<T>);
  for (int64_t index = 0; index < shape.batch && !shape.empty(); ++index) {
    const Tensor q = sample_of<T>(query, index), k = sample_of<T>(key, index), v = sample_of<T>(value, index);
    const Tensor g = sample_of<T>(grad, index), o = sample_of<T>(out, index);
    ResultSample<T> dq(dquery, index), dk(dkey, index), dv(dvalue, index);
    backward_sample<T>(shape, {data_of<T>(g), data_of<T>(q), data_of<T>(k), data_of<T>(v), data_of<T>(o),
                              data_of<T>(lse_all) + index * shape.positions(), static_cast<T*>(delta.mutable_data_ptr()),
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
