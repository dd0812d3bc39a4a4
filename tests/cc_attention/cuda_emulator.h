// The part of CUDA C++ that the kernels use, on a CPU, blocks one after another. Under sanitizers each CUDA thread
// of a block is a thread of the operating system with real barriers: so ThreadSanitizer sees a missing
// __syncthreads as a data race and AddressSanitizer a read or write outside of shared or global memory.
// Otherwise it is a fiber, a stack of its own in one thread, which takes a fifth of the time.
//
// Shared memory holds NaN when a block begins, asynchronous copies happen as late as they may, and what
// crosses a warp (shuffles, ldmatrix, mma) is exchanged between its threads as the PTX manual describes it.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#define CC_ATTENTION_EMULATED 1
#define __device__
#define __host__
#define __global__
#define __launch_bounds__(...)

namespace emulator {

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "CUDA emulator: %s\n", what);
  std::abort();
}

struct Dim3 {
  unsigned x, y, z;
};

void pause();  // let other threads of the block go on

class Barrier {
 public:
  explicit Barrier(unsigned threads) : threads_(threads) {}
  void wait() {
    const unsigned phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
    } else {
      while (phase_.load(std::memory_order_acquire) == phase) pause();
    }
  }

 private:
  const unsigned threads_;
  std::atomic<unsigned> arrived_{0}, phase_{0};
};

// What a warp's threads show each other. Two slots in turn: when a thread fills a slot again, all others have
// passed the barrier in between, so they have read it.
struct Warp {
  Barrier barrier{32};
  struct {
    uint64_t word[6];
  } slot[2][32];
};

struct Block {
  Block(unsigned threads, size_t shared_bytes)
      : barrier(threads), warps(threads / 32), shared(std::aligned_alloc(16, (shared_bytes + 15) / 16 * 16)) {}
  ~Block() { std::free(shared); }
  Barrier barrier;
  std::vector<Warp> warps;
  void* shared;
};

struct PendingCopy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Thread {
  Dim3 index, block_index;
  Block* block;
  unsigned turn = 0;
  std::vector<std::vector<PendingCopy>> copy_groups;
  std::vector<PendingCopy> open_group;
};
inline thread_local Thread* self;

inline void* shared_memory() { return self->block->shared; }

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)

// There are more threads than cores: to yield is quicker than to sleep.
inline void pause() { std::this_thread::yield(); }

inline void run_all(std::vector<Thread>& threads, const std::function<void()>& run) {
  std::vector<std::thread> pool;
  for (Thread& thread : threads) {
    pool.emplace_back([&] {
      self = &thread;
      run();
    });
  }
  for (std::thread& thread : pool) thread.join();
}

#else

struct Fibers {
  std::vector<ucontext_t> contexts;
  Thread* threads;
  std::function<void()> run;
  size_t current, running;
  ucontext_t end;
};
inline thread_local Fibers* fibers;

inline void pause() {
  const size_t from = fibers->current;
  fibers->current = (from + 1) % fibers->contexts.size();
  self = fibers->threads + fibers->current;
  swapcontext(&fibers->contexts[from], &fibers->contexts[fibers->current]);
}

inline void fiber() {
  fibers->run();
  if (--fibers->running == 0) setcontext(&fibers->end);
  for (;;) pause();
}

inline void run_all(std::vector<Thread>& threads, const std::function<void()>& run) {
  constexpr size_t STACK = 64 * 1024;
  const std::unique_ptr<char[]> stacks(new char[threads.size() * STACK]);
  Fibers all{std::vector<ucontext_t>(threads.size()), threads.data(), run, 0, threads.size(), {}};
  for (size_t n = 0; n < threads.size(); ++n) {
    getcontext(&all.contexts[n]);
    all.contexts[n].uc_stack.ss_sp = stacks.get() + n * STACK;
    all.contexts[n].uc_stack.ss_size = STACK;
    makecontext(&all.contexts[n], fiber, 0);
  }
  fibers = &all;
  self = threads.data();
  swapcontext(&all.end, &all.contexts[0]);
}

#endif

}  // namespace emulator

#define threadIdx (emulator::self->index)
#define blockIdx (emulator::self->block_index)

inline void __syncthreads() { emulator::self->block->barrier.wait(); }
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

namespace emulator {

// Runs `kernel` in each block of the grid.
template <typename Kernel>
void launch(Dim3 grid, unsigned threads, size_t shared_bytes, Kernel kernel) {
  require(threads % 32 == 0 && shared_bytes <= 227 * 1024, "a launch that a GPU would refuse");
  Block block(threads, shared_bytes);
  std::vector<Thread> all(threads);
  for (unsigned n = 0; n < threads; ++n) {
    all[n].index = {n, 0, 0};
    all[n].block = &block;
  }
  run_all(all, [&] {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, 0};
        if (threadIdx.x == 0) std::memset(block.shared, 0xff, shared_bytes);
        __syncthreads();
        kernel();
        self->copy_groups.clear();
        __syncthreads();
      }
    }
  });
}

// 16 bytes; of these `bytes` from the source, 16 or none, and zeros after them.
inline void copy_async(void* to, const void* from, size_t bytes) {
  const auto aligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  require(aligned(to) && aligned(from), "cp.async to or from an address that is not aligned");
  self->open_group.push_back({to, from, bytes});
}

inline void close_copy_group() { self->copy_groups.push_back(std::exchange(self->open_group, {})); }

inline void wait_for_all_groups_but_one() {
  auto& groups = self->copy_groups;
  for (; groups.size() > 1; groups.erase(groups.begin())) {
    for (const PendingCopy& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
}

// Each thread shows some words; the result is the array of what the warp's 32 threads have shown.
template <size_t N>
auto& exchange(const uint64_t (&words)[N]) {
  Warp& warp = self->block->warps[threadIdx.x / 32];
  auto& slot = warp.slot[self->turn++ % 2];
  static_assert(sizeof words <= sizeof slot[0].word);
  std::memcpy(slot[threadIdx.x % 32].word, words, sizeof words);
  warp.barrier.wait();
  return slot;
}

// ldmatrix.x4: lane 8m + r points at row r of matrix m.
inline void load_matrices(unsigned (&fragment)[4], const void* row, bool transposed) {
  require(reinterpret_cast<uintptr_t>(row) % 16 == 0, "ldmatrix from an address that is not aligned");
  const uint64_t words[] = {reinterpret_cast<uint64_t>(row)};
  const auto& rows = exchange(words);
  const unsigned lane = threadIdx.x % 32;
  for (unsigned m = 0; m < 4; ++m) {
    const auto element = [&](unsigned r, unsigned c) -> unsigned {
      return reinterpret_cast<const uint16_t*>(rows[8 * m + r].word[0])[c];
    };
    const unsigned g = lane / 4, t = lane % 4;
    fragment[m] = transposed ? element(2 * t, g) | element(2 * t + 1, g) << 16
                             : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
  }
}

// mma.m16n8k16 on 16-bit elements, mma.m16n8k8 on 32-bit ones: where an element of A and B is, among the lanes
// and their registers. `c` are a lane's elements of the result, `words` its four registers of A and two of B.
template <unsigned K, typename Widen>
void multiply_add(std::array<float*, 4> c, const uint64_t (&words)[6], Widen widen) {
  constexpr unsigned IN_WORD = K / 8, HALF = K / 2;
  const auto& lanes = exchange(words);
  const auto element = [&](unsigned place, unsigned k, unsigned word) {
    return widen(lanes[place * 4 + k % HALF / IN_WORD].word[word] >> 16 * (k % IN_WORD));
  };
  const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (unsigned n = 0; n < 4; ++n) {
    for (unsigned k = 0; k < K; ++k) {
      *c[n] += element(g, k, n / 2 + k / HALF * 2) * element(2 * t + n % 2, k, 4 + k / HALF);
    }
  }
}

// cvt.rna.tf32.f32: to nearest, ties away from zero.
inline unsigned round_to_tf32(float x) { return (__float_as_uint(x) + (std::isfinite(x) ? 0x1000 : 0)) & ~0x1fffu; }

inline float tf32_to_float(uint64_t bits) {
  require((bits & 0x1fff) == 0, "mma of a number that is not rounded to TF32");
  return __uint_as_float(static_cast<unsigned>(bits));
}

inline float half_to_float(unsigned short bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float size = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, exponent - 25);
  if (exponent == 31) size = mantissa == 0 ? HUGE_VALF : NAN;
  return bits & 0x8000 ? -size : size;
}

inline unsigned short float_to_half(float x) {
  const unsigned sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (std::isnan(x)) return 0x7e00;
  if (size >= 65520) return static_cast<unsigned short>(sign | 0x7c00);
  const int exponent = size == 0 ? -14 : std::max(std::ilogb(size), -14);
  const float mantissa = std::nearbyint(std::ldexp(size, 10 - exponent));  // 1024 to 2048, less if denormal
  return static_cast<unsigned short>(sign |
                                     (static_cast<unsigned>(exponent + 14) * 1024 + static_cast<unsigned>(mantissa)));
}

}  // namespace emulator

template <typename T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  uint64_t words[1] = {};
  std::memcpy(words, &x, sizeof x);
  const auto& lanes = emulator::exchange(words);
  std::memcpy(&x, lanes[(threadIdx.x % 32) ^ static_cast<unsigned>(mask)].word, sizeof x);
  return x;
}
