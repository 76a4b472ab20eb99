// What a launch is told: plain structs, read by the host code that fills them and by the kernels.
#pragma once

#include <cstdint>

#include "../slice.h"

namespace fastclip::cuda {

constexpr int kWarp = 32;

// One block of 512 threads on an SM is at most half of its threads on every card from sm_75 (1024) to sm_120 (1536),
// and at 64 registers a thread half of its registers: a collective on another stream finds room beside it, although
// all blocks stay until the last one has passed the grid-wide barrier. 512 threads with 6 loads of 16 bytes each keep
// 48 KB in flight, where an H100's 3.35 TB/s times 0.7 us of latency need 18 KB an SM. (With 8, registers spill.)
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRowsInFlight = 6;

// A row is one 16-byte load of every lane of a warp. Work is cut into shares of whole rows.
constexpr int64_t kVectorBytes = 16;
constexpr int64_t kRowBytes = kVectorBytes * kWarp;

// One gradient in 16 bytes: so the 32,764 bytes of a kernel's parameters hold some 2,000.
struct Entry {
  // Rows start at the first whole vector; up to 7 elements before it and 7 behind the last one belong to row 0.
  char* data;
  // The rows of all gradients up to this one, and below that kRowBytes * own rows + kSlackBias - own bytes, and the
  // dtype. Everything else follows from these: see Segment.
  uint64_t packed;
};

constexpr int kDTypeBits = 2, kSlackBits = 10, kRowShift = kDTypeBits + kSlackBits;
constexpr int64_t kSlackBias = 2 * kVectorBytes;
static_assert(kRowBytes + kSlackBias <= 1 << kSlackBits);

// A number that the host knows, or one in device memory. max_norm may have any floating dtype.
struct Operand {
  double value;
  const void* pointer;  // null: `value`
  DType dtype;
};

constexpr int32_t kNoneBad = INT32_MAX;

// What a call leaves on the device. It lives in the storage of the norm that the user gets, behind that norm: one
// allocation for both, on the stream that uses it, in a graph's own pool while one is captured. So it is never shared
// by two streams, nor by a graph and what runs outside of it.
struct Results {
  union {
    float norm_f32;
    double norm_f64;
  };
  double coef;           // the clip coefficient, and
  double first, second;  // the factors that it is applied as, see factors.h
  float grad_scale;      // 1 / coef: what an optimizer has to divide by
  float found_inf;       // 1 if a gradient is inf or NaN, else 0
  // The first gradients with inf or NaN in the table, of those that are written and of the copies behind them, kNoneBad
  // where there is none. Looked for only when the norm says that there is one, and Job::finds_bad that somebody may
  // ask.
  int32_t first_bad[2];
  double partial_norms[1];  // one a block, in the order of the shares
};

// What a warp knows of its part of one gradient, when statistics are wanted. Shares are contiguous, so warp + gradient
// numbers these pairs: warps + gradients - 1 of 64 bytes, 141 KB for the 148 gradients of GPT-2 small on 132 blocks,
// which are 0.03% of its bytes in float32. They are read again once.
struct WarpPart {
  double norm[3];  // as L1, L2 and Inf of clip_kernels.cuh store it
  double abs_max;  // NaN if there is one
  unsigned long long zeros, infs, nans, subnormals;
};

// Where the coefficient of a scaling comes from.
enum class Source : uint8_t { PartialNorms, TotalNorm, Coef };

enum class Task : uint8_t {
  Reduce,           // own share -> a partial norm
  Scale,            // Source -> coefficient -> own share, and the norm where partial norms are the source
  ReduceThenScale,  // both, with a grid-wide barrier between
  Norm,             // the same without scaling
  Decide,           // as Scale, but nothing is written
  Rows,             // what Reduce left of each gradient -> its row of statistics; the two tasks above do it themselves
  Clamp,
};

struct Job {
  Task task;
  NormType norm_type;
  Source source;
  bool norm_is_f64;      // the dtype of the norm that the user gets
  Nonfinite nonfinite;   // Raise: the caller will do it, and here nothing is scaled
  bool spare_found_inf;  // scale nothing when a gradient is not finite: the step will be left out
  bool finds_bad;        // when the norm is not finite, look for the first bad gradient
  int entries;
  int partials;  // how many partial norms are combined: own blocks, then those of other devices
  int64_t rows;
  int64_t scale_rows;  // only the first of them are written: copies of gradients with gaps stand behind them
  Results* results;
  WarpPart* parts;            // null where no statistics are wanted, and
  StatisticsRow* statistics;  // what becomes of them: one a gradient
  Operand max_norm, total_norm;
  double* policy;      // null, or what makes the threshold of the norm: one block evaluates it, for all
  Operand grad_scale;  // what the gradients are still multiplied by, and will be divided by
  double clip_value;
};

// All parameters of a kernel together: 32,764 bytes since CUDA 12.1. Shorter lists have a kernel with fewer, since the
// parameters are copied at each launch whether they are used or not.
constexpr int kParameterBytes = 32764;
constexpr int kFewEntries = 240;
constexpr int kManyEntries = (kParameterBytes - sizeof(Job)) / sizeof(Entry);
static_assert(kManyEntries >= 2000);

template <int N>
struct InlineTable {
  Entry entries[N];
};

struct RemoteTable {
  const Entry* entries;
};

}  // namespace fastclip::cuda
