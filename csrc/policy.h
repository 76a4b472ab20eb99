// Thresholds that follow the norms of a run, ZClip and AutoClip: the same code for host and device.
//
// A policy is one float64 tensor, laid out as the structs below: what it was told, and what it has learnt.
#pragma once

#include "clip_math.h"

namespace fastclip {

enum class Rule : uint8_t { ZClip = 1, AutoClip = 2 };
enum class SpikeTo : uint8_t { Reciprocal = 0, Max = 1, Mean = 2 };

struct PolicyHead {
  double rule;
  double threshold;  // of the last call
  double count;      // of the norms taken
};

// Kumar, Owen, Chowdhury, Guera: ZClip: Adaptive Spike Mitigation for LLM Pre-Training, 2025, arXiv:2504.02507.
struct ZClipState {
  PolicyHead head;
  double mean, variance;
  double alpha, z_threshold, warmup, eps, spike_to, max_norm;
};

// Seetharaman, Wichern, Pardo, Le Roux: AutoClip: Adaptive Gradient Clipping for Source Separation Networks, 2020,
// arXiv:2007.14469.
struct AutoClipState {
  PolicyHead head;
  double fraction, window;
  // Behind it the last `window` norms, norm number i at i % window; then the same, sorted.
  FASTCLIP_HOST_DEVICE double* arrivals() { return &window + 1; }
  FASTCLIP_HOST_DEVICE double* sorted() { return arrivals() + static_cast<int64_t>(window); }
};

// Who evaluates a policy: a thread alone, or (in clip_kernels.cuh) those of a block together.
struct Alone {
  FASTCLIP_HOST_DEVICE int size() const { return 1; }
  FASTCLIP_HOST_DEVICE int rank() const { return 0; }
  FASTCLIP_HOST_DEVICE void sync() const {}
  FASTCLIP_HOST_DEVICE int count(bool holds) const { return holds; }  // for how many of them something holds
};

FASTCLIP_HOST_DEVICE inline bool is_finite(double x) {
  return x - x == 0;
}

FASTCLIP_HOST_DEVICE inline double follow_zclip(ZClipState& state, double norm) {
  double threshold = HUGE_VAL;
  const bool learns = is_finite(norm * norm);  // else the variance would stay inf
  if (state.head.count < state.warmup) {
    if (!learns) return state.max_norm;
    // Mean and population variance of all norms so far (Welford 1962).
    const double delta = norm - state.mean;
    state.mean += delta / (state.head.count + 1);
    state.variance += (delta * (norm - state.mean) - state.variance) / (state.head.count + 1);
  } else {
    const double deviation = sqrt(state.variance), z = (norm - state.mean) / (deviation + state.eps);
    if (z > state.z_threshold) {
      const auto spike_to = static_cast<SpikeTo>(static_cast<int>(state.spike_to));
      const double at = spike_to == SpikeTo::Mean  ? 0
                        : spike_to == SpikeTo::Max ? state.z_threshold
                                                   : state.z_threshold / (z / state.z_threshold);
      threshold = state.mean + at * deviation;
      norm = threshold;  // what is learnt from a spike
    }
    if (learns) {
      state.mean = state.alpha * state.mean + (1 - state.alpha) * norm;
      state.variance = state.alpha * state.variance + (1 - state.alpha) * (norm - state.mean) * (norm - state.mean);
    }
  }
  if (learns) state.head.count += 1;
  return threshold < state.max_norm ? threshold : state.max_norm;
}

// How many of n ascending values are below x.
template <class Team>
FASTCLIP_HOST_DEVICE inline int64_t rank_of(Team team, const double* sorted, int64_t n, double x) {
  for (int64_t begin = 0; begin < n; begin += team.size()) {
    const int64_t i = begin + team.rank();
    const int below = team.count(i < n && sorted[i] < x);
    if (below < team.size()) return begin + below;
  }
  return n;
}

// Moves values[begin, end) by one place, up or down, a team's worth at a time.
template <class Team>
FASTCLIP_HOST_DEVICE inline void move_up(Team team, double* values, int64_t begin, int64_t end) {
  for (; end > begin; end -= team.size()) {
    const int64_t i = end - 1 - team.rank();
    const double value = i >= begin ? values[i] : 0;
    team.sync();
    if (i >= begin) values[i + 1] = value;
  }
}

template <class Team>
FASTCLIP_HOST_DEVICE inline void move_down(Team team, double* values, int64_t begin, int64_t end) {
  for (; begin < end; begin += team.size()) {
    const int64_t i = begin + team.rank();
    const double value = i < end ? values[i] : 0;
    team.sync();
    if (i < end) values[i - 1] = value;
  }
}

// As numpy.percentile, linearly between two values.
FASTCLIP_HOST_DEVICE inline double quantile(const double* sorted, int64_t n, double fraction) {
  const double position = static_cast<double>(n - 1) * fraction;
  const auto below = static_cast<int64_t>(position);
  if (below + 1 >= n) return sorted[n - 1];
  const double part = position - static_cast<double>(below), a = sorted[below], b = sorted[below + 1];
  return part < 0.5 ? a + (b - a) * part : b - (b - a) * (1 - part);
}

template <class Team>
FASTCLIP_HOST_DEVICE inline double follow_autoclip(Team team, AutoClipState& state, double norm) {
  const auto window = static_cast<int64_t>(state.window), count = static_cast<int64_t>(state.head.count);
  double* const arrivals = state.arrivals();
  double* const sorted = state.sorted();
  const int64_t before = count < window ? count : window;
  // Where a place gets free: that of the oldest norm, or behind the last one.
  const int64_t hole = count < window ? count : rank_of(team, sorted, before, arrivals[count % window]);
  int64_t place = rank_of(team, sorted, before, norm);
  team.sync();
  if (place <= hole) {
    move_up(team, sorted, place, hole);
  } else {
    move_down(team, sorted, hole + 1, place);
    --place;
  }
  team.sync();
  if (team.rank() == 0) {
    sorted[place] = arrivals[count % window] = norm;
    state.head.count += 1;
  }
  team.sync();
  return quantile(sorted, count < window ? count + 1 : window, state.fraction);
}

// The threshold for a norm, which the policy learns from. Of a norm that is not finite it learns nothing; the threshold
// is 0 then, which makes of everything finite 0 and of the rest NaN, as every other number does in torch.
template <class Team>
FASTCLIP_HOST_DEVICE inline double follow(Team team, double* policy, double norm) {
  auto& head = *reinterpret_cast<PolicyHead*>(policy);
  double threshold = 0;
  if (is_finite(norm) && static_cast<Rule>(static_cast<int>(head.rule)) == Rule::AutoClip) {
    threshold = follow_autoclip(team, *reinterpret_cast<AutoClipState*>(policy), norm);
  } else if (is_finite(norm) && team.rank() == 0) {
    threshold = follow_zclip(*reinterpret_cast<ZClipState*>(policy), norm);
  }
  team.sync();
  if (team.rank() == 0) head.threshold = threshold;
  return threshold;
}

}  // namespace fastclip
