// What the machine can do at best: plain reads and read-writes of one buffer, in several ways, of which the fastest is
// the ceiling; a plain clip of one buffer, in the ways that were tried; and a walk over the .grad of a list. Compiled
// for the processor at hand.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <omp.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

// Bytes of a register. Wider vectors than the processor has would go by way of the stack.
#ifdef __AVX512F__
constexpr int64_t kVec = 64;
#else
constexpr int64_t kVec = 32;
#endif
constexpr int64_t kGap = 65536;        // between two streams, as in fastclip's kernels
constexpr int64_t kShareAlign = 4096;  // shares begin at pages
using Word = uint64_t __attribute__((vector_size(kVec), aligned(kVec)));
using Floats = float __attribute__((vector_size(kVec), aligned(kVec)));
using Bits = uint32_t __attribute__((vector_size(kVec), aligned(kVec)));
using Halves = uint16_t __attribute__((vector_size(kVec / 2), aligned(kVec / 2)));

const at::Tensor& tensor(py::handle object) {
  if (!THPVariable_Check(object.ptr())) throw py::type_error("buffer: expected a torch.Tensor");
  return THPVariable_Unpack(object.ptr());
}

char* data(const at::Tensor& buffer) {
  return static_cast<char*>(buffer.mutable_data_ptr());
}

// Whole vectors; the buffers are made such that no byte is left over.
int64_t bytes(const at::Tensor& buffer) {
  return static_cast<int64_t>(buffer.nbytes()) / kVec * kVec;
}

template <class Work>
void shared(char* p, int64_t size, bool alone, Work work) {
  const int64_t threads = alone ? 1 : at::get_num_threads();
  const int64_t share = (size / threads + kShareAlign - 1) / kShareAlign * kShareAlign;
  if (threads == 1) return work(p, size, 0);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = std::min(i * share, size), to = std::min(from + share, size);
      if (to > from) work(p + from, to - from, i);
    }
  });
}

Word at(const char* p) {
  return *reinterpret_cast<const Word*>(p);
}

// kStreams forward streams, kGap apart; prefetches `ahead` bytes ahead of each.
template <int kStreams, int kAhead>
uint64_t read(const char* p, int64_t size) {
  Word acc[8] = {};
  constexpr int kPer = 8 / kStreams;
  for (; size >= kStreams * kGap; p += kStreams * kGap, size -= kStreams * kGap) {
    for (int64_t i = 0; i < kGap; i += kPer * kVec) {
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) {
        const char* q = p + k / kPer * kGap + i + k % kPer * kVec;
        if (kAhead > 0) __builtin_prefetch(q + kAhead);
        acc[k] |= at(q);
      }
    }
  }
  int64_t i = 0;
  for (; i + 8 * kVec <= size; i += 8 * kVec) {
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) acc[k] |= at(p + i + k * kVec);
  }
  for (; i < size; i += kVec) acc[0] |= at(p + i);
  uint64_t any = 0;
  for (const Word& word : acc)
    for (int64_t lane = 0; lane < kVec / 8; ++lane) any |= word[lane];
  return any;
}

void flip(char* p) {
  *reinterpret_cast<Word*>(p) ^= 0x0101010101010101;
}

template <int kStreams>
void write(char* p, int64_t size) {
  constexpr int kPer = 8 / kStreams;
  for (; size >= kStreams * kGap; p += kStreams * kGap, size -= kStreams * kGap) {
    for (int64_t i = 0; i < kGap; i += kPer * kVec) {
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) flip(p + k / kPer * kGap + i + k % kPer * kVec);
    }
  }
  for (int64_t i = 0; i < size; i += kVec) flip(p + i);
}

// From the end to the beginning, in steps of two streams: what was read last is still in the cache.
void write_backwards(char* p, int64_t size) {
  const int64_t steps = size / (2 * kGap);
  for (int64_t i = steps * 2 * kGap; i < size; i += kVec) flip(p + i);
  for (int64_t step = steps - 1; step >= 0; --step) write<2>(p + step * 2 * kGap, 2 * kGap);
}

struct alignas(64) Partial {
  double value;
};

// ---- what Python sees ----------------------------------------------------------------------------------------------

uint64_t read_buffer(py::handle object, const std::string& way, bool alone) {
  uint64_t (*one)(const char*, int64_t) = nullptr;
  if (way == "1 stream") one = read<1, 0>;
  if (way == "2 streams") one = read<2, 0>;
  if (way == "4 streams") one = read<4, 0>;
  if (way == "prefetch") one = read<1, 1024>;
  if (way == "2 streams, prefetch") one = read<2, 1024>;
  if (!one) throw py::value_error("way: expected 1, 2 or 4 streams, prefetch or 2 streams, prefetch; got " + way);
  const at::Tensor& buffer = tensor(object);
  std::vector<Partial> parts(at::get_num_threads());
  uint64_t any = 0;
  shared(data(buffer), bytes(buffer), alone,
         [&](char* p, int64_t size, int64_t i) { parts[i].value = static_cast<double>(one(p, size)); });
  for (const Partial& part : parts) any |= part.value != 0;
  return any;
}

void read_write_buffer(py::handle object, const std::string& way, bool alone) {
  void (*one)(char*, int64_t) = nullptr;
  if (way == "1 stream") one = write<1>;
  if (way == "2 streams") one = write<2>;
  if (way == "backwards") one = write_backwards;
  if (!one) throw py::value_error("way: expected 1 stream, 2 streams or backwards, got " + way);
  const at::Tensor& buffer = tensor(object);
  shared(data(buffer), bytes(buffer), alone, [&](char* p, int64_t size, int64_t) { one(p, size); });
}

// ---- a hand-written clip of one contiguous buffer ------------------------------------------------------------------
//
// Float32 sums in eight registers, one multiplying loop; no checks, no table and no rescue for values whose squares
// overflow. Its ways are what was tried for fastclip's kernels.

struct Way {
  int streams = 1;           // forward streams of the sum: 1 or 2
  int ahead = 0;             // bytes that the sum prefetches ahead: 0, 512 or 4096
  bool backwards = false;    // the second pass begins where the first one ended
  bool nontemporal = false;  // the second pass writes past the cache
  std::string region =
      "two";  // parallel regions: "two"; "one", with OpenMP's barrier in it; "spin", with one that spins
};

template <bool kHalf>
Floats load(const char* p) {
  if constexpr (kHalf) {
    const Bits wide = __builtin_convertvector(*reinterpret_cast<const Halves*>(p), Bits) << 16;
    return reinterpret_cast<const Floats&>(wide);
  } else {
    return *reinterpret_cast<const Floats*>(p);
  }
}

template <bool kHalf>
void store(char* p, Floats x) {
  if constexpr (kHalf) {
    const Bits bits = reinterpret_cast<const Bits&>(x);
    *reinterpret_cast<Halves*>(p) = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
  } else {
    *reinterpret_cast<Floats*>(p) = x;
  }
}

void store_past_the_cache(char* p, Floats x) {
#ifdef __SSE2__
  using Quad = float __attribute__((vector_size(16)));
  const Quad* parts = reinterpret_cast<const Quad*>(&x);
  for (int64_t i = 0; i < kVec / 16; ++i) __builtin_ia32_movntps(reinterpret_cast<float*>(p) + 4 * i, parts[i]);
#else
  store<false>(p, x);
#endif
}

template <bool kHalf, int kStreams, int kAhead>
double sum(const char* p, int64_t size) {
  constexpr int64_t kStep = kHalf ? kVec / 2 : kVec;
  constexpr int kPer = 8 / kStreams;
  Floats acc[8] = {};
  if (kStreams > 1) {
    for (; size >= kStreams * kGap; p += kStreams * kGap, size -= kStreams * kGap) {
      for (int64_t i = 0; i < kGap; i += kPer * kStep) {
#pragma GCC unroll 8
        for (int k = 0; k < 8; ++k) {
          const Floats x = load<kHalf>(p + k / kPer * kGap + i + k % kPer * kStep);
          acc[k] += x * x;
        }
      }
    }
  }
  int64_t i = 0;
  for (; i + 8 * kStep <= size; i += 8 * kStep) {
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      if (kAhead > 0) __builtin_prefetch(p + i + k * kStep + kAhead);
      const Floats x = load<kHalf>(p + i + k * kStep);
      acc[k] += x * x;
    }
  }
  for (; i < size; i += kStep) {
    const Floats x = load<kHalf>(p + i);
    acc[0] += x * x;
  }
  double total = 0;
  for (const Floats& part : acc)
    for (int lane = 0; lane < kVec / 4; ++lane) total += part[lane];
  return total;
}

template <bool kHalf, bool kPast>
void scale(char* p, int64_t size, float coef, bool backwards) {
  constexpr int64_t kStep = kHalf ? kVec / 2 : kVec;
  const auto one = [coef](char* q) {
    const Floats x = load<kHalf>(q) * coef;
    kPast ? store_past_the_cache(q, x) : store<kHalf>(q, x);
  };
  const int64_t part = backwards ? 2 * kGap : size;
  for (int64_t end = size; end > 0; end -= part) {
    const int64_t begin = std::max<int64_t>(0, end - part);
    for (int64_t i = begin; i < end; i += kStep) one(p + i);
  }
#ifdef __SSE2__
  if (kPast) __builtin_ia32_sfence();
#endif
}

template <bool kHalf>
double sum_in(const Way& way, const char* p, int64_t size) {
  if (way.ahead == 512) return sum<kHalf, 1, 512>(p, size);
  if (way.ahead == 4096) return sum<kHalf, 1, 4096>(p, size);
  return way.streams == 2 ? sum<kHalf, 2, 0>(p, size) : sum<kHalf, 1, 0>(p, size);
}

void wait_until(std::atomic<int64_t>& count, int64_t all) {
  count.fetch_add(1);
  while (count.load(std::memory_order_acquire) < all) {
#ifdef __SSE2__
    __builtin_ia32_pause();
#endif
  }
}

template <bool kHalf>
double plain_clip(const at::Tensor& buffer, double max_norm, const Way& way) {
  const bool alone = buffer.nbytes() < (1 << 20);
  const int64_t threads = alone ? 1 : at::get_num_threads();
  char* const whole = data(buffer);
  const int64_t size = bytes(buffer), share = (size / threads + kShareAlign - 1) / kShareAlign * kShareAlign;
  std::vector<Partial> parts(threads);
  double norm = 0, coef = 0;
  const auto finish = [&] {
    double total = 0;
    for (const Partial& part : parts) total += part.value;
    norm = std::sqrt(total);
    return max_norm / (norm + 1e-6);
  };
  const auto second = [&](char* p, int64_t n, double factor) {
    if (factor >= 1) return;
    if (!kHalf && way.nontemporal) return scale<kHalf, true>(p, n, static_cast<float>(factor), way.backwards);
    scale<kHalf, false>(p, n, static_cast<float>(factor), way.backwards);
  };
  if (way.region == "two" || threads == 1) {
    shared(whole, size, alone, [&](char* p, int64_t n, int64_t i) { parts[i].value = sum_in<kHalf>(way, p, n); });
    coef = finish();
    if (coef < 1) shared(whole, size, alone, [&](char* p, int64_t n, int64_t) { second(p, n, coef); });
    return norm;
  }
  std::atomic<int64_t> arrived{0};
  const bool spins = way.region == "spin";
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    const int64_t i = omp_get_thread_num(), from = std::min(i * share, size), n = std::min(share, size - from);
    parts[i].value = sum_in<kHalf>(way, whole + from, n);
    if (spins) {
      wait_until(arrived, threads);
    } else {
#pragma omp barrier
    }
    double mine = 0;  // every thread adds the same numbers in the same order
    for (const Partial& part : parts) mine += part.value;
    second(whole + from, n, max_norm / (std::sqrt(mine) + 1e-6));
  }
  finish();
  return norm;
}

double plain_clip_buffer(py::handle object, double max_norm, int streams, int ahead, bool backwards, bool nontemporal,
                         const std::string& region) {
  const at::Tensor& buffer = tensor(object);
  const Way way{streams, ahead, backwards, nontemporal, region};
  if (region != "two" && region != "one" && region != "spin")
    throw py::value_error("region: expected two, one or spin, got " + region);
  if (buffer.scalar_type() == at::kFloat) return plain_clip<false>(buffer, max_norm, way);
  if (buffer.scalar_type() == at::kBFloat16) return plain_clip<true>(buffer, max_norm, way);
  throw py::type_error("buffer: expected float32 or bfloat16");
}

// ---- lists ---------------------------------------------------------------------------------------------------------

struct Entry {
  const void* owner;
  const void* grad;
  void* data;
  int64_t bytes;
  at::ScalarType dtype;
};
std::vector<Entry> table;

// What has to be known of every gradient before it may be read: a table, made anew.
int64_t make_table(py::list parameters) {
  table.clear();
  for (const py::handle item : parameters) {
    const at::Tensor& grad = tensor(item).grad();
    if (!grad.defined()) continue;
    if (grad.layout() != at::kStrided || !grad.device().is_cpu() || !grad.is_contiguous()) return -1;
    table.push_back(
        {item.ptr(), grad.unsafeGetTensorImpl(), data(grad), static_cast<int64_t>(grad.nbytes()), grad.scalar_type()});
  }
  return static_cast<int64_t>(table.size());
}

// The table of the last call, if it still holds: the same objects with the same gradients at the same addresses. Sizes
// and dtypes are believed, which is more than a real cache could do.
int64_t validate_table(py::list parameters) {
  size_t i = 0;
  for (const py::handle item : parameters) {
    const at::Tensor& grad = THPVariable_Unpack(item.ptr()).grad();
    if (i >= table.size() || table[i].owner != item.ptr() || table[i].grad != grad.unsafeGetTensorImpl() ||
        table[i].data != grad.const_data_ptr())
      return -1;
    ++i;
  }
  return static_cast<int64_t>(i);
}

// The least that has to be done with a list: each parameter's gradient, its address and its size.
int64_t walk(py::list parameters) {
  int64_t sum = 0;
  for (const py::handle item : parameters) {
    const at::Tensor& grad = tensor(item).grad();
    if (grad.defined()) sum += grad.numel() ^ reinterpret_cast<int64_t>(grad.const_data_ptr());
  }
  return sum;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("read", read_buffer);
  module.def("read_write", read_write_buffer);
  module.def("plain_clip", plain_clip_buffer, py::arg("buffer"), py::arg("max_norm"), py::arg("streams") = 1,
             py::arg("ahead") = 0, py::arg("backwards") = false, py::arg("nontemporal") = false,
             py::arg("region") = "two");
  module.def("make_table", make_table);
  module.def("validate_table", validate_table);
  module.def("walk", walk);
}
