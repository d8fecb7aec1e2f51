// SPDX-License-Identifier: Apache-2.0
// devmem.cpp - see devmem.h.
#include "devmem.h"
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

namespace ptx {

DevMem& DevMem::get() {
  static DevMem* m = new DevMem;
  return *m;
}

DevMem::DevMem() {
  const char* c = getenv("PTXSIM_MEM_MB");
  cap_ = (size_t)(c ? atoll(c) : 16384) << 20; // per device, as reported and enforced
  space_ = 1ull << 40;                         // address space; pages appear when touched
  fd_ = memfd_create("ptxsim-device", MFD_CLOEXEC);
  if (fd_ < 0 || ftruncate(fd_, space_)) {
    perror("ptxsim: memfd");
    abort();
  }
  int prot = getenv("PTXSIM_HOST_ACCESS") ? PROT_READ | PROT_WRITE : PROT_NONE;
  void* d = mmap(nullptr, space_, prot, MAP_SHARED | MAP_NORESERVE, fd_, 0);
  void* s = mmap(nullptr, space_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd_, 0);
  if (d == MAP_FAILED || s == MAP_FAILED) {
    perror("ptxsim: mmap");
    abort();
  }
  dev_ = (uint64_t)d;
  simb_ = (uint64_t)s;
  top_ = dev_ + 4096;
}
uint64_t DevMem::alloc(int device, size_t bytes, bool internal) {
  if (used_[device] + bytes > cap_)
    return 0;
  // 512-byte blocks with an unmapped-by-table gap of at least 256 bytes behind each
  uint64_t need = (bytes + 256 + 511) / 512 * 512, a = 0;
  auto it = freeList_.lower_bound(need);
  if (it != freeList_.end() && it->first <= need * 2) {
    a = it->second;
    freeList_.erase(it);
    need = blockSize_[a];
  } else {
    a = (top_ + 511) / 512 * 512;
    if (a + need > dev_ + space_)
      return 0;
    top_ = a + need;
    blockSize_[a] = need;
  }
  Range r;
  r.base = a;
  r.size = bytes;
  r.device = device;
  r.delta = (int64_t)(simb_ - dev_);
  r.id = nextId_++;
  r.internal = internal;
  r_[a] = r;
  used_[device] += bytes;
  generation++;
  memset(r.sim(a), 0xFF, bytes); // poison: NaN, and large odd integers
  return a;
}
bool DevMem::free(uint64_t p, bool) {
  auto it = r_.find(p);
  if (it == r_.end() || it->second.kind != Range::DEVICE)
    return false;
  Range r = it->second;
  r_.erase(it);
  generation++;
  if (r.imported) {
    munmap((void*)(r.base + r.delta), r.size);
    munmap((void*)r.base, r.size);
    return true;
  }
  used_[r.device] -= r.size;
  if (r.size >= 1 << 16) { // give pages back
    uint64_t o = (r.base - dev_ + 4095) / 4096 * 4096, e = (r.base - dev_ + r.size) / 4096 * 4096;
    if (e > o)
      fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, o, e - o);
  }
  freeList_.emplace(blockSize_[p], p);
  return true;
}
void* DevMem::hostAlloc(size_t bytes, Range::Kind k, int device) {
  void* p = nullptr;
  size_t n = (bytes + 4095) / 4096 * 4096;
  if (posix_memalign(&p, 4096, n ? n : 4096))
    return nullptr;
  memset(p, 0xFF, n);
  Range r;
  r.base = (uint64_t)p;
  r.size = bytes;
  r.kind = k;
  r.device = device;
  r.id = nextId_++;
  r_[r.base] = r;
  generation++;
  return p;
}
bool DevMem::hostFree(void* p) {
  auto it = r_.find((uint64_t)p);
  if (it == r_.end() || (it->second.kind != Range::PINNED && it->second.kind != Range::MANAGED))
    return false;
  r_.erase(it);
  generation++;
  ::free(p);
  return true;
}
bool DevMem::registerHost(void* p, size_t n) {
  if (find((uint64_t)p))
    return false;
  Range r;
  r.base = (uint64_t)p;
  r.size = n;
  r.kind = Range::REGISTERED;
  r.id = nextId_++;
  r_[r.base] = r;
  generation++;
  return true;
}
bool DevMem::unregisterHost(void* p) {
  auto it = r_.find((uint64_t)p);
  if (it == r_.end() || it->second.kind != Range::REGISTERED)
    return false;
  r_.erase(it);
  generation++;
  return true;
}
const Range* DevMem::find(uint64_t a) const {
  auto it = r_.upper_bound(a);
  if (it == r_.begin())
    return nullptr;
  --it;
  return a < it->second.end() || (a == it->second.base) ? &it->second : nullptr;
}
char* DevMem::sim(uint64_t a, size_t n) const {
  const Range* r = find(a);
  return r && a + n <= r->end() ? r->sim(a) : nullptr;
}
uint64_t DevMem::import(int pid, int fd, uint64_t off, size_t n, int device) {
  char path[64];
  snprintf(path, sizeof path, "/proc/%d/fd/%d", pid, fd);
  int f = open(path, O_RDWR | O_CLOEXEC);
  if (f < 0)
    return 0;
  uint64_t lo = off / 4096 * 4096, len = (off + n - lo + 4095) / 4096 * 4096;
  void* d = mmap(nullptr, len, PROT_NONE, MAP_SHARED, f, lo);
  void* s = mmap(nullptr, len, PROT_READ | PROT_WRITE, MAP_SHARED, f, lo);
  close(f);
  if (d == MAP_FAILED || s == MAP_FAILED)
    return 0;
  Range r;
  r.base = (uint64_t)d + (off - lo);
  r.size = n;
  r.device = device;
  r.delta = (char*)s - (char*)d;
  r.imported = true;
  r.id = nextId_++;
  r_[r.base] = r;
  generation++;
  return r.base;
}

} // namespace ptx
