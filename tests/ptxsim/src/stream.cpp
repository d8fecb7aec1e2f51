// SPDX-License-Identifier: Apache-2.0
// stream.cpp - see stream.h.
#include "stream.h"
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <unistd.h>

namespace ptx {

Runtime& Runtime::get() {
  static Runtime* r = new Runtime;
  return *r;
}
Runtime::Runtime() {
  const char* s;
  if ((s = getenv("PTXSIM_DEVICES")))
    devices = std::max(0, std::min(63, atoi(s)));
  if ((s = getenv("PTXSIM_SM")))
    sm = atoi(s);
  rng = Rng(Options::get().seed * 31 + 5);
  pid_ = getpid();
  for (int d = 0; d < std::max(1, devices); d++) {
    auto st = std::make_unique<Stream>();
    st->device = d;
    st->legacy = true;
    st->id = nextStreamId++;
    streams.push_back(std::move(st));
  }
}
Stream* Runtime::create(int dev, bool blocking, int prio) {
  auto s = std::make_unique<Stream>();
  s->device = dev;
  s->blocking = blocking;
  s->prio = prio;
  s->id = nextStreamId++;
  s->schedPrio = (int)rng.below(1000);
  streams.push_back(std::move(s));
  return streams.back().get();
}
void Runtime::destroy(Stream* s) {
  s->dead = true;
} // queued work still completes
bool Runtime::canRun(Stream* s) {
  if (s->q.empty() || s->busy)
    return false;
  uint64_t n = s->q.front().seq;
  if (s->legacy) {
    for (auto& o : streams)
      if (o->device == s->device && o->blocking && o.get() != s && !o->q.empty() &&
          o->q.front().seq < n)
        return false;
  } else if (s->blocking) {
    Stream* l = legacy(s->device);
    if (!l->q.empty() && l->q.front().seq < n)
      return false;
  }
  return true;
}
void Runtime::fail(const SimError& e) {
  fprintf(stderr, "ptxsim ERROR: %s\n", e.what());
  fflush(stderr);
  if (!sticky) {
    sticky = e.code;
    stickyMsg = e.what();
  }
  if (Options::get().abortOnError)
    _exit(97);
}
// Everything that precedes the operation: its stream, what the host had waited for, and the legacy
// stream's rules (it waits for all blocking streams of the device, and they for it).
void Runtime::begin(Stream* s, Stream::Op& op) {
  running_ = s;
  if (!op.order) {
    op.order = OpOrder::get().add(s->timeline, s->finished + 1, op.what);
    joinOps(s->clock, op.host);
    if (s->legacy) {
      for (auto& o : streams)
        if (o->device == s->device && o->blocking)
          joinOps(s->clock, o->clock);
    } else if (s->blocking)
      joinOps(s->clock, legacy(s->device)->clock);
  }
  OpOrder::get().enter(op.order, &s->clock);
}
bool Runtime::pumpOne() {
  std::vector<Stream*> c;
  for (auto& s : streams)
    if (canRun(s.get()))
      c.push_back(s.get());
  bool skew = Options::get().sched == Options::SKEW ||
              (Options::get().sched == Options::EITHER && Options::get().seed % 2);
  if (skew && rng.below(16) == 0)
    for (auto& s : streams)
      s->schedPrio = (int)rng.below(1000);
  while (!c.empty()) {
    size_t k = 0;
    if (skew) {
      for (size_t i = 1; i < c.size(); i++)
        if (c[i]->schedPrio > c[k]->schedPrio)
          k = i;
    } else
      k = rng.below((uint32_t)c.size());
    Stream* s = c[k];
    c.erase(c.begin() + k);
    s->busy = true;
    bool done = true;
    begin(s, s->q.front());
    if (!sticky) {
      OpFn fn = s->q.front().fn;
      try {
        done = fn();
      } catch (const SimError& e) {
        fail(e);
      }
    }
    OpOrder::get().leave();
    running_ = nullptr;
    s->busy = false;
    if (done) {
      if (Options::get().trace)
        fprintf(stderr, "ptxsim: stream %llu done: %s\n", (unsigned long long)s->id,
                s->q.front().what.c_str());
      s->q.pop_front();
      s->clock[s->timeline] = ++s->finished;
      if (s->dead && s->q.empty())
        for (size_t i = 0; i < streams.size(); i++)
          if (streams[i].get() == s) {
            streams.erase(streams.begin() + i);
            break;
          }
      return true;
    }
  }
  return false;
}
int Runtime::enqueue(Stream* s, const std::string& what, OpMake make, int type) {
  std::lock_guard<Lock> g(mu);
  if (s->cap) {
    if (s->cap->invalid)
      return 901;
    auto& gr = *s->cap->g;
    gr.n.push_back({make, s->capLast, what, type});
    s->capLast = {(int)gr.n.size() - 1};
    return 0;
  }
  if (s->legacy)
    for (auto& o : streams)
      if (o->cap && o->blocking && o->device == s->device) {
        invalidateCaptures();
        return 906;
      }
  s->q.push_back({make(), ++seq, what, host_});
  lastApi = now();
  startBackground();
  const char* m = getenv("PTXSIM_LAUNCH");
  if (m && *m == 'e') {
    while (pumpOne()) {}
  } else if (!(m && *m == 'l'))
    while (rng.below(2))
      if (!pumpOne())
        break;
  return sticky;
}
std::string Runtime::dump() {
  std::string s;
  for (auto& st : streams)
    if (!st->q.empty())
      s += strf("\n    device %d stream %llu: %zu queued, head: %s", st->device,
                (unsigned long long)st->id, st->q.size(), st->q.front().what.c_str());
  return s;
}
int Runtime::wait(const std::function<bool()>& done, const char* what) {
  const char* t = getenv("PTXSIM_WAIT_TIMEOUT");
  double limit = t ? atof(t) : 120, t0 = now();
  std::unique_lock<Lock> g(mu);
  while (!done()) {
    lastApi = now();
    if (pumpOne()) {
      t0 = now();
      continue;
    }
    if (sticky)
      break;
    if (now() - t0 > limit) {
      fail(SimError(
          strf("%s: nothing can move for %.0f s; stream heads:%s", what, limit, dump().c_str()),
          702));
      break;
    }
    int depth = mu.releaseAll();
    usleep(100);
    mu.restore(depth);
  }
  return sticky;
}
int Runtime::record(const std::shared_ptr<Event>& e, Stream* s) {
  std::lock_guard<Lock> g(mu);
  if (s->cap) {
    if (s->cap->invalid)
      return 901;
    e->cap = s->cap;
    e->capNodes = s->capLast;
    return 0;
  }
  e->cap = nullptr;
  uint64_t v = ++e->recorded;
  return enqueueFn(s, "event record", [this, e, v] {
    e->done = std::max(e->done, v);
    e->time = now();
    e->clock = running_->clock;
    return true;
  });
}
int Runtime::waitEvent(Stream* s, const std::shared_ptr<Event>& e) {
  std::lock_guard<Lock> g(mu);
  if (e->cap && !e->cap->invalid && e->cap->origin && e->cap->origin->cap == e->cap) {
    if (s->cap && s->cap != e->cap)
      return 905; // cudaErrorStreamCaptureMerge
    if (!s->cap) {
      if (s->legacy)
        return 906;
      s->cap = e->cap;
      s->capLast.clear();
      e->cap->streams.insert(s);
    }
    for (int n : e->capNodes)
      s->capLast.push_back(n);
    return 0;
  }
  if (s->cap)
    return e->recorded ? 907 : 0; // event recorded outside the capture: isolation violated
  uint64_t v = e->recorded;
  if (!v)
    return 0;
  return enqueueFn(s, "wait for event", [this, e, v] {
    if (e->done < v)
      return false;
    streamSaw(e->clock);
    return true;
  });
}
int Runtime::waitStream(Stream* s) {
  std::lock_guard<Lock> g(mu);
  if (s->q.empty()) {
    hostSaw(s->clock);
    return sticky;
  }
  uint64_t n = s->q.back().seq;
  uint64_t id = s->id;
  return wait(
      [this, id, n] {
        for (auto& x : streams)
          if (x->id == id) {
            if (!x->q.empty() && x->q.front().seq <= n)
              return false;
            hostSaw(x->clock);
          }
        return true;
      },
      "stream synchronize");
}
int Runtime::waitDevice(int dev) {
  uint64_t n = seq;
  return wait(
      [this, n, dev] {
        for (auto& x : streams)
          if (x->device == dev && !x->q.empty() && x->q.front().seq <= n)
            return false;
        for (auto& x : streams)
          if (x->device == dev)
            hostSaw(x->clock);
        return true;
      },
      "device synchronize");
}
bool Runtime::anyGlobalCapture() {
  for (auto& s : streams)
    if (s->cap && s->cap->mode != 2)
      return true;
  return false;
}
void Runtime::invalidateCaptures() {
  for (auto& s : streams)
    if (s->cap)
      s->cap->invalid = true;
}
// The nodes of a graph run in any order that its edges allow, each on a timeline of its own; when
// the graph has finished they count as part of the launching stream's operation.
OpFn Runtime::graphOp(const std::shared_ptr<Graph>& g) {
  struct Node {
    OpFn fn;
    bool done = false;
    uint32_t timeline = 0, order = 0;
    OpClock clock;
  };
  struct State {
    std::shared_ptr<Graph> g;
    std::vector<Node> nodes;
    size_t left;
  };
  auto st = std::make_shared<State>();
  st->g = g;
  st->left = g->n.size();
  for (auto& n : g->n) {
    st->nodes.emplace_back();
    st->nodes.back().fn = n.make();
  }
  auto runNode = [this, st](int i) {
    Node& n = st->nodes[i];
    if (!n.order) {
      n.timeline = OpOrder::get().newTimeline();
      n.order = OpOrder::get().add(n.timeline, 1, st->g->n[i].what);
      n.clock = running_->clock;
      for (int d : st->g->n[i].deps) {
        joinOps(n.clock, st->nodes[d].clock);
        n.clock[st->nodes[d].timeline] = 1;
      }
    }
    uint32_t whole = OpOrder::get().current();
    OpOrder::get().enter(n.order, &n.clock);
    bool done = n.fn();
    OpOrder::get().enter(whole, &running_->clock);
    return done;
  };
  return [this, st, runNode]() -> bool {
    std::vector<int> ready;
    for (size_t i = 0; i < st->nodes.size(); i++) {
      if (st->nodes[i].done)
        continue;
      bool ok = true;
      for (int d : st->g->n[i].deps)
        ok &= st->nodes[d].done;
      if (ok)
        ready.push_back((int)i);
    }
    while (!ready.empty()) {
      size_t k = rng.below((uint32_t)ready.size());
      int i = ready[k];
      ready.erase(ready.begin() + k);
      if (!runNode(i))
        continue;
      st->nodes[i].done = true;
      st->left--;
      break;
    }
    if (st->left)
      return false;
    for (auto& n : st->nodes)
      if (n.order)
        OpOrder::get().moveTo(n.order, running_->timeline, running_->finished + 1);
    return true;
  };
}
// A host that never calls in again (it waits for another process, say) must not stop the "GPU":
// after 20 ms without API calls a helper thread moves the queues.
void Runtime::startBackground() {
  if (bg_ && pid_ == getpid())
    return;
  bg_ = true;
  pid_ = getpid();
  const char* s = getenv("PTXSIM_BG");
  if (s && !atoi(s))
    return;
  std::thread([this] {
    for (;;) {
      usleep(2000);
      std::unique_lock<Lock> g(mu, std::try_to_lock);
      if (!g)
        continue;
      if (now() - lastApi < 0.02)
        continue;
      for (int i = 0; i < 64 && pumpOne(); i++) {}
    }
  }).detach();
}

} // namespace ptx
