// SPDX-License-Identifier: Apache-2.0
// fatbin.cpp - see fatbin.h. Layout: header {magic 0xBA55ED50, u16 version, u16 header size, u64
// size}, then entries {u16 kind, u16 version, u32 header size, u64 size, u32 compressed size, ...}.
// Kind 1 is PTX, 2 ELF.
#include "fatbin.h"
#include <cstdint>
#include <cstring>
#include <dlfcn.h>
#include <elf.h>

namespace ptx {
namespace {
struct Entry {
  uint16_t kind, ver;
  uint32_t header;
  uint64_t size;
  uint32_t csize, opt;
  uint16_t minor, major;
  uint32_t arch, nameOff, nameLen;
  uint64_t flags, zero, usize;
};

bool lz4(const uint8_t* s, size_t n, std::string& out, size_t cap) {
  const uint8_t* e = s + n;
  while (s < e) {
    unsigned t = *s++;
    size_t lit = t >> 4;
    if (lit == 15) {
      uint8_t b;
      do {
        if (s >= e)
          return false;
        b = *s++;
        lit += b;
      } while (b == 255);
    }
    if (s + lit > e)
      return false;
    out.append((const char*)s, lit);
    s += lit;
    if (s >= e)
      break;
    size_t off = s[0] | s[1] << 8;
    s += 2;
    size_t len = (t & 15) + 4;
    if ((t & 15) == 15) {
      uint8_t b;
      do {
        if (s >= e)
          return false;
        b = *s++;
        len += b;
      } while (b == 255);
    }
    if (!off || off > out.size())
      return false;
    for (size_t i = 0; i < len; i++)
      out += out[out.size() - off];
    if (out.size() > cap + 65536)
      return false;
  }
  return true;
}
bool expand(const Entry& e, const uint8_t* p, std::string& out, std::string& note) {
  size_t n = e.csize ? e.csize : e.size;
  if (n >= 4 && p[0] == 0x28 && p[1] == 0xb5 && p[2] == 0x2f && p[3] == 0xfd) {
    static size_t (*dec)(void*, size_t, const void*, size_t) = [] {
      void* h = dlopen("libzstd.so.1", RTLD_NOW);
      return h ? (size_t (*)(void*, size_t, const void*, size_t))dlsym(h, "ZSTD_decompress")
               : nullptr;
    }();
    if (!dec) {
      note = "fatbin is zstd-compressed and libzstd.so.1 cannot be loaded; build with -Xfatbin "
             "-compress=false";
      return false;
    }
    out.resize(e.usize);
    size_t r = dec(&out[0], out.size(), p, n);
    if (r != e.usize) {
      note = "zstd decompression failed";
      return false;
    }
    return true;
  }
  if (e.flags & 0x2000) {
    if (!lz4(p, n, out, e.usize) || out.size() < e.usize) {
      note = "LZ4 decompression failed; build with -Xfatbin -compress=false";
      return false;
    }
    out.resize(e.usize);
    return true;
  }
  out.assign((const char*)p, e.size);
  return true;
}
void cubinRegs(const std::string& s, std::map<std::string, int>& regs) {
  if (s.size() < sizeof(Elf64_Ehdr) || memcmp(s.data(), ELFMAG, 4))
    return;
  auto* h = (const Elf64_Ehdr*)s.data();
  if (h->e_shoff + (uint64_t)h->e_shnum * sizeof(Elf64_Shdr) > s.size())
    return;
  auto* sh = (const Elf64_Shdr*)(s.data() + h->e_shoff);
  const char* names = s.data() + sh[h->e_shstrndx].sh_offset;
  for (int i = 0; i < h->e_shnum; i++) {
    const char* nm = names + sh[i].sh_name;
    if (!strncmp(nm, ".text.", 6))
      regs[nm + 6] = sh[i].sh_info >> 24;
  }
}
} // namespace

FatBin readFatbin(const void* data) {
  FatBin f;
  auto* p = (const uint8_t*)data;
  uint32_t magic;
  memcpy(&magic, p, 4);
  if (magic != 0xBA55ED50) {
    f.note = "not a fat binary";
    return f;
  }
  uint16_t hs;
  uint64_t size;
  memcpy(&hs, p + 6, 2);
  memcpy(&size, p + 8, 8);
  const uint8_t *q = p + hs, *end = q + size;
  while (q + sizeof(Entry) <= end) {
    Entry e;
    memcpy(&e, q, sizeof e);
    if (!e.header)
      break;
    std::string s;
    if (e.kind == 1) {
      if (expand(e, q + e.header, s, f.note)) {
        while (!s.empty() && s.back() == 0)
          s.pop_back();
        f.ptx.push_back({(int)e.arch, s});
      }
    } else if (e.kind == 2) {
      std::string n;
      if (expand(e, q + e.header, s, n))
        cubinRegs(s, f.regs[(int)e.arch]);
    }
    q += e.header + e.size;
  }
  return f;
}
} // namespace ptx
