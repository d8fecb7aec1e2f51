// SPDX-License-Identifier: Apache-2.0
// coverage.h - which source lines were executed (PTXSIM_COVERAGE), and source lines in error
// messages. Both come from the .loc directives of kernels compiled with -lineinfo.
#pragma once
#include "ptx.h"

namespace ptx {

bool coverageOn();
void coverageStart(Module& m); // this module's lines will be in the report, executed or not
void coverageHit(const Module& m, const RawInstr& in);
void coverageWrite(); // at exit: appends one JSON line per source file
std::string sourceLine(const Module& m, const RawInstr& in); // "\n    source file:line", or nothing

} // namespace ptx
