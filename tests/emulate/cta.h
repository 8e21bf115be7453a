// A functional emulator of the PTX that Triton compiles for sm_80 to sm_90: one program (CTA) at a time, its warps
// interleaved by a seed, and its asynchronous engines (cp.async, TMA, wgmma) as late or as early as the ISA allows.
// It says nothing about time. This file holds a program's state, the engines, the race detector and the scheduler.
//
// The race detector keeps a vector clock for each warp, engine and mbarrier, and for each 4 bytes of shared memory who
// wrote and read it last. It sees accesses that nothing orders in whatever order they happened to run. Reading through
// the async proxy what the generic one wrote needs a fence.proxy.async on the way.
//
// Missing: fp8, int8 and sparse products, tcgen05, clusters, local memory, calls, races in global memory between
// programs (they run one after another). exp2 and rsqrt are this CPU's; products are sums of fp32 in the order of k;
// tf32 truncates. What ptxas makes of PTX is out of sight.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef unsigned __int128 u128;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef __int128 s128;
static const u32 ALL = 0xffffffffu, SMEM_BASE = 1024,
                 POISON = 0x7fffdeadu;  // NaN as f32; as two 16-bit: NaN (bf16 & f16) and junk
static std::string fmt(const char* f, ...) {
  char b[600];
  va_list a;
  va_start(a, f);
  vsnprintf(b, sizeof b, f, a);
  va_end(a);
  return b;
}
struct Err : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct Ins {
  s32 op, guard, nops, ops, a[8], pc;
};
struct Cta;
struct Warp;
typedef void (*H)(Cta&, Warp&, const Ins&, u32);
struct Range {
  u64 lo, hi;
};
struct TMap {
  u64 magic, base;
  s32 rank, esize, etype, swizzle, fill, pad;
  u32 size[5];
  u32 box[5];
  u64 stride[4];
};  // stride[i]: bytes of dim i+1
static const u64 TMAGIC = 0x50414d414d545845ull;
static_assert(sizeof(TMap) <= 128, "a tensor map is a 128 byte parameter");
struct Rng {
  u64 s;
  u64 next() {
    s ^= s << 13;
    s ^= s >> 7;
    s ^= s << 17;
    return s * 0x2545F4914F6CDD1Dull;
  }
  u32 below(u32 n) { return (u32)((next() >> 33) % n); }
  bool chance(double p) { return (next() >> 11) * 0x1.0p-53 < p; }
};
static inline float bf2f(u16 v) {
  u32 x = (u32)v << 16;
  float f;
  memcpy(&f, &x, 4);
  return f;
}
static inline u16 f2bf(float f) {
  u32 x;
  memcpy(&x, &f, 4);
  if ((x & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (u16)((x + 0x7fff + ((x >> 16) & 1)) >> 16);
}
static inline float h2f(u16 v) { return _cvtsh_ss(v); }
static inline u16 f2h(float f) {
  if (f != f) return 0x7fff;
  return _cvtss_sh(f, 0);
}
static inline float ftz(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }

struct Program {
  std::vector<Ins> code;
  std::vector<s32> ops;
  std::vector<H> fn;
  std::vector<u64> hits;
  int maxnreg = 0;
  u64 regbytes;
  std::vector<u64> init_at, init_val;
  std::vector<s32> init_w;
  int npred;
};
struct Config {
  bool dependent;  // launched before the previous grid has ended
  u64 seed;
  int race;
  double early;
  int quantum;
  int lateness;
  u64 max_steps;
  int elect;
  int verbose;
};
enum State { RUN, BAR, MBAR, DONE, REGS };
struct Entry {
  int pc, rpc;
  u32 mask;
};
struct CpOp {
  u32 dst;
  u64 src;
  int n, size;
};
struct StOp {
  TMap m;
  s32 c[5];
  u32 src;
  int lane;
  std::vector<u8> data;
  bool read;
};
struct Acc {
  int n;
  const s32* regs;
  std::vector<float> C;
  int last;
  bool half;
};  // last: group of its newest wgmma
struct Wg {
  bool ran = false;
  int group, N, K, type;
  bool areg;
  u64 da, db;
  std::vector<u32> araw;
  const s32* aregs;
  bool scale_d;
  float sa, sb;
  bool ta, tb;
  int acc;
  int pc;
};
struct Warp {
  int id;
  u8* R;
  u32* P;
  int nreg = 0, want = 0;
  int pc = 0, rpc = -1, next = 0;
  u32 mask = ALL;
  std::vector<Entry> st;
  State state = RUN;
  int bar = -1;
  u32 mb = 0;
  int par = 0;
  double weight = 1;
  u64 icount = 0;
  std::vector<CpOp> cp_open;
  std::vector<std::vector<CpOp>> cp_groups;
  int cp_done = 0;
  bool waited = false;  // for the end of the previous grid
  bool fenced = false;
  std::vector<Wg> wq;
  int wg_group = 0, wg_done = 0;
  std::map<int, Acc> accs;
  std::vector<StOp> st_open;
  std::vector<std::vector<StOp>> st_groups;
  int st_read = 0, st_done = 0, st_waited = 0;
  template <class T>
  T* r(int off) {
    return (T*)(R + off);
  }
};
struct Load {
  TMap m;
  s32 c[5];
  u32 dst, mbar;
  int warp, pc;
  u64 due;
};
struct MBar {
  u64 bits;
  int agent;
  u32 phases;
  std::vector<u32> vc, pvc, dvc, dpvc;
};
struct Barrier {
  u32 count = 0, need = 0;
  std::vector<int> who;
};
struct Report {
  int pc, other;
  std::string text;
};

struct Cta {
  Program& p;
  Config cfg;
  Rng rng;
  u32 smem_size;
  u8* S;
  int nw, nthreads;
  std::vector<Warp> w;
  std::vector<Range> ranges;
  size_t hot = 0;
  u8* params;
  u64 steps = 0, tick = 0;
  u32 ctaid[3], ncta[3];
  int elect_lane = 0;
  std::vector<Load> loads;
  std::map<u32, MBar> mbars;
  Barrier bars[16];
  std::vector<Report> reports;
  std::set<std::pair<int, int>> seen;
  int cur_pc = 0, cur_warp = 0;
  // race detector: agents are warps, their cp.async, wgmma and bulk-store engines, and mbarriers
  int NA, NR, next_agent;
  std::vector<std::vector<u32>> vc, pvc;
  std::vector<u32> wclk, rclk;
  std::vector<u16> wag;
  std::vector<s32> wpc;
  std::vector<u8> wprox, wmask;
  int pool = 0;  // registers of the CTA that no warp holds, in units of one a thread of a warp
  Cta(Program& p, Config c, u32 smem, int nt, std::vector<Range> rg, u8* prm)
      : p(p), cfg(c), smem_size(smem), nthreads(nt), ranges(rg), params(prm) {
    nw = (nt + 31) / 32;
    S = (u8*)aligned_alloc(64, 256 * 1024);
    std::vector<Warp>(nw).swap(w);
    for (int i = 0; i < nw; i++) {
      w[i].id = i;
      w[i].R = (u8*)aligned_alloc(64, (p.regbytes + 63) / 64 * 64);
      w[i].P = (u32*)calloc(p.npred + 1, 4);
    }
    NR = 3 * nw;
  }
  ~Cta() {
    free(S);
    for (auto& x : w) {
      free(x.R);
      free(x.P);
    }
  }
  [[noreturn]] void fail(const std::string& s) { throw Err(fmt("pc %d warp %d: ", cur_pc, cur_warp) + s); }
  void report(int pc, int other, const std::string& s) {
    if (seen.insert({pc, other}).second && reports.size() < 200) reports.push_back({pc, other, s});
  }
  void check(u64 a, u64 n, const char* what) {
    if (hot < ranges.size() && a >= ranges[hot].lo && a + n <= ranges[hot].hi) return;
    for (size_t i = 0; i < ranges.size(); i++)
      if (a >= ranges[i].lo && a + n <= ranges[i].hi) {
        hot = i;
        return;
      }
    std::string near;
    u64 best = ~0ull;
    for (auto& r : ranges) {
      u64 d = a < r.lo ? r.lo - a : a + n > r.hi ? a + n - r.hi : 0;
      if (d < best) {
        best = d;
        near = fmt("%llu bytes %s an allocation of %llu bytes", (unsigned long long)d, a < r.lo ? "before" : "beyond",
                   (unsigned long long)(r.hi - r.lo));
      }
    }
    fail(fmt("global %s of %d bytes out of bounds at %llx: %s", what, (int)n, (unsigned long long)a, near.c_str()));
  }
  void touches(const Warp& x, const char* what) {
    if (cfg.dependent && !x.waited)
      report(cur_pc, -6000, fmt("%s before griddepcontrol.wait, though the launch is dependent", what));
  }
  u8* sm(u32 a, u32 n) {
    if (a < SMEM_BASE || a + n > SMEM_BASE + smem_size)
      fail(fmt("shared memory access of %u bytes at offset %d, size %u", n, (int)(a - SMEM_BASE), smem_size));
    return S + a;
  }
  // ---- race detector ----
  void race_init() {
    NA = 4 * nw + 128;
    next_agent = 4 * nw;
    vc.assign(nw, std::vector<u32>(NA, 0));
    pvc = vc;
    for (int i = 0; i < nw; i++) vc[i][i] = 1;
    size_t g = (SMEM_BASE + smem_size) / 4 + 8;
    wclk.assign(g, 0);
    wag.assign(g, 0);
    wpc.assign(g, -1);
    wprox.assign(g, 0);
    wmask.assign(g, 0);
    rclk.assign(g * NR, 0);
  }
  int ragent(int r) {
    return r < nw ? r : r < 2 * nw ? r + nw : r + nw;
  }  // reader index -> agent: warps, wgmma (2nw..), stores (3nw..)
  std::string agent_name(int a) {
    if (a < nw) return fmt("warp %d", a);
    if (a < 2 * nw) return fmt("cp.async of warp %d", a - nw);
    if (a < 3 * nw) return fmt("wgmma of warp %d", a - 2 * nw);
    if (a < 4 * nw) return fmt("TMA store of warp %d", a - 3 * nw);
    return fmt("TMA load on mbarrier #%d", a - 4 * nw);
  }
  // reader: index into rclk's row; proxy: the access is the async proxy's
  void rd(int u, u32 a, u32 n, int reader, u32 clk, bool async) {
    if (!cfg.race) return;
    sm(a, n);
    for (u32 g = a / 4, e = (a + n - 1) / 4; g <= e; g++) {
      if (wclk[g]) {
        int ag = wag[g];
        if (vc[u][ag] < wclk[g])
          report(cur_pc, wpc[g],
                 fmt("race: %s reads shared offset %d, which %s wrote (pc %d) without synchronisation in between",
                     reader < nw ? fmt("warp %d", u).c_str() : agent_name(ragent(reader)).c_str(),
                     (int)(g * 4 - SMEM_BASE), agent_name(ag).c_str(), wpc[g]));
        else if (async && !wprox[g] && pvc[u][ag] < wclk[g])
          report(cur_pc, wpc[g],
                 fmt("proxy: %s reads shared offset %d through the async proxy; %s wrote it (pc %d) through the "
                     "generic one with no fence.proxy.async in between",
                     agent_name(ragent(reader)).c_str(), (int)(g * 4 - SMEM_BASE), agent_name(ag).c_str(), wpc[g]));
      }
      rclk[(size_t)g * NR + reader] = clk;
    }
  }
  void wr(int u, u32 a, u32 n, int agent, u32 clk, bool async, const u8* same = nullptr) {
    if (!cfg.race) return;
    sm(a, n);
    const u32* v = vc[u].data();
    for (u32 g = a / 4, e = (a + n - 1) / 4; g <= e; g++) {
      u8 mk = n >= 4 ? 15 : (u8)(((1 << n) - 1) << (a & 3));
      if (wclk[g] && (wmask[g] & mk)) {
        int ag = wag[g];
        if (v[ag] < wclk[g] && !(ag == agent && wpc[g] == cur_pc) && !(same && !memcmp(S + a, same, n)))
          report(cur_pc, wpc[g],
                 fmt("race: %s writes shared offset %d, which %s wrote (pc %d) without synchronisation in between",
                     agent_name(agent).c_str(), (int)(g * 4 - SMEM_BASE), agent_name(ag).c_str(), wpc[g]));
      }
      const u32* r = &rclk[(size_t)g * NR];
      for (int i = 0; i < NR; i++)
        if (r[i] > v[i < nw ? i : i + nw])
          report(cur_pc, -2 - i,
                 fmt("race: %s overwrites shared offset %d, which %s still reads", agent_name(agent).c_str(),
                     (int)(g * 4 - SMEM_BASE), agent_name(ragent(i)).c_str()));
      wmask[g] = wag[g] == agent && wclk[g] == clk ? wmask[g] | mk : mk;
      wag[g] = agent;
      wclk[g] = clk;
      wpc[g] = cur_pc;
      wprox[g] = async;
    }
  }
  static void join(std::vector<u32>& a, const std::vector<u32>& b) {
    for (size_t i = 0; i < a.size(); i++) a[i] = std::max(a[i], b[i]);
  }
  // ---- mbarriers: expected 20 | pending 20 | tx 21 (biased) | phase 1 | valid 1 ----
  static u64 pack(u32 exp, u32 pend, s32 tx, u32 ph) {
    return (u64)exp | (u64)pend << 20 | (u64)((tx + (1 << 20)) & 0x1fffff) << 40 | (u64)ph << 61 | 1ull << 63;
  }
  MBar& mbar(u32 a, const char* what) {
    if (a % 8) fail(fmt("mbarrier %s at an address that is no multiple of 8", what));
    u64 v;
    memcpy(&v, sm(a, 8), 8);
    auto it = mbars.find(a);
    if (it == mbars.end())
      fail(fmt("mbarrier %s at shared offset %d, which is not initialised", what, (int)(a - SMEM_BASE)));
    if (it->second.bits != v)
      fail(fmt("mbarrier %s at shared offset %d: its bytes were overwritten by an ordinary store", what,
               (int)(a - SMEM_BASE)));
    return it->second;
  }
  void mb_touch(int u, u32 a) {
    if (cfg.race) rd(u, a, 8, u, vc[u][u], false);
  }
  void mset(u32 a, MBar& b, u64 v) {
    b.bits = v;
    memcpy(S + a, &v, 8);
  }
  void mb_update(u32 a, MBar& b, int arrive, s32 dtx) {
    u32 exp = b.bits & 0xfffff, pend = b.bits >> 20 & 0xfffff, ph = b.bits >> 61 & 1;
    s32 tx = (s32)(b.bits >> 40 & 0x1fffff) - (1 << 20);
    tx += dtx;
    if (arrive > (int)pend)
      fail(fmt("mbarrier at shared offset %d: %d arrivals, %u pending in this phase", (int)(a - SMEM_BASE), arrive,
               pend));
    pend -= arrive;
    if (tx <= -(1 << 20) || tx >= (1 << 20)) fail("mbarrier: tx-count overflow");
    if (!pend && !tx) {
      pend = exp;
      ph ^= 1;
      b.phases++;
      if (cfg.race) {
        join(b.dvc, b.vc);
        join(b.dpvc, b.pvc);
        b.dvc[b.agent] = b.phases;
        b.dpvc[b.agent] = b.phases;
      }
    }
    mset(a, b, pack(exp, pend, tx, ph));
  }
  void mb_release(int u, MBar& b) {
    if (cfg.race) {
      join(b.vc, vc[u]);
      join(b.pvc, pvc[u]);
      vc[u][u]++;
    }
  }
  bool mb_done(const MBar& b, int par) { return (int)(b.bits >> 61 & 1) != par; }
  // ---- TMA ----
  static u32 swz(u32 a, int mode) {
    return mode == 3   ? a ^ ((a >> 7 & 7) << 4)
           : mode == 2 ? a ^ ((a >> 7 & 3) << 4)
           : mode == 1 ? a ^ ((a >> 7 & 1) << 4)
                       : a;
  }  // 1: 32, 2: 64, 3: 128 bytes
  static u32 box_bytes(const TMap& m) {
    u32 n = m.esize;
    for (int i = 0; i < m.rank; i++) n *= m.box[i];
    return n;
  }
  template <class F>
  void each_row(const TMap& m, const s32* c,
                F f) {  // f(byte offset in the box, global address, first valid byte, end of the valid bytes)
    u32 inner = m.box[0] * m.esize, rows = 1;
    for (int i = 1; i < m.rank; i++) rows *= m.box[i];
    s64 lo = std::max<s64>(0, -(s64)c[0]), hi = std::min<s64>(m.box[0], (s64)m.size[0] - c[0]);
    for (u32 r = 0; r < rows; r++) {
      u32 q = r;
      s64 at = (s64)c[0] * m.esize;
      bool in = hi > lo;
      for (int i = 1; i < m.rank; i++) {
        s64 x = (s64)c[i] + q % m.box[i];
        q /= m.box[i];
        if (x < 0 || x >= (s64)m.size[i]) in = false;
        at += x * (s64)m.stride[i - 1];
      }
      f(r * inner, m.base + at, in ? (u32)(lo * m.esize) : 0u, in ? (u32)(hi * m.esize) : 0u);
    }
  }
  void poison(u32 a, u32 n) {
    for (u32 i = 0; i < n; i += 2) {
      u16 v = 0x7fff;
      memcpy(S + a + i, &v, std::min(2u, n - i));
    }
  }
  void land(size_t i) {
    Load l = loads[i];
    loads.erase(loads.begin() + i);
    u32 inner = l.m.box[0] * l.m.esize;
    each_row(l.m, l.c, [&](u32 off, u64 g, u32 lo, u32 hi) {
      u8 row[4096];
      u16 nanv = l.m.etype == 8 || l.m.etype == 9 || l.m.etype == 10 ? 0 : 0;
      (void)nanv;
      memset(row, 0, inner);
      if (l.m.fill)
        for (u32 k = 0; k < inner; k += 2) {
          u16 v = 0x7fff;
          memcpy(row + k, &v, 2);
        }
      if (hi > lo) {
        check(g + lo, hi - lo, "TMA load");
        memcpy(row + lo, (void*)(g + lo), hi - lo);
      }
      for (u32 k = 0; k < inner; k += 16)
        memcpy(sm(swz(l.dst + off + k, l.m.swizzle), std::min(16u, inner - k)), row + k, std::min(16u, inner - k));
    });
    MBar& b = mbar(l.mbar, "complete_tx");
    mb_update(l.mbar, b, 0, -(s32)box_bytes(l.m));
  }
  void st_read(StOp& s) {
    if (s.read) return;
    s.read = true;
    u32 inner = s.m.box[0] * s.m.esize;
    s.data.resize(box_bytes(s.m));
    each_row(s.m, s.c, [&](u32 off, u64, u32, u32) {
      for (u32 k = 0; k < inner; k += 16) {
        u32 n = std::min(16u, inner - k);
        memcpy(&s.data[off + k], sm(swz(s.src + off + k, s.m.swizzle), n), n);
      }
    });
  }
  void st_write(StOp& s) {
    st_read(s);
    each_row(s.m, s.c, [&](u32 off, u64 g, u32 lo, u32 hi) {
      if (hi > lo) {
        check(g + lo, hi - lo, "TMA store");
        memcpy((void*)(g + lo), &s.data[off + lo], hi - lo);
      }
    });
  }
  void st_reads(Warp& x, int upto) {
    for (; x.st_read < upto; x.st_read++)
      for (auto& s : x.st_groups[x.st_read]) st_read(s);
    if (cfg.race) vc[x.id][3 * nw + x.id] = std::max(vc[x.id][3 * nw + x.id], (u32)upto);
  }
  void st_writes(Warp& x, int upto) {
    st_reads(x, std::max(upto, x.st_read));
    for (; x.st_done < upto; x.st_done++) {
      for (auto& s : x.st_groups[x.st_done]) st_write(s);
      x.st_groups[x.st_done].clear();
    }
  }
  // ---- cp.async ----
  void cp_land(CpOp& o) {
    u8* d = sm(o.dst, o.n);
    if (o.size) {
      check(o.src, o.size, "cp.async");
      memcpy(d, (void*)o.src, o.size);
    }
    memset(d + o.size, 0, o.n - o.size);
  }
  void cp_upto(Warp& x, int upto) {
    for (; x.cp_done < upto; x.cp_done++) {
      for (auto& o : x.cp_groups[x.cp_done]) cp_land(o);
      std::vector<CpOp>().swap(x.cp_groups[x.cp_done]);
    }
    if (cfg.race) vc[x.id][nw + x.id] = std::max(vc[x.id][nw + x.id], (u32)upto);
  }
  // ---- wgmma ----
  // 16 byte chunk of a matrix in shared memory: K-major: row `mn`, chunk `c` of K; MN-major: column `k`, chunk `c` of
  // MN
  u32 chunk(u64 d, bool mn_major, int a, int c) {
    u32 start = (d & 0x3fff) << 4, lbo = (d >> 16 & 0x3fff) << 4, sbo = (d >> 32 & 0x3fff) << 4;
    int sw = d >> 62 & 3;
    int mode = sw == 0 ? 0 : sw == 1 ? 3 : sw == 2 ? 2 : 1;
    u32 row = sw == 0 ? 16 : sw == 1 ? 128 : sw == 2 ? 64 : 32;
    u32 at;
    if (d >> 49 & 7) fail("wgmma: a matrix descriptor with a base offset is not supported");
    if (!mn_major)
      at = sw == 0 ? start + (a / 8) * sbo + (a % 8) * 16 + c * lbo : start + (a / 8) * sbo + (a % 8) * row + c * 16;
    else
      at = sw == 0 ? start + c * sbo + (a % 8) * 16 + (a / 8) * lbo
                   : start + (c / (row / 16)) * lbo + (c % (row / 16)) * 16 + (a % 8) * row + (a / 8) * sbo;
    return swz(at, mode);
  }
  static inline float el(const u8* p, int i, int type) {
    if (type == 2) {
      u32 v;
      memcpy(&v, p + 4 * i, 4);
      v &= 0xffffe000u;
      float f;
      memcpy(&f, &v, 4);
      return f;
    }
    u16 v;
    memcpy(&v, p + 2 * i, 2);
    return type == 0 ? bf2f(v) : h2f(v);
  }
  void wg_reads(Warp& x, const Wg& q, u32 clk) {  // race detector: the addresses that this warp's part reads
    if (!cfg.race) return;
    int per = q.type == 2 ? 4 : 8, rdr = nw + x.id;
    if (!q.areg) {
      if (!q.ta)
        for (int r = 0; r < 16; r++)
          for (int c = 0; c < q.K / per; c++) rd(x.id, chunk(q.da, 0, (x.id % 4) * 16 + r, c), 16, rdr, clk, true);
      else
        for (int k = 0; k < q.K; k++)
          for (int c = 0; c < 2; c++) rd(x.id, chunk(q.da, 1, k, (x.id % 4) * 2 + c), 16, rdr, clk, true);
    }
    if (!q.tb)
      for (int n = 0; n < q.N; n++)
        for (int c = 0; c < q.K / per; c++) rd(x.id, chunk(q.db, 0, n, c), 16, rdr, clk, true);
    else
      for (int k = 0; k < q.K; k++)
        for (int c = 0; c < q.N / 8; c++) rd(x.id, chunk(q.db, 1, k, c), 16, rdr, clk, true);
  }
  void wg_run(Warp& x, Wg& q) {
    static thread_local float A[16][16], B[16][256];
    int per = q.type == 2 ? 4 : 8;
    int save = cur_pc;
    cur_pc = q.pc;
    if (q.areg) {  // the registers as they are now: nobody may write them before the wait
      for (int j = 0; j < 4; j++) {
        const u32* v = x.r<u32>(q.aregs[j]);
        for (int l = 0; l < 32; l++) {
          int r = l / 4 + 8 * (j & 1);
          if (q.type == 2) {
            u32 t = v[l] & 0xffffe000u;
            memcpy(&A[r][l % 4 + 4 * (j >> 1)], &t, 4);
          } else
            for (int h = 0; h < 2; h++)
              A[r][(l % 4) * 2 + h + 8 * (j >> 1)] = q.type == 0 ? bf2f(v[l] >> 16 * h) : h2f(v[l] >> 16 * h);
        }
      }
    } else if (!q.ta) {
      for (int r = 0; r < 16; r++)
        for (int c = 0; c < q.K / per; c++) {
          u8* s = sm(chunk(q.da, 0, (x.id % 4) * 16 + r, c), 16);
          for (int i = 0; i < per; i++) A[r][c * per + i] = el(s, i, q.type);
        }
    } else
      for (int k = 0; k < q.K; k++)
        for (int c = 0; c < 2; c++) {
          u8* s = sm(chunk(q.da, 1, k, (x.id % 4) * 2 + c), 16);
          for (int i = 0; i < 8; i++) A[c * 8 + i][k] = el(s, i, q.type);
        }
    if (!q.tb) {
      for (int n = 0; n < q.N; n++)
        for (int c = 0; c < q.K / per; c++) {
          u8* s = sm(chunk(q.db, 0, n, c), 16);
          for (int i = 0; i < per; i++) B[c * per + i][n] = el(s, i, q.type);
        }
    } else
      for (int k = 0; k < q.K; k++)
        for (int c = 0; c < q.N / 8; c++) {
          u8* s = sm(chunk(q.db, 1, k, c), 16);
          for (int i = 0; i < 8; i++) B[k][c * 8 + i] = el(s, i, q.type);
        }
    if (q.sa * q.sb != 1)
      for (auto& r : A)
        for (auto& v : r) v *= q.sa * q.sb;
    Acc& a = x.accs.at(q.acc);
    int N = q.N;
    for (int r = 0; r < 16; r++) {
      float* C = &a.C[r * N];
      if (!q.scale_d) std::fill(C, C + N, 0.0f);
      for (int k = 0; k < q.K; k++) {
        float s = A[r][k];
        const float* b = B[k];
        for (int n = 0; n < N; n++) C[n] = __builtin_fmaf(s, b[n], C[n]);
      }
    }
    cur_pc = save;
  }
  void wg_flush(Warp& x, int upto) {
    for (auto& q : x.wq)
      if (q.group < upto && !q.ran) {
        wg_run(x, q);
        q.ran = true;
      }
  }
  void wg_wait(Warp& x, int upto) {
    wg_flush(x, upto);
    size_t k = 0;
    for (; k < x.wq.size() && x.wq[k].group < upto; k++) {
      Wg& q = x.wq[k];
      if (q.areg)
        for (int i = 0; i < 4; i++)
          if (memcmp(&q.araw[32 * i], x.r<u32>(q.aregs[i]), 128)) {
            report(q.pc, -1000, "wgmma: a register of A was written before the wait for this wgmma");
            break;
          }
    }
    x.wq.erase(x.wq.begin(), x.wq.begin() + k);
    if (cfg.race) vc[x.id][2 * nw + x.id] = std::max(vc[x.id][2 * nw + x.id], (u32)upto);
    for (auto it = x.accs.begin(); it != x.accs.end();) {
      Acc& a = it->second;
      if (a.last >= upto) {
        ++it;
        continue;
      }
      int N = (a.half ? 4 : 2) * a.n;
      for (int i = 0; i < a.n; i++)
        for (int l = 0; l < 32; l++) {
          if (!a.half)
            x.r<float>(a.regs[i])[l] = a.C[(l / 4 + 8 * (i >> 1 & 1)) * N + (i / 4) * 8 + (l % 4) * 2 + (i & 1)];
          else {
            float* c = &a.C[(l / 4 + 8 * (i & 1)) * N + (i / 2) * 8 + (l % 4) * 2];
            x.r<u32>(a.regs[i])[l] = f2h(c[0]) | (u32)f2h(c[1]) << 16;
          }
        }
      it = x.accs.erase(it);
    }
  }
  // ---- scheduling ----
  void release(Barrier& b) {
    if (cfg.race) {
      std::vector<u32> m = vc[b.who[0]], q = pvc[b.who[0]];
      for (int i : b.who) {
        join(m, vc[i]);
        join(q, pvc[i]);
      }
      for (int i : b.who) {
        u32 own = vc[i][i];
        (void)own;
        vc[i] = m;
        pvc[i] = q;
        vc[i][i]++;
      }
    }
    bool waited = false;
    for (int i : b.who) waited |= w[i].waited;
    for (int i : b.who) {
      w[i].waited = waited;
      w[i].state = RUN;
      w[i].pc++;
      fix(w[i]);
    }
    b = Barrier();
  }
  void fix(Warp& x) {
    while (x.rpc >= 0 && x.pc == x.rpc && !x.st.empty()) {
      Entry e = x.st.back();
      x.st.pop_back();
      x.pc = e.pc;
      x.rpc = e.rpc;
      x.mask = e.mask;
      if (!x.mask && x.st.empty()) {
        finish(x);
        return;
      }
      while (!x.mask && !x.st.empty()) {
        e = x.st.back();
        x.st.pop_back();
        x.pc = e.pc;
        x.rpc = e.rpc;
        x.mask = e.mask;
      }
    }
  }
  int alive() {
    int n = 0;
    for (auto& x : w) n += x.state != DONE;
    return n;
  }
  void finish(Warp& x) {
    x.state = DONE;
    if (!x.wq.empty() || !x.accs.empty()) report(cur_pc, -3000, "exit with a wgmma in flight");
    for (int k = x.st_waited; k < (int)x.st_groups.size(); k++)
      if (!x.st_groups[k].empty())
        report(cur_pc, -3001, "exit while a TMA store may still read shared memory (no bulk wait_group)");
    if (!x.st_open.empty()) { fail("exit with bulk stores that were never committed"); }
    for (auto& b : bars)
      if (b.count && !b.need) maybe(b);
  }
  void maybe(Barrier& b) {
    u32 need = b.need ? b.need : alive() * 32;
    if (b.count >= need) release(b);
  }
  void exec(Warp& x, int quantum) {
    const Ins* code = p.code.data();
    const H* fn = p.fn.data();
    cur_warp = x.id;
    while (quantum-- > 0 && x.state == RUN) {
      const Ins& in = code[x.pc];
      u32 m = x.mask;
      x.icount++;
      if (in.guard >= 0) {
        u32 v = x.P[in.guard & 0xfffff];
        if (in.guard >> 20) v = ~v;
        m &= v;
        if (!m) {
          x.pc++;
          if (x.pc == x.rpc) fix(x);
          continue;
        }
      }
      cur_pc = x.pc;
      x.next = x.pc + 1;
      p.hits[x.pc]++;
      fn[x.pc](*this, x, in, m);
      if (x.state != RUN) { break; }
      x.pc = x.next;
      if (x.pc == x.rpc) fix(x);
    }
  }
  void run() {
    std::vector<int> ready;
    for (;;) {
      ready.clear();
      int done = 0;
      for (auto& x : w) {
        if (x.state == MBAR) {
          cur_warp = x.id;
          cur_pc = x.pc;
          if (mb_done(mbar(x.mb, "wait"), x.par)) x.state = RUN;
        }
        if (x.state == REGS && x.want - x.nreg <= pool) x.state = RUN;
        if (x.state == RUN) ready.push_back(x.id);
        done += x.state == DONE;
      }
      if (done == nw) break;
      if (ready.empty()) {
        if (loads.empty()) deadlock();
        land(rng.below(loads.size()));
        continue;
      }
      if (!loads.empty() && rng.chance(cfg.early)) land(rng.below(loads.size()));
      if (rng.chance(0.02))
        for (auto& x : w) x.weight = rng.chance(0.3) ? 0.02 : 1;
      double tot = 0;
      for (int i : ready) tot += w[i].weight;
      double t = tot * ((rng.next() >> 11) * 0x1.0p-53);
      int pick = ready.back();
      for (int i : ready) {
        t -= w[i].weight;
        if (t <= 0) {
          pick = i;
          break;
        }
      }
      Warp& x = w[pick];
      int q = 1 << rng.below(cfg.quantum + 1);
      u64 before = x.icount;
      exec(x, q);
      steps += x.icount - before;
      if (!x.wq.empty() && x.state != DONE && rng.chance(cfg.early)) {
        cur_warp = x.id;
        for (auto& q : x.wq)
          if (!q.ran) {
            wg_flush(x, q.group + 1);
            break;
          }
      }
      if (x.st_read < (int)x.st_groups.size() && rng.chance(cfg.early * 0.5)) {
        int keep = cfg.race;
        cfg.race = 0;
        st_reads(x, x.st_read + 1);
        cfg.race = keep;
      }
      if (cfg.max_steps && steps > cfg.max_steps) fail("too many steps: endless loop?");
    }
    if (!loads.empty()) {
      report(0, -4000, fmt("exit with %d TMA loads in flight", (int)loads.size()));
      while (!loads.empty()) land(loads.size() - 1);
    }
    for (auto& x : w) st_writes(x, x.st_groups.size());
  }
  [[noreturn]] void deadlock() {
    std::string s = "deadlock:";
    for (auto& x : w) {
      const char* n[] = {"runs", "bar", "mbarrier", "done", "setmaxnreg"};
      s += fmt("\n  warp %d %s", x.id, n[x.state]);
      if (x.state == BAR)
        s +=
            fmt(" %d (%u of %u threads)", x.bar, bars[x.bar].count, bars[x.bar].need ? bars[x.bar].need : alive() * 32);
      if (x.state == MBAR) {
        MBar& b = mbars.at(x.mb);
        s += fmt(" at shared offset %d parity %d (phase %u, pending %u, tx %d)", (int)(x.mb - SMEM_BASE), x.par,
                 (unsigned)b.phases, (unsigned)(b.bits >> 20 & 0xfffff), (int)(b.bits >> 40 & 0x1fffff) - (1 << 20));
      }
      if (x.state != DONE) s += fmt(" at pc %d", x.pc);
    }
    throw Err(s);
  }
  void start(const u32* id) {
    memcpy(ctaid, id, 12);
    rng.s = (cfg.seed * 0x9E3779B97F4A7C15ull) ^ ((u64)(id[0] + 1) * 0xD1B54A32D192ED03ull) ^ ((u64)id[1] << 40) ^
            ((u64)id[2] << 50) ^ 0x1234567;
    for (int i = 0; i < 8; i++) rng.next();
    for (u32 i = 0; i < 256 * 1024; i += 2) {
      u16 v = 0x7fff;
      memcpy(S + i, &v, 2);
    }
    pool = 0;
    loads.clear();
    mbars.clear();
    for (auto& b : bars) b = Barrier();
    if (cfg.race) race_init();
    elect_lane = cfg.elect < 0 ? rng.below(32) : cfg.elect;
    for (auto& x : w) {
      u8* R = x.R;
      u32* P = x.P;
      int idd = x.id;
      x.~Warp();
      new (&x) Warp();
      x.id = idd;
      x.R = R;
      x.P = P;
      u32* r = (u32*)R;
      for (u64 i = 0; i < p.regbytes / 4; i++) r[i] = POISON;
      u64 s = rng.next() | 1;
      for (int i = 0; i < p.npred; i++) P[i] = (u32)(s * (i * 2 + 1) >> 16);
      P[0] = 0;
      P[1] = ALL;
      for (size_t i = 0; i < p.init_at.size(); i++) {
        u8* a = R + p.init_at[i];
        u64 v = p.init_val[i];
        int wd = p.init_w[i];
        for (int l = 0; l < 32; l++) {
          u64 y = v;
          if (wd & 256) y = special((int)v, x.id, l);
          if (wd & 512) y = v + (u64)params;
          memcpy(a + l * (wd & 255), &y, wd & 255);
        }
      }
      x.nreg = p.maxnreg;
      if (nthreads % 32 && x.id == nw - 1) x.mask = (1u << nthreads % 32) - 1;
    }
  }
  u64 special(int k, int wid, int lane) {
    u32 t = wid * 32 + lane;
    switch (k) {
      case 0: return t;
      case 1:
      case 2: return 0;
      case 3: return nthreads;
      case 4:
      case 5: return 1;
      case 6: return ctaid[0];
      case 7: return ctaid[1];
      case 8: return ctaid[2];
      case 9: return ncta[0];
      case 10: return ncta[1];
      case 11: return ncta[2];
      case 12: return lane;
      case 13: return wid;
      case 14: return 0;
      case 15: return 1;
      case 16: return 1ull << lane;
      case 17: return (1ull << lane) - 1;
    }
    return 0;
  }
};
