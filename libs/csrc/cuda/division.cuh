// How the elements of (B,C,...) are divided among blocks and threads.
//
// Memory is read as lines. Channels-last, a line is the C channels of one pixel, and neighbouring threads take
// neighbouring channels. Otherwise the lines are the vectors of a plane, one after another, and all belong to
// the plane's channel. A block works on a part of the lines of some channels. The division is a function of
// the tensor alone (shape, type, alignment): on any GPU the same numbers are summed in the same order.
#pragma once

#include "numbers.cuh"

#ifdef LIBS_EMULATED
#define LIBS_SHARED_MEMORY(name) void* name = emulator::shared_memory()
#else
#define LIBS_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace libs::cuda {

// Elements in memory, from the outermost dimension inwards. Channels-last: inner is 1.
struct Shape {
  Index outer;
  int channels;
  Index inner;
  __host__ __device__ bool channels_last() const { return inner == 1; }
};

constexpr int THREADS = 256;
// Blocks that fit a multiprocessor at least: the registers suffice, and enough loads are under way.
constexpr int RESIDENT = 3;
// On 132 multiprocessors two to four rounds of what they run at a time. It bounds the number of partial results.
constexpr int BLOCKS = 1024;
// Vectors that a thread loads before it uses the first one: what is under way hides the latency of memory.
constexpr int BATCH = 4;

struct Division {
  Shape shape;
  int vector;    // elements of a load: all of 16 bytes, or one
  int columns;   // threads side by side on a line
  int rows;      // lines that a block reads at a time
  Index length;  // lines of a plane; channels-last, of all of them
  Index each;    // lines of a part
  int parts;
  int groups;  // of channels that a block works on; otherwise planes

  __host__ __device__ int threads() const { return columns * rows; }
  __host__ __device__ Index blocks() const { return static_cast<Index>(groups) * parts; }
  __host__ __device__ bool channels_last() const { return shape.inner == 1; }
  // Results per channel that are to be joined, and from how many elements comes each.
  __host__ __device__ Index partials() const { return channels_last() ? parts : shape.outer * parts; }
  __device__ Index elements(Index partial) const {
    const Index begin = partial % parts * each;
    return smaller(each, length - begin) * (channels_last() ? 1 : vector);
  }
};

__host__ __device__ inline Division divide(const Shape& shape, int vector, int threads = THREADS,
                                           int blocks = BLOCKS) {
  Division result{shape, vector, 1, threads, 0, 0, 0, 0};
  if (shape.channels_last()) {
    const int vectors = shape.channels / vector;
    while (result.columns < smaller(vectors, 32)) result.columns *= 2;
    result.rows = threads / result.columns;
    result.length = shape.outer;
    result.groups = static_cast<int>(ceil_div(vectors, result.columns));
  } else {
    result.length = shape.inner / vector;
    while (result.rows > 32 && result.rows * BATCH > result.length) result.rows /= 2;
    result.groups = static_cast<int>(shape.outer * shape.channels);
  }
  const Index most = ceil_div(result.length, static_cast<Index>(result.rows) * BATCH);
  const Index parts = smaller(most, ceil_div(blocks, result.groups));
  result.each = ceil_div(ceil_div(result.length, parts), result.rows) * result.rows;
  result.parts = static_cast<int>(ceil_div(result.length, result.each));
  return result;
}

// What a thread has to do: the vectors at the elements begin, begin + step, ... below end.
struct Work {
  Index begin, end, step;
  Index partial;    // which of the results per channel the block contributes
  int first;        // channel of the block
  int column, row;  // of the thread in its block

  __device__ explicit Work(const Division& d) {
    const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
    column = thread % d.columns, row = thread / d.columns;
    Index part, start, pitch;
    if (d.channels_last()) {
      // Neighbouring blocks read neighbouring channels of the same lines.
      part = partial = block / d.groups;
      first = block % d.groups * d.columns * d.vector;
      start = first + column * d.vector;
      pitch = d.shape.channels;
    } else {
      const int plane = block / d.parts;
      part = block % d.parts;
      partial = static_cast<Index>(plane / d.shape.channels) * d.parts + part;
      first = plane % d.shape.channels;
      start = plane * d.shape.inner;
      pitch = d.vector;
    }
    begin = start + (part * d.each + row) * pitch;
    end = start + smaller((part + 1) * d.each, d.length) * pitch;
    step = d.rows * pitch;
    if (d.channels_last() && start >= d.shape.channels) end = begin;  // a column beyond the last channel
  }
};

// use(item, element) for all of a thread's vectors, each made by read(element).
template <int BATCH_SIZE, typename Read, typename Use>
__device__ void for_each(const Work& work, Read read, Use use) {
  Index at = work.begin;
  for (; at + (BATCH_SIZE - 1) * work.step < work.end; at += BATCH_SIZE * work.step) {
    decltype(read(at)) items[BATCH_SIZE];
#pragma unroll
    for (int i = 0; i < BATCH_SIZE; ++i) items[i] = read(at + i * work.step);
#pragma unroll
    for (int i = 0; i < BATCH_SIZE; ++i) use(items[i], at + i * work.step);
  }
  for (; at < work.end; at += work.step) use(read(at), at);
}

template <int V, typename T>
__device__ Pack<T, V> load(const T* p) {
  return *reinterpret_cast<const Pack<T, V>*>(p);
}

template <int V, typename T>
__device__ void store(T* p, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

// COUNT numbers for each channel of the block are computed once, by compute(channel, numbers), and pass through
// shared memory to the threads: mine[n][i] is number n for element i of the thread's vectors.
template <int COUNT, int V, typename W, typename Compute>
__device__ void coefficients(const Division& d, const Work& work, void* shared, W (&mine)[COUNT][V], Compute compute) {
  W* table = static_cast<W*>(shared);
  const int entries = d.columns * V;
  for (int entry = static_cast<int>(threadIdx.x); entry < entries; entry += d.columns * d.rows) {
    W numbers[COUNT];
    compute(d.channels_last() ? smaller(work.first + entry, d.shape.channels - 1) : work.first, numbers);
#pragma unroll
    for (int n = 0; n < COUNT; ++n) table[n * entries + entry] = numbers[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < COUNT; ++n) {
#pragma unroll
    for (int i = 0; i < V; ++i) mine[n][i] = table[n * entries + work.column * V + i];
  }
}

// The threads of a column join what they have into that of row 0.
template <typename Partial>
__device__ void join_rows(int columns, int rows, int column, int row, void* shared, Partial& mine) {
  Partial* slots = static_cast<Partial*>(shared);
  for (int half = rows / 2; half > 0; half /= 2) {
    __syncthreads();  // all have read what was there
    if (row >= half && row < 2 * half) slots[(row - half) * columns + column] = mine;
    __syncthreads();
    if (row < half) mine.join(slots[row * columns + column]);
  }
}

// What the block knows of its channels becomes one of the partial results, two arrays (partials, channels).
template <template <typename, int> class Partial, typename W, int V>
__device__ void keep(const Division& d, const Work& work, void* shared, Partial<W, V>& mine, W* scratch) {
  const Index at = work.partial * d.shape.channels + work.first, second = d.partials() * d.shape.channels;
  if (d.channels_last()) {
    join_rows(d.columns, d.rows, work.column, work.row, shared, mine);
    if (work.row > 0 || work.begin >= work.end) return;
#pragma unroll
    for (int i = 0; i < V; ++i) mine.keep(i, scratch + at + work.column * V + i, second);
  } else {
    Partial<W, 1> one = mine.joined();
    join_rows(1, d.rows, 0, work.row, shared, one);
    if (work.row == 0) one.keep(0, scratch + at, second);
  }
}

// Blocks of JOIN_COLUMNS channels join all partial results of them: every 32 bytes that are read are used.
constexpr int JOIN_COLUMNS = 8, JOIN_ROWS = THREADS / JOIN_COLUMNS;

// use(channel, all) by one thread for each channel.
template <typename Partial, typename W, typename Use>
__device__ void join_partials(const Division& d, const W* scratch, Use use) {
  LIBS_SHARED_MEMORY(shared);
  const int column = static_cast<int>(threadIdx.x) % JOIN_COLUMNS, row = static_cast<int>(threadIdx.x) / JOIN_COLUMNS;
  const int channel = static_cast<int>(blockIdx.x) * JOIN_COLUMNS + column;
  const bool present = channel < d.shape.channels;
  const Index partials = d.partials(), second = partials * d.shape.channels;
  Partial all{};
  if (present) {
#pragma unroll 4
    for (Index partial = row; partial < partials; partial += JOIN_ROWS) {
      const W* p = scratch + partial * d.shape.channels + channel;
      all.join(Partial::kept(d.elements(partial), p[0], p[second]));
    }
  }
  join_rows(JOIN_COLUMNS, JOIN_ROWS, column, row, shared, all);
  if (present && row == 0) use(channel, all);
}

}  // namespace libs::cuda
