#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace fastclip::cpu {
namespace {

std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> list{&kBaseline};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    list.push_back(&kAvx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      list.push_back(&kAvx512);
    }
  }
#endif
  return list;
}

const Kernels* find(const std::string& name, const std::string& argument) {
  std::string names;
  for (const Kernels* kernels : runnable()) {
    if (name == kernels->name) return kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::invalid_argument(argument + ": expected one that this processor runs (" + names + "), got '" + name + "'");
}

const Kernels* choose() {
  const char* forced = std::getenv("FASTCLIP_CPU");
  return forced && *forced ? find(forced, "FASTCLIP_CPU") : runnable().back();
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* current = chosen.load(std::memory_order_acquire);
  if (!current) {
    current = choose();
    chosen.store(current, std::memory_order_release);
  }
  return *current;
}

std::vector<std::string> available_kernels() {
  std::vector<std::string> names;
  for (const Kernels* kernels : runnable()) names.emplace_back(kernels->name);
  return names;
}

void select_kernels(const std::string& name) {
  chosen.store(find(name, "name"), std::memory_order_release);
}

}  // namespace fastclip::cpu
