// The order of passes and how work is divided among blocks, without any call to CUDA: the caller gives a
// function that launches a pass, so that the tests run the same sequence on a CPU.
#pragma once

#include "backward.cuh"
#include "forward.cuh"

namespace cc_attention::cuda {

struct Shape {
  Index batch;
  int query_channels, channels;
  Size size;
  Index images() const { return batch * size.frames; }
  Index positions() const { return images() * size.pixels(); }
};

struct Plan {
  int tile;    // positions of a segment, at most TILE
  int splits;  // of the channels, forward
};

// Each axis is one launch over the whole batch: rows, then columns, then in clips lines through time. (Launches of a
// few images, whose maps the columns then find in the L2 cache, took 1.2 to 1.6 times as long on an H100: their blocks
// do not fill the multiprocessors.) Where there are fewer blocks than the GPU holds at a time (`room`), several share
// the channels of a line, each computing the energies anew (Cr/C of the work).
template <typename Engine>
Plan plan_for(const Shape& shape, Index room) {
  const auto [frames, height, width] = shape.size;
  const Index blocks = shape.images() * larger(static_cast<Index>(height) * ceil_div(width, Engine::TILE),
                                               static_cast<Index>(width) * ceil_div(height, Engine::TILE));
  const Index splits = smaller<Index>(room / larger<Index>(1, blocks), ceil_div(shape.channels, Engine::TILE));
  return {Engine::TILE, static_cast<int>(larger<Index>(1, splits))};
}

// run(axis, lines)
template <typename Run>
void for_each_axis(const Shape& shape, Run run) {
  run(Axis::ROW, shape.images() * shape.size.height);
  run(Axis::COLUMN, shape.images() * shape.size.width);
  if (shape.size.frames > 1) run(Axis::TIME, shape.batch * shape.size.pixels());
}

// launch(pass, grid x, grid y). `scratch` is as large as lse.
template <typename Engine, typename T, typename Launch>
void forward(const Shape& shape, const Plan& plan, const T* query, const T* key, const T* value, T* out, Wide<T>* lse,
             Wide<T>* scratch, Launch launch) {
  ForwardPass<T> pass{};
  pass.query = query;
  pass.key = key;
  pass.value = value;
  pass.out = out;
  pass.size = shape.size;
  pass.query_channels = shape.query_channels;
  pass.channels = shape.channels;
  pass.tile = plan.tile;
  pass.channels_per_block = ceil_div(ceil_div(shape.channels, plan.splits), Engine::TILE) * Engine::TILE;
  const int splits = shape.channels > 0 ? ceil_div(shape.channels, pass.channels_per_block) : 1;
  const auto passes_along = [&](Axis axis) { return ceil_div(shape.size.length(axis), plan.tile); };
  int left = 0;  // passes until the last one, which leaves its result in lse
  for_each_axis(shape, [&](Axis axis, Index) { left += passes_along(axis); });
  for_each_axis(shape, [&](Axis axis, Index lines) {
    pass.first = axis == Axis::ROW;
    pass.axis = axis;
    const int length = shape.size.length(axis);
    for (pass.key_begin = 0; pass.key_begin < length; pass.key_begin = pass.key_end, pass.first = false) {
      pass.key_end = smaller(pass.key_begin + plan.tile, length);
      --left;
      pass.last = left == 0;
      pass.lse_after = left % 2 == 0 ? lse : scratch;
      pass.lse_before = left % 2 == 0 ? scratch : lse;
      launch(pass, lines * ceil_div(length, plan.tile), splits);
    }
  });
}

// launch_delta(task, grid x), then launch(pass, grid x). `delta` is as large as lse.
template <typename T, typename LaunchDelta, typename Launch>
void backward(const Shape& shape, int tile, const T* grad, const T* query, const T* key, const T* value,
              const T* out, const Wide<T>* lse, Wide<T>* delta, T* dquery, T* dkey, T* dvalue,
              LaunchDelta launch_delta, Launch launch) {
  const Delta<T> task{grad, out, delta, shape.positions(), shape.channels};
  launch_delta(task, (task.positions + Delta<T>::POSITIONS - 1) / Delta<T>::POSITIONS);
  BackwardPass<T> pass{};
  pass.grad = grad;
  pass.query = query;
  pass.key = key;
  pass.value = value;
  pass.lse = lse;
  pass.delta = delta;
  pass.dquery = dquery;
  pass.dkey = dkey;
  pass.dvalue = dvalue;
  pass.size = shape.size;
  pass.query_channels = shape.query_channels;
  pass.channels = shape.channels;
  for_each_axis(shape, [&](Axis axis, Index lines) {
    pass.axis = axis;
    const int length = shape.size.length(axis);
    for (pass.query_begin = 0; pass.query_begin < length; pass.query_begin = pass.query_end) {
      pass.query_end = smaller(pass.query_begin + tile, length);
      for (pass.key_begin = 0; pass.key_begin < length; pass.key_begin = pass.key_end) {
        pass.key_end = smaller(pass.key_begin + tile, length);
        pass.first_for_queries = axis == Axis::ROW && pass.key_begin == 0;
        pass.first_for_keys = axis == Axis::ROW && pass.query_begin == 0;
        launch(pass, lines);
      }
    }
  });
}

}  // namespace cc_attention::cuda
