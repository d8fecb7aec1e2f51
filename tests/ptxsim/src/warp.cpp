// SPDX-License-Identifier: Apache-2.0
// warp.cpp - one warp: choice of the next group of lanes, divergence, and the meeting of lanes in
// collectives. Divergent lanes have their own pc; the group that is deepest in calls and lowest in
// pc runs until it meets others, which is where a compiler's reconvergence points are.
#include "coverage.h"
#include "sim.h"

namespace ptx {

std::string Warp::where(int lane) const {
  uint32_t t = tidLinear(lane);
  const uint32_t* dim = launch->blockDim;
  return strf("kernel %s block (%u,%u,%u) thread (%u,%u,%u) [warp %d lane %d]",
              launch->fn->name.c_str(), block->cta[0], block->cta[1], block->cta[2], t % dim[0],
              t / dim[0] % dim[1], t / dim[0] / dim[1], id, lane);
}

void Warp::error(const Instr& in, int lane, const std::string& msg, int code) const {
  std::string source = in.raw ? sourceLine(*launch->mod, *in.raw) : "";
  throw SimError(strf("%s\n    at %s\n    PTX line %d of %s: %s%s", msg.c_str(),
                      where(lane).c_str(), in.raw ? in.raw->line : 0, launch->mod->source.c_str(),
                      in.raw ? in.raw->text.c_str() : "?", source.c_str()),
                 code);
}

void Warp::init(Block* b, int warpId) {
  block = b;
  launch = b->launch;
  id = warpId;
  int n = b->nthreads - warpId * 32;
  exists = alive = n >= 32 ? ~0u : (1u << n) - 1;
  waitBar = waitColl = 0;
  valid = fenced = unfencedStore = false;
  cc = 0;
  starve = yields = 0;
  polls = vainPolls = 0;
  lastRange = nullptr;
  foreign = nullptr;
  wgmma = nullptr;
  bool reusable = frames[0] && frames[0].use_count() == 32 && frames[0]->fn == launch->fn;
  auto frame = reusable ? frames[0] : std::make_shared<Frame>();
  frame->fn = launch->fn;
  frame->regs.assign((size_t)launch->fn->regs() * 32, 0xBAD0BAD0BAD0BAD0ull);
  frame->paramMem.assign((size_t)launch->fn->frameParamBytes * 32, 0xFF);
  for (int lane = 0; lane < 32; lane++) {
    pc[lane] = 0;
    frames[lane] = frame;
    copies[lane].clear();
    copiesCommitted[lane] = 0;
    local[lane].clear();
  }
  clock.assign((b->nthreads + 31) / 32, 0);
  proxyClock = clock;
  clock[id] = 1;
}

void Warp::flush() {
  if (!valid)
    return;
  forEachLane(mask, [&](int lane) { pc[lane] = groupPc; });
  valid = false;
}

// Chooses the group to run. After long divergence a random lane's group gets a turn, so that lanes
// spinning on a flag cannot starve the lanes that would set it.
bool Warp::select() {
  uint32_t ready = alive & ~(waitBar | waitColl);
  if (!ready)
    return false;
  int best = -1;
  if (++starve > 20000) {
    starve = 0;
    uint32_t rest = ready;
    for (int n = (int)launch->rng.below(__builtin_popcount(ready)); n; n--)
      rest &= rest - 1;
    best = firstLane(rest);
  } else
    forEachLane(ready, [&](int lane) {
      int depth = frames[lane]->depth, bestDepth = best < 0 ? -1 : frames[best]->depth;
      if (depth > bestDepth || (depth == bestDepth && pc[lane] < pc[best]))
        best = lane;
    });
  f = frames[best].get();
  groupPc = pc[best];
  mask = 0;
  limit = ~0u;
  forEachLane(ready, [&](int lane) {
    if (frames[lane].get() != f)
      return;
    if (pc[lane] == groupPc)
      mask |= 1u << lane;
    else if (pc[lane] > groupPc)
      limit = std::min(limit, pc[lane]);
  });
  regBase = f->regs.data();
  constBase = f->fn->constCols.data();
  valid = true;
  if (mask == ready)
    starve = 0;
  return true;
}

void Warp::run(int quantum) {
  Counters& counters = launch->c;
  const bool coverage = coverageOn();
  while (quantum > 0) {
    if (!valid && !select())
      return;
    const Instr* code = f->fn->code.data();
    for (;;) {
      const Instr& in = code[groupPc];
      uint32_t lanes = mask;
      if (in.guard >= 0) {
        uint32_t p = (uint32_t)regBase[(size_t)in.guard * 32];
        lanes &= in.guardNegated ? ~p : p;
      }
      counters.warpInstr++;
      counters.threadInstr += __builtin_popcount(lanes);
      quantum--;
      if (coverage && lanes)
        coverageHit(*launch->mod, *in.raw);
      if (wgmma && lanes)
        trackRegisters(*this, in, lanes);
      if (in.control == CTL_NONE) {
        if (lanes)
          in.exec(*this, in, lanes);
        groupPc++;
      } else if (control(in, lanes, quantum)) {
        flush();
        break;
      }
      if (groupPc >= limit) {
        flush();
        break;
      }
      if (quantum <= 0)
        return;
    }
  }
}

// Executes a control instruction; true if the group may have changed.
bool Warp::control(const Instr& in, uint32_t lanes, int& quantum) {
  if (in.control == CTL_BRA)
    return branch(in, lanes);
  if (in.control == CTL_COLL && lanes) {
    collective(in, lanes);
    return !valid;
  }
  if (!lanes || in.control == CTL_COLL) {
    groupPc++;
    return false;
  }
  switch (in.control) {
    case CTL_BRX: branchIndexed(in, lanes); break;
    case CTL_CALL: call(in, lanes); break;
    case CTL_RET:
    case CTL_EXIT:
      groupPc++;
      flush();
      if (in.control == CTL_RET && f->caller)
        ret(lanes);
      else
        exit(lanes);
      break;
    case CTL_BAR:
      groupPc++;
      flush();
      block->barArrive(*this, in, lanes);
      break;
    case CTL_POLL:
      in.exec(*this, in, lanes);
      groupPc++;
      if (polls) {
        yields++;
        quantum = 0;
      }
      return false;
    default: // CTL_YIELD
      groupPc++;
      yields++;
      quantum = 0;
      return false;
  }
  return true;
}

// Counts only when no other lanes of the warp can run.
void Warp::polled(const Instr& in, uint64_t found, bool fixed) {
  bool again = fixed && pollIn == &in && pollFound == found &&
               mask == (alive & ~(waitBar | waitColl));
  polls = again ? polls + 1 : 0;
  vainPolls = again && pollAt == launch->progress ? vainPolls + 1 : 0;
  pollIn = &in;
  pollFound = found;
  pollAt = launch->progress;
}

bool Warp::branch(const Instr& in, uint32_t lanes) {
  if (!lanes) {
    groupPc++;
    return false;
  }
  if (lanes == mask) {
    bool spinning = (uint32_t)in.target <= groupPc && mask != (alive & ~(waitBar | waitColl));
    if (spinning)
      starve += 8;
    groupPc = in.target;
    return spinning;
  }
  groupPc++;
  flush();
  forEachLane(lanes, [&](int lane) { pc[lane] = in.target; });
  return true;
}

void Warp::branchIndexed(const Instr& in, uint32_t lanes) {
  const uint64_t* index = src(in.src[0]);
  groupPc++;
  flush();
  forEachLane(lanes, [&](int lane) {
    uint32_t i = (uint32_t)index[lane];
    if (i >= in.table.size())
      error(in, lane, "brx index out of range");
    pc[lane] = in.table[i];
  });
}

void Warp::exit(uint32_t lanes) {
  forEachLane(lanes, [&](int lane) {
    if (!copies[lane].empty())
      error(*copies[lane].front().in, lane,
            strf("thread exits with %zu cp.async not waited for", copies[lane].size()));
  });
  if (Options::get().strictExit)
    forEachLane(waitColl, [&](int lane) {
      if (collMask[lane] & lanes)
        error(frames[lane]->fn->code[pc[lane]], lane,
              strf("lanes 0x%08x exit without executing a collective whose member mask 0x%08x "
                   "names them",
                   lanes & collMask[lane], collMask[lane]));
    });
  if (wgmma)
    wgmmaAtExit(*this, frames[firstLane(lanes)]->fn->code[pc[firstLane(lanes)] - 1]);
  launch->progress++;
  alive &= ~lanes;
  waitColl = 0; // let waiting collectives look again
  block->onExit();
}

// ------------------------------------------------------------------ collectives
// The lanes of `todo` that name the same member mask as its first lane.
uint32_t Warp::collectiveGroup(const Instr& in, uint32_t todo, uint32_t* members) {
  *members = ~0u;
  if (in.memberMask == NOCOL) { // ldmatrix, mma, ...: all 32 lanes
    if (alive != ~0u)
      error(in, firstLane(exists != ~0u ? todo : ~alive),
            strf("warp-wide instruction with %d of 32 lanes present", __builtin_popcount(alive)));
    return todo;
  }
  const uint64_t* masks = src(in.memberMask);
  uint32_t m = *members = (uint32_t)masks[firstLane(todo)], same = 0;
  forEachLane(todo, [&](int lane) { same |= (uint32_t)((uint32_t)masks[lane] == m) << lane; });
  if (same & ~m)
    error(in, firstLane(same & ~m),
          strf("lane executes a collective whose member mask 0x%08x does not name it", m));
  if (Options::get().strictExit && (m & exists & ~alive))
    error(in, firstLane(same),
          strf("collective with member mask 0x%08x names lanes 0x%08x that have exited", m,
               m & exists & ~alive));
  return same;
}

// A collective executes when every live lane named by the mask has arrived; earlier lanes wait.
// Lanes must meet at the same instruction, but any bar.warp.sync matches any other (PTX
// ISA 9.7.13.2).
void Warp::collective(const Instr& in, uint32_t lanes) {
  uint32_t group = mask, at = groupPc, done = mask & ~lanes;
  bool blocked = false, wokeOthers = false, isBarWarp = in.raw->op == "bar";
  for (uint32_t todo = lanes; todo;) {
    uint32_t members, same = collectiveGroup(in, todo, &members), arrived = same,
                      need = members & alive;
    todo &= ~same;
    forEachLane(waitColl & members, [&](int lane) {
      const Instr& theirs = frames[lane]->fn->code[pc[lane]];
      bool here = isBarWarp ? theirs.raw->op == "bar" : frames[lane].get() == f && pc[lane] == at;
      if (here && collMask[lane] == members)
        arrived |= 1u << lane;
    });
    if ((arrived & need) == need) {
      in.exec(*this, in, arrived);
      uint32_t woken = arrived & waitColl;
      wokeOthers |= woken != 0;
      forEachLane(woken, [&](int lane) { pc[lane]++; });
      waitColl &= ~arrived;
      done |= same;
    } else {
      blocked = true;
      forEachLane(same, [&](int lane) {
        collMask[lane] = members;
        pc[lane] = at;
      });
      waitColl |= same;
    }
  }
  if (!blocked && !wokeOthers) {
    groupPc++;
    return;
  }
  valid = false;
  forEachLane(done & group, [&](int lane) { pc[lane] = at + 1; });
}

} // namespace ptx
