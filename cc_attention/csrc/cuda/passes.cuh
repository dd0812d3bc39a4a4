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
  int tile;      // positions of a segment, at most TILE
  Index images;  // of a launch: each frame of a clip is one
  int splits;    // of the channels, forward
};

// What work is divided by.
struct Device {
  int multiprocessors;
  int blocks;  // of the kernel that a multiprocessor holds at a time
  Index cache_bytes;  // L2
};

// Work goes by images, rows, then columns: what a pass along the rows has read and written is then still in the L2
// cache for that along the columns. As many images are taken together as the GPU can work on at once: with more,
// some blocks would wait for a second round. Where that leaves room for it, several blocks share the channels of a
// line, each computing the energies anew (Cr/C of the work). Where this is to be had and memory is the limit,
// image_bytes says what an image takes in the cache, and no more images are taken than fit; otherwise it is 0. Lines
// through time come last, for they need all frames.
template <typename Engine>
Plan plan_for(const Shape& shape, const Device& device, Index image_bytes) {
  const int tile = Engine::TILE;
  const Index room = static_cast<Index>(device.multiprocessors) * device.blocks;
  const auto [frames, height, width] = shape.size;
  const Index blocks_of_image = larger(static_cast<Index>(height) * ceil_div(width, tile),
                                       static_cast<Index>(width) * ceil_div(height, tile));
  Index images = smaller(shape.images(), room / blocks_of_image);
  if (image_bytes > 0) images = smaller(images, device.cache_bytes / image_bytes);
  images = larger<Index>(1, images);
  const Index splits = smaller<Index>(room / (images * blocks_of_image), ceil_div(shape.channels, tile));
  return {tile, images, static_cast<int>(larger<Index>(1, splits))};
}

// What the forward's passes read or write of an image. CUDA cores are slower than memory: there it does not matter.
template <typename Engine, typename T>
Index forward_bytes(const Shape& shape) {
  const Index channels = 2 * (static_cast<Index>(shape.query_channels) + shape.channels);
  return Engine::MEMORY_BOUND ? shape.size.pixels() * channels * static_cast<Index>(sizeof(T)) : 0;
}

// run(axis, first image, lines) for each group of images, rows first, then through time.
template <typename Run>
void for_each_axis(const Shape& shape, const Plan& plan, Run run) {
  for (Index image = 0; image < shape.images(); image += plan.images) {
    const Index images = smaller(plan.images, shape.images() - image);
    run(Axis::ROW, image, images * shape.size.height);
    run(Axis::COLUMN, image, images * shape.size.width);
  }
  if (shape.size.frames > 1) run(Axis::TIME, Index{0}, shape.batch * shape.size.pixels());
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
  const int time_passes = shape.size.frames > 1 ? passes_along(Axis::TIME) : 0;
  int left = 0;  // passes until the last one of these positions, which leaves its result in lse
  for_each_axis(shape, plan, [&](Axis axis, Index first_image, Index lines) {
    pass.first = axis == Axis::ROW;
    if (axis == Axis::ROW) left = passes_along(Axis::ROW) + passes_along(Axis::COLUMN) + time_passes;
    if (axis == Axis::TIME) left = time_passes;
    pass.axis = axis;
    pass.first_image = first_image;
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
void backward(const Shape& shape, const Plan& plan, const T* grad, const T* query, const T* key, const T* value,
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
  for_each_axis(shape, plan, [&](Axis axis, Index first_image, Index lines) {
    pass.axis = axis;
    pass.first_image = first_image;
    const int length = shape.size.length(axis);
    for (pass.query_begin = 0; pass.query_begin < length; pass.query_begin = pass.query_end) {
      pass.query_end = smaller(pass.query_begin + plan.tile, length);
      for (pass.key_begin = 0; pass.key_begin < length; pass.key_begin = pass.key_end) {
        pass.key_end = smaller(pass.key_begin + plan.tile, length);
        pass.first_for_queries = axis == Axis::ROW && pass.key_begin == 0;
        pass.first_for_keys = axis == Axis::ROW && pass.query_begin == 0;
        launch(pass, lines);
      }
    }
  });
}

}  // namespace cc_attention::cuda
