// SPDX-License-Identifier: Apache-2.0
// sim.h - the execution model: a Launch runs Blocks, which run Warps, whose lanes run Frames (one
// call of one function). Also the counters, and the interface through which the instruction files
// register decoders.
#pragma once
#include "devmem.h"
#include "options.h"
#include "ptx.h"
#include "race_global.h"
#include <algorithm>
#include <array>
#include <cstring>
#include <memory>

namespace ptx {

// Generic addresses: global memory has host addresses; the other spaces have windows that no host
// address uses.
constexpr uint64_t WIN_SHARED = 0x00f1000000000000ull, WIN_LOCAL = 0x00f2000000000000ull,
                   WIN_PARAM = 0x00f3000000000000ull, WIN_FUNC = 0x00f4000000000000ull,
                   WIN_MASK = 0xffff000000000000ull;

struct Counters {
  uint64_t warpInstr = 0, threadInstr = 0, mma = 0, sharedReq = 0, sharedWave = 0, sharedIdeal = 0,
           globalReq = 0, globalSect = 0, globalIdeal = 0, barriers = 0, cpasync = 0, atomics = 0,
           localReq = 0;
};

using Clock = std::vector<uint32_t>; // a vector clock over the warps of a block
void joinClock(Clock& into, const Clock& other, int except = -1);

// Calls f(lane) for every lane of a mask.
template <class F> inline void forEachLane(uint32_t mask, F&& f) {
  if (mask == 0xffffffffu)
    for (int lane = 0; lane < 32; lane++)
      f(lane);
  else
    for (; mask; mask &= mask - 1)
      f(__builtin_ctz(mask));
}
inline int firstLane(uint32_t mask) {
  return __builtin_ctz(mask);
}

// One call of one function by a group of lanes. Registers are columns of 32 lanes.
struct Frame {
  const Function* fn = nullptr;
  std::shared_ptr<Frame> caller;
  const Instr* call = nullptr;
  uint32_t retPc = 0;
  int depth = 0;
  uint64_t localBase = 0;
  std::vector<uint64_t> regs;
  std::vector<uint8_t> paramMem; // frameParamBytes for each lane
  uint8_t* param(int lane) { return paramMem.data() + fn->frameParamBytes * lane; }
};

// A cp.async in flight; group counts the commit_groups before it.
struct AsyncCopy {
  uint32_t dst;
  uint64_t src;
  uint8_t size, srcSize;
  uint32_t group;
  const Instr* in;
};

struct WgmmaState; // wgmma.cpp: results in flight, registers written since the last wgmma.fence
struct Block;
struct Launch;

struct Warp {
  Block* block = nullptr;
  Launch* launch = nullptr;
  int id = 0;
  uint32_t exists = 0, alive = 0;     // lanes
  uint32_t waitBar = 0, waitColl = 0; // lanes that wait at a barrier, for a collective
  uint32_t pc[32] = {};
  std::shared_ptr<Frame> frames[32];
  uint32_t collMask[32] = {}; // member mask that a waiting lane named
  int barId[32] = {};
  const Instr* barIn[32] = {};

  // The group of lanes that runs now: all at pc groupPc of frame f. `limit` is where the next group
  // waits.
  bool valid = false;
  uint32_t mask = 0, groupPc = 0, limit = 0;
  Frame* f = nullptr;
  uint64_t* regBase = nullptr;
  const uint64_t* constBase = nullptr;
  uint64_t starve = 0; // steps since the last full reconvergence

  uint32_t cc = 0; // carry flags
  std::vector<uint8_t> local[32];
  std::vector<AsyncCopy> copies[32]; // cp.async in flight
  uint32_t copiesCommitted[32] = {};
  std::shared_ptr<WgmmaState> wgmma;
  int prio = 0;
  uint64_t yields = 0;
  const Range* lastRange = nullptr;

  // How often in a row the same instruction found the same; vain: and nothing else happened meanwhile
  uint32_t polls = 0, vainPolls = 0;
  const Instr* pollIn = nullptr;
  uint64_t pollFound = 0, pollAt = 0;

  // Order of memory operations, for the race checks
  Clock clock;         // clock[id] is this warp's own time
  Clock proxyClock;    // what a fence.proxy.async made visible to the async proxy
  bool fenced = false; // a fence since the last barrier: strong stores to shared memory publish
  bool unfencedStore = false; // a global store since the last fence: relaxed atomics do not publish
  ForeignClocks foreign;      // what this warp knows of other blocks

  uint64_t* reg(int i) { return regBase + (size_t)i * 32; }
  const uint64_t* src(int i) const {
    return i >= 0 ? regBase + (size_t)i * 32 : constBase + (size_t)(-2 - i) * 32;
  }
  uint32_t pred(int i, bool negated) const {
    uint32_t b = (uint32_t)src(i)[0];
    return negated ? ~b : b;
  }
  void setPred(int i, uint32_t bits, uint32_t lanes) {
    if (i < 0)
      return;
    uint64_t& r = reg(i)[0];
    r = ((uint32_t)r & ~lanes) | (bits & lanes);
  }

  void init(Block* b, int warpId);
  void run(int quantum);
  void flush(); // writes the group's pc back to its lanes
  bool runnable() const { return alive & ~(waitBar | waitColl); }
  uint32_t tidLinear(int lane) const { return (uint32_t)id * 32 + lane; }
  std::string where(int lane) const;
  [[noreturn]] void error(const Instr& in, int lane, const std::string& msg, int code = 719) const;

  // memory.cpp: checked pointers. resolve sets sharedOff to the offset in shared memory, else ~0.
  char* globalPtr(const Instr& in, uint64_t a, int n, int lane, bool write);
  char* sharedPtr(const Instr& in, uint64_t off, int n, int lane);
  char* resolve(const Instr& in, uint64_t a, int n, int lane, bool write, uint8_t space,
                uint32_t* sharedOff);
  void deliverCopies(int lane, uint32_t upToGroup); // cp_async.cpp
  // A strong load or an atomic has found this in memory, left it, and (`fixed`) nobody outside the
  // launch can change it.
  void polled(const Instr& in, uint64_t found, bool fixed);

  // race_shared.cpp, race_global.cpp
  void checkShared(const Instr& in, uint32_t off, int n, int lane, bool write, bool strong,
                   const void* data = nullptr, bool inFlight = false);
  void checkProxy(const Instr& in, uint32_t off, int n, int lane); // read by the async proxy
  void checkGlobal(const Instr& in, uint64_t a, int n, int lane, bool write, bool strong,
                   const void* data = nullptr);
  void acquire(uint64_t key, bool shared);
  void release(uint64_t key, bool shared, bool explicitRelease);
  void tick() { clock[id]++; }
  void learn(const Clock& from,
             const Clock& fromProxy); // what others did before a synchronisation is now ordered

 private:
  bool select();
  bool control(const Instr& in, uint32_t lanes, int& quantum);
  bool branch(const Instr& in, uint32_t lanes);
  void branchIndexed(const Instr& in, uint32_t lanes);
  void call(const Instr& in, uint32_t lanes);
  const Function* indirectCallee(const Instr& in, uint32_t lanes, uint32_t* same);
  void callBuiltin(const Instr& in, int lane, Frame& caller);
  void ret(uint32_t lanes);
  void exit(uint32_t lanes);
  void collective(const Instr& in, uint32_t lanes);
  uint32_t collectiveGroup(const Instr& in, uint32_t todo, uint32_t* members);
  std::string deviceString(const Instr& in, int lane, uint64_t addr);
  void devicePrintf(const Instr& in, int lane, uint64_t format, uint64_t args);
};

struct Barrier {
  uint32_t expectWarps = 0;      // 0: the whole block
  std::vector<uint32_t> arrived; // lanes of each warp
  Clock clock, proxyClock;
  bool used = false, unfencedStore = false;
  ForeignClocks foreign;
  int popc = 0; // barrier.red
  bool andv = true, orv = false;
};
struct MBarrier {
  uint64_t phase = 0;
  int64_t expected = 0, pending = 0, tx = 0;
  Clock clock, proxyClock;
};
struct BulkCopy { // cp.async.bulk to shared memory, in flight
  uint32_t dst, bytes, mbar;
  uint64_t src;
  Warp* warp;
  int lane;
  const Instr* in;
};

struct Block {
  Launch* launch = nullptr;
  uint32_t cta[3] = {};
  uint32_t linear = 0;
  std::vector<Warp> warps;
  int nthreads = 0;
  std::vector<uint8_t> smem;
  uint32_t smemSize = 0;
  std::vector<uint32_t> shWriter, shReader, shReader2; // race_shared.cpp: tags per byte
  std::vector<uint16_t> shWgmmaReads;                  // wgmma reads in flight per 16 bytes
  Barrier bar[16];
  std::map<uint32_t, MBarrier> mbar; // by shared-memory offset
  std::vector<BulkCopy> bulk;
  std::unordered_map<uint64_t, Clock> published; // by shared-memory offset of a strong access
  bool done = false;

  void start(Launch* l, uint64_t linearId);
  enum Step { RAN, YIELDED, ENDED };
  Step step(Rng& rng, bool skew); // runs one warp for a while
  bool spins() const;             // all warps that can run poll memory, in vain for long
  void barArrive(Warp& w, const Instr& in, uint32_t lanes);
  void onExit();

 private:
  Warp* pickWarp(Rng& rng, bool skew);
  void barComplete(int id);
  void barResult(Warp& w, const Barrier& b, int lane);
  [[noreturn]] void deadlock();
};

struct Launch {
  Module* mod = nullptr;
  Function* fn = nullptr;
  int device = 0;
  uint32_t grid[3] = {1, 1, 1}, blockDim[3] = {1, 1, 1};
  uint32_t dynSmem = 0;
  bool cooperative = false;
  uint64_t gridWorkspace = 0; // cooperative launches: zeroed device memory for grid.sync()
  std::vector<uint8_t> params;
  Counters c;
  Rng rng{1};
  uint64_t id = 0;
  uint64_t progress = 0; // stores, arrivals at barriers, exits: what others may wait for
  PublishedClocks published; // global addresses of atomics
  void run();                // throws SimError

 private:
  void runBlocks(bool skew, double deadline);
};

void writeCounters(const Launch& l, double seconds); // counters.cpp

// wgmma.cpp: bookkeeping for kernels that use wgmma, called before every instruction
void trackRegisters(Warp& w, const Instr& in, uint32_t mask);
void wgmmaAtExit(Warp& w, const Instr& in);

// ------------------------------------------------------------------ decoding
void loadModule(Module&);         // places the variables
void prepare(Module&, Function&); // decodes a kernel and everything that it may call

struct DecodeCtx {
  Module& module;
  Function& fn;
  const RawInstr& raw;
  Instr& ins;
  int source(const Operand& o, Type t); // column of a source operand; t is the type of a constant
  int dest(const Operand& o);
  int constant(uint64_t v);
  std::vector<int> sources(const Operand& o, Type t);
  std::vector<int> dests(const Operand& o);
  Type type(int n = 0) const;                  // n-th type among the modifiers
  uint64_t symValue(const Operand& o);         // address of a variable or function
  void memory(const Operand& o, int slot = 0); // address operand: src[slot] and offset
  [[noreturn]] void fail(const char* why);
};
using Decoder = bool (*)(DecodeCtx&); // false: this form is not supported
using DecoderTable = std::unordered_map<std::string, Decoder>;
void registerInteger(DecoderTable&);
void registerFloat(DecoderTable&);
void registerCompare(DecoderTable&);
void registerMove(DecoderTable&);
void registerConvert(DecoderTable&);
void registerMemory(DecoderTable&);
void registerAtomics(DecoderTable&);
void registerCpAsync(DecoderTable&);
void registerWarp(DecoderTable&);
void registerMatrix(DecoderTable&);
void registerMbarrier(DecoderTable&);
void registerWgmma(DecoderTable&);
bool decodeCpBulk(DecodeCtx&); // mbarrier.cpp

void execNop(Warp&, const Instr&, uint32_t mask);
void execMov(Warp&, const Instr&, uint32_t mask); // alu_move.cpp; wgmma.cpp recognises it
uint8_t spaceOf(const RawInstr&);                 // load_store.cpp
bool clusterShared(const RawInstr&);
int vecOf(const RawInstr&);
uint64_t loadBits(const char* p, int n, bool isSigned);
uint64_t pollHash(uint64_t found, uint64_t address, const char* p, int n); // of all lanes so far

// counters.cpp
void count(Warp&, const Instr&, uint32_t mask, int bytes, const uint64_t* base);
void countShared(Warp&, const uint32_t* off, uint32_t mask, int bytes);
void countGlobal(Warp&, const uint64_t* addr, uint32_t mask, int bytes);

} // namespace ptx
