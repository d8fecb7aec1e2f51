// SPDX-License-Identifier: Apache-2.0
// options.h - settings from the environment (README.md lists them), random numbers, time.
#pragma once
#include <cstdint>
#include <string>

namespace ptx {

struct Options {
  enum Sched { UNIFORM, SKEW, EITHER };
  enum Mma { EXACT, AMPERE, HOPPER };
  uint64_t seed = 1;
  Sched sched = EITHER;
  Mma mma = EXACT;
  bool shuffleBlocks = true, race = true, warpRace = true, strictExit = true;
  int globalRace = 1; // 0 off, 1 on, 2 also when both write the same value
  bool counters = false, abortOnError = false, trace = false;
  int resident = 2;     // blocks interleaved at once
  double timeout = 300; // seconds for one kernel
  std::string counterFile, coverageFile;
  static Options& get();
};

struct Rng { // xorshift64*
  uint64_t s;
  explicit Rng(uint64_t seed = 1) : s(seed * 0x9E3779B97F4A7C15ull + 0x1234567) {
    next();
    next();
  }
  uint64_t next() {
    s ^= s << 13;
    s ^= s >> 7;
    s ^= s << 17;
    return s * 0x2545F4914F6CDD1Dull;
  }
  uint32_t below(uint32_t n) { return (uint32_t)((next() >> 33) % n); }
};

double now(); // seconds of a steady clock

} // namespace ptx
