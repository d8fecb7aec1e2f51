// SPDX-License-Identifier: Apache-2.0
// stream.h - streams as queues of closures run at random legal moments; events; capture and graphs.
// An operation is a function that returns true once it has finished; false means "poll me again"
// (event waits, collectives). Everything is guarded by one recursive lock.
#pragma once
#include "sim.h"
#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace ptx {

using OpFn = std::function<bool()>;
using OpMake =
    std::function<OpFn()>; // called when the operation is really enqueued or a graph is launched

struct Graph {
  struct Node {
    OpMake make;
    std::vector<int> deps;
    std::string what;
    int type;
  };
  std::vector<Node> n;
};
struct GraphExec {
  std::shared_ptr<Graph> g;
};
struct Stream;
struct Event;
struct Capture {
  std::shared_ptr<Graph> g = std::make_shared<Graph>();
  Stream* origin = nullptr;
  int mode = 0;
  bool invalid = false;
  std::set<Stream*> streams;
  uint64_t id = 0;
};

struct Stream {
  int device = 0, prio = 0;
  bool blocking = true, legacy = false, dead = false;
  uint64_t id = 0;
  int schedPrio = 0;
  struct Op {
    OpFn fn;
    uint64_t seq;
    std::string what;
    OpClock host;       // what the host had waited for when it enqueued this
    uint32_t order = 0; // OpOrder number, once started
  };
  uint32_t timeline = OpOrder::get().newTimeline();
  uint64_t finished = 0; // operations
  OpClock clock;         // what precedes the stream's next operation
  std::deque<Op> q;
  bool busy = false;
  std::shared_ptr<Capture> cap;
  std::vector<int> capLast;
};
struct Event {
  OpClock clock;
  uint64_t recorded = 0, done = 0;
  double time = 0;
  int device = 0;
  bool timing = true;
  std::shared_ptr<Capture> cap;
  std::vector<int> capNodes;
};

// Recursive lock that a waiting call can give up completely, whatever its depth, so that others
// move on.
class Lock {
 public:
  void lock() {
    if (owner_ == me()) {
      depth_++;
      return;
    }
    m_.lock();
    owner_ = me();
    depth_ = 1;
  }
  bool try_lock() {
    if (owner_ == me()) {
      depth_++;
      return true;
    }
    if (!m_.try_lock())
      return false;
    owner_ = me();
    depth_ = 1;
    return true;
  }
  void unlock() {
    if (--depth_ == 0) {
      owner_ = 0;
      m_.unlock();
    }
  }
  int releaseAll() {
    int d = depth_;
    depth_ = 0;
    owner_ = 0;
    m_.unlock();
    return d;
  }
  void restore(int d) {
    m_.lock();
    owner_ = me();
    depth_ = d;
  }

 private:
  static uintptr_t me() {
    static thread_local char c;
    return (uintptr_t)&c;
  }
  std::mutex m_;
  std::atomic<uintptr_t> owner_{0};
  int depth_ = 0;
};

class Runtime {
 public:
  static Runtime& get();
  Lock mu;
  std::vector<std::unique_ptr<Stream>> streams; // 0..ndev-1 are the legacy streams
  int devices = 1, sm = 80;
  int sticky = 0;
  std::string stickyMsg;
  Rng rng{1};
  Stream* legacy(int dev) { return streams[dev].get(); }
  Stream* create(int dev, bool blocking, int prio);
  void destroy(Stream*);
  // Enqueue; during capture the operation becomes a graph node instead. Returns a cudaError_t.
  int enqueue(Stream* s, const std::string& what, OpMake make, int nodeType = 0);
  int enqueueFn(Stream* s, const std::string& what, OpFn fn, int nodeType = 0) {
    return enqueue(s, what, [fn] { return fn; }, nodeType);
  }
  bool pumpOne(); // run one runnable operation; false if none could move
  int wait(const std::function<bool()>& done, const char* what);
  int record(const std::shared_ptr<Event>&, Stream*);
  int waitEvent(Stream*, const std::shared_ptr<Event>&);
  int waitStream(Stream* s);
  int waitDevice(int dev);
  bool anyGlobalCapture();
  void invalidateCaptures();
  OpFn graphOp(const std::shared_ptr<Graph>&);
  void fail(const SimError&);
  std::string dump();
  void hostSaw(const OpClock& c) { joinOps(host_, c); } // the host waited for, or asked about, this
  void streamSaw(const OpClock& c) {
    if (running_)
      joinOps(running_->clock, c);
  }
  void startBackground();
  uint64_t seq = 0, nextStreamId = 1;
  double lastApi = 0;

 private:
  Runtime();
  bool canRun(Stream*);
  void begin(Stream* s, Stream::Op& op);
  OpClock host_;
  Stream* running_ = nullptr;
  bool bg_ = false;
  int pid_ = 0;
};

} // namespace ptx

// Hooks for the stand-in libnccl.so.2.
extern "C" {
void* ptxsim_stream(void* cudaStream, int* device); // resolve a handle
int ptxsim_enqueue(void* stream, const char* what, std::function<std::function<bool()>()>* make);
char* ptxsim_ptr(const void* p, size_t n, int device,
                 const char** why);                    // pointer usable by the simulator
void ptxsim_touch(const void* p, size_t n, int write); // an access, for the race check
void ptxsim_fail(const char* msg);
void* ptxsim_lock();
}
