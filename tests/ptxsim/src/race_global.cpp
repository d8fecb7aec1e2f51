// SPDX-License-Identifier: Apache-2.0
// race_global.cpp - see race_global.h.
#include "race_global.h"
#include "sim.h"

namespace ptx {

void joinForeign(ForeignClocks& into, const ForeignClocks& other) {
  if (!other || into == other)
    return;
  if (!into) {
    into = other;
    return;
  }
  std::shared_ptr<ForeignMap> joined;
  for (auto& [block, theirs] : *other) {
    const ForeignMap& now = joined ? *joined : *into;
    auto it = now.find(block);
    if (it != now.end() && it->second == theirs)
      continue;
    std::shared_ptr<const Clock> result = theirs;
    if (it != now.end()) {
      auto both = std::make_shared<Clock>(*it->second);
      joinClock(*both, *theirs);
      if (*both == *it->second)
        continue;
      result = both;
    }
    if (!joined)
      joined = std::make_shared<ForeignMap>(*into);
    (*joined)[block] = result;
  }
  if (joined)
    into = joined;
}

// ------------------------------------------------------------------ order of operations
void joinOps(OpClock& into, const OpClock& other) {
  for (auto& [timeline, n] : other)
    into[timeline] = std::max(into[timeline], n);
}

OpOrder& OpOrder::get() {
  static OpOrder* o = new OpOrder;
  return *o;
}

uint32_t OpOrder::add(uint32_t timeline, uint64_t n, const std::string& what) {
  ops_.push_back({timeline, n, what});
  return (uint32_t)ops_.size() - 1;
}

void OpOrder::enter(uint32_t op, const OpClock* before) {
  current_ = op;
  before_ = before;
  lastOk_ = 0;
}

void OpOrder::moveTo(uint32_t op, uint32_t timeline, uint64_t n) {
  ops_[op].timeline = timeline;
  ops_[op].n = n;
}

bool OpOrder::precedes(uint32_t op) {
  if (op == 0 || op == current_ || op == lastOk_ || !current_)
    return true;
  auto it = before_->find(ops_[op].timeline);
  if (it == before_->end() || it->second < ops_[op].n)
    return false;
  lastOk_ = op;
  return true;
}

std::string OpOrder::name(uint32_t op) const {
  return ops_[op].what;
}

// ------------------------------------------------------------------ shadow memory
ShadowCells& ShadowPage::expand() {
  if (!cells) {
    cells = std::make_unique<ShadowCells>();
    std::fill_n(cells->writeOp, 1024, writeOp);
    std::fill_n(cells->readOp, 1024, readOp);
    std::fill_n(cells->readOp2, 1024, readOp2);
  }
  return *cells;
}

namespace {

constexpr uint32_t MAX_TIME = (1u << 20) - 1;
constexpr int SEVERAL = 32;

// Tag of an access inside an operation: block 24 bits, warp 5, lane 6, time 20, bytes of the word
// 4, strong 1, shared 1 (a reader: warps of several blocks have read the word).
struct Tag {
  uint64_t bits;
  Tag(uint64_t b = 0) : bits(b) {}
  Tag(uint32_t block, int warp, int lane, uint32_t time, int bytes, bool strong)
      : bits((uint64_t)(block & 0xffffff) << 40 | (uint64_t)warp << 35 | (uint64_t)lane << 29 |
             (uint64_t)time << 9 | (uint64_t)bytes << 5 | (uint64_t)strong << 4 | 1) {}
  uint32_t block() const { return bits >> 40; }
  int warp() const { return bits >> 35 & 31; }
  int lane() const { return bits >> 29 & 63; }
  uint32_t time() const { return bits >> 9 & MAX_TIME; }
  int bytes() const { return bits >> 5 & 15; }
  bool strong() const { return bits >> 4 & 1; }
  bool severalBlocks() const { return bits >> 3 & 1; }
  static constexpr uint64_t SEVERAL_BLOCKS = 8;
};

ShadowPage& pageOf(const Range& r, uint64_t a) {
  if (!r.shadow)
    r.shadow = std::make_shared<Shadow>();
  if (r.shadow->pages.empty())
    r.shadow->pages.resize((r.size + (r.base & 4095) + 4095) / 4096 + 1);
  return r.shadow->pages[(a - r.base / 4096 * 4096) / 4096];
}

std::string describe(const Launch& l, Tag t) {
  uint32_t b = t.block();
  return strf("block (%u,%u,%u) warp %d%s", b % l.grid[0], b / l.grid[0] % l.grid[1],
              b / l.grid[0] / l.grid[1], t.warp(),
              t.lane() < SEVERAL ? strf(" lane %d", t.lane()).c_str() : "");
}

[[noreturn]] void streamRace(uint64_t a, const char* kind, uint32_t other, const std::string& who) {
  OpOrder& o = OpOrder::get();
  throw SimError(strf(
      "race between streams (%s) at 0x%llx: \"%s\" and \"%s\" are ordered by no stream, event or "
      "synchronisation%s",
      kind, (unsigned long long)a, o.name(other).c_str(), o.name(o.current()).c_str(),
      who.c_str()));
}

// Did the access `t` of this launch happen before what the warp does now?
bool ordered(const Warp& w, Tag t, int lane, bool bothWrite) {
  if (t.block() != (w.block->linear & 0xffffff)) {
    if (!w.foreign)
      return false;
    auto it = w.foreign->find(t.block());
    return it != w.foreign->end() && t.warp() < (int)it->second->size() &&
           t.time() <= (*it->second)[t.warp()];
  }
  if (t.warp() != w.id)
    return t.time() <= w.clock[t.warp()];
  return bothWrite || t.lane() == lane || t.time() < w.clock[w.id] || !Options::get().warpRace;
}

struct Access {
  Warp& w;
  const Instr& in;
  int lane;
  bool write, strong;
  [[noreturn]] void race(uint64_t a, Tag t, const char* kind) const {
    w.error(in, lane & 31,
            strf("global-memory race (%s) at 0x%llx: conflicts with %s and nothing orders the two",
                 kind, (unsigned long long)a, describe(*w.launch, t).c_str()));
  }
};

// A read by others is kept in one tag; once blocks have mixed, it only says "some other block".
uint64_t joinReaders(Tag old, Tag t) {
  if (!old.bits || old.bits == t.bits)
    return t.bits;
  if (old.block() != t.block() || old.severalBlocks())
    return t.bits | Tag::SEVERAL_BLOCKS;
  bool sameStep = old.warp() == t.warp() && old.time() == t.time() && old.lane() != t.lane();
  return sameStep
             ? Tag(t.block(), t.warp(), SEVERAL, t.time(), old.bytes() | t.bytes(), t.strong()).bits
             : t.bits;
}

// A reader that the current operation is not ordered after is kept beside it.
void rememberReader(uint32_t& latest, uint32_t& unordered) {
  OpOrder& o = OpOrder::get();
  if (!o.precedes(latest))
    unordered = latest;
  latest = o.current();
}

void checkWord(const Access& x, ShadowCells& c, int i, uint64_t a, Tag t, bool sameValue) {
  OpOrder& o = OpOrder::get();
  uint32_t op = o.current();
  if (c.writeOp[i] != op) { // the last write was another operation's
    if (!o.precedes(c.writeOp[i]))
      streamRace(a, x.write ? "write after write" : "read after write", c.writeOp[i],
                 "\n    at " + x.w.where(x.lane & 31));
    c.writer[i] = 0;
  } else {
    Tag last = c.writer[i];
    bool overlap = last.bits && (last.bytes() & t.bytes()) && !(last.strong() && x.strong);
    if (overlap && !sameValue && !ordered(x.w, last, x.lane, x.write))
      x.race(a, last, x.write ? "write after write" : "read after write");
  }
  if (x.write && !o.precedes(c.readOp2[i]))
    streamRace(a, "write after read", c.readOp2[i], "\n    at " + x.w.where(x.lane & 31));
  if (c.readOp[i] != op) {
    if (x.write && !o.precedes(c.readOp[i]))
      streamRace(a, "write after read", c.readOp[i], "\n    at " + x.w.where(x.lane & 31));
    c.reader[i] = 0;
  } else if (x.write) {
    Tag last = c.reader[i];
    if (last.bits && (last.bytes() & t.bytes()) && !(last.strong() && x.strong)) {
      bool others = last.severalBlocks() && !x.w.foreign; // this block has met no other one yet
      if (others || !ordered(x.w, last, x.lane, false))
        x.race(a, last, "write after read");
    }
  }
  if (x.write) {
    c.writeOp[i] = op;
    c.writer[i] = t.bits;
    c.reader[i] = 0;
  } else {
    c.reader[i] = c.readOp[i] == op ? joinReaders(c.reader[i], t) : t.bits;
    rememberReader(c.readOp[i], c.readOp2[i]);
  }
}

} // namespace

// data: what a write stores; by default, writing the value that is there already is tolerated.
void Warp::checkGlobal(const Instr& in, uint64_t a, int n, int lane, bool write, bool strong,
                       const void* data) {
  if (write)
    unfencedStore |= !strong;
  int level = Options::get().globalRace;
  if (!level || clock[id] >= MAX_TIME || !OpOrder::get().current())
    return;
  const Range& r = *lastRange; // set by globalPtr just before
  Access x{*this, in, lane, write, strong};
  bool sameValue = write && data && level < 2 && !memcmp(r.sim(a), data, n);
  for (uint64_t word = a / 4 * 4; word < a + n; word += 4) {
    int first = word < a ? (int)(a - word) : 0, last = (int)std::min<uint64_t>(4, a + n - word);
    int bytes = ((1 << last) - 1) & ~((1 << first) - 1);
    ShadowCells& c = pageOf(r, word).expand();
    checkWord(x, c, (int)(word % 4096 / 4), word,
              Tag(block->linear, id, lane, clock[id], bytes, strong), sameValue);
  }
}

void touchRange(uint64_t addr, size_t bytes, bool write) {
  OpOrder& o = OpOrder::get();
  const Range* r = DevMem::get().find(addr);
  if (!r || !bytes || !o.current() || !Options::get().globalRace)
    return;
  auto check = [&](uint64_t a, uint32_t& writeOp, uint32_t& readOp, uint32_t& readOp2) {
    if (!o.precedes(writeOp))
      streamRace(a, write ? "write after write" : "read after write", writeOp, "");
    if (!write) {
      rememberReader(readOp, readOp2);
      return;
    }
    for (uint32_t reader : {readOp, readOp2})
      if (!o.precedes(reader))
        streamRace(a, "write after read", reader, "");
    writeOp = o.current();
  };
  uint64_t end = std::min(addr + bytes, r->end());
  for (uint64_t a = addr / 4 * 4; a < end;) {
    ShadowPage& p = pageOf(*r, a);
    bool whole = !p.cells && a % 4096 == 0 && (a + 4096 <= end || end == r->end());
    if (whole) {
      check(a, p.writeOp, p.readOp, p.readOp2);
      a += 4096;
      continue;
    }
    ShadowCells& c = p.expand();
    int i = (int)(a % 4096 / 4);
    uint32_t before = write ? c.writeOp[i] : c.readOp[i];
    check(a, c.writeOp[i], c.readOp[i], c.readOp2[i]);
    if (before != o.current()) // tags are of the operation that they were written in
      (write ? c.writer : c.reader)[i] = 0;
    a += 4;
  }
}

} // namespace ptx
