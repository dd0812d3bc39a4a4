// Kernels for one line of positions: a row, a column or a line through time. Compiled for each instruction set.
#pragma once

#include <cstdint>

namespace cc_attention {

// A line whose positions lie `step` apart: 1 in a row, W in a column, H * W through time. In channels-last
// memory a tensor of C channels then is a matrix with leading dimension step * C.
struct Line {
  int64_t positions;
  int64_t reduced;   // channels of query and key
  int64_t channels;  // channels of value
  int64_t step;
  bool row;   // rows come first and overwrite, other lines add; a position meets itself in its row only
  bool last;  // no other line of these positions follows
};

// Pointers to a line's first position.
template <typename T>
struct Forward {
  const T *query, *key, *value;
  T *out, *lse;
};

template <typename T>
struct Backward {
  const T *grad, *query, *key, *value, *out, *lse;
  T* delta;  // written by rows, read by other lines
  T *dquery, *dkey, *dvalue;
};

// Both need `scratch` of so many elements, aligned to 64 bytes, and leave nothing in it.
template <typename T>
struct LineKernels {
  const char* name;
  int64_t (*forward_scratch)(const Line&);
  void (*forward)(const Line&, const Forward<T>&, T* scratch);
  int64_t (*backward_scratch)(const Line&);
  void (*backward)(const Line&, const Backward<T>&, T* scratch);
};

// The best that this processor runs; CC_ATTENTION_KERNELS=avx2 or baseline asks for less.
template <typename T>
const LineKernels<T>& line_kernels();

}  // namespace cc_attention
