// SPDX-License-Identifier: Apache-2.0
// tensor_core.h - the arithmetic of mma and wgmma: element decoding and K-long dot products. PTX
// leaves the accumulation order and the intermediate precision open; mode "exact" sums in double
// and rounds once, "ampere" and "hopper" follow the truncating models measured in arXiv 2511.10909.
#pragma once
#include "types.h"

namespace ptx {

double elementValue(Type t, uint64_t bits); // the value of one matrix element
float dotProduct(const double* a, const double* b, int K, float c, Type t,
                 int mode); // c + sum of a[k]*b[k]

} // namespace ptx
