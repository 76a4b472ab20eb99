// Tests of tensor_table.{h,cpp}, clip_math.h and factors.h: one case for each name that the command line may have.
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "check.h"
#include "clip_math.h"
#include "factors.h"
#include "tensor_table.h"

using namespace fastclip;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
const double kNan = std::nan("");

char* at(int64_t address) {
  return reinterpret_cast<char*>(address);
}

bool near(double a, double b) {
  return std::fabs(a - b) <= 1e-15 * std::fabs(b) * 4;
}

void packing() {
  TensorTable table;
  CHECK(table.size() == 0 && table.bytes() == 0 && !table.has_overlaps());
  const DType dtypes[] = {DType::F32, DType::F64, DType::F16, DType::BF16};
  const int64_t sizes[] = {4, 8, 2, 2};
  int64_t bytes = 0;
  for (int i = 0; i < 4; ++i) {
    table.add(at(4096), 0, dtypes[i]);  // empty: not in the table
    table.add(at(4096 * (i + 1)), i + 3, dtypes[i]);
    bytes += sizes[i] * (i + 3);
    CHECK(item_size(dtypes[i]) == sizes[i]);
    CHECK(table.size() == i + 1 && table.bytes() == bytes);
    const Slice& slice = table.slices()[i];
    CHECK(slice.data == at(4096 * (i + 1)) && slice.bytes == sizes[i] * (i + 3));
    CHECK(slice.dtype == dtypes[i] && slice.written == 0);
  }
  TensorTable huge;
  huge.add(at(64), int64_t{1} << 33, DType::F64);
  CHECK(huge.bytes() == int64_t{1} << 36);
}

// Walks the shares as a kernel does and counts what is covered: every byte of every slice, once and in order.
void check_cuts(const TensorTable& table, int shares) {
  const auto cuts = table.cut(shares);
  CHECK(static_cast<int>(cuts.size()) == shares + 1);
  CHECK(cuts.front().slice == 0 && cuts.front().byte == 0);
  CHECK(cuts.back().slice == table.size() && cuts.back().byte == 0);
  int64_t slice = 0, byte = 0;
  for (int share = 0; share < shares; ++share) {
    const Cut begin = cuts[share], end = cuts[share + 1];
    CHECK(begin.slice < end.slice || (begin.slice == end.slice && begin.byte <= end.byte));
    CHECK(begin.byte % kCutBytes == 0 && end.byte % kCutBytes == 0);
    CHECK(end.slice == table.size() ? end.byte == 0 : end.byte < table.slices()[end.slice].bytes);
    int64_t in_share = 0;
    for (int64_t s = begin.slice; s < end.slice + (end.byte > 0); ++s) {
      const int64_t from = s == begin.slice ? begin.byte : 0;
      const int64_t to = s == end.slice ? end.byte : table.slices()[s].bytes;
      CHECK(s == slice && from == byte && from <= to);
      in_share += to - from;
      byte = to;
      if (byte == table.slices()[s].bytes) ++slice, byte = 0;
    }
    CHECK(std::llabs(in_share - table.bytes() / shares) <= 2 * kCutBytes + shares);  // balanced but for rounding
  }
  CHECK(slice == table.size() && byte == 0);
}

void cut() {
  std::mt19937 random(7);
  for (int repeat = 0; repeat < 3000; ++repeat) {
    TensorTable table;
    const int slices = random() % 30;
    const int64_t most[] = {3, 100, 5000, 3 * kCutBytes, 1000000};
    // Slices longer than the balance allows for are cut, short ones are not: one limit for all of a table.
    const int64_t limit = most[random() % 5];
    for (int i = 0; i < slices; ++i) {
      int64_t numel = random() % (limit + 1);
      if (random() % 4 == 0) numel = numel / kCutBytes * kCutBytes;  // ends fall on cuts
      table.add(at(64), numel, static_cast<DType>(random() % 4));
    }
    const int shares[] = {1, 2, 3, 4, 7, 16, 64, 200};
    for (int share : shares) check_cuts(table, share);
  }
  for (int64_t numel : {kCutBytes / 4 - 1, kCutBytes / 4, kCutBytes / 4 + 1, kCutBytes, int64_t{1} << 34}) {
    TensorTable table;
    table.add(at(64), numel, DType::F32);
    for (int shares = 1; shares < 20; ++shares) check_cuts(table, shares);
  }
}

bool overlap(std::initializer_list<std::pair<int64_t, int64_t>> ranges) {
  TensorTable table;
  for (const auto& [begin, end] : ranges) table.add(at(begin), (end - begin) / 2, DType::F16);
  return table.has_overlaps();
}

void overlaps() {
  CHECK(!overlap({{100, 200}}));
  CHECK(!overlap({{100, 200}, {200, 300}, {300, 302}}));
  CHECK(!overlap({{300, 302}, {100, 200}, {200, 300}}));
  CHECK(overlap({{100, 200}, {198, 300}}));
  CHECK(overlap({{198, 300}, {100, 200}}));
  CHECK(overlap({{100, 200}, {100, 200}}));
  CHECK(overlap({{100, 200}, {400, 500}, {100, 200}}));
  CHECK(overlap({{100, 900}, {200, 300}, {1000, 1100}}));
  CHECK(overlap({{1000, 1100}, {200, 300}, {100, 900}}));
  CHECK(overlap({{100, 900}, {950, 960}, {300, 302}}));
  CHECK(!overlap({}));
}

void nan_max_() {
  CHECK(nan_max(1, 2) == 2 && nan_max(2, 1) == 2 && nan_max(0, 0) == 0);
  CHECK(nan_max(kInf, 1) == kInf && nan_max(1, kInf) == kInf);
  for (double other : {0.0, 1.0, kInf, kNan}) {
    CHECK(std::isnan(nan_max(kNan, other)));
    CHECK(std::isnan(nan_max(other, kNan)));
  }
}

void combine_norms_() {
  for (NormType type : {NormType::L1, NormType::L2, NormType::Inf}) {
    for (double x : {0.0, 1.0, 1e-320, 1e-200, 1e200, 1.7e308, kInf}) {
      CHECK(combine_norms(x, 0, type) == x && combine_norms(0, x, type) == x);
      CHECK(combine_norms(x, kInf, type) == kInf && combine_norms(kInf, x, type) == kInf);
      CHECK(std::isnan(combine_norms(x, kNan, type)) && std::isnan(combine_norms(kNan, x, type)));
    }
    CHECK(std::isnan(combine_norms(kNan, kNan, type)));
  }
  for (double scale : {1.0, 1e-160, 1e-200, 1e-300, 1e160, 1e200, 1e300}) {
    CHECK(near(combine_norms(3 * scale, 4 * scale, NormType::L2), 5 * scale));
    CHECK(near(combine_norms(4 * scale, 3 * scale, NormType::L2), 5 * scale));
    CHECK(near(combine_norms(3 * scale, 4 * scale, NormType::L1), 7 * scale));
    CHECK(combine_norms(3 * scale, 4 * scale, NormType::Inf) == 4 * scale);
    CHECK(combine_norms(4 * scale, 3 * scale, NormType::Inf) == 4 * scale);
  }
  CHECK(combine_norms(1e200, 1e-200, NormType::L2) == 1e200);
}

void clip_coef_() {
  CHECK(near(clip_coef(1, 4), 1 / (4 + 1e-6)));
  CHECK(near(clip_coef(1e-6, 1e-6), 0.5));
  CHECK(near(clip_coef(1e-3, 1e38), 1e-41));
  CHECK(clip_coef(5, 4) == 1 && clip_coef(kInf, 4) == 1 && clip_coef(1, 0) == 1);
  CHECK(clip_coef(0, 4) == 0 && clip_coef(0, 0) == 0 && clip_coef(1, kInf) == 0);
  CHECK(near(clip_coef(-2, 4), -2 / (4 + 1e-6)) && clip_coef(-kInf, 4) == -kInf);
  CHECK(std::isnan(clip_coef(kNan, 1)) && std::isnan(clip_coef(1, kNan)) && std::isnan(clip_coef(kInf, kInf)));
}

void must_scale_() {
  CHECK(!must_scale(1));
  CHECK(must_scale(std::nextafter(1.0, 0.0)) && must_scale(0) && must_scale(-1) && must_scale(kNan));
  CHECK(must_scale(2) && must_scale(kInf));  // gradients with a grad_scale below 1
}

void factors() {
  for (double coef : {1.0, 0.5, 1e-20, 1e-29, 0.0, -0.5, -1e-29}) {
    const Factors whole = factors_of(coef);
    CHECK(whole.first == coef && whole.second == 1);
  }
  CHECK(std::isnan(factors_of(kNan).first) && factors_of(-kInf).first == -kInf);
  // Two factors that float32 represents well, in a product that it would not.
  for (double coef : {1e-31, 1e-38, 1e-41, 1e-45, -1e-41, 1e-50, 1e-57, 1e-65, -1e-70, 1.5e-76}) {
    const Factors split = factors_of(coef);
    CHECK(split.first * split.second == coef);
    for (double factor : {split.first, split.second}) {
      CHECK(std::fabs(factor) >= std::numeric_limits<float>::min());
      CHECK(std::fabs(static_cast<float>(factor) / factor - 1) <= 0x1p-24);
    }
    CHECK(std::exp2(std::round(std::log2(std::fabs(split.first)))) == std::fabs(split.first));  // exact
  }
}

}  // namespace

int main(int argc, char** argv) {
  const struct {
    const char* name;
    void (*run)();
  } cases[] = {{"packing", packing},
               {"cut", cut},
               {"overlaps", overlaps},
               {"nan_max", nan_max_},
               {"combine_norms", combine_norms_},
               {"clip_coef", clip_coef_},
               {"must_scale", must_scale_},
               {"factors", factors}};
  for (const auto& entry : cases) {
    if (argc == 2 && !std::strcmp(argv[1], entry.name)) {
      entry.run();
      std::printf("%s: good\n", entry.name);
      return 0;
    }
  }
  std::printf("no such case\n");
  return 2;
}
