// experts.h - where the packed pieces of one expert lie; shared by experts.c and step4_ffn.c.
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_EXPERTS_H
#define MS_EXPERTS_H

#include "moeshard.h"

typedef struct ms_slice { // this rank's columns [start, start + width) of one expert
  int64_t start, width;
  int32_t
      in_panels; // of the first matrix (K = D): one each 16 columns; gated: gate panel, up panel, alternating
  int32_t out_panels; // of the second (K = width): one each 16 outputs
  const char *w_in, *w_out;
  const float *scale_in;  // [in_panels * 16], in panel order; NULL unless the storage is int8
  const float *scale_out; // [out_panels * 16]; likewise
  const float *b_in;      // [in_panels * 16], in panel order; NULL without
  const float *b_out;     // [D]; NULL without, and on ranks that do not hold column 0
} ms_slice;

struct ms_experts {
  ms_experts_spec spec;
  int64_t in_panel_bytes; // one panel of the first matrix
  char *data;             // one mapping for all experts
  int64_t bytes;
  ms_slice *slices; // [E]
  int64_t *columns; // [E][2]
};

#endif
