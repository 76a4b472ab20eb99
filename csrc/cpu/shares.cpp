#include "shares.h"

#include <pthread.h>

namespace fastclip::cpu {

bool forked = false;

namespace {
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
}  // namespace

}  // namespace fastclip::cpu
