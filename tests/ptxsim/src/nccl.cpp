// SPDX-License-Identifier: Apache-2.0
// nccl.cpp - the stand-in libnccl.so.2. Ranks are processes or threads of one host; they meet in a
// POSIX shared-memory segment named after the unique id, and read each other's data through memfds
// opened by /proc/PID/fd. Every operation is a polled stream operation: it publishes its input and
// its description, waits until all ranks have published the same operation, computes, and retires.
// Reductions visit ranks as a ring does, from a pseudo-random start, rounding to the element type
// at every hop.
#include "nccl_abi.h"
#include "stream.h"
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fcntl.h>
#include <random>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#define API extern "C" __attribute__((visibility("default")))
using ptx::strf;

namespace {
// The hooks are looked up at run time so that a program may be linked against the real libcudart.
template <class F> F hook(const char* n) {
  static void* h = dlopen("libcudart.so.13", RTLD_NOW | RTLD_NOLOAD);
  void* p = h ? dlsym(h, n) : nullptr;
  if (!p) {
    fprintf(stderr,
            "ptxsim NCCL: %s not found: the stand-in libcudart.so.13 is not the one loaded; check "
            "LD_LIBRARY_PATH\n",
            n);
    abort();
  }
  return (F)p;
}
#define ptxsim_ptr(...) (hook<decltype(&::ptxsim_ptr)>("ptxsim_ptr")(__VA_ARGS__))
#define ptxsim_enqueue(...) (hook<decltype(&::ptxsim_enqueue)>("ptxsim_enqueue")(__VA_ARGS__))
#define ptxsim_stream(...) (hook<decltype(&::ptxsim_stream)>("ptxsim_stream")(__VA_ARGS__))
#define ptxsim_touch(...) (hook<decltype(&::ptxsim_touch)>("ptxsim_touch")(__VA_ARGS__))
#define ptxsim_fail(...) (hook<decltype(&::ptxsim_fail)>("ptxsim_fail")(__VA_ARGS__))
bool alive(int pid) { // a zombie counts as gone
  if (kill(pid, 0) && errno == ESRCH)
    return false;
  char path[64], buf[512];
  snprintf(path, sizeof path, "/proc/%d/stat", pid);
  FILE* f = fopen(path, "r");
  if (!f)
    return true;
  size_t n = fread(buf, 1, sizeof buf - 1, f);
  fclose(f);
  buf[n] = 0;
  char* p = strrchr(buf, ')');
  return !(p && p[1] && (p[2] == 'Z' || p[2] == 'X'));
}
constexpr int MAXR = 64;
enum Kind {
  K_ALLGATHER,
  K_ALLREDUCE,
  K_REDUCESCATTER,
  K_BROADCAST,
  K_REDUCE,
  K_ALLTOALL,
  K_SEND,
  K_RECV
};
const char* kindName[] = {"AllGather", "AllReduce", "ReduceScatter", "Broadcast",
                          "Reduce",    "AlltoAll",  "Send",          "Recv"};
struct Desc {
  int kind, dtype, op, root;
  uint64_t count;
};
struct Slot {
  std::atomic<int> pid, fd, aborted;
  std::atomic<uint64_t> published, consumed, splitGen;
  int color, key;
  Desc d;
};
struct Pair {
  std::atomic<uint64_t> sent, taken;
  std::atomic<int> fd;
  Desc d;
};
struct Ctl {
  std::atomic<int> attached, ready;
  int nranks;
  Slot r[MAXR];
  Pair p[MAXR][MAXR];
};

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
double timeoutS() {
  const char* s = getenv("PTXSIM_NCCL_TIMEOUT");
  return s ? atof(s) : 60;
}

struct Buf { // a memfd of this process
  int fd = -1;
  size_t cap = 0;
  char* p = nullptr;
  bool fit(size_t n) {
    if (n <= cap)
      return true;
    if (fd < 0)
      fd = memfd_create("ptxsim-nccl", MFD_CLOEXEC);
    size_t c = (n + 65535) / 65536 * 65536;
    if (p)
      munmap(p, cap);
    if (ftruncate(fd, c))
      return false;
    p = (char*)mmap(nullptr, c, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    cap = c;
    return p != MAP_FAILED;
  }
  ~Buf() {
    if (p)
      munmap(p, cap);
    if (fd >= 0)
      close(fd);
  }
};
} // namespace
struct ncclComm {
  Ctl* ctl = nullptr;
  int rank = 0, n = 0, dev = 0;
  std::string name;
  uint64_t hash = 0;
  bool aborted = false, waitedInit = false, nonblocking = false;
  uint64_t nextSeq = 0, doneSeq = 0, sendSeq[MAXR] = {}, recvSeq[MAXR] = {}, splitGen = 0;
  Buf data, out[MAXR];
  ncclResult_t async = ncclSuccess;
};
namespace {
struct Peer { // read-only view of another rank's memfd
  char* p = nullptr;
  size_t n = 0;
  char* own = nullptr;
  Peer(int pid, int fd, size_t bytes) : n(bytes) {
    if (!bytes)
      return;
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", pid, fd);
    int f = open(path, O_RDONLY | O_CLOEXEC);
    if (f < 0)
      return;
    p = (char*)mmap(nullptr, n, PROT_READ, MAP_SHARED, f, 0);
    close(f);
    if (p == MAP_FAILED)
      p = nullptr;
  }
  ~Peer() {
    if (p)
      munmap(p, n);
  }
};
int esize(int t) {
  switch (t) {
    case ncclInt8:
    case ncclUint8: return 1;
    case ncclFloat16:
    case ncclBfloat16: return 2;
    case ncclInt64:
    case ncclUint64:
    case ncclFloat64: return 8;
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32: return 4;
    default: return 1;
  }
}
const char* tname(int t) {
  const char* n[] = {"int8",    "uint8",   "int32",   "uint32",   "int64",      "uint64",
                     "float16", "float32", "float64", "bfloat16", "float8e4m3", "float8e5m2"};
  return t >= 0 && t < 12 ? n[t] : "?";
}
std::string show(const Desc& d) {
  return strf("%s count %llu %s op %d root/peer %d", kindName[d.kind], (unsigned long long)d.count,
              tname(d.dtype), d.op, d.root);
}

template <class T> T comb(T a, T b, int op) {
  switch (op) {
    case ncclProd: return a * b;
    case ncclMax: return a > b ? a : b;
    case ncclMin: return a < b ? a : b;
    default: return a + b;
  }
}
void reduce1(char* acc, const char* x, int t, int op,
             double scale) { // acc = acc (op) x; scale != 0: acc *= scale
  using namespace ptx;
#define CASE(TT, C)                                                                                \
  case TT: {                                                                                       \
    C a, b;                                                                                        \
    memcpy(&a, acc, sizeof a);                                                                     \
    if (scale)                                                                                     \
      a = (C)(a * scale);                                                                          \
    else {                                                                                         \
      memcpy(&b, x, sizeof b);                                                                     \
      a = comb<C>(a, b, op);                                                                       \
    }                                                                                              \
    memcpy(acc, &a, sizeof a);                                                                     \
    return;                                                                                        \
  }
  switch (t) {
    CASE(ncclInt8, int8_t)
    CASE(ncclUint8, uint8_t)
    CASE(ncclInt32, int32_t) CASE(ncclUint32, uint32_t) CASE(ncclInt64, int64_t)
        CASE(ncclUint64, uint64_t) CASE(ncclFloat32, float) CASE(ncclFloat64, double) default : {
      uint16_t a = 0, b = 0;
      int n = esize(t);
      memcpy(&a, acc, n);
      if (x)
        memcpy(&b, x, n);
      auto dec = [&](uint16_t v) -> float {
        return t == ncclFloat16      ? h2f(v)
               : t == ncclBfloat16   ? bf2f(v)
               : t == ncclFloat8e4m3 ? e4m32f((uint8_t)v)
                                     : e5m22f((uint8_t)v);
      };
      float r = scale ? dec(a) * (float)scale : comb<float>(dec(a), dec(b), op);
      a = t == ncclFloat16      ? d2h(r)
          : t == ncclBfloat16   ? f2bf(r)
          : t == ncclFloat8e4m3 ? f2e4m3(r)
                                : f2e5m2(r);
      memcpy(acc, &a, n);
    }
  }
}
struct Task {
  ncclComm* c;
  Desc d;
  const void* send;
  void* recv;
  uint64_t seq = 0;
  int state = 0;
  double since = now();
  bool finished = false;
  size_t es() const { return esize(d.dtype); }
  size_t inBytes() const {
    size_t b = d.count * es();
    return d.kind == K_REDUCESCATTER || d.kind == K_ALLTOALL ? b * c->n : b;
  }
  size_t outBytes() const {
    size_t b = d.count * es();
    return d.kind == K_ALLGATHER || d.kind == K_ALLTOALL ? b * c->n : b;
  }
  [[noreturn]] void fail(const std::string& m) {
    if (!c->async)
      c->async = ncclInternalError;
    throw ptx::SimError(strf("NCCL rank %d of %d: ", c->rank, c->n) + m, 719);
  }
  char* ptr(const void* p, size_t n, bool write) {
    const char* what = write ? "recv" : "send";
    if (!n)
      return (char*)p;
    const char* why = "";
    char* q = ptxsim_ptr(p, n, c->dev, &why);
    if (!q)
      fail(strf("%s %s buffer %p: %s", kindName[d.kind], what, p, why));
    ptxsim_touch(p, n, write);
    return q;
  }
  void timeout() {
    for (int r = 0; r < c->n; r++)
      if (c->ctl->r[r].aborted) {
        c->async = ncclRemoteError;
        fail(strf("rank %d aborted", r));
      }
    double w = now() - since;
    if (w < 1)
      return;
    for (int r = 0; r < c->n; r++)
      if (!alive(c->ctl->r[r].pid)) {
        c->async = ncclRemoteError;
        fail(strf("rank %d (pid %d) is gone while this rank waits in %s", r, (int)c->ctl->r[r].pid,
                  show(d).c_str()));
      }
    if (w < timeoutS())
      return;
    std::string s = strf("timeout after %.0f s in operation %llu: %s", w, (unsigned long long)seq,
                         show(d).c_str());
    for (int r = 0; r < c->n; r++) {
      Slot& x = c->ctl->r[r];
      s += strf("\n    rank %d: %llu collectives posted, %llu finished%s", r,
                (unsigned long long)x.published, (unsigned long long)x.consumed,
                x.published ? (", last: " + show(x.d)).c_str() : "");
    }
    if (d.kind >= K_SEND)
      s += strf("\n    pair %d->%d: %llu sent, %llu taken", d.kind == K_SEND ? c->rank : d.root,
                d.kind == K_SEND ? d.root : c->rank, (unsigned long long)pair().sent,
                (unsigned long long)pair().taken);
    fail(s);
  }
  Pair& pair() {
    return d.kind == K_SEND ? c->ctl->p[c->rank][d.root] : c->ctl->p[d.root][c->rank];
  }
  bool poll() {
    if (finished || c->aborted)
      return finished = true;
    if (d.kind == K_SEND ? pollSend() : d.kind == K_RECV ? pollRecv() : pollColl())
      return finished = true;
    timeout();
    return false;
  }
  bool pollSend() {
    Pair& p = pair();
    size_t n = d.count * es();
    if (state == 0) {
      if (p.taken < seq || p.sent != seq)
        return false;
      Buf& b = c->out[d.root];
      if (!b.fit(n + 1))
        fail("out of shared memory");
      memcpy(b.p, ptr(send, n, false), n);
      p.fd = b.fd;
      p.d = d;
      p.sent = seq + 1;
      state = 1;
      since = now();
    }
    return p.taken > seq; // rendezvous: a send ends when it was received
  }
  bool pollRecv() {
    Pair& p = pair();
    size_t n = d.count * es();
    if (state == 0) {
      char* q = ptr(recv, n, true);
      memset(q, 0xFF, n);
      state = 1;
      since = now();
    }
    if (p.sent <= seq || p.taken != seq)
      return false;
    if (p.d.count * esize(p.d.dtype) != n)
      fail(strf("recv of %zu bytes from rank %d meets a send of %zu bytes", n, d.root,
                (size_t)(p.d.count * esize(p.d.dtype))));
    Peer v(c->ctl->r[d.root].pid, p.fd, n);
    if (n && !v.p)
      fail("cannot map the sender's buffer");
    memcpy(ptr(recv, n, true), v.p, n);
    p.taken = seq + 1;
    return true;
  }
  bool pollColl() {
    Slot& me = c->ctl->r[c->rank];
    if (state == 0) {
      if (c->doneSeq != seq)
        return false;
      for (int r = 0; r < c->n; r++)
        if (c->ctl->r[r].consumed < seq)
          return false;
      size_t n = inBytes(), o = outBytes();
      if (!c->data.fit(n + 1))
        fail("out of shared memory");
      bool sends = d.kind != K_BROADCAST || c->rank == d.root,
           recvs = d.kind != K_REDUCE || c->rank == d.root;
      if (sends)
        memcpy(c->data.p, ptr(send, n, false), n);
      if (recvs) {
        char* q = ptr(recv, o, true);
        if (!(d.kind == K_BROADCAST && c->rank == d.root))
          memset(q, 0xFF, o);
      }
      me.d = d;
      me.fd = c->data.fd;
      me.published = seq + 1;
      state = 1;
      since = now();
    }
    for (int r = 0; r < c->n; r++)
      if (c->ctl->r[r].published < seq + 1)
        return false;
    for (int r = 0; r < c->n; r++)
      if (memcmp(&c->ctl->r[r].d, &d, sizeof d))
        fail(strf("operation %llu differs between ranks:\n    rank %d: %s\n    rank %d: %s",
                  (unsigned long long)seq, c->rank, show(d).c_str(), r,
                  show(c->ctl->r[r].d).c_str()));
    compute();
    c->doneSeq = seq + 1;
    me.consumed = seq + 1;
    return true;
  }
  void compute() {
    size_t b = d.count * es(), n = inBytes();
    std::vector<std::unique_ptr<Peer>> v(c->n);
    auto view = [&](int r) -> const char* {
      if (r == c->rank)
        return c->data.p;
      if (!v[r])
        v[r] = std::make_unique<Peer>(c->ctl->r[r].pid, c->ctl->r[r].fd, n);
      if (n && !v[r]->p)
        fail(strf("cannot map rank %d's buffer", r));
      return v[r]->p;
    };
    if ((d.kind == K_REDUCE && c->rank != d.root) || !b)
      return;
    char* o = ptr(recv, outBytes(), true);
    if (d.kind == K_ALLGATHER)
      for (int r = 0; r < c->n; r++)
        memcpy(o + r * b, view(r), b);
    else if (d.kind == K_ALLTOALL)
      for (int r = 0; r < c->n; r++)
        memcpy(o + r * b, view(r) + c->rank * b, b);
    else if (d.kind == K_BROADCAST)
      memcpy(o, view(d.root), b);
    else {
      size_t off = d.kind == K_REDUCESCATTER ? c->rank * b : 0, e = es();
      std::vector<const char*> p(c->n);
      for (int r = 0; r < c->n; r++)
        p[r] = view(r) + off;
      for (uint64_t i = 0; i < d.count; i++) {
        uint64_t h =
            (c->hash + seq * 0x9E3779B97F4A7C15ull + (i + off / e) / 512 * 0xBF58476D1CE4E5B9ull) *
            0x94D049BB133111EBull;
        int s = (int)((h >> 33) % c->n);
        char* a = o + i * e;
        memcpy(a, p[s] + i * e, e);
        for (int k = 1; k < c->n; k++)
          reduce1(a, p[(s + k) % c->n] + i * e, d.dtype, d.op, 0);
        if (d.op == ncclAvg)
          reduce1(a, nullptr, d.dtype, d.op, 1.0 / c->n);
      }
    }
  }
};
struct Pending {
  ncclComm* c;
  Desc d;
  const void* send;
  void* recv;
  void* stream;
};
thread_local int tDepth = 0;
thread_local std::vector<Pending> tPend;
thread_local std::vector<ncclComm*> tInit;
thread_local std::string tErr = "";

ncclResult_t bad(const std::string& m, ncclResult_t r = ncclInvalidArgument) {
  tErr = m;
  fprintf(stderr, "ptxsim NCCL: %s\n", m.c_str());
  return r;
}
// ncclCommInitRankConfig with blocking = 0: the communicator is usable once all ranks have come.
bool initPending(ncclComm* c) {
  if (c->waitedInit || c->ctl->attached < c->n)
    return !c->waitedInit;
  c->ctl->ready++;
  c->waitedInit = true; // the segment's name is removed by ncclCommDestroy of rank 0
  return false;
}
ncclResult_t waitInit(ncclComm* c) {
  double t0 = now();
  while (c->ctl->attached < c->n) {
    if (now() - t0 > timeoutS())
      return bad(strf("rank %d: only %d of %d ranks called ncclCommInitRank", c->rank,
                      (int)c->ctl->attached, c->n),
                 ncclSystemError);
    usleep(300);
  }
  c->ctl->ready++;
  if (c->rank == 0) {
    while (c->ctl->ready < c->n && now() - t0 < timeoutS()) {
      if (tInit.size() > 1)
        break;
      usleep(300);
    }
    shm_unlink(c->name.c_str());
  }
  c->waitedInit = true;
  return ncclSuccess;
}
ncclResult_t attach(ncclComm_t* out, int n, const char* id, int rank) {
  if (n < 1 || n > MAXR || rank < 0 || rank >= n)
    return bad("bad rank or size");
  auto* c = new ncclComm;
  c->rank = rank;
  c->n = n;
  cudaGetDevice(&c->dev);
  c->name = std::string("/ptxsim-nccl-") + id;
  for (const char* s = id; *s; s++)
    c->hash = c->hash * 131 + *s;
  int f = shm_open(c->name.c_str(), O_CREAT | O_RDWR, 0600);
  if (f < 0 || ftruncate(f, sizeof(Ctl)))
    return bad("shm_open failed", ncclSystemError);
  c->ctl = (Ctl*)mmap(nullptr, sizeof(Ctl), PROT_READ | PROT_WRITE, MAP_SHARED, f, 0);
  close(f);
  if (c->ctl == MAP_FAILED)
    return bad("mmap failed", ncclSystemError);
  int zero = 0;
  if (!c->ctl->r[rank].pid.compare_exchange_strong(zero, getpid()))
    return bad(strf("rank %d joined twice", rank), ncclInvalidUsage);
  c->ctl->attached++;
  *out = c;
  return ncclSuccess;
}
ncclResult_t flushGroup() {
  std::vector<Pending> all;
  all.swap(tPend);
  std::vector<void*> order;
  for (auto& p : all)
    if (std::find(order.begin(), order.end(), p.stream) == order.end())
      order.push_back(p.stream);
  for (void* st : order) {
    std::vector<Pending> mine;
    for (auto& p : all)
      if (p.stream == st)
        mine.push_back(p);
    std::function<std::function<bool()>()> make = [mine]() -> std::function<bool()> {
      auto ts = std::make_shared<std::vector<Task>>();
      for (auto& p : mine) {
        Task t{p.c, p.d, p.send, p.recv};
        t.seq = p.d.kind == K_SEND   ? p.c->sendSeq[p.d.root]++
                : p.d.kind == K_RECV ? p.c->recvSeq[p.d.root]++
                                     : p.c->nextSeq++;
        ts->push_back(t);
      }
      return [ts]() -> bool { // exceptions must not cross into the other library
        try {
          bool all = true;
          for (auto& t : *ts)
            if (!t.poll())
              all = false;
          return all;
        } catch (const ptx::SimError& e) {
          ptxsim_fail(e.what());
          return true;
        }
      };
    };
    std::string what =
        mine.size() == 1 ? "nccl " + show(mine[0].d) : strf("nccl group of %zu", mine.size());
    if (int e = ptxsim_enqueue(st, what.c_str(), &make))
      return bad(strf("enqueue failed with CUDA error %d", e), ncclUnhandledCudaError);
  }
  return ncclSuccess;
}
ncclResult_t post(ncclComm* c, Kind k, const void* s, void* r, size_t count, ncclDataType_t t,
                  int op, int root, cudaStream_t st) {
  if (!c || !c->ctl)
    return bad("null communicator");
  if (c->async)
    return c->async;
  if (c->nonblocking && initPending(c))
    return bad("the communicator is not ready; poll ncclCommGetAsyncError", ncclInvalidUsage);
  if (root < 0 || root >= c->n)
    return bad(strf("%s: rank %d out of range", kindName[k], root));
  if ((int)t < 0 || (int)t >= ncclNumTypes)
    return bad("data type");
  if (k != K_SEND && k != K_RECV && op > ncclAvg)
    return bad("reduction operator not supported");
  int dev = 0;
  void* stream = ptxsim_stream(st, &dev);
  if (!stream)
    return bad("bad stream");
  if (dev != c->dev)
    return bad(strf("stream of device %d, communicator of device %d", dev, c->dev),
               ncclInvalidUsage);
  Pending p{c, {}, s, r, stream};
  memset(&p.d, 0, sizeof p.d);
  p.d = Desc{k, (int)t, op, root, count};
  tPend.push_back(p);
  return tDepth ? ncclSuccess : flushGroup();
}
} // namespace

API ncclResult_t ncclGetVersion(int* v) {
  *v = NCCL_VERSION_CODE;
  return ncclSuccess;
}
API ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  memset(id, 0, sizeof *id);
  std::random_device rd;
  snprintf(id->internal, sizeof id->internal, "%08x%08x%08x", rd(), rd(), (unsigned)getpid());
  return ncclSuccess;
}
API const char* ncclGetErrorString(ncclResult_t r) {
  const char* n[] = {"no error",
                     "unhandled cuda error",
                     "unhandled system error",
                     "internal error",
                     "invalid argument",
                     "invalid usage",
                     "remote process exited or there was a network error",
                     "NCCL operation in progress"};
  return (int)r < 8 ? n[r] : "unknown";
}
API const char* ncclGetLastError(ncclComm_t) {
  return tErr.c_str();
}
API ncclResult_t ncclCommInitRank(ncclComm_t* c, int n, ncclUniqueId id, int rank) {
  if (auto e = attach(c, n, id.internal, rank))
    return e;
  if (tDepth) {
    tInit.push_back(*c);
    return ncclSuccess;
  }
  return waitInit(*c);
}
API ncclResult_t ncclCommInitRankConfig(ncclComm_t* c, int n, ncclUniqueId id, int rank,
                                        ncclConfig_t* config) {
  if (!config || config->blocking != 0)
    return ncclCommInitRank(c, n, id, rank);
  if (auto e = attach(c, n, id.internal, rank))
    return e;
  (*c)->nonblocking = true;
  return initPending(*c) ? ncclInProgress : ncclSuccess;
}
API ncclResult_t ncclCommInitRankScalable(ncclComm_t* c, int n, int rank, int, ncclUniqueId* id,
                                          ncclConfig_t*) {
  return ncclCommInitRank(c, n, id[0], rank);
}
API ncclResult_t ncclCommInitAll(ncclComm_t* c, int n, const int* devs) {
  ncclUniqueId id;
  ncclGetUniqueId(&id);
  int old;
  cudaGetDevice(&old);
  for (int i = 0; i < n; i++) {
    cudaSetDevice(devs ? devs[i] : i);
    if (auto e = attach(&c[i], n, id.internal, i))
      return e;
    c[i]->waitedInit = true;
  }
  cudaSetDevice(old);
  shm_unlink(c[0]->name.c_str());
  return ncclSuccess;
}
API ncclResult_t ncclCommSplit(ncclComm_t c, int color, int key, ncclComm_t* out, ncclConfig_t*) {
  Slot& me = c->ctl->r[c->rank];
  uint64_t g = ++c->splitGen;
  double t0 = now();
  auto all = [&](uint64_t v) {
    for (int r = 0; r < c->n; r++)
      while (c->ctl->r[r].splitGen < v) {
        if (now() - t0 > timeoutS())
          return false;
        usleep(200);
      }
    return true;
  };
  me.color = color;
  me.key = key;
  me.splitGen = 2 * g - 1;
  if (!all(2 * g - 1))
    return bad("ncclCommSplit timeout", ncclSystemError);
  std::vector<std::pair<int, int>> v;
  for (int r = 0; r < c->n; r++)
    if (c->ctl->r[r].color == color)
      v.push_back({c->ctl->r[r].key, r});
  std::sort(v.begin(), v.end());
  int nr = -1;
  for (size_t i = 0; i < v.size(); i++)
    if (v[i].second == c->rank)
      nr = (int)i;
  me.splitGen = 2 * g;
  if (!all(2 * g))
    return bad("ncclCommSplit timeout", ncclSystemError);
  *out = nullptr;
  if (color == NCCL_SPLIT_NOCOLOR)
    return ncclSuccess;
  std::string id = c->name.substr(13) + strf("-%llu-%d", (unsigned long long)g, color);
  if (auto e = attach(out, (int)v.size(), id.c_str(), nr))
    return e;
  return waitInit(*out);
}
API ncclResult_t ncclCommFinalize(ncclComm_t) {
  return ncclSuccess;
}
API ncclResult_t ncclCommDestroy(ncclComm_t c) {
  if (!c)
    return ncclSuccess;
  if (c->nonblocking && c->rank == 0)
    shm_unlink(c->name.c_str());
  double t0 = now();
  bool idle = false; // finish queued operations first
  while (!(idle = c->doneSeq == c->nextSeq) && !c->async && now() - t0 < timeoutS()) {
    cudaSetDevice(c->dev);
    if (cudaDeviceSynchronize())
      break;
  }
  t0 = now();
  if (idle)
    for (int r = 0; r < c->n; r++)
      while (c->ctl->r[r].consumed < c->doneSeq && now() - t0 < 5 && alive(c->ctl->r[r].pid) &&
             c->ctl->r[r].pid != getpid())
        usleep(200);  // others still read my buffer
  return ncclSuccess; // kept mapped: peers may be a step behind
}
API ncclResult_t ncclCommAbort(ncclComm_t c) {
  if (c) {
    c->aborted = true;
    c->ctl->r[c->rank].aborted = 1;
  }
  return ncclSuccess;
}
API ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t* e) {
  *e = c->async ? c->async : c->nonblocking && initPending(c) ? ncclInProgress : ncclSuccess;
  return ncclSuccess;
}
API ncclResult_t ncclCommCount(const ncclComm_t c, int* n) {
  *n = c->n;
  return ncclSuccess;
}
API ncclResult_t ncclCommUserRank(const ncclComm_t c, int* r) {
  *r = c->rank;
  return ncclSuccess;
}
API ncclResult_t ncclCommCuDevice(const ncclComm_t c, int* d) {
  *d = c->dev;
  return ncclSuccess;
}
API ncclResult_t ncclMemAlloc(void** p, size_t n) {
  return cudaMalloc(p, n) ? ncclUnhandledCudaError : ncclSuccess;
}
API ncclResult_t ncclMemFree(void* p) {
  return cudaFree(p) ? ncclUnhandledCudaError : ncclSuccess;
}
API ncclResult_t ncclCommRegister(const ncclComm_t, void* b, size_t, void** h) {
  *h = b;
  return ncclSuccess;
}
API ncclResult_t ncclCommDeregister(const ncclComm_t, void*) {
  return ncclSuccess;
}
API ncclResult_t ncclCommWindowRegister(ncclComm_t, void* b, size_t, ncclWindow_t* w, int) {
  *w = (ncclWindow_t)b;
  return ncclSuccess;
}
API ncclResult_t ncclCommWindowDeregister(ncclComm_t, ncclWindow_t) {
  return ncclSuccess;
}
API ncclResult_t ncclAllGather(const void* s, void* r, size_t n, ncclDataType_t t, ncclComm_t c,
                               cudaStream_t st) {
  return post(c, K_ALLGATHER, s, r, n, t, 0, 0, st);
}
API ncclResult_t ncclAllReduce(const void* s, void* r, size_t n, ncclDataType_t t, ncclRedOp_t op,
                               ncclComm_t c, cudaStream_t st) {
  return post(c, K_ALLREDUCE, s, r, n, t, op, 0, st);
}
API ncclResult_t ncclReduceScatter(const void* s, void* r, size_t n, ncclDataType_t t,
                                   ncclRedOp_t op, ncclComm_t c, cudaStream_t st) {
  return post(c, K_REDUCESCATTER, s, r, n, t, op, 0, st);
}
API ncclResult_t ncclBroadcast(const void* s, void* r, size_t n, ncclDataType_t t, int root,
                               ncclComm_t c, cudaStream_t st) {
  return post(c, K_BROADCAST, s, r, n, t, 0, root, st);
}
API ncclResult_t ncclBcast(void* b, size_t n, ncclDataType_t t, int root, ncclComm_t c,
                           cudaStream_t st) {
  return post(c, K_BROADCAST, b, b, n, t, 0, root, st);
}
API ncclResult_t ncclReduce(const void* s, void* r, size_t n, ncclDataType_t t, ncclRedOp_t op,
                            int root, ncclComm_t c, cudaStream_t st) {
  return post(c, K_REDUCE, s, r, n, t, op, root, st);
}
API ncclResult_t ncclAlltoAll(const void* s, void* r, size_t n, ncclDataType_t t, ncclComm_t c,
                              cudaStream_t st) {
  return post(c, K_ALLTOALL, s, r, n, t, 0, 0, st);
}
API ncclResult_t ncclSend(const void* s, size_t n, ncclDataType_t t, int peer, ncclComm_t c,
                          cudaStream_t st) {
  return post(c, K_SEND, s, nullptr, n, t, 0, peer, st);
}
API ncclResult_t ncclRecv(void* r, size_t n, ncclDataType_t t, int peer, ncclComm_t c,
                          cudaStream_t st) {
  return post(c, K_RECV, nullptr, r, n, t, 0, peer, st);
}
API ncclResult_t ncclGroupStart() {
  tDepth++;
  return ncclSuccess;
}
API ncclResult_t ncclGroupEnd() {
  if (tDepth == 0)
    return bad("ncclGroupEnd without start", ncclInvalidUsage);
  if (--tDepth)
    return ncclSuccess;
  for (auto* c : tInit)
    if (!c->waitedInit)
      if (auto e = waitInit(c))
        return e;
  tInit.clear();
  return flushGroup();
}
API ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t*, void*, ncclDataType_t,
                                          ncclScalarResidence_t, ncclComm_t) {
  return bad("PreMulSum is not supported", ncclInvalidUsage);
}
API ncclResult_t ncclRedOpDestroy(ncclRedOp_t, ncclComm_t) {
  return ncclSuccess;
}
