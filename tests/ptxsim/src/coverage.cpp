// SPDX-License-Identifier: Apache-2.0
// coverage.cpp - see coverage.h.
#include "coverage.h"
#include "options.h"
#include <cstdio>
#include <cstdlib>
#include <set>

namespace ptx {
namespace {

// Executions by module and index into its sourceLines
std::map<Module*, std::vector<uint64_t>>& hits() {
  static auto* h = new std::map<Module*, std::vector<uint64_t>>;
  return *h;
}

} // namespace

bool coverageOn() {
  static bool on = !Options::get().coverageFile.empty();
  return on;
}

void coverageStart(Module& m) {
  if (!coverageOn())
    return;
  static bool registered = (atexit(coverageWrite), true);
  (void)registered;
  hits()[&m];
}

void coverageHit(const Module& m, const RawInstr& in) {
  if (in.loc < 0)
    return;
  auto& h = hits()[const_cast<Module*>(&m)];
  if (h.size() <= (size_t)in.loc)
    h.resize(in.loc + 1);
  h[in.loc]++;
}

// Kernels of the module that were never launched are parsed now, so that their lines count as not
// executed.
void coverageWrite() {
  std::map<std::string, std::map<int, uint64_t>> files;
  for (auto& [m, h] : hits()) {
    std::set<int> used;
    for (auto& kv : m->funcs) {
      Function& f = *kv.second;
      try {
        parseBody(*m, f);
      } catch (const SimError&) { // not executed either
      }
      for (auto& in : f.raw)
        if (in.loc >= 0)
          used.insert(in.loc);
    }
    for (int i : used) {
      const SourceLine& at = m->sourceLines[i];
      uint64_t n = (size_t)i < h.size() ? h[i] : 0;
      if (at.line) // 0: the compiler's own
        files[m->files[at.file]][at.line] += n;
      if (at.callLine) // a call has been executed if what it calls has, also without code of its own
        files[m->files[at.callFile]][at.callLine] += n;
    }
  }
  FILE* out = fopen(Options::get().coverageFile.c_str(), "a");
  if (!out)
    return;
  for (auto& [file, lines] : files) {
    std::string s = "{\"file\":\"" + file + "\",\"lines\":{";
    for (auto& [line, n] : lines)
      s += strf("%s\"%d\":%llu", s.back() == '{' ? "" : ",", line, (unsigned long long)n);
    fprintf(out, "%s}}\n", s.c_str()); // one write, so that processes can append to one file
  }
  fclose(out);
}

std::string sourceLine(const Module& m, const RawInstr& in) {
  if (in.loc < 0)
    return "";
  const SourceLine& at = m.sourceLines[in.loc];
  auto it = m.files.find(at.file);
  return "\n    source " + (it == m.files.end() ? "?" : it->second) + ":" +
         std::to_string(at.line);
}

} // namespace ptx
