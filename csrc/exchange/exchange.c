// exchange.c - what all transports share: who we are, refusing a call, naming ranks, the end.
// SPDX-License-Identifier: Apache-2.0
#include "exchange.h"

#include <stdio.h>

void ms_rank_list(const bool *in, int32_t R, char text[MS_RANK_LIST]) {
  enum { NAMED = 8 };
  int32_t count = 0;
  for (int32_t r = 0; r < R; r++) count += in[r];
  int32_t used = snprintf(text, MS_RANK_LIST, count == 1 ? "rank" : "ranks"), named = 0;
  for (int32_t r = 0; r < R && named < NAMED; r++)
    if (in[r])
      used += snprintf(text + used, (size_t)(MS_RANK_LIST - used), "%s %d", named++ ? "," : "", r);
  if (count > named)
    snprintf(text + used, (size_t)(MS_RANK_LIST - used), " and %d more", count - named);
}

int32_t ms_exchange_rank(const ms_exchange *exchange) { return exchange->rank; }

int32_t ms_exchange_ranks(const ms_exchange *exchange) { return exchange->R; }

ms_status ms_exchange_refuse(ms_exchange *exchange, const char *msg, ms_error *err) {
  if (!exchange->open) exchange->call++;
  ms_status status = exchange->ops->refuse(exchange, msg, err);
  exchange->open = false;
  return status;
}

void ms_exchange_free(ms_exchange *exchange) {
  if (exchange) exchange->ops->free(exchange);
}
