// step4_ffn.c - ffn: both matrices of every expert, on this rank's columns.
//
//   phase 1   H[i] = act(row[i] . w_in^T + b_in)                 [slots of the wave, Fr]
//   phase 2   slot[order[i]] = weight[i] * (H[i] . w_out^T + b_out)
//
// H is fp32, and 16-bit tokens are widened first; but where the processor multiplies pairs of bf16, bf16 tokens stay as
// they are when the weights are bf16 too, and H is rounded to bf16 (docs/numerics.md).
//
// The slots, sorted by expert, are taken in waves of about WAVE_ROWS, so that H stays in the last-level cache and memory
// does not grow with the batch. A wave is cut in segments (rows of one expert) and a phase in tasks (a segment's rows x
// four panels of its weights): a thread streams its panels once, in blocks of K_BLOCK that fit the L2 cache, while
// the rows pass by. Hot experts are many tasks and cold ones few, each of about equal size per row: the routing does
// not matter to the balance between threads.
//
// While one block of weights is used, the next one this thread will need is fetched: its own next block, or that of the
// task `threads` further on, which is the one it will get when all threads run alike.
//
// SPDX-License-Identifier: Apache-2.0
#include "base/memory.h"
#include "experts.h"
#include "kernels/kernels.h"
#include "kernels/pack.h" // for ms_panel_bytes

enum {
  WAVE_ROWS = 1024,
  TASK_ROWS = 256, // a task's accumulators: 64 KiB
  K_BLOCK =
      384, // 4 panels: 96 KiB of fp32 weights, twice (in use and on the way) in the L2 cache; even for bf16.
           // Part of the numerics: where sums are cut (kernels.h), so the same for every shape
  ACC_STRIDE = MS_TILE_PANELS * MS_PANEL,
  LINE = 64 // bytes
};

typedef struct segment {
  int32_t expert;
  int64_t base, rows; // rows [base, base + rows) of the wave
} segment;

typedef struct task {
  int32_t segment, panel; // first of up to four panels
  int32_t row, rows;      // within the segment
} task;

typedef struct wave {
  const ms_batch *batch;
  const ms_experts *experts;
  const ms_kernels *kernels;
  void (*tile)(const ms_tile *tile);
  bool dot;        // bf16 tokens, H and weights
  int64_t k_bytes; // of one k of a panel
  int32_t threads;
  float *scratch; // [threads][TASK_ROWS][64]

  int64_t begin, rows; // order[begin .. begin + rows)
  const void **input;  // [rows] rows of the first matrix's left side
  const void **middle; // [rows] rows of H
  float **output;      // [rows] where the slot goes
  float *weight;       // [rows]
  float *widened;      // [rows][D] when hidden is neither fp32 nor dotted
  char *h;             // [rows][h_stride] fp32, bf16 when dotted
  int64_t h_stride;    // elements
  int64_t h_size;      // bytes of one

  segment *segments;
  int64_t segment_count;
  task *tasks; // phase 1, then phase 2
  int64_t first_tasks, all_tasks;
} wave;

typedef struct weights { // the matrix of one task
  const char *panel;     // its first panel
  int64_t stride, K;
  int32_t panels;
} weights;

static weights task_weights(const wave *w, int64_t i) {
  const task *t = &w->tasks[i];
  const ms_slice *s = &w->experts->slices[w->segments[t->segment].expert];
  bool first = i < w->first_tasks;
  weights m = {.K = first ? w->batch->D : s->width};
  m.stride =
      first ? w->experts->in_panel_bytes : ms_panel_bytes(w->experts->spec.storage, s->width);
  m.panel = (first ? s->w_in : s->w_out) + t->panel * m.stride;
  int32_t left = (first ? s->in_panels : s->out_panels) - t->panel;
  m.panels = left < MS_TILE_PANELS ? left : MS_TILE_PANELS;
  return m;
}

static int64_t block_end(int64_t k0, int64_t K) { return k0 + K_BLOCK < K ? k0 + K_BLOCK : K; }

// acc = left rows x the task's panels, over all k.
static weights multiply(const wave *w, int64_t i, const void *const *left, float *acc) {
  weights m = task_weights(w, i), next = {0};
  if (i + w->threads < w->all_tasks) next = task_weights(w, i + w->threads);
  ms_tile tile = {
      .a = left, .rows = w->tasks[i].rows, .b_stride = m.stride, .panels = m.panels, .acc = acc};
  int64_t k0 = 0;
  do {
    tile.k0 = k0;
    tile.k1 = block_end(k0, m.K);
    tile.b = m.panel + k0 * w->k_bytes;
    tile.first = k0 == 0;
    bool last = tile.k1 == m.K;
    const weights *ahead = last ? &next : &m;
    int64_t from = last ? 0 : tile.k1;
    tile.ahead = ahead->panel ? ahead->panel + from * w->k_bytes : NULL;
    tile.ahead_stride = ahead->stride;
    tile.ahead_panels = ahead->panels;
    tile.ahead_bytes = (block_end(from, ahead->K) - from) * w->k_bytes;
    w->tile(&tile);
    k0 = tile.k1;
  } while (k0 < m.K);
  return m;
}

static const float *from(const float *x, int64_t column) { return x ? x + column : NULL; }

static void run_first(void *context, int64_t i, int32_t thread) {
  const wave *w = context;
  const task *t = &w->tasks[i];
  const segment *s = &w->segments[t->segment];
  const ms_experts_spec *spec = &w->experts->spec;
  const ms_slice *slice = &w->experts->slices[s->expert];
  float *acc = w->scratch + (int64_t)thread * TASK_ROWS * ACC_STRIDE;
  int64_t row = s->base + t->row;
  weights m = multiply(w, i, w->input + row, acc);
  int64_t column = (int64_t)t->panel * MS_PANEL, to = spec->gated ? column / 2 : column;
  (w->dot ? w->kernels->activate_bf16 : w->kernels->activate)(
      spec->activation, spec->gated, acc, from(slice->scale_in, column), from(slice->b_in, column),
      t->rows, m.panels, w->h + (row * w->h_stride + to) * w->h_size, w->h_stride);
}

static void run_second(void *context, int64_t unit, int32_t thread) {
  const wave *w = context;
  int64_t i = w->first_tasks + unit;
  const task *t = &w->tasks[i];
  const segment *s = &w->segments[t->segment];
  const ms_slice *slice = &w->experts->slices[s->expert];
  float *acc = w->scratch + (int64_t)thread * TASK_ROWS * ACC_STRIDE;
  int64_t row = s->base + t->row, column = (int64_t)t->panel * MS_PANEL;
  weights m = multiply(w, i, w->middle + row, acc);
  int64_t columns =
      w->batch->D - column < m.panels * MS_PANEL ? w->batch->D - column : m.panels * MS_PANEL;
  float *to[TASK_ROWS];
  for (int32_t r = 0; r < t->rows; r++) to[r] = w->output[row + r] + column;
  w->kernels->scatter(acc, from(slice->scale_out, column), from(slice->b_out, column),
                      w->weight + row, t->rows, columns, to);
}

// 16-bit tokens are widened once a wave: every column of the first matrix reads them.
static void run_widen(void *context, int64_t i, int32_t thread) {
  const wave *w = context;
  const ms_batch *b = w->batch;
  (void)thread;
  const void *from = b->row[b->order[w->begin + i] / b->K];
  float *to = w->widened + i * b->D;
  if (b->dtype == MS_BF16)
    w->kernels->widen_bf16(from, to, b->D);
  else
    w->kernels->widen_f16(from, to, b->D);
}

static int64_t cut(int64_t n, int64_t most) {
  return (n + most - 1) / most;
} // pieces of at most `most`

// Tasks of one phase for one segment: by panels, then by rows, so that neighbours share weights.
static int64_t add_tasks(task *tasks, int32_t segment_index, int64_t rows, int32_t panels) {
  int64_t n = 0, pieces = cut(rows, TASK_ROWS);
  for (int32_t panel = 0; panel < panels; panel += MS_TILE_PANELS)
    for (int64_t piece = 0; piece < pieces; piece++, n++)
      if (tasks) {
        int64_t row = rows * piece / pieces;
        tasks[n] = (task){segment_index, panel, (int32_t)row,
                          (int32_t)(rows * (piece + 1) / pieces - row)};
      }
  return n;
}

static int64_t add_phase(const wave *w, task *tasks, bool first) {
  int64_t n = 0;
  for (int64_t i = 0; i < w->segment_count; i++) {
    const ms_slice *s = &w->experts->slices[w->segments[i].expert];
    n += add_tasks(tasks ? tasks + n : NULL, (int32_t)i, w->segments[i].rows,
                   first ? s->in_panels : s->out_panels);
  }
  return n;
}

// Take the next rows of the sorted slots: whole experts while they fit, a large expert in near-equal pieces.
// `expert` and `begin` move on. Returns false when nothing is left.
static bool next_wave(wave *w, int32_t *expert) {
  const int64_t *offset = w->batch->offset;
  int64_t at = w->begin += w->rows;
  w->rows = w->segment_count = 0;
  for (; *expert < w->batch->E; ++*expert) {
    int64_t left = offset[*expert + 1] - at;
    if (!left) continue;
    int64_t rows = cut(left, cut(left, WAVE_ROWS));
    if (w->rows && w->rows + rows > WAVE_ROWS) break;
    w->segments[w->segment_count++] = (segment){*expert, w->rows, rows};
    w->rows += rows;
    at += rows;
    if (rows < left) break;
  }
  return w->rows > 0;
}

static void point_rows(wave *w) {
  const ms_batch *b = w->batch;
  for (int64_t i = 0; i < w->rows; i++) {
    int64_t slot = b->order[w->begin + i];
    w->input[i] = w->widened ? w->widened + i * b->D : b->row[slot / b->K];
    w->middle[i] = w->h + i * w->h_stride * w->h_size;
    w->output[i] = b->slot + slot * b->D;
    w->weight[i] = b->all_weight[slot];
  }
}

static ms_status reserve(wave *w, ms_batch *batch, ms_error *err) {
  struct ms_batch_memory *memory = batch->memory;
  int64_t slots = batch->offset[batch->E];
  int64_t rows = slots < WAVE_ROWS ? slots : WAVE_ROWS;
  int64_t widest = 0;
  for (int32_t e = 0; e < batch->E; e++)
    if (w->experts->slices[e].width > widest) widest = w->experts->slices[e].width;
  // A row of H is a few lines longer than needed: a power of two would map all rows to the same cache sets.
  w->h_size = ms_dtype_size(w->dot ? MS_BF16 : MS_F32);
  w->h_stride = cut(widest, MS_PANEL) * MS_PANEL + LINE / w->h_size;

  // input, middle, output, weight and the segments share one buffer.
  int64_t pointers = rows * (int64_t)sizeof(void *);
  int64_t segments = (rows < batch->E ? rows : batch->E) * (int64_t)sizeof(segment);
  MS_TRY(ms_buffer_grow(&memory->input, 3 * pointers + segments + rows * (int64_t)sizeof(float),
                        "row pointers", err));
  char *at = memory->input.data;
  w->input = (const void **)at;
  w->middle = (const void **)(at + pointers);
  w->output = (float **)(at + 2 * pointers);
  w->segments = (segment *)(at + 3 * pointers);
  w->weight = (float *)(at + 3 * pointers + segments);

  bool widen = batch->dtype != MS_F32 && !w->dot;
  int64_t h_bytes = rows * w->h_stride * w->h_size;
  int64_t widened_bytes = widen ? rows * batch->D * (int64_t)sizeof(float) : 0;
  MS_TRY(ms_buffer_grow(&memory->hidden, h_bytes + widened_bytes, "ffn rows", err));
  w->h = memory->hidden.data;
  w->widened = widen ? (float *)(w->h + h_bytes) : NULL;
  MS_TRY(ms_buffer_grow(&memory->scratch,
                        w->threads * (int64_t)(TASK_ROWS * ACC_STRIDE * sizeof(float)),
                        "accumulators", err));
  w->scratch = memory->scratch.data;

  batch->slot = batch->partial;
  if (batch->K > 1) {
    MS_TRY(ms_buffer_grow(&memory->slot, batch->N * batch->K * batch->D * (int64_t)sizeof(float),
                          "slots", err));
    batch->slot = memory->slot.data;
  }
  return MS_OK;
}

static ms_status plan_tasks(wave *w, ms_batch *batch, ms_error *err) {
  int64_t first = add_phase(w, NULL, true), second = add_phase(w, NULL, false);
  MS_TRY(ms_buffer_grow(&batch->memory->tasks, (first + second) * (int64_t)sizeof(task), "tasks",
                        err));
  w->tasks = batch->memory->tasks.data;
  w->first_tasks = add_phase(w, w->tasks, true);
  w->all_tasks = first + add_phase(w, w->tasks + first, false);
  return MS_OK;
}

ms_status ms_ffn(ms_batch *batch, const ms_experts *experts, ms_threads *threads, ms_error *err) {
  const ms_experts_spec *spec = &experts->spec;
  if (spec->E != batch->E || spec->D != batch->D)
    return ms_fail(err, MS_ESHAPE,
                   "experts: got num_experts=%d, d_model=%lld, expected %d, %lld as routed",
                   spec->E, (long long)spec->D, batch->E, (long long)batch->D);
  const ms_kernels *kernels = ms_kernels_get();
  bool dot = kernels->tile_dot && batch->dtype == MS_BF16 && spec->storage == MS_BF16;
  wave w = {.batch = batch,
            .experts = experts,
            .kernels = kernels,
            .tile = dot ? kernels->tile_dot : kernels->tile[spec->storage],
            .dot = dot,
            .k_bytes = MS_PANEL * ms_dtype_size(spec->storage),
            .threads = ms_threads_count(threads)};
  MS_TRY(reserve(&w, batch, err));
  int32_t expert = 0;
  while (next_wave(&w, &expert)) {
    MS_TRY(plan_tasks(&w, batch, err));
    point_rows(&w);
    if (w.widened) ms_threads_run(threads, w.rows, run_widen, &w);
    ms_threads_run(threads, w.first_tasks, run_first, &w);
    ms_threads_run(threads, w.all_tasks - w.first_tasks, run_second, &w);
  }
  return MS_OK;
}
