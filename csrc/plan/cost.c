// cost.c - what a layer takes under any table: the five steps, each from a handful of numbers of the machine.
//
//   route    tokens x experts: the router's product, and picking the largest, over a fixed cost; of the rank with the most tokens
//   gather   dense:  all-gather; ring inside a host and between hosts at once, log2 steps of latency
//            sparse: all-to-all; every rank sends and receives what its experts are chosen for, a message to each peer
//   group    one sort of the slots that a rank has
//   ffn      for each expert, hypot(arithmetic, weights): the two overlap, but not wholly. Weights are read once, and
//            only if the expert gets a row. Arithmetic counts `idle_rows` more rows than there are
//   combine  the choices of a token are added, then the way back: reduce-scatter or all-to-all of fp32 rows
//
// Ranks wait for each other in gather and in combine, so of every step the slowest rank counts. Ranks of a host share
// its memory bandwidth in the proportion of what they need: the one that needs less is done first, and leaves it to the
// others. Loads are means over batches unless `exact`: an expert with load m is hit with probability 1 - exp(-m), and of
// R ranks with equal means the slowest lies `spread` standard deviations above, except for what all ranks hold alike.
//
// An expert's tokens are split evenly over its copies, and stay with the copy that their own rank is in where they can.
//
// Which of dense and sparse is taken: the one that is predicted faster. All-gather and reduce-scatter follow the alpha-beta
// model of Thakur, Rabenseifner and Gropp (2005), doi 10.1177/1094342005051521: log2(p) messages one after the other. In
// an all-to-all messages overlap: one latency, and `message` seconds for each further peer, as LogGP's gap (Alexandrov,
// Ionescu, Schauser and Scheiman 1995).
//
// SPDX-License-Identifier: Apache-2.0
#include "cost.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
  PARTIAL = 4,  // bytes of an element of a partial output
  CHOICE = 8,   // of a choice: index and weight
  FEW_RANKS = 8 // up to which every sender of a copy is looked at
};

// ---- checks ---------------------------------------------------------------------------------------

static ms_status check_positive(const char *name, const double *x, int64_t n, bool zero,
                                bool infinite, ms_error *err) {
  for (int64_t i = 0; i < n; i++)
    if (!(zero ? x[i] >= 0 : x[i] > 0) || (!infinite && isinf(x[i])))
      return ms_fail(err, MS_EINVAL, "%s[%lld]: got %g, expected a %s%s number", name, (long long)i,
                     x[i], infinite ? "" : "finite ", zero ? "non-negative" : "positive");
  return MS_OK;
}

static ms_status check(const ms_cluster *c, const ms_moe_layer *l, ms_error *err) {
  if (c->R < 1 || c->R > MS_MAX_RANKS)
    return ms_fail(err, MS_EINVAL, "ranks: got %d, expected 1 to %d", c->R, MS_MAX_RANKS);
  if (l->E < 1 || l->E > MS_MAX_EXPERTS)
    return ms_fail(err, MS_EINVAL, "num_experts: got %d, expected 1 to %d", l->E, MS_MAX_EXPERTS);
  if (l->K < 1 || l->K > l->E)
    return ms_fail(err, MS_EINVAL, "top_k: got %d, expected 1 to %d experts", l->K, l->E);
  if (l->D < 1 || l->F < 1 || l->matrices < 1 || l->weight_size < 1 || l->token_size < 1)
    return ms_fail(err, MS_EINVAL, "d_model, d_ff and sizes must be at least 1, got %lld and %lld",
                   (long long)l->D, (long long)l->F);
  if (c->panel < 1)
    return ms_fail(err, MS_EINVAL, "panel: got %lld, expected at least 1", (long long)c->panel);
  MS_TRY(check_positive("flops", c->flops, c->R, false, false, err));
  MS_TRY(check_positive("bandwidth", c->bandwidth, c->R, false, false, err));
  MS_TRY(check_positive("memory", c->memory, c->R, true, true, err));
  MS_TRY(check_positive("tokens", l->tokens, c->R, true, false, err));
  MS_TRY(check_positive("load", l->load, l->E, true, false, err));
  MS_TRY(check_positive("host_bandwidth", &c->host_bandwidth, 1, false, true, err));
  const double rates[] = {c->inside.bandwidth, c->between.bandwidth};
  MS_TRY(check_positive("link bandwidth", rates, 2, false, true, err));
  const double times[] = {
      c->inside.latency, c->inside.message, c->between.latency, c->between.message, c->step,
      c->expert,         c->slot,           c->router,          c->logit,           c->idle_rows};
  MS_TRY(check_positive("link latency and overhead", times, 10, true, false, err));
  const double shares[] = {c->flops_share, c->bandwidth_share};
  MS_TRY(check_positive("share of the peak", shares, 2, false, false, err));
  for (int32_t r = 1; r < c->R; r++)
    if (c->host[r] < c->host[r - 1])
      return ms_fail(err, MS_EINVAL,
                     "host[%d]: got %d after %d, expected ranks of a host to follow each other", r,
                     c->host[r], c->host[r - 1]);
  return MS_OK;
}

// ---- preparing --------------------------------------------------------------------------------------

// The normal distribution's quantile, to about 1e-3: Winitzki's approximation of the inverse error function.
static double normal_quantile(double p) {
  double x = 2 * p - 1, a = 0.147, l = log(1 - x * x), b = 2 / (M_PI * a) + l / 2;
  double y = sqrt(sqrt(b * b - l / a) - b);
  return sqrt(2) * (x < 0 ? -y : y);
}

// Blom's approximation of the expected largest of n independent normal numbers.
static double expected_largest(int32_t n) {
  return n < 2 ? 0 : normal_quantile((n - 0.375) / (n + 0.25));
}

static double larger(double a, double b) { return a > b ? a : b; }
static int32_t at_least(int32_t a, int32_t b) { return a > b ? a : b; }
static int32_t at_most(int32_t a, int32_t b) { return a < b ? a : b; }

static double row_bytes(const ms_moe_layer *l) {
  return (double)l->D * l->token_size + (double)l->K * CHOICE;
}

static double partial_bytes(const ms_moe_layer *l) { return (double)l->D * PARTIAL; }

static double log2_steps(int32_t n) { return ceil(log2((double)n)); }

// Seconds of an all-gather (or, with the rows of partial outputs, a reduce-scatter). Between hosts each of a host's
// ranks carries its part of what the host needs.
static double dense_seconds(const ms_costing *w, double bytes_per_row) {
  const ms_cluster *c = w->cluster;
  double slowest = 0;
  int32_t hosts = 0, largest = 0;
  for (int32_t r = 0; r < c->R; r = w->host_end[r]) {
    int32_t n = w->host_end[r] - r;
    double own = w->before[w->host_end[r]] - w->before[r], least = own;
    for (int32_t i = r; i < w->host_end[r]; i++)
      if (w->layer->tokens[i] < least) least = w->layer->tokens[i];
    double inside = n > 1 ? (w->tokens - least) * bytes_per_row / c->inside.bandwidth : 0;
    double between = (w->tokens - own) * bytes_per_row / (n * c->between.bandwidth);
    slowest = larger(slowest, larger(inside, between));
    largest = n > largest ? n : largest;
    hosts++;
  }
  return slowest + log2_steps(largest) * c->inside.latency + log2_steps(hosts) * c->between.latency;
}

ms_status ms_costing_create(const ms_cluster *cluster, const ms_moe_layer *layer, ms_costing *out,
                            ms_error *err) {
  *out = (ms_costing){0};
  MS_TRY(check(cluster, layer, err));
  int32_t R = cluster->R;
  size_t n = (size_t)R;
  out->cluster = cluster;
  out->layer = layer;
  out->before = malloc((n + 1) * sizeof *out->before);
  out->host_of = malloc(n * sizeof *out->host_of);
  out->host_end = malloc(n * sizeof *out->host_end);
  out->host_bytes = malloc(n * sizeof *out->host_bytes);
  out->difference = malloc(3 * (n + 1) * sizeof *out->difference);
  out->copy_from = malloc(n * sizeof *out->copy_from);
  out->copy_to = malloc(n * sizeof *out->copy_to);
  out->copy_size = malloc(n * sizeof *out->copy_size);
  out->ranks = malloc(n * sizeof *out->ranks);
  out->regions = malloc(n * MS_REGIONS * sizeof *out->regions);
  if (!out->before || !out->host_of || !out->host_end || !out->host_bytes || !out->difference ||
      !out->ranks || !out->copy_from || !out->copy_to || !out->copy_size || !out->regions) {
    ms_costing_free(out);
    return ms_fail(err, MS_ENOMEM, "no memory to plan for %d ranks", R);
  }
  out->before[0] = 0;
  double most = 0;
  for (int32_t r = 0; r < R; r++) {
    out->before[r + 1] = out->before[r] + layer->tokens[r];
    most = larger(most, layer->tokens[r]);
    out->host_of[r] = r > 0 && cluster->host[r] == cluster->host[r - 1] ? out->host_of[r - 1] : r;
  }
  for (int32_t r = R - 1; r >= 0; r--)
    out->host_end[r] =
        r + 1 < R && out->host_of[r + 1] == out->host_of[r] ? out->host_end[r + 1] : r + 1;
  out->tokens = out->before[R];
  out->spread = layer->exact ? 0 : expected_largest(R);
  double product = 2.0 * (double)layer->D * layer->E;
  for (int32_t r = 0; r < R; r++) {
    double seconds = layer->tokens[r] * (product / (cluster->flops_share * cluster->flops[r]) +
                                         layer->E * cluster->logit);
    out->route = larger(out->route, cluster->step + cluster->router + seconds);
  }
  if (R > 1) {
    out->dense_gather = dense_seconds(out, row_bytes(layer));
    out->dense_combine = dense_seconds(out, partial_bytes(layer));
  }
  return MS_OK;
}

void ms_costing_free(ms_costing *w) {
  free(w->before);
  free(w->host_of);
  free(w->host_end);
  free(w->host_bytes);
  free(w->difference);
  free(w->copy_from);
  free(w->copy_to);
  free(w->copy_size);
  free(w->ranks);
  free(w->regions);
  *w = (ms_costing){0};
}

// ---- ffn --------------------------------------------------------------------------------------------

static double padded(const ms_costing *w, int64_t width) {
  int64_t panel = w->cluster->panel;
  return (double)((width + panel - 1) / panel * panel);
}

// Weights of `width` columns.
static double weights_of(const ms_costing *w, int64_t width) {
  return padded(w, width) * (double)w->layer->D * w->layer->matrices;
}

static double hit_chance(const ms_costing *w, double rows) {
  if (w->layer->exact) return rows > 0 ? 1 : 0;
  return rows > 30 ? 1 : -expm1(-rows); // 1e-13 off
}

double ms_costing_expert(const ms_costing *w, int32_t r, double rows, int64_t width) {
  const ms_cluster *c = w->cluster;
  double weights = weights_of(w, width), hit = hit_chance(w, rows);
  double arithmetic = 2 * (rows + hit * c->idle_rows) * weights / (c->flops_share * c->flops[r]);
  double bandwidth = c->bandwidth[r] < c->host_bandwidth ? c->bandwidth[r] : c->host_bandwidth;
  return hypot(arithmetic,
               hit * weights * w->layer->weight_size / (c->bandwidth_share * bandwidth)) +
         hit * c->expert;
}

// Senders [from, to) want an expert of rank r with this probability.
static void add_region(ms_costing *w, int32_t r, int32_t from, int32_t to, double chance) {
  ms_region *regions = w->regions + (int64_t)r * MS_REGIONS;
  int32_t n = w->ranks[r].regions, i = 0;
  while (i < n && (regions[i].from != from || regions[i].to != to)) i++;
  if (i == n && n == MS_REGIONS) { // join the last two
    i = n - 1;
    regions[i].from = from < regions[i].from ? from : regions[i].from;
    regions[i].to = to > regions[i].to ? to : regions[i].to;
  } else if (i == n) {
    regions[w->ranks[r].regions++] = (ms_region){.from = from, .to = to};
  }
  regions[i].sum += chance;
  regions[i].largest = larger(regions[i].largest, chance);
}

// Which senders go to which copy: those that are in a copy go there as far as it has room for 1/c of all tokens, the
// others where room is left. On few ranks for each sender; on many only for copies that are consecutive ranks, of which
// each serves its own, else every sender goes to all copies alike.
static void add_copies(ms_costing *w, const ms_parts *l, int32_t e, double chance) {
  int32_t R = w->cluster->R, c = l->copies[e], members = (int32_t)(l->first[e + 1] - l->first[e]);
  int32_t *from = w->copy_from, *to = w->copy_to, *size = w->copy_size;
  for (int32_t i = 0; i < c; i++) {
    from[i] = R;
    to[i] = size[i] = 0;
  }
  int32_t in[FEW_RANKS];
  for (int32_t r = 0; r < R && R <= FEW_RANKS; r++) in[r] = -1;
  for (int64_t i = l->first[e]; i < l->first[e + 1]; i++) {
    const ms_part *part = &l->parts[i];
    from[part->copy] = at_most(from[part->copy], part->rank);
    to[part->copy] = at_least(to[part->copy], part->rank + 1);
    size[part->copy]++;
    if (R <= FEW_RANKS) in[part->rank] = part->copy;
  }
  double room = 0, most = (double)R / c; // ranks' worth of tokens that a copy serves
  for (int32_t i = 0; i < c; i++) room += larger(most - size[i], 0);
  for (int64_t i = l->first[e]; i < l->first[e + 1]; i++) {
    int32_t r = l->parts[i].rank, copy = l->parts[i].copy, n = size[copy];
    if (R > FEW_RANKS) {
      bool own = members == R && n * c == R && to[copy] - from[copy] == n;
      add_region(w, r, own ? from[copy] : 0, own ? to[copy] : R, own ? chance : chance / c);
      continue;
    }
    for (int32_t s = 0; s < R; s++) {
      double stays = in[s] < 0 ? 0 : size[in[s]] > most ? most / size[in[s]] : 1;
      double there = in[s] == copy ? stays : 0;
      if (room > 0) there += (1 - stays) * larger(most - n, 0) / room;
      if (there > 0) add_region(w, r, s, s + 1, chance * there);
    }
  }
}

// What each rank holds, reads and is wanted for.
static void add_up(ms_costing *w, const ms_parts *l) {
  int32_t R = w->cluster->R;
  memset(w->ranks, 0, (size_t)R * sizeof *w->ranks);
  for (int32_t e = 0; e < l->filled; e++) {
    double load = w->layer->load[e], chance = w->tokens > 0 ? load / w->tokens : 0;
    double hit = hit_chance(w, load / at_least(l->copies[e], 1)), weights = 0;
    int64_t width = -1;
    for (int64_t i = l->first[e]; i < l->first[e + 1]; i++) {
      const ms_part *part = &l->parts[i];
      ms_rank_state *rank = &w->ranks[part->rank];
      if (part->width != width)
        weights = weights_of(w, width = part->width) * w->layer->weight_size;
      rank->memory += weights;
      rank->bytes += hit * weights;
      if (l->copies[e] == 1) add_region(w, part->rank, 0, R, chance);
    }
    if (l->copies[e] > 1) add_copies(w, l, e, chance);
  }
  memset(w->host_bytes, 0, (size_t)R * sizeof *w->host_bytes);
  for (int32_t r = 0; r < R; r++) w->host_bytes[w->host_of[r]] += w->ranks[r].bytes;
}

// Seconds a byte of weights for this rank, its host's other ranks reading too: each gets what it needs of the whole, and
// never less than an equal share.
static double byte_seconds(const ms_costing *w, int32_t r) {
  const ms_cluster *c = w->cluster;
  double all = w->host_bytes[w->host_of[r]], equal = 1.0 / (w->host_end[r] - w->host_of[r]);
  double part = all > 0 ? larger(w->ranks[r].bytes / all, equal) : equal, rate = c->bandwidth[r];
  if (isfinite(c->host_bandwidth) && part * c->host_bandwidth < rate)
    rate = part * c->host_bandwidth;
  return 1 / (c->bandwidth_share * rate);
}

static void time_experts(ms_costing *w, const ms_parts *l) {
  const ms_cluster *c = w->cluster;
  int32_t R = c->R;
  double *per_byte = w->difference, *per_flop = w->difference + R + 1; // not in use yet
  for (int32_t r = 0; r < R; r++) {
    per_byte[r] = byte_seconds(w, r) * w->layer->weight_size;
    per_flop[r] = 2 / (c->flops_share * c->flops[r]);
  }
  for (int32_t e = 0; e < l->filled; e++) {
    double rows = w->layer->load[e] / at_least(l->copies[e], 1), hit = hit_chance(w, rows),
           weights = 0;
    bool common =
        l->first[e + 1] - l->first[e] == R && l->copies[e] == 1; // its luck is every rank's
    int64_t width = -1;
    for (int64_t i = l->first[e]; i < l->first[e + 1]; i++) {
      const ms_part *part = &l->parts[i];
      int32_t r = part->rank;
      if (part->width != width) weights = weights_of(w, width = part->width);
      double arithmetic = (rows + hit * c->idle_rows) * weights * per_flop[r];
      double reading = hit * weights * per_byte[r];
      w->ranks[r].ffn += sqrt(arithmetic * arithmetic + reading * reading) + hit * c->expert;
      if (!common && w->spread > 0) {
        double row = weights * per_flop[r], all = weights * per_byte[r];
        w->ranks[r].variance += rows * row * row + hit * (1 - hit) * all * all;
      }
    }
  }
}

// ---- the exchange -----------------------------------------------------------------------------------

// A token whose choices fall on a rank with probabilities that add up to `sum`, at most `largest` for one expert, goes
// there with about this probability. Exact for K = 1, for tables that are dense, and for an expert that all tokens want.
static double reach(int32_t K, double sum, double largest) {
  if (sum >= K) return 1;
  double apart = K == 1 ? sum : 1 - pow(1 - sum / K, K);
  double found = apart > largest ? apart : largest;
  return found < 1 ? found : 1;
}

// Senders [from, to) each have the same chance to reach r: what arrives there, and what they send.
static void add_flow(ms_costing *w, int32_t r, int32_t from, int32_t to, double chance) {
  if (from >= to || chance <= 0) return;
  int32_t R = w->cluster->R;
  double *all = w->difference, *inside = all + R + 1, *own = inside + R + 1;
  int32_t begin = at_least(from, w->host_of[r]), end = at_most(to, w->host_end[r]);
  double rows = (w->before[to] - w->before[from]) * chance, near = 0, mine = 0;
  if (begin < end) {
    near = (w->before[end] - w->before[begin]) * chance;
    inside[begin] += chance;
    inside[end] -= chance;
  }
  all[from] += chance;
  all[to] -= chance;
  if (from <= r && r < to) {
    own[r] += chance;
    mine = w->layer->tokens[r] * chance;
  }
  ms_rank_state *rank = &w->ranks[r];
  rank->rows += rows;
  rank->received[0] += near - mine;
  rank->received[1] += rows - near;
}

static void flow_to(ms_costing *w, int32_t r) {
  const ms_region *regions = w->regions + (int64_t)r * MS_REGIONS;
  int32_t n = w->ranks[r].regions, R = w->cluster->R, cuts[2 * MS_REGIONS + 2], count = 0;
  cuts[count++] = 0;
  cuts[count++] = R;
  for (int32_t i = 0; i < n; i++) {
    cuts[count++] = regions[i].from;
    cuts[count++] = regions[i].to;
  }
  for (int32_t i = 1; i < count; i++) // insertion sort: a handful
    for (int32_t j = i; j > 0 && cuts[j] < cuts[j - 1]; j--) {
      int32_t swap = cuts[j];
      cuts[j] = cuts[j - 1];
      cuts[j - 1] = swap;
    }
  for (int32_t i = 0; i + 1 < count; i++) {
    double sum = 0, largest = 0;
    for (int32_t j = 0; j < n; j++)
      if (regions[j].from <= cuts[i] && cuts[i + 1] <= regions[j].to) {
        sum += regions[j].sum;
        largest = larger(largest, regions[j].largest);
      }
    add_flow(w, r, cuts[i], cuts[i + 1], reach(w->layer->K, sum, largest));
  }
}

static void flows(ms_costing *w) {
  int32_t R = w->cluster->R;
  memset(w->difference, 0, 3 * ((size_t)R + 1) * sizeof *w->difference);
  for (int32_t r = 0; r < R; r++) flow_to(w, r);
  double *all = w->difference, *inside = all + R + 1, *own = inside + R + 1, a = 0, b = 0;
  for (int32_t r = 0; r < R; r++) {
    a += all[r];
    b += inside[r];
    double sent = (b - own[r]) * w->layer->tokens[r];
    w->ranks[r].sent[0] = larger(sent, 0);
    w->ranks[r].sent[1] = larger((a - b) * w->layer->tokens[r], 0);
  }
}

// Seconds until messages to so many peers are under way and the last has arrived, but for their bytes.
static double messages_seconds(const ms_link *link, int32_t peers) {
  return peers > 0 ? link->latency + (peers - 1) * link->message : 0;
}

// Seconds of an all-to-all at rank r.
static double sparse_seconds(const ms_costing *w, int32_t r, double bytes_per_row) {
  const ms_cluster *c = w->cluster;
  const ms_rank_state *rank = &w->ranks[r];
  double inside = larger(rank->received[0], rank->sent[0]) * bytes_per_row / c->inside.bandwidth;
  double between = larger(rank->received[1], rank->sent[1]) * bytes_per_row / c->between.bandwidth;
  int32_t near = w->host_end[r] - w->host_of[r];
  return larger(inside + messages_seconds(&c->inside, near - 1),
                between + messages_seconds(&c->between, c->R - near));
}

// ---- all together -----------------------------------------------------------------------------------

// Seconds to add up the choices of the rows of rank r, all ranks of its host doing so.
static double choices_seconds(const ms_costing *w, int32_t r, double rows) {
  const ms_cluster *c = w->cluster;
  double share = c->host_bandwidth / (w->host_end[r] - w->host_of[r]);
  double rate = c->bandwidth_share * (c->bandwidth[r] < share ? c->bandwidth[r] : share);
  int32_t passes = w->layer->K > 1 ? w->layer->K + 1 : 1;
  return passes * rows * partial_bytes(w->layer) / rate;
}

static void finish(ms_cost *cost) {
  cost->total = cost->route + cost->gather + cost->group + cost->ffn + cost->combine;
}

void ms_costing_run(ms_costing *w, const ms_parts *l, ms_cost *out) {
  const ms_cluster *c = w->cluster;
  add_up(w, l);
  time_experts(w, l);
  ms_cost dense = {.route = w->route, .gather = c->step + w->dense_gather},
          sparse = {.route = w->route, .sparse = true};
  double group_ffn[2] = {0, 0}, combine[2] = {0, 0}, sparse_gather = 0;
  bool alone = c->R == 1;
  if (!alone) flows(w);
  for (int32_t r = 0; r < c->R; r++) {
    const ms_rank_state *rank = &w->ranks[r];
    double ffn = rank->ffn + w->spread * sqrt(rank->variance);
    for (int mode = 0; mode < (alone ? 1 : 2); mode++) {
      double rows = mode ? rank->rows : w->tokens, sort = rows * w->layer->K * c->slot;
      if (sort + ffn > group_ffn[mode]) {
        ms_cost *cost = mode ? &sparse : &dense;
        group_ffn[mode] = sort + ffn;
        cost->group = c->step + sort;
        cost->ffn = c->step + ffn;
      }
      double back = mode ? sparse_seconds(w, r, partial_bytes(w->layer)) : w->dense_combine;
      combine[mode] = larger(combine[mode], choices_seconds(w, r, rows) + back);
    }
    if (!alone) sparse_gather = larger(sparse_gather, sparse_seconds(w, r, row_bytes(w->layer)));
  }
  if (group_ffn[0] <= 0) dense.group = dense.ffn = c->step;
  if (group_ffn[1] <= 0) sparse.group = sparse.ffn = c->step;
  dense.combine = c->step + combine[0];
  finish(&dense);
  *out = dense;
  if (alone) return;
  sparse.gather = c->step + sparse_gather;
  sparse.combine = c->step + combine[1];
  finish(&sparse);
  if (sparse.total < dense.total) *out = sparse;
}

bool ms_costing_fits(const ms_costing *w, double *fullest) {
  bool fits = true;
  *fullest = 0;
  for (int32_t r = 0; r < w->cluster->R; r++) {
    *fullest = larger(*fullest, w->ranks[r].memory);
    if (w->ranks[r].memory > w->cluster->memory[r]) fits = false;
  }
  return fits;
}

ms_status ms_plan_cost(const ms_plan *plan, const ms_cluster *cluster, const ms_moe_layer *layer,
                       ms_cost *out, const ms_rank_costs *ranks, ms_error *err) {
  if (plan->R != cluster->R || plan->E != layer->E)
    return ms_fail(err, MS_EINVAL, "columns: got [%d, %d, 2], expected [%d ranks, %d experts, 2]",
                   plan->R, plan->E, cluster->R, layer->E);
  ms_costing costing = {0};
  ms_parts layout = {0};
  ms_status status = ms_costing_create(cluster, layer, &costing, err);
  if (status == MS_OK) status = ms_parts_from_plan(plan, &layout, err);
  if (status == MS_OK) {
    ms_costing_run(&costing, &layout, out);
    for (int32_t r = 0; ranks && r < cluster->R; r++) {
      const ms_rank_state *rank = &costing.ranks[r];
      bool sparse = out->sparse && cluster->R > 1;
      double rows =
          sparse ? rank->received[0] + rank->received[1] : costing.tokens - layer->tokens[r];
      double back = sparse ? rank->sent[0] + rank->sent[1] : (cluster->R - 1) * layer->tokens[r];
      if (ranks->ffn) ranks->ffn[r] = rank->ffn;
      if (ranks->memory) ranks->memory[r] = rank->memory;
      if (ranks->gathered) ranks->gathered[r] = rows * row_bytes(layer);
      if (ranks->combined) ranks->combined[r] = back * partial_bytes(layer);
    }
  }
  ms_parts_free(&layout);
  ms_costing_free(&costing);
  return status;
}
