// How a tensor lies in memory, and the pieces in which threads work on it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace libs {

using torch::stable::Tensor;

// How (B,C,...) lies in memory: as rows of C channels, or as B * C planes of one channel each.
struct Layout {
  int64_t channels, planes, rows, columns;
  bool plane() const { return planes > 0; }
};

// Whether the dimensions, listed from the outermost inwards, follow each other in memory without gaps.
inline bool dense(const Tensor& x, const std::vector<int64_t>& order) {
  int64_t stride = 1;
  for (auto dim = order.rbegin(); dim != order.rend(); ++dim) {
    if (x.size(*dim) != 1 && x.stride(*dim) != stride) return false;
    stride *= x.size(*dim);
  }
  return true;
}

inline Layout layout_of(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 2 && x.numel() > 0, "x must be (B,C,...) on the CPU and not empty");
  const int64_t channels = x.size(1), others = x.numel() / channels;
  std::vector<int64_t> usual{0, 1}, last{0};
  for (int64_t dim = 2; dim < x.dim(); ++dim) {
    usual.push_back(dim);
    last.push_back(dim);
  }
  last.push_back(1);
  if (dense(x, last)) return {channels, 0, others, channels};
  STD_TORCH_CHECK(dense(x, usual), "x must be contiguous or channels-last");
  return {channels, x.size(0) * channels, 1, others / x.size(0)};
}

inline void check_like(const Tensor& x, const Tensor& other, const char* name) {
  bool same = other.is_cpu() && other.dim() == x.dim() && other.scalar_type() == x.scalar_type();
  for (int64_t dim = 0; same && dim < x.dim(); ++dim)
    same = other.size(dim) == x.size(dim) && (x.size(dim) == 1 || other.stride(dim) == x.stride(dim));
  STD_TORCH_CHECK(same, name, " must have the shape, strides and dtype of y");
}

// Pieces of about 128 KiB, which stay in the L2 cache between two looks at them. Where they begin does not depend
// on the number of threads, nor does any sum.
struct Pieces {
  Pieces(const Layout& layout, int64_t element_size) : layout(layout) {
    constexpr int64_t bytes = 128 * 1024;
    const int64_t size = std::max<int64_t>(1, bytes / element_size);
    if (layout.plane()) {
      each = std::min(size, layout.columns);
      of_plane = (layout.columns + each - 1) / each;
      count = layout.planes * of_plane;
    } else {
      each = std::max<int64_t>(1, size / std::max<int64_t>(1, layout.columns));
      count = (layout.rows + each - 1) / each;
    }
  }
  struct Piece {
    int64_t offset, rows, columns, channel;
    int64_t size() const { return rows * columns; }
  };
  Piece operator[](int64_t index) const {
    if (!layout.plane()) {
      const int64_t begin = index * each;
      return {begin * layout.columns, std::min(each, layout.rows - begin), layout.columns, 0};
    }
    const int64_t plane = index / of_plane, begin = index % of_plane * each;
    return {plane * layout.columns + begin, 1, std::min(each, layout.columns - begin), plane % layout.channels};
  }
  // Numbers that a kernel gives for a piece: one for each channel in it.
  int64_t width() const { return layout.plane() ? 1 : layout.columns; }

  Layout layout;
  int64_t each = 0, of_plane = 1, count = 0;
};

template <typename Body>
void for_all(const Pieces& pieces, const Body& body) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), pieces.count);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t index; (index = next++) < pieces.count;) body(index, pieces[index]);
  });
}

}  // namespace libs
