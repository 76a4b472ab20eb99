// The operators count which of their calls torch's operations did, and why.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace fastclip::ops {

std::map<std::string, int64_t> fallback_reasons();
void reset_fallback_reasons();

}  // namespace fastclip::ops
