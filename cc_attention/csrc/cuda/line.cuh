// Lines of a channels-last map. A clip is a (T,H,W,C) array, an image one of T = 1; a row of it is a matrix (W,C)
// of leading dimension C, a column a matrix (H,C) of leading dimension W·C, a line through time a matrix (T,C) of
// leading dimension H·W·C. Nothing is ever permuted or copied.
#pragma once

#include "scalar.cuh"

namespace cc_attention::cuda {

enum class Axis { ROW, COLUMN, TIME };

struct Size {
  int frames, height, width;

  __host__ __device__ Index pixels() const { return static_cast<Index>(height) * width; }
  // Positions of a line.
  __host__ __device__ int length(Axis axis) const {
    return axis == Axis::ROW ? width : axis == Axis::COLUMN ? height : frames;
  }
};

// Some consecutive positions of a line, with all channels: a matrix (positions, channels) in global memory.
template <typename T>
struct Segment {
  T* data;
  Index stride;  // in elements
  int positions;
  int channels;
};

// Which positions these are, in any tensor. They are numbered over the whole batch: ((b·T + t)·H + y)·W + x.
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

// The positions [begin, end) of a line. Rows are numbered image·H + y, columns image·W + x, lines through time
// (b·H + y)·W + x. A launch has fewer than 2^31 lines; to divide 64 bits would take a hundred instructions.
__device__ inline Span span_of(Axis axis, const Size& size, int line, int begin, int end) {
  const Index width = size.width, pixels = size.pixels();
  if (axis == Axis::ROW) return {line * width + begin, 1, end - begin};
  const int lines = axis == Axis::COLUMN ? size.width : static_cast<int>(pixels);
  const Index group = line / lines, place = line % lines;
  if (axis == Axis::COLUMN) {
    return {(group * size.height + begin) * width + place, width, end - begin};
  }
  return {(group * size.frames + begin) * pixels + place, pixels, end - begin};
}

}  // namespace cc_attention::cuda
