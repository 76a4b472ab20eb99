// Chooses the kernels for this processor: once, at the first use.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace fastclip::cpu {

// The best that the processor has, or what FASTCLIP_CPU=baseline|avx2|avx512 names.
// Throws std::invalid_argument for a name that is unknown or that this processor cannot run.
const Kernels& kernels();

// What this processor can run, best last.
std::vector<std::string> available_kernels();

// Replaces the choice: for tests, which cover every instruction set in one process.
void select_kernels(const std::string& name);

}  // namespace fastclip::cpu
