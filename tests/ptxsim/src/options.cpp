// SPDX-License-Identifier: Apache-2.0
// options.cpp - see options.h.
#include "options.h"
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>

namespace ptx {

double now() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

static Options fromEnvironment() {
  Options o;
  auto flag = [](const char* name, bool& v) {
    if (const char* s = getenv(name))
      v = atoi(s) != 0;
  };
  auto text = [](const char* name) {
    const char* s = getenv(name);
    return std::string(s ? s : "");
  };
  if (const char* s = getenv("PTXSIM_SEED"))
    o.seed = strtoull(s, nullptr, 0);
  std::string sched = text("PTXSIM_SCHED"), mma = text("PTXSIM_MMA");
  o.sched = sched == "uniform" ? Options::UNIFORM
            : sched == "skew"  ? Options::SKEW
                               : Options::EITHER;
  o.mma = mma == "ampere" ? Options::AMPERE : mma == "hopper" ? Options::HOPPER : Options::EXACT;
  o.shuffleBlocks = text("PTXSIM_BLOCK_ORDER") != "linear";
  o.strictExit = text("PTXSIM_EXITED") != "allow";
  flag("PTXSIM_RACE", o.race);
  flag("PTXSIM_WARPRACE", o.warpRace);
  flag("PTXSIM_ABORT", o.abortOnError);
  flag("PTXSIM_TRACE", o.trace);
  if (const char* s = getenv("PTXSIM_GLOBAL_RACE"))
    o.globalRace = atoi(s);
  if (const char* s = getenv("PTXSIM_RESIDENT"))
    o.resident = std::max(1, atoi(s));
  if (const char* s = getenv("PTXSIM_TIMEOUT"))
    o.timeout = atof(s);
  o.counterFile = text("PTXSIM_COUNTERS");
  o.counters = !o.counterFile.empty();
  o.coverageFile = text("PTXSIM_COVERAGE");
  return o;
}

Options& Options::get() {
  static Options* o = new Options(fromEnvironment());
  return *o;
}

} // namespace ptx
