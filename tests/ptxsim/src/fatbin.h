// SPDX-License-Identifier: Apache-2.0
// fatbin.h - walks nvcc's fat binaries: PTX text and per-kernel register counts from cubins.
#pragma once
#include <map>
#include <string>
#include <vector>
namespace ptx {
struct FatPtx {
  int arch;
  std::string text;
};
struct FatBin {
  std::vector<FatPtx> ptx;
  std::map<int, std::map<std::string, int>> regs;
  std::string note;
}; // regs: arch -> kernel -> registers
FatBin readFatbin(const void* data);
} // namespace ptx
