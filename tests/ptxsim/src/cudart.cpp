// SPDX-License-Identifier: Apache-2.0
// cudart.cpp - the stand-in libcudart.so.13: CUDA runtime API on top of Runtime (streams), DevMem
// and the PTX engine, plus the __cudaRegister* entry points of nvcc's generated host code.
// Functions that are not here are generated stubs that print their name and return
// cudaErrorNotSupported (gen_stubs.py).
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unistd.h>
#define __CUDA_API_VERSION_INTERNAL 1
#include "fatbin.h"
#include "stream.h"
#include <cuda_runtime_api.h>

using namespace ptx;
#define API extern "C" __attribute__((visibility("default")))
using Err = cudaError_t;

namespace {
thread_local Err tLast = cudaSuccess;
thread_local int tDev = 0;
Runtime& rt() {
  return Runtime::get();
}
DevMem& dm() {
  return DevMem::get();
}
using Guard = std::lock_guard<Lock>;
Err ret(int e) {
  if (e && !(e == cudaErrorNotReady))
    tLast = (Err)e;
  return (Err)e;
}
Err warn(int e, const char* fn, const std::string& m) {
  fprintf(stderr, "ptxsim: %s: %s (%s)\n", fn, m.c_str(), cudaGetErrorName((Err)e));
  return ret(e);
}
bool forked() {
  static int pid = getpid();
  return pid != getpid();
} // CUDA does not survive fork()
#define ENTER                                                                                      \
  Guard guard_(rt().mu);                                                                           \
  if (forked())                                                                                    \
    return ret(cudaErrorInitializationError);                                                      \
  if (rt().devices == 0)                                                                           \
    return ret(cudaErrorNoDevice);                                                                 \
  if (rt().sticky)                                                                                 \
  return ret(rt().sticky)

// ---------------------------------------------------------------- modules and kernels
struct FatHandle {
  const void* data = nullptr;
  bool read = false;
  FatBin fb;
  std::map<int, std::unique_ptr<Module>> mod;
};
struct Kern {
  FatHandle* fat;
  std::string name;
  int maxDyn = 48 * 1024;
  int carveout = -1;
};
struct HostVar {
  FatHandle* fat;
  std::string name;
  size_t size;
  bool managed = false;
  void** mptr = nullptr;
};
std::map<const void*, Kern*>& kernels() {
  static auto* m = new std::map<const void*, Kern*>;
  return *m;
}
std::map<const void*, HostVar>& hostVars() {
  static auto* m = new std::map<const void*, HostVar>;
  return *m;
}
std::set<Kern*>& kernSet() {
  static auto* m = new std::set<Kern*>;
  return *m;
}

Module* moduleOn(FatHandle* h, int dev) {
  auto& slot = h->mod[dev];
  if (slot)
    return slot.get();
  if (!h->read) {
    h->fb = readFatbin(h->data);
    h->read = true;
  }
  const FatPtx* best = nullptr;
  for (auto& p : h->fb.ptx) {
    int a = p.arch;
    bool spec = p.text.find(".target sm_" + std::to_string(a) + "a") != std::string::npos ||
                p.text.find(".target sm_" + std::to_string(a) + "f") != std::string::npos;
    if (a > rt().sm || (spec && a != rt().sm))
      continue;
    if (!best || a >= best->arch)
      best = &p;
  }
  if (!best) {
    std::string have;
    for (auto& p : h->fb.ptx)
      have += " compute_" + std::to_string(p.arch);
    throw SimError(strf("no PTX that runs on sm_%d in this binary (has:%s)%s%s; keep a "
                        "code=compute_XX target in the build",
                        rt().sm, have.empty() ? " none" : have.c_str(),
                        h->fb.note.empty() ? "" : "; ", h->fb.note.c_str()),
                   cudaErrorNoKernelImageForDevice);
  }
  static int serial = 0;
  std::string src = strf("module%d.compute_%d.ptx", serial++, best->arch);
  if (const char* d = getenv("PTXSIM_DUMP_PTX")) {
    FILE* f = fopen((std::string(d) + "/" + src).c_str(), "w");
    if (f) {
      fwrite(best->text.data(), 1, best->text.size(), f);
      fclose(f);
    }
  }
  auto m = parseModule(best->text, src);
  m->device = dev;
  loadModule(*m);
  slot = std::move(m);
  return slot.get();
}
Kern* kernOf(const void* f) {
  auto it = kernels().find(f);
  if (it != kernels().end())
    return it->second;
  return kernSet().count((Kern*)f) ? (Kern*)f : nullptr;
}
Function* functionOn(Kern* k, int dev, Module** mod) {
  Module* m = moduleOn(k->fat, dev);
  auto it = m->funcs.find(k->name);
  if (it == m->funcs.end() || !it->second->defined)
    throw SimError("kernel " + k->name + " has no PTX in this module",
                   cudaErrorInvalidDeviceFunction);
  prepare(*m, *it->second);
  *mod = m;
  return it->second.get();
}
int regsOf(Kern* k) {
  if (!k->fat->read) {
    k->fat->fb = readFatbin(k->fat->data);
    k->fat->read = true;
  }
  int r = 0;
  for (auto& a : k->fat->fb.regs)
    if (a.first <= rt().sm) {
      auto it = a.second.find(k->name);
      if (it != a.second.end())
        r = it->second;
    }
  return r ? r : 32;
}
struct Dev {
  int major, minor, sms, smemSm, smemOptin, l2, maxWarps, maxBlocks;
  const char* name;
  size_t mem;
};
const Dev& devInfo() {
  static const Dev a = {8, 0, 108, 167936, 166912, 40 << 20, 64, 32, "ptxsim A100-like", 0},
                   h = {9, 0, 132, 233472, 232448, 50 << 20, 64, 32, "ptxsim H100-like", 0},
                   b = {10, 0, 148, 233472, 232448, 126 << 20, 64, 32, "ptxsim B200-like", 0};
  return rt().sm >= 100 ? b : rt().sm >= 90 ? h : a;
}
int occupancy(Kern* k, int block, size_t dyn) {
  Module* m;
  Function* f = functionOn(k, tDev, &m);
  const Dev& d = devInfo();
  int warps = (block + 31) / 32;
  if (block <= 0 || block > 1024)
    return 0;
  int r = (regsOf(k) * 32 + 255) / 256 * 256, byReg = 65536 / (r * ((warps + 3) / 4 * 4)),
      byWarp = d.maxWarps / warps;
  size_t sm = f->staticShared + dyn + 1024;
  sm = (sm + 127) / 128 * 128;
  int bySm = (int)(d.smemSm / sm);
  return std::min({byReg, byWarp, bySm, d.maxBlocks});
}

// ---------------------------------------------------------------- handles
struct EventH {
  std::shared_ptr<Event> e;
};
std::set<EventH*>& events() {
  static auto* s = new std::set<EventH*>;
  return *s;
}
thread_local Stream* tPerThread[64] = {};
Stream* stream(cudaStream_t h) {
  uintptr_t v = (uintptr_t)h;
  if (v <= 1)
    return rt().legacy(tDev);
  if (v == 2) {
    if (!tPerThread[tDev])
      tPerThread[tDev] = rt().create(tDev, true, 0);
    return tPerThread[tDev];
  }
  for (auto& s : rt().streams)
    if (s.get() == (Stream*)h && !s->dead && !s->legacy)
      return s.get();
  return nullptr;
}
Event* event(cudaEvent_t h) {
  return events().count((EventH*)h) ? ((EventH*)h)->e.get() : nullptr;
}
int captureCheck(const char* fn) {
  if (!rt().anyGlobalCapture())
    return 0;
  rt().invalidateCaptures();
  fprintf(stderr, "ptxsim: %s is not allowed while a stream is being captured\n", fn);
  return cudaErrorStreamCaptureUnsupported;
}
#define NOCAP(fn)                                                                                  \
  if (int e_ = captureCheck(fn))                                                                   \
  return ret(e_)
#define STREAM(s, h)                                                                               \
  Stream* s = stream(h);                                                                           \
  if (!s)                                                                                          \
  return warn(cudaErrorInvalidResourceHandle, __func__, "bad stream handle")

// ---------------------------------------------------------------- copies
// Pointer the simulator may use for a copy. dir 'd' device-accessible required, 'h' host required,
// '?' either.
char* copyPtr(const void* p, size_t n, char dir, std::string* why, bool* pageable) {
  const Range* r = dm().find((uint64_t)p);
  *pageable = false;
  if (r) {
    if (dir == 'h' && r->kind == Range::DEVICE) {
      *why = "device pointer where the copy kind says host";
      return nullptr;
    }
    if ((uint64_t)p + n > r->end()) {
      *why = strf("copy runs %llu bytes past the end of a %llu-byte allocation",
                  (unsigned long long)((uint64_t)p + n - r->end()), (unsigned long long)r->size);
      return nullptr;
    }
    return r->sim((uint64_t)p);
  }
  if (dir == 'd') {
    *why = "not a live device pointer";
    return nullptr;
  }
  *pageable = true;
  return (char*)p;
}
Err copy(void* dst, const void* src, size_t n, cudaMemcpyKind kind, Stream* s, bool sync,
         const char* fn) {
  if (!n)
    return ret(0);
  std::string why;
  bool pd = false, ps = false;
  char dd = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice ? 'd'
            : kind == cudaMemcpyDefault                                        ? '?'
                                                                               : 'h';
  char ds = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice ? 'd'
            : kind == cudaMemcpyDefault                                        ? '?'
                                                                               : 'h';
  if (!dst || !src)
    return warn(cudaErrorInvalidValue, fn, "null pointer");
  if (!copyPtr(dst, n, dd, &why, &pd))
    return warn(cudaErrorInvalidValue, fn, "destination: " + why);
  if (!copyPtr(src, n, ds, &why, &ps))
    return warn(cudaErrorInvalidValue, fn, "source: " + why);
  if (s->cap && sync) {
    rt().invalidateCaptures();
    return ret(cudaErrorStreamCaptureUnsupported);
  }
  std::shared_ptr<std::vector<char>> staged;
  if (ps && !s->cap)
    staged = std::make_shared<std::vector<char>>(
        (const char*)src, (const char*)src + n); // pageable sources are read at the call
  auto op = [=]() -> bool {
    std::string w;
    bool x;
    char* d = copyPtr(dst, n, '?', &w, &x);
    if (!d)
      throw SimError(std::string(fn) + ": destination freed before the copy ran: " + w, 700);
    const char* q = staged ? staged->data() : copyPtr(src, n, '?', &w, &x);
    if (!q)
      throw SimError(std::string(fn) + ": source freed before the copy ran: " + w, 700);
    if (!staged)
      touchRange((uint64_t)src, n, false);
    touchRange((uint64_t)dst, n, true);
    memmove(d, q, n);
    return true;
  };
  if (int e = rt().enqueueFn(s, strf("%s %zu bytes", fn, n), op, cudaGraphNodeTypeMemcpy))
    return ret(e);
  if (sync || (pd && !s->cap))
    return ret(rt().waitStream(s));
  return ret(0);
}
Err fill(void* p, int v, size_t n, Stream* s, bool sync, const char* fn) {
  std::string why;
  bool pg;
  if (!n)
    return ret(0);
  if (!copyPtr(p, n, 'd', &why, &pg))
    return warn(cudaErrorInvalidValue, fn, why);
  if (int e = rt().enqueueFn(
          s, fn,
          [=]() -> bool {
            std::string w;
            bool x;
            char* d = copyPtr(p, n, 'd', &w, &x);
            if (!d)
              throw SimError(std::string(fn) + ": " + w, 700);
            touchRange((uint64_t)p, n, true);
            memset(d, v, n);
            return true;
          },
          cudaGraphNodeTypeMemset))
    return ret(e);
  (void)sync;
  return ret(0);
}
Err launch(const void* func, dim3 g, dim3 b, void** args, size_t smem, cudaStream_t st, bool coop) {
  Kern* k = kernOf(func);
  if (!k)
    return warn(cudaErrorInvalidDeviceFunction, "launch", "unknown kernel");
  STREAM(s, st);
  if (s->device != tDev)
    return warn(cudaErrorInvalidResourceHandle, k->name.c_str(),
                strf("stream of device %d used while device %d is current", s->device, tDev));
  auto L = std::make_shared<Launch>();
  try {
    Function* f = functionOn(k, tDev, &L->mod);
    L->fn = f;
    const Dev& d = devInfo();
    uint64_t n = (uint64_t)b.x * b.y * b.z;
    if (!g.x || !g.y || !g.z || !n || n > 1024 || b.x > 1024 || b.y > 1024 || b.z > 64 ||
        g.y > 65535 || g.z > 65535 || g.x > 2147483647u)
      return warn(cudaErrorInvalidConfiguration, k->name.c_str(),
                  strf("grid %u,%u,%u block %u,%u,%u", g.x, g.y, g.z, b.x, b.y, b.z));
    if (f->reqntid[0] &&
        ((int)b.x != f->reqntid[0] || (int)b.y != f->reqntid[1] || (int)b.z != f->reqntid[2]))
      return warn(cudaErrorInvalidValue, k->name.c_str(), "block differs from __block_size__");
    if (f->maxntid && (int)n > f->maxntid)
      return warn(cudaErrorLaunchFailure, k->name.c_str(),
                  strf("block of %llu threads exceeds __launch_bounds__ %d", (unsigned long long)n,
                       f->maxntid));
    if ((int)smem > k->maxDyn)
      return warn(cudaErrorInvalidValue, k->name.c_str(),
                  strf("%zu bytes of dynamic shared memory, but only %d are allowed without "
                       "cudaFuncSetAttribute",
                       smem, k->maxDyn));
    if (smem + f->staticShared > (size_t)d.smemOptin)
      return warn(cudaErrorInvalidValue, k->name.c_str(), "too much shared memory");
    if (regsOf(k) * ((n + 31) / 32 * 32) > 65536)
      return warn(cudaErrorLaunchOutOfResources, k->name.c_str(),
                  strf("%d registers x %llu threads", regsOf(k), (unsigned long long)n));
    if (f->clusterX > 1)
      return warn(cudaErrorNotSupported, k->name.c_str(), "thread block clusters");
    if (coop && (uint64_t)g.x * g.y * g.z > (uint64_t)occupancy(k, (int)n, smem) * d.sms)
      return warn(cudaErrorCooperativeLaunchTooLarge, k->name.c_str(),
                  "cooperative grid does not fit");
    L->params.resize(f->paramBytes);
    for (size_t i = 0; i < f->params.size(); i++)
      memcpy(L->params.data() + f->params[i]->offset, args[i], f->params[i]->size);
  } catch (const SimError& e) {
    fprintf(stderr, "ptxsim ERROR: %s\n", e.what());
    return ret(e.code);
  }
  L->device = tDev;
  L->grid[0] = g.x;
  L->grid[1] = g.y;
  L->grid[2] = g.z;
  L->blockDim[0] = b.x;
  L->blockDim[1] = b.y;
  L->blockDim[2] = b.z;
  L->dynSmem = (uint32_t)smem;
  L->cooperative = coop;
  return ret(rt().enqueueFn(
      s, "kernel " + k->name,
      [L]() -> bool {
        L->c = Counters();
        L->run();
        return true;
      },
      cudaGraphNodeTypeKernel));
}
struct CallCfg {
  dim3 g, b;
  size_t smem;
  void* st;
};
thread_local std::vector<CallCfg> tCfg;
std::shared_ptr<Graph> graphOf(cudaGraph_t g) {
  return g ? *(std::shared_ptr<Graph>*)g : nullptr;
}
} // namespace

// ================================================================ generated host code
API void** __cudaRegisterFatBinary(void* w) {
  auto* h = new FatHandle;
  struct W {
    int magic, version;
    const void* data;
    void* f;
  };
  auto* p = (W*)w;
  if (p->magic == 0x466243b1)
    h->data = p->data;
  else
    h->data = w;
  return (void**)h;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) {
  return 1;
}
API void __cudaRegisterFunction(void** h, const char* host, char*, const char* name, int, void*,
                                void*, void*, void*, int*) {
  auto* k = new Kern{(FatHandle*)h, name};
  Guard g(rt().mu);
  kernels()[host] = k;
  kernSet().insert(k);
}
API void __cudaRegisterVar(void** h, char* host, char*, const char* name, int, size_t size, int,
                           int) {
  Guard g(rt().mu);
  hostVars()[host] = {(FatHandle*)h, name, size};
}
API void __cudaRegisterManagedVar(void**, void**, char*, const char* name, int, size_t, int, int) {
  fprintf(stderr, "ptxsim: __managed__ variable %s is not supported\n", name);
}
API void __cudaRegisterHostVar(void**, const char*, char*, size_t) {}
API void __cudaRegisterUnifiedTable(void*, void*) {}
API unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t smem, void* st) {
  tCfg.push_back({g, b, smem, st});
  return 0;
}
API Err __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* smem, void* st) {
  if (tCfg.empty())
    return cudaErrorUnknown;
  auto c = tCfg.back();
  tCfg.pop_back();
  *g = c.g;
  *b = c.b;
  *smem = c.smem;
  *(void**)st = c.st;
  return cudaSuccess;
}
API Err __cudaGetKernel(cudaKernel_t* k, const void* f) {
  Guard g(rt().mu);
  Kern* x = kernOf(f);
  if (!x)
    return cudaErrorInvalidDeviceFunction;
  *k = (cudaKernel_t)x;
  return cudaSuccess;
}
API Err __cudaLaunchKernel(cudaKernel_t k, dim3 g, dim3 b, void** a, size_t sm, cudaStream_t s) {
  ENTER;
  return launch(k, g, b, a, sm, s, false);
}
API Err __cudaLaunchKernel_ptsz(cudaKernel_t k, dim3 g, dim3 b, void** a, size_t sm,
                                cudaStream_t s) {
  ENTER;
  return launch(k, g, b, a, sm, s ? s : (cudaStream_t)2, false);
}

// ================================================================ devices
API Err cudaGetDeviceCount(int* n) {
  *n = rt().devices;
  return rt().devices ? ret(0) : ret(cudaErrorNoDevice);
}
API Err cudaGetDevice(int* d) {
  *d = tDev;
  return ret(rt().devices ? 0 : cudaErrorNoDevice);
}
API Err cudaSetDevice(int d) {
  if (d < 0 || d >= rt().devices)
    return ret(cudaErrorInvalidDevice);
  tDev = d;
  return ret(rt().sticky);
}
API Err cudaInitDevice(int d, unsigned, unsigned) {
  return ret(d < rt().devices ? 0 : cudaErrorInvalidDevice);
}
API Err cudaSetDeviceFlags(unsigned) {
  return ret(0);
}
API Err cudaGetDeviceFlags(unsigned* f) {
  *f = 0;
  return ret(0);
}
API Err cudaDeviceSynchronize() {
  ENTER;
  NOCAP("cudaDeviceSynchronize");
  return ret(rt().waitDevice(tDev));
}
API Err cudaDeviceReset() {
  ENTER;
  return ret(rt().waitDevice(tDev));
}
API Err cudaDriverGetVersion(int* v) {
  *v = 13000;
  return ret(0);
}
API Err cudaRuntimeGetVersion(int* v) {
  *v = 13000;
  return ret(0);
}
API Err cudaDeviceSetLimit(cudaLimit, size_t) {
  return ret(0);
}
API Err cudaDeviceGetLimit(size_t* v, cudaLimit l) {
  *v = l == cudaLimitStackSize ? 1024 : l == cudaLimitPrintfFifoSize ? 1 << 20 : 8 << 20;
  return ret(0);
}
API Err cudaDeviceGetStreamPriorityRange(int* lo, int* hi) {
  if (lo)
    *lo = 0;
  if (hi)
    *hi = -5;
  return ret(0);
}
API Err cudaDeviceGetPCIBusId(char* s, int n, int d) {
  snprintf(s, n, "0000:%02x:00.0", d + 1);
  return ret(0);
}
API Err cudaDeviceSetCacheConfig(cudaFuncCache) {
  return ret(0);
}
API Err cudaDeviceCanAccessPeer(int* v, int a, int b) {
  *v = a != b;
  return ret(0);
}
API Err cudaDeviceEnablePeerAccess(int p, unsigned) {
  Guard g(rt().mu);
  if (p == tDev || p >= rt().devices)
    return ret(cudaErrorInvalidDevice);
  if (dm().peer(tDev, p))
    return ret(cudaErrorPeerAccessAlreadyEnabled);
  dm().enablePeer(tDev, p, true);
  return ret(0);
}
API Err cudaDeviceDisablePeerAccess(int p) {
  Guard g(rt().mu);
  if (!dm().peer(tDev, p))
    return ret(cudaErrorPeerAccessNotEnabled);
  dm().enablePeer(tDev, p, false);
  return ret(0);
}
API Err cudaGetDeviceProperties(cudaDeviceProp* p, int d) {
  if (d < 0 || d >= rt().devices)
    return ret(cudaErrorInvalidDevice);
  memset(p, 0, sizeof *p);
  const Dev& i = devInfo();
  snprintf(p->name, sizeof p->name, "%s", i.name);
  p->major = i.major;
  p->minor = i.minor;
  p->totalGlobalMem = dm().capacity();
  p->sharedMemPerBlock = 49152;
  p->regsPerBlock = 65536;
  p->warpSize = 32;
  p->memPitch = 2147483647;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536;
  p->textureAlignment = 512;
  p->multiProcessorCount = i.sms;
  p->concurrentKernels = 1;
  p->asyncEngineCount = 3;
  p->unifiedAddressing = 1;
  p->managedMemory = 1;
  p->canMapHostMemory = 1;
  p->memoryBusWidth = 5120;
  p->l2CacheSize = i.l2;
  p->maxThreadsPerMultiProcessor = i.maxWarps * 32;
  p->streamPrioritiesSupported = 1;
  p->sharedMemPerMultiprocessor = i.smemSm;
  p->regsPerMultiprocessor = 65536;
  p->cooperativeLaunch = 1;
  p->sharedMemPerBlockOptin = i.smemOptin;
  p->maxBlocksPerMultiProcessor = i.maxBlocks;
  p->reservedSharedMemPerBlock = 1024;
  p->memoryPoolsSupported = 1;
  p->pciBusID = d + 1;
  p->uuid.bytes[0] = (char)(d + 1);
  p->persistingL2CacheMaxSize = i.l2 / 4;
  return ret(0);
}
API Err cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int d) {
  if (d < 0 || d >= rt().devices)
    return ret(cudaErrorInvalidDevice);
  const Dev& i = devInfo();
  switch (a) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: *v = 1024; break;
    case cudaDevAttrMaxBlockDimZ: *v = 64; break;
    case cudaDevAttrMaxGridDimX: *v = 2147483647; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *v = 65535; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *v = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = i.smemOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *v = i.smemSm; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *v = 1024; break;
    case cudaDevAttrMultiProcessorCount: *v = i.sms; break;
    case cudaDevAttrComputeCapabilityMajor: *v = i.major; break;
    case cudaDevAttrComputeCapabilityMinor: *v = i.minor; break;
    case cudaDevAttrWarpSize: *v = 32; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *v = 65536; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *v = i.maxWarps * 32; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *v = i.maxBlocks; break;
    case cudaDevAttrL2CacheSize: *v = i.l2; break;
    case cudaDevAttrClockRate: *v = 1410000; break;
    case cudaDevAttrMemoryClockRate: *v = 1215000; break;
    case cudaDevAttrGlobalMemoryBusWidth: *v = 5120; break;
    case cudaDevAttrTotalConstantMemory: *v = 65536; break;
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrManagedMemory:
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrStreamPrioritiesSupported:
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrGpuOverlap:
    case cudaDevAttrHostRegisterSupported:
    case cudaDevAttrCanUseHostPointerForRegisteredMem: *v = 1; break;
    case cudaDevAttrAsyncEngineCount: *v = 3; break;
    default: *v = 0;
  }
  return ret(0);
}
// ================================================================ errors
API Err cudaGetLastError() {
  Err e = tLast;
  tLast = rt().sticky ? (Err)rt().sticky : cudaSuccess;
  return e ? e : (Err)rt().sticky;
}
API Err cudaPeekAtLastError() {
  return tLast ? tLast : (Err)rt().sticky;
}
API const char* cudaGetErrorName(Err e) {
  switch (e) {
#define N(x)                                                                                       \
  case x: return #x
    N(cudaSuccess);
    N(cudaErrorInvalidValue);
    N(cudaErrorMemoryAllocation);
    N(cudaErrorInvalidConfiguration);
    N(cudaErrorInvalidDevice);
    N(cudaErrorNoDevice);
    N(cudaErrorInvalidResourceHandle);
    N(cudaErrorNotReady);
    N(cudaErrorIllegalAddress);
    N(cudaErrorLaunchFailure);
    N(cudaErrorLaunchOutOfResources);
    N(cudaErrorLaunchTimeout);
    N(cudaErrorMisalignedAddress);
    N(cudaErrorAssert);
    N(cudaErrorNotSupported);
    N(cudaErrorInvalidDeviceFunction);
    N(cudaErrorNoKernelImageForDevice);
    N(cudaErrorInvalidPtx);
    N(cudaErrorStreamCaptureUnsupported);
    N(cudaErrorStreamCaptureInvalidated);
    N(cudaErrorStreamCaptureMerge);
    N(cudaErrorStreamCaptureUnmatched);
    N(cudaErrorStreamCaptureUnjoined);
    N(cudaErrorStreamCaptureIsolation);
    N(cudaErrorStreamCaptureImplicit);
    N(cudaErrorPeerAccessAlreadyEnabled);
    N(cudaErrorPeerAccessNotEnabled);
    N(cudaErrorCooperativeLaunchTooLarge);
    N(cudaErrorHostMemoryAlreadyRegistered);
    N(cudaErrorHostMemoryNotRegistered);
    N(cudaErrorUnknown);
    N(cudaErrorInvalidSymbol);
    N(cudaErrorIllegalState);
    N(cudaErrorSymbolNotFound);
    N(cudaErrorInvalidDevicePointer);
#undef N
    default: return "cudaErrorOther";
  }
}
API const char* cudaGetErrorString(Err e) {
  switch (e) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorNotReady: return "device not ready";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorMisalignedAddress: return "misaligned address";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    default: return cudaGetErrorName(e);
  }
}
// ================================================================ memory
API Err cudaMalloc(void** p, size_t n) {
  ENTER;
  NOCAP("cudaMalloc");
  if (!p)
    return ret(cudaErrorInvalidValue);
  *p = nullptr;
  if (!n)
    return ret(0);
  *p = (void*)dm().alloc(tDev, n);
  return ret(*p ? 0 : cudaErrorMemoryAllocation);
}
API Err cudaFree(void* p) {
  ENTER;
  if (!p)
    return ret(0);
  NOCAP("cudaFree");
  rt().waitDevice(tDev);
  if (dm().free((uint64_t)p))
    return ret(0);
  if (dm().find((uint64_t)p) && dm().hostFree(p))
    return ret(0);
  return warn(cudaErrorInvalidValue, "cudaFree", "not the start of a live allocation");
}
API Err cudaMallocAsync(void** p, size_t n, cudaStream_t st) {
  ENTER;
  STREAM(s, st);
  *p = n ? (void*)dm().alloc(s->device, n) : nullptr;
  if (n && !*p)
    return ret(cudaErrorMemoryAllocation);
  return ret(0);
}
API Err cudaMallocFromPoolAsync(void** p, size_t n, cudaMemPool_t, cudaStream_t st) {
  return cudaMallocAsync(p, n, st);
}
API Err cudaFreeAsync(void* p, cudaStream_t st) {
  ENTER;
  if (!p)
    return ret(0);
  STREAM(s, st);
  const Range* r = dm().find((uint64_t)p);
  if (!r || r->base != (uint64_t)p)
    return warn(cudaErrorInvalidValue, "cudaFreeAsync", "not a live allocation");
  if (s->cap)
    return ret(rt().enqueueFn(s, "free (graph)", [] { return true; }));
  return ret(rt().enqueueFn(s, "cudaFreeAsync", [p] {
    dm().free((uint64_t)p);
    return true;
  }));
}
API Err cudaHostAlloc(void** p, size_t n, unsigned) {
  ENTER;
  *p = n ? dm().hostAlloc(n, Range::PINNED, tDev) : nullptr;
  return ret(n && !*p ? cudaErrorMemoryAllocation : 0);
}
API Err cudaMallocHost(void** p, size_t n) {
  return cudaHostAlloc(p, n, 0);
}
API Err cudaMallocManaged(void** p, size_t n, unsigned) {
  ENTER;
  *p = dm().hostAlloc(n, Range::MANAGED, tDev);
  return ret(*p ? 0 : cudaErrorMemoryAllocation);
}
API Err cudaFreeHost(void* p) {
  ENTER;
  if (!p)
    return ret(0);
  rt().waitDevice(tDev);
  return ret(dm().hostFree(p) ? 0 : cudaErrorInvalidValue);
}
API Err cudaHostRegister(void* p, size_t n, unsigned) {
  ENTER;
  return ret(dm().registerHost(p, n) ? 0 : cudaErrorHostMemoryAlreadyRegistered);
}
API Err cudaHostUnregister(void* p) {
  ENTER;
  return ret(dm().unregisterHost(p) ? 0 : cudaErrorHostMemoryNotRegistered);
}
API Err cudaHostGetDevicePointer(void** d, void* h, unsigned) {
  ENTER;
  const Range* r = dm().find((uint64_t)h);
  if (!r)
    return ret(cudaErrorInvalidValue);
  *d = h;
  return ret(0);
}
API Err cudaHostGetFlags(unsigned* f, void*) {
  *f = 0;
  return ret(0);
}
API Err cudaMallocPitch(void** p, size_t* pitch, size_t w, size_t h) {
  *pitch = (w + 511) / 512 * 512;
  return cudaMalloc(p, *pitch * h);
}
API Err cudaMemGetInfo(size_t* f, size_t* t) {
  ENTER;
  *t = dm().capacity();
  *f = *t - dm().used(tDev);
  return ret(0);
}
API Err cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  ENTER;
  memset(a, 0, sizeof *a);
  const Range* r = dm().find((uint64_t)p);
  if (!r) {
    a->type = cudaMemoryTypeUnregistered;
    a->device = -2;
    a->hostPointer = (void*)p;
    return ret(0);
  }
  a->device = r->device;
  a->devicePointer = (void*)p;
  if (r->kind == Range::DEVICE)
    a->type = cudaMemoryTypeDevice;
  else {
    a->type = r->kind == Range::MANAGED ? cudaMemoryTypeManaged : cudaMemoryTypeHost;
    a->hostPointer = (void*)p;
  }
  return ret(0);
}
API Err cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind k) {
  ENTER;
  NOCAP("cudaMemcpy");
  return copy(d, s, n, k, rt().legacy(tDev), true, "cudaMemcpy");
}
API Err cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind k, cudaStream_t st) {
  ENTER;
  STREAM(q, st);
  return copy(d, s, n, k, q, false, "cudaMemcpyAsync");
}
API Err cudaMemcpyPeer(void* d, int, const void* s, int, size_t n) {
  ENTER;
  return copy(d, s, n, cudaMemcpyDeviceToDevice, rt().legacy(tDev), true, "cudaMemcpyPeer");
}
API Err cudaMemcpyPeerAsync(void* d, int, const void* s, int, size_t n, cudaStream_t st) {
  ENTER;
  STREAM(q, st);
  return copy(d, s, n, cudaMemcpyDeviceToDevice, q, false, "cudaMemcpyPeerAsync");
}
API Err cudaMemcpy2DAsync(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h,
                          cudaMemcpyKind k, cudaStream_t st) {
  for (size_t i = 0; i < h; i++)
    if (Err e = cudaMemcpyAsync((char*)d + i * dp, (const char*)s + i * sp, w, k, st))
      return e;
  return ret(0);
}
API Err cudaMemcpy2D(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h,
                     cudaMemcpyKind k) {
  for (size_t i = 0; i < h; i++)
    if (Err e = cudaMemcpy((char*)d + i * dp, (const char*)s + i * sp, w, k))
      return e;
  return ret(0);
}
API Err cudaMemset(void* p, int v, size_t n) {
  ENTER;
  NOCAP("cudaMemset");
  return fill(p, v, n, rt().legacy(tDev), false, "cudaMemset");
}
API Err cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t st) {
  ENTER;
  STREAM(s, st);
  return fill(p, v, n, s, false, "cudaMemsetAsync");
}
API Err cudaMemset2DAsync(void* p, size_t pitch, int v, size_t w, size_t h, cudaStream_t st) {
  for (size_t i = 0; i < h; i++)
    if (Err e = cudaMemsetAsync((char*)p + i * pitch, v, w, st))
      return e;
  return ret(0);
}
API Err cudaMemset2D(void* p, size_t pitch, int v, size_t w, size_t h) {
  return cudaMemset2DAsync(p, pitch, v, w, h, 0);
}
API Err cudaMemPrefetchAsync(const void*, size_t, cudaMemLocation, unsigned, cudaStream_t) {
  return ret(0);
}
API Err cudaMemAdvise(const void*, size_t, cudaMemoryAdvise, cudaMemLocation) {
  return ret(0);
}
static int thePool;
API Err cudaDeviceGetDefaultMemPool(cudaMemPool_t* p, int) {
  *p = (cudaMemPool_t)&thePool;
  return ret(0);
}
API Err cudaDeviceGetMemPool(cudaMemPool_t* p, int) {
  *p = (cudaMemPool_t)&thePool;
  return ret(0);
}
API Err cudaDeviceSetMemPool(int, cudaMemPool_t) {
  return ret(0);
}
API Err cudaMemPoolCreate(cudaMemPool_t* p, const cudaMemPoolProps*) {
  *p = (cudaMemPool_t) new int;
  return ret(0);
}
API Err cudaMemPoolDestroy(cudaMemPool_t) {
  return ret(0);
}
API Err cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) {
  return ret(0);
}
API Err cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* v) {
  *(uint64_t*)v = 0;
  return ret(0);
}
API Err cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) {
  return ret(0);
}
API Err cudaMemPoolTrimTo(cudaMemPool_t, size_t) {
  return ret(0);
}
// symbols
static Err symbol(const void* sym, uint64_t* a, size_t* size) {
  auto it = hostVars().find(sym);
  if (it == hostVars().end())
    return cudaErrorInvalidSymbol;
  try {
    Module* m = moduleOn(it->second.fat, tDev);
    auto v = m->vars.find(it->second.name);
    if (v == m->vars.end())
      return cudaErrorInvalidSymbol;
    *a = v->second->addr;
    if (size)
      *size = it->second.size;
    return cudaSuccess;
  } catch (const SimError& e) {
    fprintf(stderr, "ptxsim ERROR: %s\n", e.what());
    return (Err)e.code;
  }
}
API Err cudaGetSymbolAddress(void** p, const void* s) {
  ENTER;
  uint64_t a;
  Err e = symbol(s, &a, nullptr);
  if (!e)
    *p = (void*)a;
  return ret(e);
}
API Err cudaGetSymbolSize(size_t* n, const void* s) {
  ENTER;
  uint64_t a;
  return ret(symbol(s, &a, n));
}
API Err cudaMemcpyToSymbolAsync(const void* s, const void* src, size_t n, size_t off,
                                cudaMemcpyKind k, cudaStream_t st) {
  ENTER;
  uint64_t a;
  if (Err e = symbol(s, &a, nullptr))
    return ret(e);
  STREAM(q, st);
  return copy((void*)(a + off), src, n, k, q, false, "cudaMemcpyToSymbol");
}
API Err cudaMemcpyToSymbol(const void* s, const void* src, size_t n, size_t off, cudaMemcpyKind k) {
  ENTER;
  uint64_t a;
  if (Err e = symbol(s, &a, nullptr))
    return ret(e);
  return copy((void*)(a + off), src, n, k, rt().legacy(tDev), true, "cudaMemcpyToSymbol");
}
API Err cudaMemcpyFromSymbol(void* d, const void* s, size_t n, size_t off, cudaMemcpyKind k) {
  ENTER;
  uint64_t a;
  if (Err e = symbol(s, &a, nullptr))
    return ret(e);
  return copy(d, (void*)(a + off), n, k, rt().legacy(tDev), true, "cudaMemcpyFromSymbol");
}
API Err cudaMemcpyFromSymbolAsync(void* d, const void* s, size_t n, size_t off, cudaMemcpyKind k,
                                  cudaStream_t st) {
  ENTER;
  uint64_t a;
  if (Err e = symbol(s, &a, nullptr))
    return ret(e);
  STREAM(q, st);
  return copy(d, (void*)(a + off), n, k, q, false, "cudaMemcpyFromSymbol");
}
// IPC: the handle names this process and the place in its device memory file
API Err cudaIpcGetMemHandle(cudaIpcMemHandle_t* h, void* p) {
  ENTER;
  const Range* r = dm().find((uint64_t)p);
  if (!r || r->kind != Range::DEVICE)
    return ret(cudaErrorInvalidValue);
  r->exported = true;
  uint64_t* v = (uint64_t*)h;
  memset(h, 0, sizeof *h);
  v[0] = getpid();
  v[1] = dm().memfd();
  v[2] = dm().fileOffset(r->base);
  v[3] = r->size;
  v[4] = r->device;
  return ret(0);
}
API Err cudaIpcOpenMemHandle(void** p, cudaIpcMemHandle_t h, unsigned) {
  ENTER;
  uint64_t* v = (uint64_t*)&h;
  if ((int)v[0] == getpid())
    return ret(cudaErrorDeviceUninitialized);
  *p = (void*)dm().import((int)v[0], (int)v[1], v[2], v[3], tDev);
  return ret(*p ? 0 : cudaErrorInvalidValue);
}
API Err cudaIpcCloseMemHandle(void* p) {
  ENTER;
  return ret(dm().free((uint64_t)p) ? 0 : cudaErrorInvalidValue);
}
// ================================================================ streams and events
API Err cudaStreamCreateWithPriority(cudaStream_t* s, unsigned fl, int pr) {
  ENTER;
  *s = (cudaStream_t)rt().create(tDev, !(fl & cudaStreamNonBlocking), pr);
  return ret(0);
}
API Err cudaStreamCreate(cudaStream_t* s) {
  return cudaStreamCreateWithPriority(s, 0, 0);
}
API Err cudaStreamCreateWithFlags(cudaStream_t* s, unsigned f) {
  return cudaStreamCreateWithPriority(s, f, 0);
}
API Err cudaStreamDestroy(cudaStream_t h) {
  ENTER;
  STREAM(s, h);
  if (s->legacy)
    return ret(cudaErrorInvalidResourceHandle);
  rt().destroy(s);
  return ret(0);
}
API Err cudaStreamSynchronize(cudaStream_t h) {
  ENTER;
  STREAM(s, h);
  if (s->cap) {
    rt().invalidateCaptures();
    return warn(cudaErrorStreamCaptureUnsupported, "cudaStreamSynchronize",
                "stream is being captured");
  }
  return ret(rt().waitStream(s));
}
API Err cudaStreamQuery(cudaStream_t h) {
  ENTER;
  STREAM(s, h);
  if (s->cap) {
    rt().invalidateCaptures();
    return ret(cudaErrorStreamCaptureUnsupported);
  }
  rt().pumpOne();
  if (rt().sticky)
    return ret(rt().sticky);
  if (!s->q.empty())
    return ret(cudaErrorNotReady);
  rt().hostSaw(s->clock);
  return ret(0);
}
API Err cudaStreamGetPriority(cudaStream_t h, int* p) {
  ENTER;
  STREAM(s, h);
  *p = s->prio;
  return ret(0);
}
API Err cudaStreamGetFlags(cudaStream_t h, unsigned* f) {
  ENTER;
  STREAM(s, h);
  *f = s->blocking ? 0 : cudaStreamNonBlocking;
  return ret(0);
}
API Err cudaStreamGetId(cudaStream_t h, unsigned long long* id) {
  ENTER;
  STREAM(s, h);
  *id = s->id;
  return ret(0);
}
API Err cudaStreamGetDevice(cudaStream_t h, int* d) {
  ENTER;
  STREAM(s, h);
  *d = s->device;
  return ret(0);
}
API Err cudaStreamSetAttribute(cudaStream_t, cudaLaunchAttributeID,
                               const cudaLaunchAttributeValue*) {
  return ret(0);
}
API Err cudaCtxResetPersistingL2Cache() {
  return ret(0);
}
API Err cudaEventCreateWithFlags(cudaEvent_t* e, unsigned f) {
  ENTER;
  auto* h = new EventH{std::make_shared<Event>()};
  h->e->device = tDev;
  h->e->timing = !(f & cudaEventDisableTiming);
  events().insert(h);
  *e = (cudaEvent_t)h;
  return ret(0);
}
API Err cudaEventCreate(cudaEvent_t* e) {
  return cudaEventCreateWithFlags(e, 0);
}
API Err cudaEventDestroy(cudaEvent_t e) {
  ENTER;
  if (!event(e))
    return ret(cudaErrorInvalidResourceHandle);
  events().erase((EventH*)e);
  delete (EventH*)e;
  return ret(0);
}
API Err cudaEventRecord(cudaEvent_t e, cudaStream_t st) {
  ENTER;
  STREAM(s, st);
  if (!event(e))
    return warn(cudaErrorInvalidResourceHandle, "cudaEventRecord", "bad event");
  if (event(e)->device != s->device)
    return warn(cudaErrorInvalidResourceHandle, "cudaEventRecord",
                "event and stream are on different devices");
  return ret(rt().record(((EventH*)e)->e, s));
}
API Err cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t st, unsigned) {
  return cudaEventRecord(e, st);
}
API Err cudaStreamWaitEvent(cudaStream_t st, cudaEvent_t e, unsigned) {
  ENTER;
  STREAM(s, st);
  if (!event(e))
    return warn(cudaErrorInvalidResourceHandle, "cudaStreamWaitEvent", "bad event");
  return ret(rt().waitEvent(s, ((EventH*)e)->e));
}
API Err cudaEventSynchronize(cudaEvent_t e) {
  ENTER;
  if (!event(e))
    return ret(cudaErrorInvalidResourceHandle);
  auto p = ((EventH*)e)->e;
  if (p->cap) {
    NOCAP("cudaEventSynchronize");
  }
  uint64_t v = p->recorded;
  return ret(rt().wait(
      [p, v] {
        if (p->done < v)
          return false;
        rt().hostSaw(p->clock);
        return true;
      },
      "event synchronize"));
}
API Err cudaEventQuery(cudaEvent_t e) {
  ENTER;
  if (!event(e))
    return ret(cudaErrorInvalidResourceHandle);
  auto p = ((EventH*)e)->e;
  rt().pumpOne();
  if (rt().sticky)
    return ret(rt().sticky);
  if (p->done < p->recorded)
    return ret(cudaErrorNotReady);
  rt().hostSaw(p->clock);
  return ret(0);
}
API Err cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b) {
  ENTER;
  Event *x = event(a), *y = event(b);
  if (!x || !y || !x->timing || !y->timing || !x->recorded || !y->recorded)
    return ret(cudaErrorInvalidResourceHandle);
  if (x->done < x->recorded || y->done < y->recorded)
    return ret(cudaErrorNotReady);
  *ms = (float)((y->time - x->time) * 1e3);
  return ret(0);
}
API Err cudaLaunchHostFunc(cudaStream_t st, cudaHostFn_t f, void* u) {
  ENTER;
  STREAM(s, st);
  return ret(rt().enqueueFn(
      s, "host function",
      [f, u] {
        f(u);
        return true;
      },
      cudaGraphNodeTypeHost));
}
API Err cudaStreamAddCallback(cudaStream_t st, cudaStreamCallback_t f, void* u, unsigned) {
  ENTER;
  STREAM(s, st);
  return ret(rt().enqueueFn(s, "stream callback", [=] {
    f(st, cudaSuccess, u);
    return true;
  }));
}
// ================================================================ launches and functions
API Err cudaLaunchKernel(const void* f, dim3 g, dim3 b, void** a, size_t sm, cudaStream_t s) {
  ENTER;
  return launch(f, g, b, a, sm, s, false);
}
API Err cudaLaunchCooperativeKernel(const void* f, dim3 g, dim3 b, void** a, size_t sm,
                                    cudaStream_t s) {
  ENTER;
  return launch(f, g, b, a, sm, s, true);
}
API Err cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** a) {
  ENTER;
  bool coop = false;
  for (unsigned i = 0; i < c->numAttrs; i++) {
    if (c->attrs[i].id == cudaLaunchAttributeCooperative)
      coop = c->attrs[i].val.cooperative;
    if (c->attrs[i].id == cudaLaunchAttributeClusterDimension &&
        c->attrs[i].val.clusterDim.x * c->attrs[i].val.clusterDim.y * c->attrs[i].val.clusterDim.z >
            1)
      return warn(cudaErrorNotSupported, "cudaLaunchKernelExC", "clusters");
  }
  return launch(f, c->gridDim, c->blockDim, a, c->dynamicSmemBytes, c->stream, coop);
}
API Err cudaFuncSetAttribute(const void* f, cudaFuncAttribute a, int v) {
  ENTER;
  Kern* k = kernOf(f);
  if (!k)
    return ret(cudaErrorInvalidDeviceFunction);
  if (a == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    try {
      Module* m;
      Function* fn = functionOn(k, tDev, &m);
      if (v < 0 || v + (int)fn->staticShared > devInfo().smemOptin)
        return warn(cudaErrorInvalidValue, k->name.c_str(),
                    strf("dynamic shared memory %d over the device's %d", v, devInfo().smemOptin));
    } catch (const SimError& e) {
      fprintf(stderr, "ptxsim ERROR: %s\n", e.what());
      return ret(e.code);
    }
    k->maxDyn = v;
  }
  return ret(0);
}
API Err cudaFuncSetCacheConfig(const void*, cudaFuncCache) {
  return ret(0);
}
API Err cudaFuncGetAttributes(cudaFuncAttributes* a, const void* f) {
  ENTER;
  Kern* k = kernOf(f);
  if (!k)
    return ret(cudaErrorInvalidDeviceFunction);
  memset(a, 0, sizeof *a);
  try {
    Module* m;
    Function* fn = functionOn(k, tDev, &m);
    a->sharedSizeBytes = fn->staticShared;
    a->maxThreadsPerBlock = fn->maxntid ? fn->maxntid : 1024;
    a->numRegs = regsOf(k);
    a->ptxVersion = m->arch;
    a->binaryVersion = rt().sm;
    a->maxDynamicSharedSizeBytes = k->maxDyn;
    a->localSizeBytes = fn->frameLocalBytes;
  } catch (const SimError& e) {
    fprintf(stderr, "ptxsim ERROR: %s\n", e.what());
    return ret(e.code);
  }
  return ret(0);
}
API Err cudaFuncGetName(const char** n, const void* f) {
  Guard g(rt().mu);
  Kern* k = kernOf(f);
  if (!k)
    return ret(cudaErrorInvalidDeviceFunction);
  *n = k->name.c_str();
  return ret(0);
}
API Err cudaGetFuncBySymbol(cudaFunction_t* o, const void* f) {
  Guard g(rt().mu);
  Kern* k = kernOf(f);
  if (!k)
    return ret(cudaErrorInvalidDeviceFunction);
  *o = (cudaFunction_t)k;
  return ret(0);
}
API Err cudaGetKernel(cudaKernel_t* o, const void* f) {
  return ret(__cudaGetKernel(o, f));
}
API Err cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void* f, int b,
                                                               size_t sm, unsigned) {
  ENTER;
  Kern* k = kernOf(f);
  if (!k)
    return ret(cudaErrorInvalidDeviceFunction);
  try {
    *n = occupancy(k, b, sm);
  } catch (const SimError& e) {
    return ret(e.code);
  }
  return ret(0);
}
API Err cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void* f, int b, size_t sm) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n, f, b, sm, 0);
}
API Err cudaOccupancyAvailableDynamicSMemPerBlock(size_t* n, const void*, int blocks, int) {
  *n = devInfo().smemSm / std::max(1, blocks) - 1024;
  return ret(0);
}
API Err cudaGetDriverEntryPointByVersion(const char* s, void** p, unsigned, unsigned long long,
                                         cudaDriverEntryPointQueryResult* q) {
  *p = nullptr;
  if (q)
    *q = cudaDriverEntryPointSymbolNotFound;
  fprintf(stderr, "ptxsim: driver entry point %s is not available\n", s);
  return ret(cudaErrorSymbolNotFound);
}
API Err cudaGetDriverEntryPoint(const char* s, void** p, unsigned long long f,
                                cudaDriverEntryPointQueryResult* q) {
  return cudaGetDriverEntryPointByVersion(s, p, 0, f, q);
}
API Err cudaProfilerStart() {
  return ret(0);
}
API Err cudaProfilerStop() {
  return ret(0);
}
// ================================================================ capture and graphs
API Err cudaStreamBeginCapture(cudaStream_t h, cudaStreamCaptureMode mode) {
  ENTER;
  if ((uintptr_t)h <= 1)
    return ret(cudaErrorStreamCaptureUnsupported);
  STREAM(s, h);
  if (s->cap)
    return ret(cudaErrorIllegalState);
  static uint64_t ids = 0;
  s->cap = std::make_shared<Capture>();
  s->cap->origin = s;
  s->cap->mode = mode;
  s->cap->streams.insert(s);
  s->cap->id = ++ids;
  s->capLast.clear();
  return ret(0);
}
API Err cudaStreamEndCapture(cudaStream_t h, cudaGraph_t* g) {
  ENTER;
  STREAM(s, h);
  *g = nullptr;
  if (!s->cap)
    return ret(cudaErrorIllegalState);
  auto c = s->cap;
  if (c->origin != s)
    return ret(cudaErrorStreamCaptureUnmatched);
  std::set<int> have(s->capLast.begin(), s->capLast.end());
  std::vector<int> st(s->capLast);
  while (!st.empty()) {
    int n = st.back();
    st.pop_back();
    for (int d : c->g->n[n].deps)
      if (have.insert(d).second)
        st.push_back(d);
  }
  bool joined = true;
  for (Stream* x : c->streams)
    if (x != s)
      for (int n : x->capLast)
        if (!have.count(n))
          joined = false;
  for (Stream* x : c->streams) {
    x->cap = nullptr;
    x->capLast.clear();
  }
  if (c->invalid)
    return ret(cudaErrorStreamCaptureInvalidated);
  if (!joined)
    return warn(cudaErrorStreamCaptureUnjoined, "cudaStreamEndCapture",
                "a forked stream was not joined");
  *g = (cudaGraph_t) new std::shared_ptr<Graph>(c->g);
  return ret(0);
}
API Err cudaStreamIsCapturing(cudaStream_t h, cudaStreamCaptureStatus* st) {
  ENTER;
  STREAM(s, h);
  *st = !s->cap           ? cudaStreamCaptureStatusNone
        : s->cap->invalid ? cudaStreamCaptureStatusInvalidated
                          : cudaStreamCaptureStatusActive;
  return ret(0);
}
API Err cudaStreamGetCaptureInfo(cudaStream_t h, cudaStreamCaptureStatus* st,
                                 unsigned long long* id, cudaGraph_t* g, const cudaGraphNode_t** d,
                                 const cudaGraphEdgeData** ed, size_t* n) {
  ENTER;
  STREAM(s, h);
  *st = !s->cap           ? cudaStreamCaptureStatusNone
        : s->cap->invalid ? cudaStreamCaptureStatusInvalidated
                          : cudaStreamCaptureStatusActive;
  if (id)
    *id = s->cap ? s->cap->id : 0;
  if (g)
    *g = nullptr;
  if (d)
    *d = nullptr;
  if (ed)
    *ed = nullptr;
  if (n)
    *n = 0;
  return ret(0);
}
API Err cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* m) {
  *m = cudaStreamCaptureModeGlobal;
  return ret(0);
}
API Err cudaGraphCreate(cudaGraph_t* g, unsigned) {
  *g = (cudaGraph_t) new std::shared_ptr<Graph>(std::make_shared<Graph>());
  return ret(0);
}
API Err cudaGraphDestroy(cudaGraph_t g) {
  delete (std::shared_ptr<Graph>*)g;
  return ret(0);
}
API Err cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t* nodes, size_t* n) {
  ENTER;
  auto p = graphOf(g);
  if (!p)
    return ret(cudaErrorInvalidValue);
  if (nodes)
    for (size_t i = 0; i < *n && i < p->n.size(); i++)
      nodes[i] = (cudaGraphNode_t)&p->n[i];
  *n = p->n.size();
  return ret(0);
}
API Err cudaGraphNodeGetType(cudaGraphNode_t nd, cudaGraphNodeType* t) {
  *t = (cudaGraphNodeType)((Graph::Node*)nd)->type;
  return ret(0);
}
API Err cudaGraphInstantiate(cudaGraphExec_t* e, cudaGraph_t g, unsigned long long) {
  ENTER;
  auto p = graphOf(g);
  if (!p)
    return ret(cudaErrorInvalidValue);
  *e = (cudaGraphExec_t) new GraphExec{std::make_shared<Graph>(*p)};
  return ret(0);
}
API Err cudaGraphInstantiateWithFlags(cudaGraphExec_t* e, cudaGraph_t g, unsigned long long f) {
  return cudaGraphInstantiate(e, g, f);
}
API Err cudaGraphExecDestroy(cudaGraphExec_t e) {
  ENTER;
  delete (GraphExec*)e;
  return ret(0);
}
API Err cudaGraphExecUpdate(cudaGraphExec_t e, cudaGraph_t g, cudaGraphExecUpdateResultInfo* r) {
  ENTER;
  auto p = graphOf(g);
  auto* x = (GraphExec*)e;
  bool same = x->g->n.size() == p->n.size();
  if (same)
    for (size_t i = 0; i < p->n.size(); i++)
      if (p->n[i].deps != x->g->n[i].deps || p->n[i].type != x->g->n[i].type)
        same = false;
  if (r) {
    memset(r, 0, sizeof *r);
    r->result = same ? cudaGraphExecUpdateSuccess : cudaGraphExecUpdateErrorTopologyChanged;
  }
  if (!same)
    return ret(cudaErrorGraphExecUpdateFailure);
  x->g = std::make_shared<Graph>(*p);
  return ret(0);
}
API Err cudaGraphUpload(cudaGraphExec_t, cudaStream_t) {
  return ret(0);
}
API Err cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t st) {
  ENTER;
  STREAM(s, st);
  auto g = ((GraphExec*)e)->g;
  return ret(rt().enqueue(
      s, strf("graph of %zu nodes", g->n.size()), [g] { return rt().graphOp(g); },
      cudaGraphNodeTypeGraph));
}

// ================================================================ hooks for libnccl
API void* ptxsim_stream(void* h, int* dev) {
  Guard g(rt().mu);
  Stream* s = stream((cudaStream_t)h);
  if (s)
    *dev = s->device;
  return s;
}
API int ptxsim_enqueue(void* s, const char* what, std::function<std::function<bool()>()>* make) {
  return rt().enqueue((Stream*)s, what, *make);
}
API char* ptxsim_ptr(const void* p, size_t n, int device, const char** why) {
  const Range* r = dm().find((uint64_t)p);
  static thread_local std::string w;
  if (!r) {
    w = "not device-accessible memory";
    *why = w.c_str();
    return nullptr;
  }
  if ((uint64_t)p + n > r->end()) {
    w = strf("needs %zu bytes, the allocation ends %llu bytes short", n,
             (unsigned long long)((uint64_t)p + n - r->end()));
    *why = w.c_str();
    return nullptr;
  }
  if (r->kind == Range::DEVICE && r->device != device && !dm().peer(device, r->device)) {
    w = strf("buffer is on device %d, communicator on %d", r->device, device);
    *why = w.c_str();
    return nullptr;
  }
  return r->sim((uint64_t)p);
}
API void ptxsim_touch(const void* p, size_t n, int write) {
  touchRange((uint64_t)p, n, write);
}
API void ptxsim_fail(const char* m) {
  Guard g(rt().mu);
  rt().fail(SimError(m, cudaErrorLaunchFailure));
}
API void* ptxsim_lock() {
  return &rt().mu;
}
