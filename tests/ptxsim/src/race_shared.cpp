// SPDX-License-Identifier: Apache-2.0
// race_shared.cpp - races on shared memory, by vector clocks. Each warp has a clock that ticks at
// synchronisation; each byte remembers its last writer and last two readers. An access conflicts
// with an earlier one of another warp that no barrier, mbarrier or release/acquire pair put before
// it, and with one of another lane of the same warp since the last __syncwarp. Also: what the async
// proxy may read.
#include "sim.h"

namespace ptx {

void joinClock(Clock& into, const Clock& other, int except) {
  if (into.size() < other.size())
    into.resize(other.size());
  for (size_t k = 0; k < other.size(); k++)
    if ((int)k != except)
      into[k] = std::max(into[k], other[k]);
}

void Warp::learn(const Clock& from, const Clock& fromProxy) {
  joinClock(clock, from, id);
  joinClock(proxyClock, fromProxy);
}

namespace {

constexpr uint32_t MAX_TIME = (1u << 19) - 1; // later accesses go unchecked
constexpr int SEVERAL = 32;                   // the lane of an access by several lanes

// A shadow entry: time 19 bits, warp 5, lane 6, strong 1, in flight 1; 0 is "never".
struct Tag {
  uint32_t bits;
  Tag(uint32_t b) : bits(b) {}
  Tag(uint32_t time, int warp, int lane, bool strong, bool inFlight)
      : bits(time << 13 | (uint32_t)warp << 8 | (uint32_t)lane << 2 | strong << 1 | inFlight) {}
  uint32_t time() const { return bits >> 13; }
  int warp() const { return bits >> 8 & 31; }
  int lane() const { return bits >> 2 & 63; }
  bool strong() const { return bits & 2; }
  bool inFlight() const { return bits & 1; }
};

bool conflicts(const Warp& w, Tag t, int lane, bool strong, bool bothWrite) {
  if (!t.bits)
    return false;
  if (t.inFlight())
    return true;
  if (strong && t.strong())
    return false;
  if (t.warp() == w.id) // lanes writing in one instruction are PTX's "one of them wins"
    return Options::get().warpRace && !bothWrite && t.lane() != lane && t.time() >= w.clock[w.id];
  return t.time() > w.clock[t.warp()];
}

[[noreturn]] void report(const Warp& w, const Instr& in, int lane, uint32_t off, Tag t,
                         const char* kind) {
  std::string who = t.lane() < SEVERAL ? strf(" lane %d", t.lane()) : "";
  const char* why = t.inFlight()       ? "; a cp.async to it has not been waited for"
                    : t.warp() == w.id ? " (same warp, no __syncwarp)"
                                       : "";
  w.error(in, lane & 31,
          strf("shared-memory race (%s) at offset %u: conflicts with warp %d%s and nothing orders "
               "the two%s",
               kind, off, t.warp(), who.c_str(), why));
}

void rememberRead(uint32_t& latest, uint32_t& older, Tag t) {
  Tag r = latest;
  if (r.bits == t.bits)
    return;
  if (r.bits && r.warp() == t.warp()) {
    latest =
        r.time() == t.time() ? Tag(t.time(), t.warp(), SEVERAL, t.strong(), false).bits : t.bits;
    return;
  }
  older = latest;
  latest = t.bits;
}

} // namespace

// data: what a write stores; writing the value that is there already is no race.
void Warp::checkShared(const Instr& in, uint32_t off, int n, int lane, bool write, bool strong,
                       const void* data, bool inFlight) {
  Block& b = *block;
  if (write && !b.shWgmmaReads.empty())
    for (uint32_t k = off / 16; k <= (off + n - 1) / 16; k++)
      if (b.shWgmmaReads[k])
        error(in, lane & 31,
              strf("write to shared offset %u, which a wgmma that has not been waited for reads",
                   off));
  if (b.shWriter.empty() || clock[id] >= MAX_TIME)
    return;
  Tag tag(clock[id], id, lane, strong, inFlight);
  uint32_t *writer = &b.shWriter[off], *reader = &b.shReader[off], *reader2 = &b.shReader2[off];
  for (int i = 0; i < n; i++) {
    bool checked = i && !write && writer[i] == writer[i - 1];
    if (!checked && conflicts(*this, writer[i], lane, strong, write)) {
      bool sameValue = write && data && !Tag(writer[i]).inFlight() &&
                       b.smem[off + i] == ((const uint8_t*)data)[i];
      if (!sameValue)
        report(*this, in, lane, off, writer[i], write ? "write after write" : "read after write");
    }
    if (!write) {
      rememberRead(reader[i], reader2[i], tag);
      continue;
    }
    for (uint32_t r : {reader[i], reader2[i]})
      if (conflicts(*this, r, lane, strong, false))
        report(*this, in, lane, off, r, "write after read");
    writer[i] = tag.bits;
    reader[i] = reader2[i] = 0;
  }
}

// wgmma and bulk stores read shared memory through the async proxy. A generic write before them
// needs a fence.proxy.async on the way (PTX ISA 8.10 "proxy-preserved base causality order"): by
// the writer before the synchronisation, or by the reader after it.
void Warp::checkProxy(const Instr& in, uint32_t off, int n, int lane) {
  Block& b = *block;
  if (b.shWriter.empty())
    return;
  for (int i = 0; i < n; i++) {
    Tag t = b.shWriter[off + i];
    if (t.bits && (t.warp() >= (int)proxyClock.size() || t.time() > proxyClock[t.warp()]))
      error(in, lane & 31,
            strf("shared offset %u was written by ordinary stores of warp %d and is read through "
                 "the async proxy "
                 "with no fence.proxy.async between",
                 off + i, t.warp()));
  }
}

void Warp::acquire(uint64_t key, bool shared) {
  if (!shared) {
    auto it = launch->published.find(key);
    if (it != launch->published.end())
      joinForeign(foreign, it->second);
  }
  auto it = block->published.find(key);
  if (it != block->published.end())
    joinClock(clock, it->second, id);
}

// A strong store or atomic publishes what came before it if it has release semantics itself, or if
// a fence came before it: for shared memory since the last barrier, for global memory since the
// last global store (fences are cumulative, so that one thread's fence after a barrier covers the
// block's stores).
void Warp::release(uint64_t key, bool shared, bool explicitRelease) {
  if (!explicitRelease && (shared ? !fenced : unfencedStore))
    return;
  if (explicitRelease || fenced)
    joinClock(block->published[key], clock);
  if (!shared) {
    auto mine = std::make_shared<ForeignMap>();
    (*mine)[block->linear] = std::make_shared<const Clock>(clock);
    ForeignClocks all = mine;
    joinForeign(all, foreign);
    joinForeign(launch->published[key], all);
  }
  tick();
}

} // namespace ptx
