// SPDX-License-Identifier: Apache-2.0
// race_global.h - races on global memory, inside a launch and between operations of different
// streams.
//
// Inside a launch every 4-byte word remembers its last writer and last reader (block, warp, lane,
// clock of the warp). Order inside a block comes from the warps' vector clocks; order between
// blocks from atomics that release and acquire, along which the clocks of whole blocks travel
// (ForeignClocks).
//
// Between operations (kernels, copies, memsets, collectives) every word remembers the last
// operation that wrote it and the last that read it; an operation knows by a vector clock over
// streams which others precede it.
#pragma once
#include "devmem.h"
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {

// block number -> clock of its warps; shared between warps until one learns more
using ForeignMap = std::unordered_map<uint32_t, std::shared_ptr<const std::vector<uint32_t>>>;
using ForeignClocks = std::shared_ptr<const ForeignMap>;
void joinForeign(ForeignClocks& into, const ForeignClocks& other);
using PublishedClocks = std::unordered_map<uint64_t, ForeignClocks>; // by global address

// ------------------------------------------------------------------ order of operations
using OpClock =
    std::map<uint32_t, uint64_t>; // timeline (a stream, or a graph node) -> operations finished
void joinOps(OpClock& into, const OpClock& other);

class OpOrder {
 public:
  static OpOrder& get();
  uint32_t newTimeline() { return nextTimeline_++; }
  // A new operation, n-th of its timeline, after everything in `before`. Returns its number, never
  // 0.
  uint32_t add(uint32_t timeline, uint64_t n, const std::string& what);
  void enter(uint32_t op, const OpClock* before); // from now on, accesses are this operation's
  void leave() { current_ = 0; }
  void moveTo(uint32_t op, uint32_t timeline,
              uint64_t n); // a finished graph node counts as its stream's
  uint32_t current() const { return current_; }
  bool precedes(uint32_t op);
  std::string name(uint32_t op) const;

 private:
  struct Op {
    uint32_t timeline;
    uint64_t n;
    std::string what;
  };
  std::vector<Op> ops_{{0, 0, "nothing"}};
  uint32_t nextTimeline_ = 1, current_ = 0, lastOk_ = 0;
  const OpClock* before_ = nullptr;
};

// Accesses of copies, memsets and collectives. Throws SimError on a race.
void touchRange(uint64_t addr, size_t bytes, bool write);

// ------------------------------------------------------------------ shadow memory
struct ShadowCells {
  uint32_t writeOp[1024], readOp[1024],
      readOp2[1024];                   // readOp2: a reader not ordered before readOp
  uint64_t writer[1024], reader[1024]; // tags inside the operation, see race_global.cpp
};
struct ShadowPage { // 4096 bytes of device memory; without cells, all words are alike
  uint32_t writeOp = 0, readOp = 0, readOp2 = 0;
  std::unique_ptr<ShadowCells> cells;
  ShadowCells& expand();
};
struct Shadow {
  std::vector<ShadowPage> pages;
};

} // namespace ptx
