// SPDX-License-Identifier: Apache-2.0
// devmem.h - the table of legal device-visible memory. Device memory lives in a memfd mapped twice:
// at the address handed to the user (no access, so a host dereference faults) and at a private
// alias that the simulator uses. Host (pinned, registered, managed) ranges are mapped at their own
// address.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>

namespace ptx {

struct Range {
  uint64_t base = 0, size = 0;
  enum Kind : uint8_t { DEVICE, PINNED, REGISTERED, MANAGED } kind = DEVICE;
  int device = 0;
  int64_t delta = 0; // simulator address = user address + delta
  uint64_t id = 0;
  bool internal = false, imported = false;
  mutable bool exported = false;                 // another process may have imported it
  mutable std::shared_ptr<struct Shadow> shadow; // race_global.cpp, made on first use
  uint64_t end() const { return base + size; }
  char* sim(uint64_t a) const { return (char*)(a + delta); }
  bool fixed() const { // during a launch, but for what the launch writes
    return kind == DEVICE && !imported && !exported;
  }
};

class DevMem {
 public:
  static DevMem& get();
  uint64_t alloc(int device, size_t bytes, bool internal = false); // 0 = out of memory
  bool free(uint64_t p, bool wantAsync = false);
  void* hostAlloc(size_t bytes, Range::Kind k, int device);
  bool hostFree(void* p);
  bool registerHost(void* p, size_t n);
  bool unregisterHost(void* p);
  const Range* find(uint64_t a) const;   // range containing a, or null
  char* sim(uint64_t a, size_t n) const; // pointer usable by the simulator, or null
  size_t used(int device) const { return device < 64 ? used_[device] : 0; }
  size_t capacity() const { return cap_; }
  void enablePeer(int from, int to, bool on) {
    peer_[from & 63] = on ? peer_[from & 63] | (1ull << to) : peer_[from & 63] & ~(1ull << to);
  }
  bool peer(int from, int to) const { return from == to || (peer_[from & 63] >> to & 1); }
  int memfd() const { return fd_; }
  uint64_t fileOffset(uint64_t devAddr) const { return devAddr - dev_; }
  uint64_t import(int pid, int fd, uint64_t off, size_t n, int device); // IPC
  uint64_t generation = 0;

 private:
  DevMem();
  int fd_ = -1;
  uint64_t dev_ = 0, simb_ = 0, space_ = 0, top_ = 0, nextId_ = 1;
  size_t cap_ = 0, used_[64] = {};
  uint64_t peer_[64] = {};
  std::map<uint64_t, Range> r_;
  std::multimap<uint64_t, uint64_t> freeList_; // size -> address
  std::map<uint64_t, uint64_t> blockSize_;     // address -> reserved size
};

} // namespace ptx
