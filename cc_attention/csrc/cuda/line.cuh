// Lines of a channels-last map. An image is an (H,W,C) array; a row of it is a matrix (W,C) of leading
// dimension C, a column a matrix (H,C) of leading dimension W·C. Nothing is ever permuted or copied.
#pragma once

#include "scalar.cuh"

namespace cc_attention::cuda {

enum class Axis { ROW, COLUMN };

// Some consecutive positions of a line, with all channels: a matrix (positions, channels) in global memory.
template <typename T>
struct Segment {
  T* data;
  Index stride;  // in elements
  int positions;
  int channels;
};

// Which positions these are, in any tensor. They are numbered over the whole batch: (b·H + y)·W + x.
struct Span {
  Index first;
  Index stride;  // from one to the next
  int length;

  __device__ Index position(int i) const { return first + i * stride; }

  template <typename T>
  __device__ Segment<T> of(T* tensor, int channels) const {
    return {tensor + first * channels, stride * channels, length, channels};
  }
};

// The positions [begin, end) of a line. Lines, too, are numbered over the whole batch: row b·H + y, column
// b·W + x.
__device__ inline Span span_of(Axis axis, int height, int width, Index line, int begin, int end) {
  if (axis == Axis::ROW) return {line * width + begin, 1, end - begin};
  return {(line / width * height + begin) * width + line % width, width, end - begin};
}

}  // namespace cc_attention::cuda
