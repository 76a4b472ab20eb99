// The whole CPU backend without torch and OpenMP, for ThreadSanitizer: several callers at a time, each with threads of
// its own that share slices. Results are those of one thread. tools/sanitize.sh builds and runs it.
#include <ATen/Parallel.h>

#include <cmath>
#include <cstring>
#include <random>

#include "backend.h"
#include "check.h"
#include "cpu/dispatch.h"

using namespace fastclip;

namespace {

struct Model {
  std::vector<std::vector<char>> memory;
  TensorTable table;

  // The same bytes for the same seed: small gradients, and two that threads share, of 500 KB to 1 MB.
  explicit Model(int seed) {
    std::mt19937 random(seed);
    for (int i = 0; i < 12; ++i) {
      const auto dtype = static_cast<DType>((seed + i) % 4);
      const int64_t numel = i % 6 == 2 ? 250000 + random() % 100 : random() % 3000;
      std::vector<char>& bytes = memory.emplace_back(numel * item_size(dtype));
      for (int64_t at = 0; at + 2 <= numel * item_size(dtype); at += 2) {
        const uint16_t value = 0x2c00 + random() % 0x1000;  // a finite number in every dtype
        std::memcpy(bytes.data() + at, &value, 2);
      }
      table.add(bytes.data(), numel, dtype, i);
    }
  }

  std::vector<double> clipped() {
    std::vector<StatisticsRow> rows(memory.size(), StatisticsRow{});
    std::vector<double> results;
    for (NormType type : {NormType::L1, NormType::L2, NormType::Inf}) {
      results.push_back(cpu::total_norm(table, type));
      CHECK(results.back() == cpu::total_norm(table, type, rows.data()));
    }
    cpu::scale(table, 0.125);
    cpu::scale(table, 1e-40);
    cpu::clamp(table, 1e-44);
    int written = 0;
    for (int64_t i = 0; i < table.size(); ++i) written += table.slices()[i].written;
    results.push_back(written);
    for (const StatisticsRow& row : rows) results.insert(results.end(), {row.norm, row.abs_max, row.zeros});
    return results;
  }
};

// Other shares add up in another order, blocks of float32 in float32.
bool near(const std::vector<double>& a, const std::vector<double>& b) {
  CHECK(a.size() == b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::fabs(a[i] - b[i]) > 1e-7 * std::fabs(b[i])) return false;
  }
  return true;
}

}  // namespace

int main() {
  constexpr int kCallers = 6;
  for (const std::string& name : cpu::available_kernels()) {
    cpu::select_kernels(name);
    std::vector<std::thread> callers;
    for (int seed = 0; seed < kCallers; ++seed) {
      callers.emplace_back([seed] {
        Model alone(seed);
        at::num_threads = 1;
        const auto expected = alone.clipped();
        for (int threads : {2, 3, 8}) {
          Model model(seed);
          at::num_threads = threads;
          CHECK(near(model.clipped(), expected));
          for (size_t i = 0; i < model.memory.size(); ++i) CHECK(model.memory[i] == alone.memory[i]);
        }
      });
    }
    for (std::thread& caller : callers) caller.join();
    std::printf("%s: good\n", name.c_str());
  }
}
