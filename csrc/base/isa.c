// isa.c - which build of the kernels this process runs.
// SPDX-License-Identifier: Apache-2.0
#include "../kernels/kernels.h"

#include <stdlib.h>
#include <string.h>

typedef struct isa_entry {
  const char *name;
  const ms_kernels *kernels;
  bool usable;
} isa_entry;

enum { ISA_MAX = 4 };

// Best first.
static int32_t list_isas(isa_entry entries[ISA_MAX]) {
  int32_t n = 0;
#if defined(__x86_64__) && !defined(MS_ONLY_GENERIC)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  entries[n++] = (isa_entry){"avx512bf16", &ms_kernels_avx512bf16, bf16};
  entries[n++] = (isa_entry){"avx512", &ms_kernels_avx512, avx512};
  entries[n++] = (isa_entry){"avx2", &ms_kernels_avx2, avx2};
#endif
  entries[n++] = (isa_entry){"generic", &ms_kernels_generic, true};
  return n;
}

static ms_status choose(const ms_kernels **out, ms_error *err) {
  isa_entry entries[ISA_MAX];
  int32_t n = list_isas(entries);
  const char *wanted = getenv("MOESHARD_ISA");
  if (wanted && !*wanted) wanted = NULL;
  for (int32_t i = 0; i < n; i++) {
    if (wanted ? strcmp(wanted, entries[i].name) != 0 : !entries[i].usable) continue;
    if (!entries[i].usable)
      return ms_fail(err, MS_EINVAL, "MOESHARD_ISA=%s: this CPU cannot run it", wanted);
    *out = entries[i].kernels;
    return MS_OK;
  }
  return ms_fail(err, MS_EINVAL, "MOESHARD_ISA=%s: expected avx512bf16, avx512, avx2 or generic",
                 wanted ? wanted : "");
}

ms_status ms_isa(const char **name, ms_error *err) {
  const ms_kernels *kernels = NULL;
  MS_TRY(choose(&kernels, err));
  *name = kernels->isa;
  return MS_OK;
}

const char *const *ms_isa_available(void) {
  static const char *names[ISA_MAX + 1]; // filled alike by every caller
  isa_entry entries[ISA_MAX];
  int32_t n = list_isas(entries), used = 0;
  for (int32_t i = 0; i < n; i++)
    if (entries[i].usable) names[used++] = entries[i].name;
  return names;
}

const ms_kernels *ms_kernels_get(void) {
  // Decided once: the environment is not read again in the hot path. Two threads would store the same pointer.
  static const ms_kernels *chosen;
  const ms_kernels *kernels = __atomic_load_n(&chosen, __ATOMIC_ACQUIRE);
  if (!kernels) {
    if (choose(&kernels, NULL) != MS_OK) kernels = &ms_kernels_generic;
    __atomic_store_n(&chosen, kernels, __ATOMIC_RELEASE);
  }
  return kernels;
}
