// SPDX-License-Identifier: Apache-2.0
// ptx_parse.cpp - PTX text parser. parseModule() splits a module into variables and functions;
// parseBody() parses one function body into raw instructions on first use.
#include "ptx.h"
#include <cctype>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace ptx {

std::string strf(const char* fmt, ...) {
  char buf[4096];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(buf, sizeof buf, fmt, ap);
  va_end(ap);
  return buf;
}

namespace {
struct Tok {
  enum Kind { END, ID, NUM, STR, PUNCT } kind = END;
  std::string s;
  int line = 0;
  size_t pos = 0, end = 0;
};

struct Lexer {
  const std::string& t;
  size_t p = 0;
  int line;
  Lexer(const std::string& text, int l) : t(text), line(l) {}
  void skip() {
    while (p < t.size()) {
      if (t[p] == '\n') {
        line++;
        p++;
      } else if (isspace((unsigned char)t[p]))
        p++;
      else if (t.compare(p, 2, "//") == 0) {
        while (p < t.size() && t[p] != '\n')
          p++;
      } else if (t.compare(p, 2, "/*") == 0) {
        while (p < t.size() && t.compare(p, 2, "*/") != 0) {
          if (t[p] == '\n')
            line++;
          p++;
        }
        p += 2;
      } else
        break;
    }
  }
  static bool idc(char c) {
    return isalnum((unsigned char)c) || c == '_' || c == '$' || c == '.' || c == '%';
  }
  Tok next() {
    skip();
    Tok k;
    k.line = line;
    k.pos = p;
    if (p >= t.size())
      return k;
    char c = t[p];
    if (isdigit((unsigned char)c)) {
      k.kind = Tok::NUM;
      while (p < t.size() && (isalnum((unsigned char)t[p]) || t[p] == '.'))
        p++;
    } else if (idc(c)) {
      k.kind = Tok::ID;
      while (p < t.size() && (idc(t[p]) || (t[p] == ':' && p + 1 < t.size() && t[p + 1] == ':') ||
                              (t[p] == ':' && t[p - 1] == ':')))
        p++;
    } else if (c == '"') {
      k.kind = Tok::STR;
      p++;
      while (p < t.size() && t[p] != '"') {
        if (t[p] == '\\')
          p++;
        p++;
      }
      p++;
    } else {
      k.kind = Tok::PUNCT;
      p++;
    }
    k.s = t.substr(k.pos, p - k.pos);
    k.end = p;
    return k;
  }
};

struct Parser {
  Lexer lx;
  Tok cur;
  Module& m;
  Function* f = nullptr;
  struct Scope {
    std::unordered_map<std::string, int> regs;
    std::unordered_map<std::string, std::shared_ptr<Var>> vars;
    std::unordered_map<std::string, std::string> labels;
  };
  std::vector<Scope> scopes;
  int scopeId = 0;
  std::vector<Type> regTy;
  int loc = -1; // index into Module::sourceLines
  Parser(const std::string& t, int line, Module& mod) : lx(t, line), m(mod) { adv(); }
  void adv() { cur = lx.next(); }
  [[noreturn]] void fail(const std::string& s) {
    throw SimError(
        strf("%s: PTX line %d: %s near '%s'", m.source.c_str(), cur.line, s.c_str(), cur.s.c_str()),
        218);
  }
  bool is(const char* s) const { return cur.s == s && cur.kind != Tok::STR; }
  bool accept(const char* s) {
    if (is(s)) {
      adv();
      return true;
    }
    return false;
  }
  void expect(const char* s) {
    if (!accept(s))
      fail(std::string("expected ") + s);
  }

  static uint64_t number(const std::string& s, bool* flt) {
    *flt = false;
    if (s.size() > 2 && s[0] == '0' && (s[1] == 'f' || s[1] == 'F')) {
      *flt = true;
      return strtoull(s.c_str() + 2, nullptr, 16);
    }
    if (s.size() > 2 && s[0] == '0' && (s[1] == 'd' || s[1] == 'D')) {
      *flt = true;
      return strtoull(s.c_str() + 2, nullptr, 16);
    }
    if (s.size() > 2 && s[0] == '0' && (s[1] == 'b' || s[1] == 'B'))
      return strtoull(s.c_str() + 2, nullptr, 2);
    if (s.find('.') != std::string::npos) {
      *flt = true;
      return put<double>(strtod(s.c_str(), nullptr));
    }
    return strtoull(s.c_str(), nullptr, 0);
  }
  int64_t integer() {
    bool neg = false;
    while (is("-") || is("+")) {
      if (is("-"))
        neg = !neg;
      adv();
    }
    bool fl;
    if (cur.kind != Tok::NUM)
      fail("expected number");
    int64_t v = (int64_t)number(cur.s, &fl);
    adv();
    return neg ? -v : v;
  }

  // .space [.align n] [.ptr ...] .type name [dims] [= init]; cur is after the space directive
  std::shared_ptr<Var> varDecl(Space sp, bool ext) {
    auto v = std::make_shared<Var>();
    v->space = sp;
    v->isExtern = ext;
    int vec = 1;
    bool haveTy = false;
    uint64_t align = 0;
    while (cur.kind == Tok::ID && cur.s[0] == '.') {
      std::string d = cur.s.substr(1);
      // ".align" takes a number; types may come glued like ".u64" or ".v4"
      if (d == "align") {
        adv();
        align = integer();
        continue;
      }
      if (d == "ptr") {
        adv();
        continue;
      }
      if (d == "v2" || d == "v4") {
        vec = d[1] - '0';
        adv();
        continue;
      }
      if (d == "attribute") {
        adv();
        expect("(");
        int depth = 1;
        while (depth) {
          if (is("("))
            depth++;
          if (is(")"))
            depth--;
          adv();
        }
        continue;
      }
      Type t = typeFromName(d);
      if (t != T_NONE) {
        v->ty = t;
        haveTy = true;
        adv();
        continue;
      }
      if (d == "global" || d == "shared" || d == "local" || d == "const" || d == "generic" ||
          d == "samplerref" || d == "texref") {
        adv();
        continue;
      }
      fail("unknown attribute in declaration");
    }
    (void)haveTy;
    v->name = cur.s;
    adv();
    uint64_t n = vec;
    bool unsized = false;
    while (accept("[")) {
      if (is("]"))
        unsized = true;
      else
        n *= integer();
      expect("]");
    }
    int es = typeSize(v->ty);
    v->size = unsized ? 0 : n * es;
    v->align = align ? align : (uint64_t)es * vec;
    if (unsized && sp == SP_SHARED)
      v->dynShared = true;
    if (ext && sp == SP_SHARED && v->size == 0)
      v->dynShared = true;
    if (accept("=")) {
      initializer(*v, es);
      if (unsized)
        v->size = v->init.size();
    }
    return v;
  }
  void initElem(Var& v, int es) {
    bool neg = accept("-");
    uint64_t val = 0;
    if (cur.kind == Tok::NUM) {
      bool fl;
      val = number(cur.s, &fl);
      if (neg)
        val = -val;
      adv();
    } else { // symbol, generic(symbol), mask(symbol)
      uint64_t shiftMask = 0;
      if (cur.kind == Tok::NUM)
        shiftMask = 0;
      std::string s = cur.s;
      adv();
      if (s == "generic") {
        expect("(");
        s = cur.s;
        adv();
        expect(")");
      }
      int64_t add = 0;
      if (is("+") || is("-"))
        add = integer();
      (void)shiftMask;
      v.relocs.push_back({v.init.size(), s, add});
    }
    for (int i = 0; i < es; i++)
      v.init.push_back((uint8_t)(val >> (8 * i)));
  }
  void initializer(Var& v, int es) {
    if (accept("{")) {
      while (!is("}")) {
        if (is("{"))
          initializer(v, es);
        else
          initElem(v, es);
        accept(",");
      }
      adv();
    } else
      initElem(v, es);
  }

  void paramList(std::vector<std::shared_ptr<Var>>& out, bool entry) {
    expect("(");
    while (!is(")")) {
      if (accept(".param")) {
        auto v = varDecl(SP_PARAM, false);
        v->isEntryParam = entry;
        out.push_back(v);
      } else if (accept(".reg")) {
        auto v = varDecl(SP_REG, false);
        out.push_back(v);
      } else
        fail("parameter");
      accept(",");
    }
    adv();
  }

  // ---------------------------------------------------------------- module level
  void module() {
    while (cur.kind != Tok::END) {
      if (accept(".version")) {
        adv();
        continue;
      }
      if (accept(".target")) {
        m.target = cur.s;
        m.arch = cur.s.size() > 3 ? atoi(cur.s.c_str() + 3) : 0;
        adv();
        while (accept(","))
          adv();
        continue;
      }
      if (accept(".address_size")) {
        adv();
        continue;
      }
      if (accept(".file")) {
        int n = (int)integer();
        if (cur.s.size() >= 2)
          m.files[n] = cur.s.substr(1, cur.s.size() - 2);
        adv();
        while (accept(","))
          adv();
        continue;
      }
      if (is(".section")) {
        while (!is("{"))
          adv();
        int d = 0;
        do {
          if (is("{"))
            d++;
          if (is("}"))
            d--;
          adv();
        } while (d);
        continue;
      }
      if (is(".pragma") || is(".alias") || is(".loc")) {
        while (!is(";"))
          adv();
        adv();
        continue;
      }
      if (is(";")) {
        adv();
        continue;
      }
      bool ext = false;
      for (;;) {
        if (is(".visible") || is(".weak") || is(".common"))
          adv();
        else if (is(".extern")) {
          ext = true;
          adv();
        } else
          break;
      }
      if (is(".func") || is(".entry")) {
        function(is(".entry"));
        continue;
      }
      Space sp;
      if (accept(".global"))
        sp = SP_GLOBAL;
      else if (accept(".const"))
        sp = SP_CONST;
      else if (accept(".shared"))
        sp = SP_SHARED;
      else if (accept(".local"))
        sp = SP_LOCAL;
      else if (is(".tex") || is(".texref")) {
        while (!is(";"))
          adv();
        adv();
        continue;
      } else
        fail("unknown directive");
      do {
        auto v = varDecl(sp, ext);
        auto& slot = m.vars[v->name];
        if (slot && !slot->isExtern)
          continue;
        slot = v;
        if (sp == SP_SHARED && !v->dynShared) {
          m.sharedStatic = (m.sharedStatic + v->align - 1) / v->align * v->align;
          v->offset = m.sharedStatic;
          m.sharedStatic += v->size;
        }
      } while (accept(","));
      expect(";");
    }
  }
  void function(bool entry) {
    adv();
    auto fn = std::make_shared<Function>();
    fn->entry = entry;
    if (accept(".attribute")) {
      while (!is(")"))
        adv();
      adv();
    }
    if (is("("))
      paramList(fn->rets, false);
    fn->name = cur.s;
    adv();
    if (is("("))
      paramList(fn->params, entry);
    while (cur.kind == Tok::ID && cur.s[0] == '.') {
      std::string d = cur.s;
      adv();
      if (d == ".maxntid" || d == ".reqntid" || d == ".reqnctapercluster") {
        int a[3] = {1, 1, 1};
        for (int i = 0; i < 3; i++) {
          a[i] = (int)integer();
          if (!accept(","))
            break;
        }
        if (d == ".maxntid")
          fn->maxntid = a[0] * a[1] * a[2];
        else if (d == ".reqntid")
          for (int i = 0; i < 3; i++)
            fn->reqntid[i] = a[i];
        else
          fn->clusterX = a[0] * a[1] * a[2];
      } else if (d == ".pragma") {
        adv();
        accept(";");
      } else if (cur.kind == Tok::NUM) {
        adv();
        while (accept(","))
          adv();
      } // .minnctapersm n, .maxnreg n ...
    }
    uint64_t off = 0;
    for (auto& p : fn->params) {
      off = (off + p->align - 1) / p->align * p->align;
      p->offset = off;
      off += p->size;
    }
    fn->paramBytes = off;
    auto& slot = m.funcs[fn->name];
    if (is("{")) {
      fn->defined = true;
      fn->bodyLine = cur.line;
      size_t a = cur.pos;
      int d = 0;
      size_t e = 0;
      do {
        if (is("{"))
          d++;
        if (is("}")) {
          d--;
          e = cur.end;
        }
        if (cur.kind == Tok::END)
          fail("unterminated body");
        adv();
      } while (d);
      fn->body = m.text.substr(a, e - a);
    } else
      accept(";");
    if (!slot || fn->defined)
      slot = fn;
  }

  // ---------------------------------------------------------------- function level
  int newReg(Type t) {
    f->regBytes.push_back(t == T_PRED ? 0 : (uint8_t)std::min(8, typeSize(t)));
    regTy.push_back(t);
    return f->regs() - 1;
  }
  int findReg(const std::string& s) {
    for (int i = (int)scopes.size() - 1; i >= 0; i--) {
      auto it = scopes[i].regs.find(s);
      if (it != scopes[i].regs.end())
        return it->second;
    }
    return -1;
  }
  std::shared_ptr<Var> findVar(const std::string& s) {
    for (int i = (int)scopes.size() - 1; i >= 0; i--) {
      auto it = scopes[i].vars.find(s);
      if (it != scopes[i].vars.end())
        return it->second;
    }
    auto it = m.vars.find(s);
    return it == m.vars.end() ? nullptr : it->second;
  }
  std::string scopedLabel(const std::string& s) {
    for (int i = (int)scopes.size() - 1; i >= 1; i--) {
      auto it = scopes[i].labels.find(s);
      if (it != scopes[i].labels.end())
        return it->second;
    }
    return s;
  }
  static bool isSreg(const std::string& s) {
    static const char* pre[] = {"%tid",           "%ntid",          "%ctaid",
                                "%nctaid",        "%laneid",        "%warpid",
                                "%nwarpid",       "%smid",          "%nsmid",
                                "%gridid",        "%lanemask",      "%clock",
                                "%globaltimer",   "%dynamic_smem",  "%total_smem",
                                "%aggr_smem",     "%envreg",        "%pm",
                                "%cluster",       "%nclusterid",    "%is_explicit",
                                "%reserved_smem", "%current_graph", "WARP_SZ"};
    for (auto p : pre)
      if (s.compare(0, strlen(p), p) == 0)
        return true;
    return false;
  }
  Operand operand() {
    Operand o;
    if (accept("!")) {
      o = operand();
      o.neg = true;
      return o;
    }
    if (accept("{")) {
      o.kind = Operand::VEC;
      while (!is("}")) {
        o.v.push_back(operand());
        accept(",");
      }
      adv();
      return o;
    }
    if (accept("[")) {
      o.kind = Operand::MEM;
      Operand b = operand();
      o.off = b.off;
      b.off = 0;
      if (is("+") || is("-")) {
        bool neg = is("-");
        adv();
        int64_t v = integer();
        o.off += neg ? -v : v;
      }
      o.v.push_back(b);
      while (accept(","))
        o.v.push_back(operand());
      expect("]");
      return o;
    }
    if (cur.kind == Tok::NUM || is("-") || is("+")) {
      bool neg = false;
      while (is("-") || is("+")) {
        if (is("-"))
          neg = !neg;
        adv();
      }
      o.kind = Operand::IMM;
      if (cur.kind != Tok::NUM)
        fail("operand");
      o.imm = number(cur.s, &o.isFloat);
      if (neg)
        o.imm = o.isFloat ? o.imm ^ (1ull << 63) : -o.imm;
      adv();
      return o;
    }
    if (cur.kind != Tok::ID)
      fail("operand");
    std::string s = cur.s;
    adv();
    if (s == "_") {
      o.kind = Operand::SINK;
      return o;
    }
    int r = findReg(s);
    if (r < 0 && s.size() > 2 && s[s.size() - 2] == '.' && strchr("xyzw", s.back()) &&
        findReg(s.substr(0, s.size() - 2)) >= 0)
      fail("vector register component");
    if (r >= 0) {
      o.kind = Operand::REG;
      o.reg = r;
      o.ty = regTy[r];
    } else if (isSreg(s)) {
      o.kind = Operand::SREG;
      o.sym = s;
    } else {
      o.kind = Operand::SYM;
      o.sym = s;
      o.var = findVar(s);
      if (!o.var)
        o.sym = scopedLabel(s);
      if (is("+") || is("-")) {
        bool neg = is("-");
        adv();
        int64_t v = integer();
        o.off = neg ? -v : v;
      }
    }
    if (is("|")) {
      adv();
      o.second = std::make_shared<Operand>(operand());
    }
    return o;
  }
  // Labels of a nested scope are found ahead so that forward branches resolve to the scoped name.
  void scanLabels(Scope& sc) {
    Lexer save = lx;
    Lexer l2(lx.t, lx.line);
    l2.p = cur.pos;
    int depth = 0;
    Tok prev;
    for (Tok k = l2.next(); k.kind != Tok::END; k = l2.next()) {
      if (k.s == "{")
        depth++;
      if (k.s == "}") {
        if (depth-- == 0)
          break;
      }
      if (k.s == ":" && depth == 0 && prev.kind == Tok::ID)
        sc.labels[prev.s] = prev.s + "@" + std::to_string(scopeId);
      prev = k;
    }
    (void)save;
  }
  void pushScope() {
    scopes.emplace_back();
    scopeId++;
    if (scopes.size() > 1)
      scanLabels(scopes.back());
  }

  void body(Function& fn) {
    f = &fn;
    expect("{");
    scopes.emplace_back();
    uint64_t fp = 0;
    auto addParam = [&](std::shared_ptr<Var> v) {
      fp = (fp + 15) / 16 * 16;
      v->offset = fp;
      fp += std::max<uint64_t>(v->size, 8);
      scopes[0].vars[v->name] = v;
    };
    for (auto& p : fn.params) {
      if (p->space == SP_REG)
        fail("register parameters unsupported");
      if (fn.entry)
        scopes[0].vars[p->name] = p;
      else
        addParam(p);
    }
    for (auto& p : fn.rets)
      addParam(p);
    int depth = 1;
    while (depth) {
      if (cur.kind == Tok::END)
        fail("unexpected end");
      if (is("{")) {
        adv();
        pushScope();
        depth++;
        continue;
      }
      if (accept("}")) {
        scopes.pop_back();
        depth--;
        continue;
      }
      if (accept(";"))
        continue;
      if (cur.kind == Tok::ID && cur.s[0] == '.') {
        std::string d = cur.s;
        if (d == ".reg") {
          adv();
          int vec = 1;
          Type t = T_NONE;
          while (cur.kind == Tok::ID && cur.s[0] == '.') {
            if (cur.s == ".v2")
              vec = 2;
            else if (cur.s == ".v4")
              vec = 4;
            else
              t = typeFromName(cur.s.substr(1));
            if (t == T_NONE && vec == 1)
              fail("register type");
            adv();
          }
          if (vec != 1)
            fail("vector registers");
          do {
            std::string n = cur.s;
            adv();
            if (accept("<")) {
              int cnt = (int)integer();
              expect(">");
              for (int i = 0; i < cnt; i++)
                scopes.back().regs[n + std::to_string(i)] = newReg(t);
            } else
              scopes.back().regs[n] = newReg(t);
          } while (accept(","));
          expect(";");
          continue;
        }
        if (d == ".local" || d == ".shared" || d == ".param" || d == ".global" || d == ".const") {
          adv();
          Space sp = d == ".local"    ? SP_LOCAL
                     : d == ".shared" ? SP_SHARED
                     : d == ".param"  ? SP_PARAM
                     : d == ".const"  ? SP_CONST
                                      : SP_GLOBAL;
          do {
            auto v = varDecl(sp, false);
            auto up = [](uint64_t x, uint64_t a) { return (x + a - 1) / a * a; };
            if (sp == SP_LOCAL) {
              fn.frameLocalBytes = up(fn.frameLocalBytes, v->align);
              v->offset = fn.frameLocalBytes;
              fn.frameLocalBytes += v->size;
            } else if (sp == SP_SHARED) {
              uint64_t& s = fn.root->staticShared;
              s = up(s, v->align);
              v->offset = s;
              s += v->size;
            } else if (sp == SP_PARAM) {
              fp = up(fp, 16);
              v->offset = fp;
              fp += std::max<uint64_t>(v->size, 8);
            } else
              m.vars[fn.name + "::" + v->name] = v;
            fn.locals.push_back(v);
            scopes.back().vars[v->name] = v;
          } while (accept(","));
          expect(";");
          continue;
        }
        if (d == ".loc") {
          location();
          continue;
        }
        if (d == ".pragma") {
          while (!is(";"))
            adv();
          adv();
          continue;
        }
        fail("unknown directive in body");
      }
      instruction();
    }
    fn.frameParamBytes = (fp + 15) / 16 * 16;
  }
  // .loc file line column [, function_name name, inlined_at file line column]: the source of the
  // instructions that follow
  void location() {
    int ln = cur.line;
    adv();
    SourceLine at = {};
    at.file = (int)integer();
    at.line = (int)integer();
    while (cur.line == ln && !is("}")) {
      bool inlined = is("inlined_at");
      adv();
      if (inlined) {
        at.callFile = (int)integer();
        at.callLine = (int)integer();
      }
    }
    auto added = m.sourceLineIndex.insert({at, (int)m.sourceLines.size()});
    if (added.second)
      m.sourceLines.push_back(at);
    loc = added.first->second;
  }
  void instruction() {
    RawInstr r;
    r.line = cur.line;
    r.loc = loc;
    size_t start = cur.pos;
    if (accept("@")) {
      r.guardNeg = accept("!");
      r.guard = findReg(cur.s);
      if (r.guard < 0)
        fail("guard predicate");
      adv();
    } else {
      Tok t = cur;
      size_t q = lx.p;
      int ql = lx.line;
      adv();
      if (is(":")) { // label, possibly of a table or prototype
        adv();
        std::string name = scopedLabel(t.s);
        if (accept(".branchtargets")) {
          auto& v = f->branchTargets[name];
          do {
            v.push_back(scopedLabel(cur.s));
            adv();
          } while (accept(","));
          expect(";");
          return;
        }
        if (is(".callprototype") || is(".calltargets")) {
          while (!is(";"))
            adv();
          adv();
          return;
        }
        f->labels[name] = (int)f->raw.size();
        return;
      }
      lx.p = q;
      lx.line = ql;
      cur = t;
    }
    std::string op = cur.s;
    if (cur.kind != Tok::ID)
      fail("instruction");
    adv();
    size_t b = 0, e = op.find('.');
    r.op = op.substr(0, e);
    while (e != std::string::npos) {
      b = e + 1;
      e = op.find('.', b);
      r.mods.push_back(op.substr(b, e == std::string::npos ? e : e - b));
    }
    if (r.op == "call")
      call(r);
    else
      while (!is(";")) {
        r.operands.push_back(operand());
        if (!accept(",") && !is(";"))
          fail("expected , or ;");
      }
    r.text = lx.t.substr(start, cur.pos - start);
    for (auto& c : r.text)
      if (c == '\n' || c == '\t')
        c = ' ';
    expect(";");
    f->raw.push_back(std::move(r));
  }
  void call(RawInstr& r) {
    if (accept("(")) {
      while (!is(")")) {
        r.callRet.push_back(operand());
        accept(",");
      }
      adv();
      accept(",");
    }
    int reg = findReg(cur.s);
    if (reg >= 0)
      r.calleeReg = reg;
    else
      r.callee = cur.s;
    adv();
    if (accept(",")) {
      if (accept("(")) {
        while (!is(")")) {
          r.callArg.push_back(operand());
          accept(",");
        }
        adv();
      }
      while (accept(","))
        adv(); // prototype label
    }
    while (!is(";"))
      adv();
  }
};
} // namespace

std::unique_ptr<Module> parseModule(const std::string& text, const std::string& source) {
  auto m = std::make_unique<Module>();
  m->text = text;
  m->source = source;
  {
    Parser p(m->text, 1, *m);
    p.module();
  }
  for (auto& kv : m->funcs)
    m->funcById.push_back(kv.second.get());
  return m;
}
void parseBody(Module& m, Function& f) {
  if (!f.raw.empty() || !f.defined)
    return;
  if (!f.root)
    f.root = &f;
  Parser p(f.body, f.bodyLine, m);
  p.body(f);
}

} // namespace ptx
