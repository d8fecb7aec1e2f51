// SPDX-License-Identifier: Apache-2.0
// call.cpp - calls and returns, calls through function pointers, device printf and assert (PTX
// ISA 9.7.12).
#include "sim.h"
#include <cstdio>

namespace ptx {

// The callee of a call through a pointer by the first of `lanes`, and the lanes that call the same
// one.
const Function* Warp::indirectCallee(const Instr& in, uint32_t lanes, uint32_t* same) {
  const uint64_t* pointers = src(in.src[0]);
  int first = firstLane(lanes);
  uint64_t p = pointers[first], index = (p & ~WIN_MASK) / 16;
  *same = 0;
  forEachLane(lanes, [&](int lane) { *same |= (uint32_t)(pointers[lane] == p) << lane; });
  if ((p & WIN_MASK) != WIN_FUNC || index >= launch->mod->funcById.size())
    error(in, first, "call through a bad function pointer");
  auto& callees = f->fn->root->callees;
  auto it = callees.find(launch->mod->funcById[index]->name);
  return it == callees.end() ? nullptr : it->second.get();
}

void Warp::call(const Instr& in, uint32_t lanes) {
  uint32_t retPc = groupPc + 1;
  groupPc++;
  flush();
  auto caller = frames[firstLane(lanes)];
  while (lanes) {
    const Function* fn = in.callee;
    uint32_t group = lanes;
    if (in.src[0] != NOCOL)
      fn = indirectCallee(in, lanes, &group);
    lanes &= ~group;
    if (!fn || !fn->defined) {
      forEachLane(group, [&](int lane) {
        callBuiltin(in, lane, *caller);
        pc[lane] = retPc;
      });
      continue;
    }
    auto frame = std::make_shared<Frame>();
    frame->fn = fn;
    frame->caller = caller;
    frame->call = &in;
    frame->retPc = retPc;
    frame->depth = caller->depth + 1;
    if (frame->depth > 512)
      error(in, firstLane(group), "call stack deeper than 512");
    frame->localBase = (caller->localBase + caller->fn->frameLocalBytes + 15) / 16 * 16;
    frame->regs.assign((size_t)fn->regs() * 32, 0xBAD0BAD0BAD0BAD0ull);
    frame->paramMem.assign((size_t)fn->frameParamBytes * 32, 0xFF);
    forEachLane(group, [&](int lane) {
      for (size_t i = 0; i < in.srcVec.size() && i < fn->params.size(); i++)
        memcpy(frame->param(lane) + fn->params[i]->offset, caller->param(lane) + in.srcVec[i],
               std::min<size_t>(in.srcVecB[i], fn->params[i]->size));
      frames[lane] = frame;
      pc[lane] = 0;
    });
  }
}

void Warp::ret(uint32_t lanes) {
  Frame* from = f;
  auto keep = frames[firstLane(lanes)];
  bool hasResult = !from->call->dstVec.empty() && !from->fn->rets.empty();
  forEachLane(lanes, [&](int lane) {
    if (hasResult)
      memcpy(from->caller->param(lane) + from->call->dstVec[0],
             from->param(lane) + from->fn->rets[0]->offset, from->call->srcVecC[0]);
    pc[lane] = from->retPc;
    frames[lane] = from->caller;
  });
}

std::string Warp::deviceString(const Instr& in, int lane, uint64_t addr) {
  std::string s;
  uint32_t sharedOff;
  while (s.size() < 4096) {
    char c = *resolve(in, addr++, 1, lane, false, SP_GENERIC, &sharedOff);
    if (!c)
      break;
    s += c;
  }
  return s;
}

void Warp::devicePrintf(const Instr& in, int lane, uint64_t format, uint64_t args) {
  std::string fmt = deviceString(in, lane, format), out;
  uint64_t off = 0;
  auto arg = [&](int bytes) {
    uint32_t sharedOff;
    uint64_t v = 0;
    off = (off + bytes - 1) / bytes * bytes;
    memcpy(&v, resolve(in, args + off, bytes, lane, false, SP_GENERIC, &sharedOff), bytes);
    off += bytes;
    return v;
  };
  for (size_t i = 0; i < fmt.size(); i++) {
    if (fmt[i] != '%' || fmt[i + 1] == '%') {
      out += fmt[i];
      i += fmt[i] == '%';
      continue;
    }
    std::string spec = "%";
    bool wide = false;
    for (i++; i < fmt.size() && !isalpha(fmt[i]); i++)
      spec += fmt[i];
    for (; i < fmt.size() && strchr("lhzj", fmt[i]); i++)
      wide |= fmt[i] == 'l' || fmt[i] == 'z';
    char c = fmt[i];
    if (c == 'c')
      out += strf((spec + c).c_str(), (int)arg(4));
    else if (c == 'd' || c == 'i')
      out += strf((spec + "ll" + c).c_str(), wide ? (long long)arg(8) : (long long)(int32_t)arg(4));
    else if (strchr("uxXo", c))
      out += strf((spec + "ll" + c).c_str(), (long long)arg(wide ? 8 : 4));
    else if (strchr("feEgGaF", c))
      out += strf((spec + c).c_str(), get<double>(arg(8)));
    else if (c == 's')
      out += deviceString(in, lane, arg(8));
    else if (c == 'p')
      out += strf("0x%llx", (unsigned long long)arg(8));
  }
  fputs(out.c_str(), stdout);
}

// Functions that the driver provides on a real GPU.
void Warp::callBuiltin(const Instr& in, int lane, Frame& caller) {
  const std::string& name = in.raw->callee;
  auto arg = [&](int i) {
    uint64_t v;
    memcpy(&v, caller.param(lane) + in.srcVec[i], 8);
    return v;
  };
  if (name == "vprintf") {
    devicePrintf(in, lane, arg(0), arg(1));
    int result = 1;
    if (!in.dstVec.empty())
      memcpy(caller.param(lane) + in.dstVec[0], &result, 4);
  } else if (name == "__assertfail")
    error(in, lane,
          strf("device assertion failed: %s (%s:%u)", deviceString(in, lane, arg(0)).c_str(),
               deviceString(in, lane, arg(1)).c_str(), (uint32_t)arg(2)),
          710);
  else
    error(in, lane, "call to an undefined function " + name);
}

} // namespace ptx
