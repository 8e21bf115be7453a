// What each instruction does to a warp's registers and to its program. `init` gives them their names.
#pragma once

#include "cta.h"

#define HD [](Cta& c, Warp& w, const Ins& i, u32 m)
#define O(k) (c.p.ops[i.ops + (k)])
#define EACH(body)                           \
  {                                          \
    if (m == ALL) {                          \
      for (int l = 0; l < 32; l++) { body; } \
    } else                                   \
      for (u32 mm = m; mm; mm &= mm - 1) {   \
        int l = __builtin_ctz(mm);           \
        body;                                \
      }                                      \
  }
static inline u32 pr(Warp& w, s32 o) {
  u32 v = w.P[o & 0xfffff];
  return o >> 20 ? ~v : v;
}
static inline void pw(Warp& w, s32 o, u32 v, u32 m) {
  if (o < 0) return;
  w.P[o] = (w.P[o] & ~m) | (v & m);
}
static std::unordered_map<std::string, std::pair<int, int>>& names() {
  static std::unordered_map<std::string, std::pair<int, int>> n;
  return n;
}  // name -> (index, runs without active lanes)
static std::vector<H>& handlers() {
  static std::vector<H> h;
  return h;
}
static void def(const std::string& n, H h) {
  names()[n] = {(int)handlers().size(), 0};
  handlers().push_back(h);
}
#define UN(T, D, expr)                 \
  HD {                                 \
    T* a = w.r<T>(O(1));               \
    D* d = w.r<D>(O(0));               \
    EACH(T x = a[l]; d[l] = (D)(expr)) \
  }
#define BI(T, expr)                                            \
  HD {                                                         \
    T *a = w.r<T>(O(1)), *b = w.r<T>(O(2)), *d = w.r<T>(O(0)); \
    EACH(T x = a[l]; T y = b[l]; d[l] = (T)(expr))             \
  }
#define TR(T, expr)                                                               \
  HD {                                                                            \
    T *a = w.r<T>(O(1)), *b = w.r<T>(O(2)), *e = w.r<T>(O(3)), *d = w.r<T>(O(0)); \
    EACH(T x = a[l]; T y = b[l]; T z = e[l]; d[l] = (T)(expr))                    \
  }
#define SH(T, expr)                                  \
  HD {                                               \
    T *a = w.r<T>(O(1)), *d = w.r<T>(O(0));          \
    u32* b = w.r<u32>(O(2));                         \
    EACH(T x = a[l]; u32 y = b[l]; d[l] = (T)(expr)) \
  }
#define WIDE(T, D, expr)                           \
  HD {                                             \
    T *a = w.r<T>(O(1)), *b = w.r<T>(O(2));        \
    D* d = w.r<D>(O(0));                           \
    EACH(D x = a[l]; D y = b[l]; d[l] = (D)(expr)) \
  }
#define WIDE3(T, D, expr)                                      \
  HD {                                                         \
    T *a = w.r<T>(O(1)), *b = w.r<T>(O(2));                    \
    D *d = w.r<D>(O(0)), *e = w.r<D>(O(3));                    \
    EACH(D x = a[l]; D y = b[l]; D z = e[l]; d[l] = (D)(expr)) \
  }
#define PK(conv, back, expr)                                           \
  HD {                                                                 \
    u32 *a = w.r<u32>(O(1)), *b = w.r<u32>(O(2)), *d = w.r<u32>(O(0)); \
    EACH(u32 r = 0; for (int h = 0; h < 2; h++) {                      \
      float x = conv((u16)(a[l] >> 16 * h));                           \
      float y = conv((u16)(b[l] >> 16 * h));                           \
      r |= (u32)back(expr) << 16 * h;                                  \
    } d[l] = r)                                                        \
  }
#define PK3(conv, back, expr)                                                               \
  HD {                                                                                      \
    u32 *a = w.r<u32>(O(1)), *b = w.r<u32>(O(2)), *e = w.r<u32>(O(3)), *d = w.r<u32>(O(0)); \
    EACH(u32 r = 0; for (int h = 0; h < 2; h++) {                                           \
      float x = conv((u16)(a[l] >> 16 * h));                                                \
      float y = conv((u16)(b[l] >> 16 * h));                                                \
      float z = conv((u16)(e[l] >> 16 * h));                                                \
      r |= (u32)back(expr) << 16 * h;                                                       \
    } d[l] = r)                                                                             \
  }
#define SC(conv, back, expr)                                            \
  HD {                                                                  \
    u16 *a = w.r<u16>(O(1)), *b = w.r<u16>(O(2)), *d = w.r<u16>(O(0));  \
    EACH(float x = conv(a[l]); float y = conv(b[l]); d[l] = back(expr)) \
  }
#define SC3(conv, back, expr)                                                                 \
  HD {                                                                                        \
    u16 *a = w.r<u16>(O(1)), *b = w.r<u16>(O(2)), *e = w.r<u16>(O(3)), *d = w.r<u16>(O(0));   \
    EACH(float x = conv(a[l]); float y = conv(b[l]); float z = conv(e[l]); d[l] = back(expr)) \
  }
static inline float fminp(float x, float y) {
  return x != x ? y : y != y ? x : x < y ? x : (x == y && std::signbit(x)) ? x : y;
}
static inline float fmaxp(float x, float y) {
  return x != x ? y : y != y ? x : x > y ? x : (x == y && !std::signbit(x)) ? x : y;
}
static inline float nanp(float x, float y) { return x != x || y != y; }
static inline float qnan() {
  u32 v = 0x7fffffff;
  float f;
  memcpy(&f, &v, 4);
  return f;
}
template <class T>
static T satcvt(double x) {
  if (x != x) return 0;
  double lo = (double)std::numeric_limits<T>::min(), hi = (double)std::numeric_limits<T>::max();
  return x <= lo ? std::numeric_limits<T>::min() : x >= hi ? std::numeric_limits<T>::max() : (T)x;
}
template <class T>
static void setp_ops(const char* t) {
#define SP(nm, expr)                                                           \
  def(                                                                         \
      std::string("setp.") + nm + "." + t, HD {                                \
        T *a = w.r<T>(O(1)), *b = w.r<T>(O(2));                                \
        u32 r = 0;                                                             \
        EACH(T x = a[l]; T y = b[l]; r |= (u32)(expr) << l) pw(w, O(0), r, m); \
      })
  SP("eq", x == y);
  SP("ne", x != y);
  SP("lt", x < y);
  SP("le", x <= y);
  SP("gt", x > y);
  SP("ge", x >= y);
  SP("lo", x < y);
  SP("ls", x <= y);
  SP("hi", x > y);
  SP("hs", x >= y);
}
template <class T, class S, int B>
static void int_ops(const std::string& u, const std::string& s, const std::string& b) {
  for (auto& t : {u, s}) {
    def("add." + t, BI(T, x + y));
    def("sub." + t, BI(T, x - y));
    def("mul.lo." + t, BI(T, x * y));
    def("mad.lo." + t, TR(T, x * y + z));
  }
  def("min." + u, BI(T, x < y ? x : y));
  def("max." + u, BI(T, x > y ? x : y));
  def("min." + s, BI(S, x < y ? x : y));
  def("max." + s, BI(S, x > y ? x : y));
  def("div." + u, BI(T, y ? x / y : ~(T)0));
  def("rem." + u, BI(T, y ? x % y : x));
  def("div." + s, BI(S, y == 0 ? -1 : y == -1 ? (S)(0 - (T)x) : x / y));
  def("rem." + s, BI(S, y == 0 ? x : y == -1 ? 0 : x % y));
  def("neg." + s, UN(S, S, (S)(0 - (T)x)));
  def("abs." + s, UN(S, S, x < 0 ? (S)(0 - (T)x) : x));
  def("and." + b, BI(T, x & y));
  def("or." + b, BI(T, x | y));
  def("xor." + b, BI(T, x ^ y));
  def("not." + b, UN(T, T, ~x));
  def("cnot." + b, UN(T, T, !x));
  for (auto& t : {u, s, b}) {
    def("shl." + t, SH(T, y >= B ? 0 : x << y));
    def("mov." + t, UN(T, T, x));
    def(
        "selp." + t, HD {
          T *a = w.r<T>(O(1)), *bb = w.r<T>(O(2)), *d = w.r<T>(O(0));
          u32 q = pr(w, O(3));
          EACH(d[l] = q >> l & 1 ? a[l] : bb[l])
        });
  }
  def("shr." + u, SH(T, y >= B ? 0 : x >> y));
  def("shr." + b, SH(T, y >= B ? 0 : x >> y));
  def("shr." + s, SH(S, x >> (y >= B ? B - 1 : y)));
  setp_ops<T>(u.c_str());
  setp_ops<T>(b.c_str());
  setp_ops<S>(s.c_str());
}
template <class D, class S>
static void cvt1(const std::string& d, const std::string& s) {
  def("cvt." + d + "." + s, UN(S, D, x));
}
template <class S>
static void cvt_from(const std::string& s) {
  cvt1<u8, S>("xu8", s);
  cvt1<u16, S>("u16", s);
  cvt1<s16, S>("s16", s);
  cvt1<u32, S>("u32", s);
  cvt1<s32, S>("s32", s);
  cvt1<u64, S>("u64", s);
  cvt1<s64, S>("s64", s);
  def("cvt.u8." + s, UN(S, u16, (u8)x));
  def("cvt.s8." + s, UN(S, s16, (s8)x));
  def("cvt.f32." + s, UN(S, float, (float)x));
  def("cvt.f64." + s, UN(S, double, (double)x));
  def("cvt.f16." + s, UN(S, u16, f2h((float)x)));
  def("cvt.bf16." + s, UN(S, u16, f2bf((float)x)));
}
static double rnd(double x, int mode) {
  return mode == 1 ? trunc(x) : mode == 2 ? floor(x) : mode == 3 ? ceil(x) : nearbyint(x);
}
static void ld_reg(u8* R, int off, int l, int dw, int sw, bool sg, const u8* p) {
  u64 v = 0;
  memcpy(&v, p, sw);
  if (sg && sw < dw && (v >> (8 * sw - 1) & 1)) v |= ~0ull << 8 * sw;
  memcpy(R + off + l * dw, &v, dw);
}
static inline u32 saddr(Warp& w, int off, int wd, int l) { return wd == 8 ? (u32)w.r<u64>(off)[l] : w.r<u32>(off)[l]; }
// aux of ld/st: 0 element bytes, 1 vector length, 2 offset, 3 register bytes, 4 signed, 5 address register bytes
static void ld_global(Cta& c, Warp& w, const Ins& i, u32 m) {
  c.touches(w, "load");
  int e = i.a[0], n = i.a[1];
  u64* ad = w.r<u64>(O(n));
  u64 at[32];
  EACH(at[l] = ad[l] + (s64)i.a[2]; if (at[l] % (e * n)) c.fail(
      fmt("misaligned global load of %d bytes at %llx (lane %d)", e * n, (unsigned long long)at[l], l));
       c.check(at[l], e * n, "load"))
  for (int k = 0; k < n; k++) {
    int d = O(k);
    if (d < 0) continue;
    EACH(ld_reg(w.R, d, l, i.a[3], e, i.a[4], (u8*)at[l] + k * e))
  }
}
static void st_global(Cta& c, Warp& w, const Ins& i, u32 m) {
  c.touches(w, "store");
  int e = i.a[0], n = i.a[1];
  u64* ad = w.r<u64>(O(0));
  EACH(u64 at = ad[l] + (s64)i.a[2];
       if (at % (e * n)) c.fail(fmt("misaligned global store of %d bytes at %llx", e * n, (unsigned long long)at));
       c.check(at, e * n, "store"); for (int k = 0; k < n; k++) memcpy((u8*)at + k * e, w.R + O(1 + k) + l * i.a[3], e))
}
static void ld_shared(Cta& c, Warp& w, const Ins& i, u32 m) {
  int e = i.a[0], n = i.a[1];
  EACH(u32 at = saddr(w, O(n), i.a[5], l) + i.a[2]; if (at % (e * n)) c.fail("misaligned shared load");
       u8* s = c.sm(at, e * n); c.rd(w.id, at, e * n, w.id, c.cfg.race ? c.vc[w.id][w.id] : 0, false); u8 tmp[32];
       memcpy(tmp, s, e * n);
       for (int k = 0; k < n; k++) if (O(k) >= 0) ld_reg(w.R, O(k), l, i.a[3], e, i.a[4], tmp + k * e))
}
static void st_shared(Cta& c, Warp& w, const Ins& i, u32 m) {
  int e = i.a[0], n = i.a[1];
  EACH(u32 at = saddr(w, O(0), i.a[5], l) + i.a[2]; if (at % (e * n)) c.fail("misaligned shared store");
       u8* s = c.sm(at, e * n); u8 tmp[32];
       for (int k = 0; k < n; k++) memcpy(tmp + k * e, w.R + O(1 + k) + l * i.a[3], e);
       c.wr(w.id, at, e * n, w.id, c.cfg.race ? c.vc[w.id][w.id] : 0, false, tmp); memcpy(s, tmp, e * n))
}
static void ld_param(Cta& c, Warp& w, const Ins& i, u32 m) {
  int e = i.a[0], n = i.a[1];
  u64* ad = w.r<u64>(O(n));
  EACH(for (int k = 0; k < n; k++) ld_reg(w.R, O(k), l, i.a[3], e, i.a[4], (u8*)(ad[l] + i.a[2]) + k * e))
}
static void converged(Cta& c, Warp& w, u32 m, const char* what) {
  if (m != ALL) c.fail(fmt("%s with lanes %08x of the warp only", what, m));
}
static void bar(Cta& c, Warp& w, int id, u32 need, u32 m) {
  if (id < 0 || id > 15) c.fail("barrier id out of range");
  Barrier& b = c.bars[id];
  if (m != w.mask || m != ALL) c.fail(fmt("bar.sync with lanes %08x of the warp only", m));
  if (b.count && b.need != need)
    c.fail(fmt("barrier %d: warps wait with different thread counts (%u, %u)", id, b.need, need));
  if (need % 32) c.fail("bar.sync: count is no multiple of 32");
  b.need = need;
  b.count += 32;
  b.who.push_back(w.id);
  w.state = BAR;
  w.bar = id;
  if (need && b.count > need) c.fail("bar.sync: more threads than the barrier's count");
  c.maybe(b);
}
// aux of wgmma: 0 N, 1 K, 2 type (0 bf16, 1 f16, 2 tf32), 3 A in registers, 4 scale_d: -1 predicate else constant, 5
// flags (ta 1, tb 2, -a 4, -b 8), 6 f16 accumulator, 7 number of accumulator registers
static void wgmma(Cta& c, Warp& w, const Ins& i, u32 m) {
  converged(c, w, m, "wgmma");
  Wg q;
  q.N = i.a[0];
  q.K = i.a[1];
  q.type = i.a[2];
  q.areg = i.a[3];
  int n = i.a[7];
  int k = n;
  q.pc = w.pc;
  q.aregs = nullptr;
  q.da = 0;
  q.acc = O(0);
  if (q.areg) {
    q.aregs = &O(k);
    q.araw.resize(128);
    for (int j = 0; j < 4; j++) memcpy(&q.araw[32 * j], w.r<u32>(O(k + j)), 128);
    k += 4;
  } else {
    u64* d = w.r<u64>(O(k++));
    q.da = d[0];
    for (int l = 1; l < 32; l++)
      if (d[l] != d[0]) c.fail("wgmma: A's descriptor differs between lanes");
  }
  u64* d = w.r<u64>(O(k++));
  q.db = d[0];
  for (int l = 1; l < 32; l++)
    if (d[l] != d[0]) c.fail("wgmma: B's descriptor differs between lanes");
  if (i.a[4] < 0) {
    u32 v = pr(w, O(k));
    if (v != 0 && v != ALL) c.fail("wgmma: scale-d differs between lanes");
    q.scale_d = v;
  } else q.scale_d = i.a[4];
  q.ta = i.a[5] & 1;
  q.tb = i.a[5] & 2;
  q.sa = i.a[5] & 4 ? -1 : 1;
  q.sb = i.a[5] & 8 ? -1 : 1;
  q.group = w.wg_group;
  auto it = w.accs.find(q.acc);
  if (!w.fenced && (it == w.accs.end() || q.areg))
    c.report(w.pc, -5000,
             "wgmma: no wgmma.fence since the last wait_group, though its registers may have been written");
  if (it == w.accs.end()) {
    Acc a;
    a.n = n;
    a.regs = &O(0);
    a.half = i.a[6];
    a.C.resize(16 * q.N);
    if (!a.half) {
      for (int j = 0; j < n; j++) {
        float* r = w.r<float>(O(j));
        for (int l = 0; l < 32; l++) a.C[(l / 4 + 8 * (j >> 1 & 1)) * q.N + (j / 4) * 8 + (l % 4) * 2 + (j & 1)] = r[l];
      }
    } else
      for (int j = 0; j < n; j++) {
        u32* r = w.r<u32>(O(j));
        for (int l = 0; l < 32; l++)
          for (int h = 0; h < 2; h++)
            a.C[(l / 4 + 8 * (j & 1)) * q.N + (j / 2) * 8 + (l % 4) * 2 + h] = h2f(r[l] >> 16 * h);
      }
    for (int j = 0; j < n; j++) {
      u32* r = w.r<u32>(O(j));
      for (int l = 0; l < 32; l++) r[l] = POISON;
    }
    it = w.accs.emplace(q.acc, std::move(a)).first;
  } else if (it->second.n != n || memcmp(it->second.regs, &O(0), 4 * n))
    c.fail("wgmma: accumulators overlap those of a wgmma in flight");
  it->second.last = w.wg_group;
  c.wg_reads(w, q, w.wg_group + 1);
  w.wq.push_back(q);
  if (c.rng.chance(c.cfg.early)) c.wg_flush(w, w.wg_group + 1);
}
static void mma_sync(Cta& c, Warp& w, const Ins& i,
                     u32 m) {  // aux: 0 K, 1 type, 2 A regs, 3 B regs, 4 f16 accumulators; ops: d, a, b, c
  converged(c, w, m, "mma.sync");
  int K = i.a[0], ty = i.a[1], na = i.a[2], nb = i.a[3], nc = i.a[4] ? 2 : 4;
  float A[16][16] = {}, B[16][8] = {}, C[16][8];
  for (int j = 0; j < na; j++)
    for (int l = 0; l < 32; l++) {
      u32 v = w.r<u32>(O(nc + j))[l];
      int r = l / 4 + 8 * (j & 1);
      if (ty == 2) {
        v &= 0xffffe000u;
        memcpy(&A[r][l % 4 + 4 * (j >> 1)], &v, 4);
      } else
        for (int h = 0; h < 2; h++)
          A[r][(l % 4) * 2 + h + 8 * (j >> 1)] = ty == 0 ? bf2f(v >> 16 * h) : h2f(v >> 16 * h);
    }
  for (int j = 0; j < nb; j++)
    for (int l = 0; l < 32; l++) {
      u32 v = w.r<u32>(O(nc + na + j))[l];
      if (ty == 2) {
        v &= 0xffffe000u;
        memcpy(&B[l % 4 + 4 * j][l / 4], &v, 4);
      } else
        for (int h = 0; h < 2; h++) B[(l % 4) * 2 + h + 8 * j][l / 4] = ty == 0 ? bf2f(v >> 16 * h) : h2f(v >> 16 * h);
    }
  for (int l = 0; l < 32; l++)
    for (int j = 0; j < nc; j++) {
      if (i.a[4])
        for (int h = 0; h < 2; h++) C[l / 4 + 8 * j][(l % 4) * 2 + h] = h2f(w.r<u32>(O(nc + na + nb + j))[l] >> 16 * h);
      else C[l / 4 + 8 * (j >> 1)][(l % 4) * 2 + (j & 1)] = w.r<float>(O(nc + na + nb + j))[l];
    }
  for (int r = 0; r < 16; r++)
    for (int k = 0; k < K; k++)
      for (int n = 0; n < 8; n++) C[r][n] = __builtin_fmaf(A[r][k], B[k][n], C[r][n]);
  for (int l = 0; l < 32; l++)
    for (int j = 0; j < nc; j++) {
      if (i.a[4])
        w.r<u32>(O(j))[l] = f2h(C[l / 4 + 8 * j][(l % 4) * 2]) | (u32)f2h(C[l / 4 + 8 * j][(l % 4) * 2 + 1]) << 16;
      else w.r<float>(O(j))[l] = C[l / 4 + 8 * (j >> 1)][(l % 4) * 2 + (j & 1)];
    }
}
static void ldmatrix(Cta& c, Warp& w, const Ins& i, u32 m) {  // aux: 0 count, 1 trans, 2 offset, 3 address bytes
  converged(c, w, m, "ldmatrix");
  int n = i.a[0];
  u16 M[4][8][8];
  for (int j = 0; j < n; j++)
    for (int r = 0; r < 8; r++) {
      u32 a = saddr(w, O(n), i.a[3], 8 * j + r) + i.a[2];
      if (a % 16) c.fail("misaligned ldmatrix row");
      memcpy(M[j][r], c.sm(a, 16), 16);
      c.rd(w.id, a, 16, w.id, c.cfg.race ? c.vc[w.id][w.id] : 0, false);
    }
  for (int j = 0; j < n; j++)
    for (int l = 0; l < 32; l++) {
      int r = l / 4, q = (l % 4) * 2;
      w.r<u32>(O(j))[l] = i.a[1] ? M[j][q][r] | (u32)M[j][q + 1][r] << 16 : M[j][r][q] | (u32)M[j][r][q + 1] << 16;
    }
}
static void stmatrix(Cta& c, Warp& w, const Ins& i, u32 m) {
  converged(c, w, m, "stmatrix");
  int n = i.a[0];
  u16 M[4][8][8];
  for (int j = 0; j < n; j++)
    for (int l = 0; l < 32; l++) {
      int r = l / 4, q = (l % 4) * 2;
      u32 v = w.r<u32>(O(1 + j))[l];
      if (i.a[1]) {
        M[j][q][r] = v;
        M[j][q + 1][r] = v >> 16;
      } else {
        M[j][r][q] = v;
        M[j][r][q + 1] = v >> 16;
      }
    }
  for (int j = 0; j < n; j++)
    for (int r = 0; r < 8; r++) {
      u32 a = saddr(w, O(0), i.a[3], 8 * j + r) + i.a[2];
      if (a % 16) c.fail("misaligned stmatrix row");
      u8* s = c.sm(a, 16);
      c.wr(w.id, a, 16, w.id, c.cfg.race ? c.vc[w.id][w.id] : 0, false, (u8*)M[j][r]);
      memcpy(s, M[j][r], 16);
    }
}
static TMap tmap(Cta& c, u64 a) {
  TMap t;
  u64 lo = (u64)c.params;
  if (a < lo || a > lo + 65536) c.fail("TMA: the descriptor is not a kernel parameter");
  memcpy(&t, (void*)a, sizeof t);
  if (t.magic != TMAGIC) c.fail("TMA: no tensor map at this address");
  return t;
}
// aux of TMA: 0 rank, 1 offset of the shared address. load ops: dst, map, coords.., mbar; store ops: map, coords.., src
static void tma_load(Cta& c, Warp& w, const Ins& i, u32 m) {
  c.touches(w, "TMA load");
  EACH(Load t; t.m = tmap(c, w.r<u64>(O(1))[l]);
       if (t.m.rank != i.a[0]) c.fail("TMA: rank differs from the descriptor's"); t.dst = w.r<u32>(O(0))[l] + i.a[1];
       for (int k = 0; k < i.a[0]; k++) t.c[k] = w.r<s32>(O(2 + k))[l]; t.mbar = w.r<u32>(O(2 + i.a[0]))[l] + i.a[2];
       t.warp = w.id; t.pc = w.pc;
       if (t.dst % 128) c.fail(fmt("TMA load: shared address %u is no multiple of 128", t.dst));
       u32 n = Cta::box_bytes(t.m); c.sm(t.dst, n); MBar& b = c.mbar(t.mbar, "of a TMA load"); c.mb_touch(w.id, t.mbar);
       c.wr(w.id, t.dst, n, b.agent, b.phases + 1, true); c.poison(t.dst, n); if (c.cfg.race) c.vc[w.id][w.id]++;
       c.loads.push_back(t); if (c.rng.chance(c.cfg.early * 0.3)) c.land(c.loads.size() - 1))
}
static void tma_store(Cta& c, Warp& w, const Ins& i, u32 m) {
  c.touches(w, "TMA store");
  EACH(StOp s; s.m = tmap(c, w.r<u64>(O(0))[l]); for (int k = 0; k < i.a[0]; k++) s.c[k] = w.r<s32>(O(1 + k))[l];
       s.src = w.r<u32>(O(1 + i.a[0]))[l] + i.a[1]; s.lane = l; s.read = false;
       if (s.src % 128) c.fail("TMA store: shared address is no multiple of 128"); u32 n = Cta::box_bytes(s.m);
       c.sm(s.src, n); c.rd(w.id, s.src, n, 2 * c.nw + w.id, w.st_groups.size() + 1, true); w.st_open.push_back(s))
}
template <class T, class F>
static void atomic(Cta& c, Warp& w, const Ins& i, u32 m, bool shared,
                   F f) {  // aux: 2 offset, 5 address bytes, 6 has destination
  int k = i.a[6] ? 1 : 0;
  if (!shared) c.touches(w, "atomic");
  EACH(
      u8 * p; if (shared) {
        u32 a = saddr(w, O(k), i.a[5], l) + i.a[2];
        p = c.sm(a, sizeof(T));
      } else {
        u64 a = w.r<u64>(O(k))[l] + (s64)i.a[2];
        if (a % sizeof(T)) c.fail("misaligned atomic");
        c.check(a, sizeof(T), "atomic");
        p = (u8*)a;
      } T old;
      memcpy(&old, p, sizeof(T)); T y = f(old, w.r<T>(O(k + 1))[l], i.nops > k + 2 ? w.r<T>(O(k + 2))[l] : T());
      memcpy(p, &y, sizeof(T)); if (k && O(0) >= 0) w.r<T>(O(0))[l] = old)
}
template <class T>
static void atoms(const std::string& t) {
#define AT(nm, e)                                        \
  def(                                                   \
      std::string("atom.global.") + nm + "." + t, HD {   \
        atomic<T>(c, w, i, m, false, [](T x, T y, T z) { \
          (void)z;                                       \
          return (T)(e);                                 \
        });                                              \
      });                                                \
  def(                                                   \
      std::string("atom.shared.") + nm + "." + t, HD {   \
        atomic<T>(c, w, i, m, true, [](T x, T y, T z) {  \
          (void)z;                                       \
          return (T)(e);                                 \
        });                                              \
      });
  AT("add", x + y) AT("min", x < y ? x : y) AT("max", x > y ? x : y) AT("exch", y) AT("cas", x == y ? z : x)
}
static void init() {
  int_ops<u16, s16, 16>("u16", "s16", "b16");
  int_ops<u32, s32, 32>("u32", "s32", "b32");
  int_ops<u64, s64, 64>("u64", "s64", "b64");
  setp_ops<float>("f32");
  setp_ops<double>("f64");
  def("mul.wide.s32", WIDE(s32, s64, x * y));
  def("mul.wide.u32", WIDE(u32, u64, x * y));
  def("mul.wide.s16", WIDE(s16, s32, x * y));
  def("mul.wide.u16", WIDE(u16, u32, x * y));
  def("mad.wide.s32", WIDE3(s32, s64, x * y + z));
  def("mad.wide.u32", WIDE3(u32, u64, x * y + z));
  def("mad.wide.s16", WIDE3(s16, s32, x * y + z));
  def("mad.wide.u16", WIDE3(u16, u32, x * y + z));
  def("mul.hi.u16", BI(u16, ((u32)x * y) >> 16));
  def("mul.hi.s16", BI(s16, ((s32)x * y) >> 16));
#define X2(T, nm, e)                                                       \
  def(                                                                     \
      nm, HD {                                                             \
        u32 *a = w.r<u32>(O(1)), *b = w.r<u32>(O(2)), *d = w.r<u32>(O(0)); \
        EACH(u32 r = 0; for (int h = 0; h < 2; h++) {                      \
          T x = (T)(a[l] >> 16 * h);                                       \
          T y = (T)(b[l] >> 16 * h);                                       \
          r |= (u32)(u16)(T)(e) << 16 * h;                                 \
        } d[l] = r)                                                        \
      });
  X2(u16, "add.u16x2", x + y)
  X2(s16, "add.s16x2", x + y) X2(u16, "sub.u16x2", x - y) X2(s16, "sub.s16x2", x - y)
      X2(u16, "min.u16x2", x < y ? x : y) X2(s16, "min.s16x2", x < y ? x : y) X2(u16, "max.u16x2", x > y ? x : y)
          X2(s16, "max.s16x2", x > y ? x : y) def("mul.hi.s32", BI(s32, ((s64)x * y) >> 32));
  def("mul.hi.u32", BI(u32, ((u64)x * y) >> 32));
  def("mul.hi.u64", BI(u64, ((u128)x * y) >> 64));
  def("mul.hi.s64", BI(s64, ((s128)x * y) >> 64));
  def("mad.hi.u32", TR(u32, (u32)(((u64)x * y) >> 32) + z));
  def("mad.hi.s32", TR(s32, (s32)(((s64)x * y) >> 32) + z));
  def("bfe.u32", TR(u32, (y & 255) > 31   ? 0
                         : (z & 255) == 0 ? 0
                                          : (x >> (y & 255)) & ((z & 255) > 31 ? ALL : (1u << (z & 255)) - 1)));
  def(
      "bfe.s32", HD {
        s32 *a = w.r<s32>(O(1)), *d = w.r<s32>(O(0));
        u32 *b = w.r<u32>(O(2)), *e = w.r<u32>(O(3));
        EACH(u32 pos = b[l] & 255; u32 len = e[l] & 255; s32 r = 0; if (len) {
          u32 msb = std::min(31u, pos + len - 1);
          s64 v = (s64)(u64)(u32)a[l];
          u32 sign = (u32)a[l] >> msb & 1;
          u64 f = ((u64)v >> pos) & ((len > 31 ? ~0ull : (1ull << len) - 1));
          if (pos + len > 32) f &= pos > 31 ? 0 : (1ull << (32 - pos)) - 1;
          u32 w2 = std::min(len, pos > 31 ? 0 : 32 - pos);
          if (sign) f |= ~0ull << w2;
          r = (s32)f;
        } d[l] = r)
      });
  def(
      "bfi.b32", HD {
        u32 *a = w.r<u32>(O(1)), *b = w.r<u32>(O(2)), *p = w.r<u32>(O(3)), *n = w.r<u32>(O(4)), *d = w.r<u32>(O(0));
        EACH(u32 pos = p[l] & 255; u32 len = n[l] & 255;
             u64 k = (len > 31 ? 0xffffffffull : (1ull << len) - 1) << std::min(pos, 63u);
             d[l] = (u32)((b[l] & ~k) | (((u64)a[l] << std::min(pos, 63u)) & k)))
      });
  def("popc.b32", UN(u32, u32, __builtin_popcount(x)));
  def("clz.b32", UN(u32, u32, x ? __builtin_clz(x) : 32));
  def(
      "brev.b32", HD {
        u32 *a = w.r<u32>(O(1)), *d = w.r<u32>(O(0));
        EACH(u32 v = a[l]; u32 r = 0; for (int k = 0; k < 32; k++) r |= (v >> k & 1) << (31 - k); d[l] = r)
      });
  def("prmt.b32", TR(u32, ([&] {
                       u64 v = (u64)y << 32 | x;
                       u32 r = 0;
                       for (int k = 0; k < 4; k++) {
                         u32 s = z >> 4 * k & 15;
                         u32 b = v >> 8 * (s & 7) & 255;
                         if (s & 8) b = b & 128 ? 255 : 0;
                         r |= b << 8 * k;
                       }
                       return r;
                     })()));
  def(
      "lop3.b32", HD {
        u32 *a = w.r<u32>(O(1)), *b = w.r<u32>(O(2)), *e = w.r<u32>(O(3)), *d = w.r<u32>(O(0));
        u32 k = i.a[0];
        EACH(u32 r = 0; for (int t = 0; t < 8; t++) if (k >> t & 1) r |=
                        (t & 4 ? a[l] : ~a[l]) & (t & 2 ? b[l] : ~b[l]) & (t & 1 ? e[l] : ~e[l]);
             d[l] = r)
      });
  def("shf.l.wrap.b32", TR(u32, (z & 31) ? (y << (z & 31)) | (x >> (32 - (z & 31))) : y));
  def("shf.r.wrap.b32", TR(u32, (z & 31) ? (x >> (z & 31)) | (y << (32 - (z & 31))) : x));
  def("shf.r.clamp.b32", TR(u32, (u32)(((u64)y << 32 | x) >> std::min(z, 32u))));
  def("shf.l.clamp.b32", TR(u32, (u32)(((u64)y << 32 | x) << std::min(z, 32u) >> 32)));
  // floating point
  for (const char* t : {"f32"}) (void)t;
  def("add.f32", BI(float, x + y));
  def("sub.f32", BI(float, x - y));
  def("mul.f32", BI(float, x* y));
  def("fma.f32", TR(float, __builtin_fmaf(x, y, z)));
  def("div.f32", BI(float, x / y));
  def("neg.f32", UN(u32, u32, x ^ 0x80000000u));
  def("abs.f32", UN(u32, u32, x & 0x7fffffffu));
  def("copysign.f32", BI(float, std::copysign(y, x)));
  def("min.f32", BI(float, fminp(x, y)));
  def("max.f32", BI(float, fmaxp(x, y)));
  def("min.NaN.f32", BI(float, nanp(x, y) ? qnan() : fminp(x, y)));
  def("max.NaN.f32", BI(float, nanp(x, y) ? qnan() : fmaxp(x, y)));
  def("mov.f32", UN(u32, u32, x));
  def("mov.f64", UN(u64, u64, x));
  def("ex2.f32", UN(float, float, exp2f(x)));
  def("ex2.ftz.f32", UN(float, float, ftz(exp2f(ftz(x)))));
  def("lg2.f32", UN(float, float, log2f(x)));
  def("rcp.f32", UN(float, float, 1.0f / x));
  def("sqrt.f32", UN(float, float, sqrtf(x)));
  def("rsqrt.f32", UN(float, float, 1.0f / sqrtf(x)));
  def("rsqrt.ftz.f32", UN(float, float, 1.0f / sqrtf(ftz(x))));
  def("sin.f32", UN(float, float, sinf(x)));
  def("cos.f32", UN(float, float, cosf(x)));
  def("tanh.f32", UN(float, float, tanhf(x)));
  def(
      "selp.f32", HD {
        u32 *a = w.r<u32>(O(1)), *b = w.r<u32>(O(2)), *d = w.r<u32>(O(0));
        u32 q = pr(w, O(3));
        EACH(d[l] = q >> l & 1 ? a[l] : b[l])
      });
  def("add.f64", BI(double, x + y));
  def("sub.f64", BI(double, x - y));
  def("mul.f64", BI(double, x* y));
  def("fma.f64", TR(double, fma(x, y, z)));
  def("div.f64", BI(double, x / y));
  def("neg.f64", UN(double, double, -x));
#define HALF(t, cv, bk)                                             \
  def("add." t, SC(cv, bk, x + y));                                 \
  def("sub." t, SC(cv, bk, x - y));                                 \
  def("mul." t, SC(cv, bk, x* y));                                  \
  def("min." t, SC(cv, bk, fminp(x, y)));                           \
  def("max." t, SC(cv, bk, fmaxp(x, y)));                           \
  def("min.NaN." t, SC(cv, bk, nanp(x, y) ? qnan() : fminp(x, y))); \
  def("max.NaN." t, SC(cv, bk, nanp(x, y) ? qnan() : fmaxp(x, y))); \
  def("fma." t, SC3(cv, bk, (float)((double)x * y + z)));           \
  def("neg." t, UN(u16, u16, x ^ 0x8000));                          \
  def("abs." t, UN(u16, u16, x & 0x7fff));                          \
  def("add." t "x2", PK(cv, bk, x + y));                            \
  def("sub." t "x2", PK(cv, bk, x - y));                            \
  def("mul." t "x2", PK(cv, bk, x* y));                             \
  def("min." t "x2", PK(cv, bk, fminp(x, y)));                      \
  def("max." t "x2", PK(cv, bk, fmaxp(x, y)));                      \
  def("fma." t "x2", PK3(cv, bk, (float)((double)x * y + z)));      \
  def("neg." t "x2", UN(u32, u32, x ^ 0x80008000u));                \
  def("abs." t "x2", UN(u32, u32, x & 0x7fff7fffu));                \
  def("cvt." t ".f32", UN(float, u16, bk(x)));                      \
  def("cvt.f32." t, UN(u16, float, cv(x)));                         \
  def(                                                              \
      "cvt." t "x2.f32", HD {                                       \
        float *a = w.r<float>(O(1)), *b = w.r<float>(O(2));         \
        u32* d = w.r<u32>(O(0));                                    \
        EACH(d[l] = bk(b[l]) | (u32)bk(a[l]) << 16)                 \
      });                                                           \
  for (int md = 0; md < 4; md++) {}
  HALF("bf16", bf2f, f2bf)
  HALF("f16", h2f, f2h)
#define SPH(t, cv, nm, e)                                                                   \
  def(                                                                                      \
      "setp." nm "." t, HD {                                                                \
        u16 *a = w.r<u16>(O(1)), *b = w.r<u16>(O(2));                                       \
        u32 r = 0;                                                                          \
        EACH(float x = cv(a[l]); float y = cv(b[l]); r |= (u32)(e) << l) pw(w, O(0), r, m); \
      });
      SPH("bf16", bf2f, "lt", x < y) SPH("bf16", bf2f, "gt", x > y) SPH("bf16", bf2f, "eq", x == y)
          SPH("bf16", bf2f, "ne", x != y) SPH("f16", h2f, "lt", x < y) SPH("f16", h2f, "gt", x > y)
              SPH("f16", h2f, "eq", x == y) SPH("f16", h2f, "ne", x != y)
#define SPU(nm, e)                                                                  \
  def(                                                                              \
      "setp." nm ".f32", HD {                                                       \
        float *a = w.r<float>(O(1)), *b = w.r<float>(O(2));                         \
        u32 r = 0;                                                                  \
        EACH(float x = a[l]; float y = b[l]; r |= (u32)(e) << l) pw(w, O(0), r, m); \
      });
                  SPU("equ", x != x || y != y || x == y) SPU("neu", x != x || y != y || x != y) SPU("ltu", !(x >= y))
                      SPU("leu", !(x > y)) SPU("gtu", !(x <= y)) SPU("geu", !(x < y)) SPU("nan", x != x || y != y)
                          SPU("num", x == x && y == y) def(
                              "setp.ne.f32", HD {
                                float *a = w.r<float>(O(1)), *b = w.r<float>(O(2));
                                u32 r = 0;
                                EACH(float x = a[l]; float y = b[l]; r |= (u32)(x < y || x > y) << l) pw(w, O(0), r, m);
                              });
  cvt_from<u16>("u16");
  cvt_from<s16>("s16");
  cvt_from<u32>("u32");
  cvt_from<s32>("s32");
  cvt_from<u64>("u64");
  cvt_from<s64>("s64");
  def("cvt.u32.u8", UN(u16, u32, (u8)x));
  def("cvt.s32.s8", UN(u16, s32, (s8)x));
  def("cvt.f32.u8", UN(u16, float, (u8)x));
  def("cvt.f32.s8", UN(u16, float, (s8)x));
  def("cvt.u16.u8", UN(u16, u16, (u8)x));
  def("cvt.s16.s8", UN(u16, s16, (s8)x));
  def("cvt.u64.u8", UN(u16, u64, (u8)x));
  def("cvt.f16.u8", UN(u16, u16, f2h((u8)x)));
#define CI(T, n)                                                \
  def("cvt.rni." n ".f32", UN(float, T, satcvt<T>(rnd(x, 0)))); \
  def("cvt.rzi." n ".f32", UN(float, T, satcvt<T>(rnd(x, 1)))); \
  def("cvt.rmi." n ".f32", UN(float, T, satcvt<T>(rnd(x, 2)))); \
  def("cvt.rpi." n ".f32", UN(float, T, satcvt<T>(rnd(x, 3))));
  CI(s32, "s32")
  CI(u32, "u32") CI(s64, "s64") CI(s16, "s16") CI(u16, "u16") def("cvt.rni.f32.f32", UN(float, float, nearbyintf(x)));
  def("cvt.rzi.f32.f32", UN(float, float, truncf(x)));
  def("cvt.rmi.f32.f32", UN(float, float, floorf(x)));
  def("cvt.rpi.f32.f32", UN(float, float, ceilf(x)));
  def("cvt.f64.f32", UN(float, double, x));
  def("cvt.f32.f64", UN(double, float, x));
  def("cvt.tf32.f32", UN(u32, u32, (x & 0x7f800000) == 0x7f800000 ? x : (x + 0x1000) & 0xffffe000u));
  def("cvt.rn.tf32.f32", UN(u32, u32, (x & 0x7f800000) == 0x7f800000 ? x : (x + 0xfff + (x >> 13 & 1)) & 0xffffe000u));
  // predicates
  def("and.pred", HD { pw(w, O(0), pr(w, O(1)) & pr(w, O(2)), m); });
  def("or.pred", HD { pw(w, O(0), pr(w, O(1)) | pr(w, O(2)), m); });
  def("xor.pred", HD { pw(w, O(0), pr(w, O(1)) ^ pr(w, O(2)), m); });
  def("not.pred", HD { pw(w, O(0), ~pr(w, O(1)), m); });
  def("mov.pred", HD { pw(w, O(0), pr(w, O(1)), m); });
  // packing: aux 0 parts, 1 part bytes
  def(
      "pack", HD {
        int n = i.a[0];
        int b = i.a[1];
        EACH(u64 v = 0; for (int k = 0; k < n; k++) {
          u64 x = 0;
          memcpy(&x, w.R + O(1 + k) + l * b, b);
          v |= x << 8 * b * k;
        } memcpy(w.R + O(0) + l * n * b, &v, n * b))
      });
  def(
      "unpack", HD {
        int n = i.a[0];
        int b = i.a[1];
        EACH(u64 v = 0; memcpy(&v, w.R + O(n) + l * n * b, n * b); for (int k = 0; k < n; k++) {
          if (O(k) < 0) continue;
          u64 x = v >> 8 * b * k;
          memcpy(w.R + O(k) + l * b, &x, b);
        })
      });
  def(
      "ext8", HD {
        int sb = i.a[0];
        int db = i.a[2];
        EACH(u8 x = w.R[O(1) + l * sb]; s64 v = i.a[1] ? (s64)(s8)x : (s64)x; memcpy(w.R + O(0) + l * db, &v, db))
      });  // aux: source register bytes, signed, destination register bytes
  // memory
  def("ld.global", ld_global);
  def("st.global", st_global);
  def("ld.shared", ld_shared);
  def("st.shared", st_shared);
  def("ld.param", ld_param);
  atoms<u32>("u32");
  atoms<s32>("s32");
  atoms<u32>("b32");
  atoms<u64>("u64");
  atoms<u64>("b64");
  atoms<float>("f32");
  def("ldmatrix", ldmatrix);
  def("stmatrix", stmatrix);
  // control. bra aux: 0 target, 1 reconvergence
  def(
      "bra", HD {
        u32 rest = w.mask & ~m;
        if (!rest) {
          w.next = i.a[0];
          return;
        }
        w.st.push_back({i.a[1], w.rpc, w.mask});
        if (i.a[1] == w.pc + 1) {}
        w.st.push_back({w.pc + 1, i.a[1], rest});
        w.rpc = i.a[1];
        w.mask = m;
        w.next = i.a[0];
      });
  def(
      "brx.idx", HD {
        u32* a = w.r<u32>(O(0));
        int l0 = __builtin_ctz(m);
        EACH(if (a[l] != a[l0]) c.fail("brx.idx: lanes diverge"))
        if ((int)a[l0] >= i.nops - 1) c.fail("brx.idx: index out of range");
        w.next = O(1 + a[l0]);
      });
  def(
      "ret", HD {
        for (auto& e : w.st) e.mask &= ~m;
        w.mask &= ~m;
        if (w.mask) return;
        while (!w.mask && !w.st.empty()) {
          Entry e = w.st.back();
          w.st.pop_back();
          w.next = e.pc;
          w.rpc = e.rpc;
          w.mask = e.mask;
        }
        if (!w.mask) c.finish(w);
      });
  def(
      "setmaxnreg", HD {
        int n = i.a[0];
        if (n < 24 || n > 256 || n % 8) c.fail("setmaxnreg: count out of range");
        if (!w.nreg) return;
        if (i.a[1] ? n < w.nreg : n > w.nreg)
          c.fail(fmt("setmaxnreg.%s from %d to %d registers", i.a[1] ? "inc" : "dec", w.nreg, n));
        if (n - w.nreg > c.pool) {
          w.state = REGS;
          w.want = n;
          return;
        }
        c.pool -= n - w.nreg;
        w.nreg = n;
      });
  def("trap", HD { c.fail("trap"); });
  def("nop", HD{});
  def("griddepcontrol.wait", HD { w.waited = true; });
  def(
      "bar.sync", HD {
        int id = w.r<u32>(O(0))[0];
        bar(c, w, id, i.nops > 1 ? w.r<u32>(O(1))[0] : 0, m);
      });
  def("bar.warp.sync", HD { converged(c, w, m, "bar.warp.sync"); });
  def(
      "shfl.bfly", HD {
        converged(c, w, m, "shfl.sync");
        u32 *a = w.r<u32>(O(1)), *d = w.r<u32>(O(0));
        u32 b = w.r<u32>(O(2))[0], cc = w.r<u32>(O(3))[0];
        u32 t[32];
        memcpy(t, a, 128);
        u32 ok = 0;
        for (int l = 0; l < 32; l++) {
          u32 seg = cc >> 8 & 31;
          int mx = (l & seg) | ((cc & 31) & ~seg);
          int j = l ^ (int)b;
          bool p = j <= mx;
          d[l] = t[p ? j : l];
          ok |= (u32)p << l;
        }
        if (i.a[0]) pw(w, O(5), ok, m);
      });
  def(
      "shfl.idx", HD {
        converged(c, w, m, "shfl.sync");
        u32 *a = w.r<u32>(O(1)), *d = w.r<u32>(O(0)), *b = w.r<u32>(O(2));
        u32 cc = w.r<u32>(O(3))[0];
        u32 t[32];
        memcpy(t, a, 128);
        u32 ok = 0;
        for (int l = 0; l < 32; l++) {
          u32 seg = cc >> 8 & 31;
          int mx = (l & seg) | ((cc & 31) & ~seg);
          int j = (l & seg) | ((b[l] & 31) & ~seg);
          bool p = j <= mx;
          d[l] = t[p ? j : l];
          ok |= (u32)p << l;
        }
        if (i.a[0]) pw(w, O(5), ok, m);
      });
  def(
      "shfl.up", HD {
        converged(c, w, m, "shfl.sync");
        u32 *a = w.r<u32>(O(1)), *d = w.r<u32>(O(0));
        u32 b = w.r<u32>(O(2))[0], cc = w.r<u32>(O(3))[0];
        u32 t[32];
        memcpy(t, a, 128);
        u32 ok = 0;
        for (int l = 0; l < 32; l++) {
          u32 seg = cc >> 8 & 31;
          int mx = (l & seg) | ((cc & 31) & ~seg);
          int j = l - (int)b;
          bool p = j >= mx;
          d[l] = t[p ? j : l];
          ok |= (u32)p << l;
        }
        if (i.a[0]) pw(w, O(5), ok, m);
      });
  def(
      "shfl.down", HD {
        converged(c, w, m, "shfl.sync");
        u32 *a = w.r<u32>(O(1)), *d = w.r<u32>(O(0));
        u32 b = w.r<u32>(O(2))[0], cc = w.r<u32>(O(3))[0];
        u32 t[32];
        memcpy(t, a, 128);
        u32 ok = 0;
        for (int l = 0; l < 32; l++) {
          u32 seg = cc >> 8 & 31;
          int mx = (l & seg) | ((cc & 31) & ~seg);
          int j = l + (int)b;
          bool p = j <= mx;
          d[l] = t[p ? j : l];
          ok |= (u32)p << l;
        }
        if (i.a[0]) pw(w, O(5), ok, m);
      });
  def(
      "elect", HD {
        converged(c, w, m, "elect.sync");
        if (O(0) >= 0) {
          u32* d = w.r<u32>(O(0));
          for (int l = 0; l < 32; l++) d[l] = c.elect_lane;
        }
        pw(w, O(1), 1u << c.elect_lane, m);
      });
  def(
      "vote.any", HD {
        u32 v = pr(w, O(1)) & m;
        pw(w, O(0), v ? ALL : 0, m);
      });
  def(
      "vote.all", HD {
        u32 v = pr(w, O(1)) & m;
        pw(w, O(0), v == m ? ALL : 0, m);
      });
  def(
      "vote.ballot", HD {
        u32 v = pr(w, O(1)) & m;
        u32* d = w.r<u32>(O(0));
        EACH(d[l] = v)
      });
  // async copies. cp.async aux: 0 bytes, 1 offset dst, 2 offset src, 3 has src-size
  def(
      "cp.async", HD {
        c.touches(w, "cp.async");
        EACH(CpOp o; o.dst = w.r<u32>(O(0))[l] + i.a[1]; o.src = w.r<u64>(O(1))[l] + (s64)i.a[2]; o.n = i.a[0];
             u32 sz = i.a[3] ? w.r<u32>(O(2))[l] : i.a[0];
             if (sz > (u32)o.n) c.fail("cp.async: src-size is larger than cp-size"); o.size = sz;
             if (o.dst % o.n || (sz && o.src % o.n)) c.fail("misaligned cp.async"); c.sm(o.dst, o.n);
             if (sz) c.check(o.src, sz, "cp.async"); c.wr(w.id, o.dst, o.n, c.nw + w.id, w.cp_groups.size() + 1, false);
             c.poison(o.dst, o.n); w.cp_open.push_back(o))
      });
  def(
      "cp.async.commit_group", HD {
        w.cp_groups.push_back(std::move(w.cp_open));
        w.cp_open.clear();
        if (c.rng.chance(c.cfg.early * 0.5)) {
          int k = c.cfg.race;
          c.cfg.race = 0;
          c.cp_upto(w, w.cp_groups.size());
          c.cfg.race = k;
        }
      });
  def(
      "cp.async.wait_group", HD {
        int n = (int)w.cp_groups.size() - i.a[0];
        if (n > 0) c.cp_upto(w, n);
      });
  def(
      "cp.async.wait_all", HD {
        w.cp_groups.push_back(std::move(w.cp_open));
        w.cp_open.clear();
        c.cp_upto(w, w.cp_groups.size());
      });
  def("tma.load", tma_load);
  def("tma.store", tma_store);
  def(
      "bulk.commit_group", HD {
        w.st_groups.push_back(std::move(w.st_open));
        w.st_open.clear();
      });
  def(
      "bulk.wait_group.read", HD {
        int n = (int)w.st_groups.size() - i.a[0];
        if (n > 0) {
          w.st_waited = std::max(w.st_waited, n);
          c.st_reads(w, n);
        }
      });
  def(
      "bulk.wait_group", HD {
        int n = (int)w.st_groups.size() - i.a[0];
        if (n > 0) {
          w.st_waited = std::max(w.st_waited, n);
          c.st_writes(w, n);
        }
      });
  // mbarriers. aux 0: offset of the address
  def(
      "mbarrier.init", HD {
        EACH(u32 a = w.r<u32>(O(0))[l] + i.a[0]; u32 n = w.r<u32>(O(1))[l]; if (a % 8) c.fail("misaligned mbarrier");
             c.sm(a, 8); c.wr(w.id, a, 8, w.id, c.cfg.race ? c.vc[w.id][w.id] : 0, false); MBar b; b.phases = 0;
             b.agent = 0; if (c.cfg.race) {
               auto it = c.mbars.find(a);
               (void)it;
               if (c.next_agent >= c.NA) c.next_agent = 4 * c.nw;
               b.agent = c.next_agent++;
               b.vc.assign(c.NA, 0);
               b.pvc = b.dvc = b.dpvc = b.vc;
             } c.mset(a, b, Cta::pack(n, n, 0, 0));
             c.mbars[a] = b)
      });
  def(
      "mbarrier.inval", HD {
        EACH(u32 a = w.r<u32>(O(0))[l] + i.a[0]; MBar& b = c.mbar(a, "inval");
             for (auto& t : c.loads) if (t.mbar == a) c.fail("mbarrier.inval with a TMA load in flight");
             for (auto& x : c.w) if (x.state == MBAR && x.mb == a && !c.mb_done(b, x.par))
                 c.fail(fmt("mbarrier.inval while warp %d waits", x.id));
             c.mbars.erase(a); c.poison(a, 8); if (c.cfg.race) c.wr(w.id, a, 8, w.id, c.vc[w.id][w.id], false))
      });
  def(
      "mbarrier.expect_tx", HD {
        EACH(u32 a = w.r<u32>(O(0))[l] + i.a[0]; MBar& b = c.mbar(a, "expect_tx"); c.mb_touch(w.id, a);
             c.mb_update(a, b, 0, w.r<u32>(O(1))[l]))
      });
  def(
      "mbarrier.arrive.expect_tx", HD {
        EACH(u32 a = w.r<u32>(O(0))[l] + i.a[0]; MBar& b = c.mbar(a, "arrive.expect_tx"); c.mb_touch(w.id, a);
             c.mb_release(w.id, b); c.mb_update(a, b, 1, w.r<u32>(O(1))[l]))
      });
  def(
      "mbarrier.arrive", HD {
        EACH(u32 a = w.r<u32>(O(0))[l] + i.a[0]; MBar& b = c.mbar(a, "arrive"); c.mb_touch(w.id, a);
             c.mb_release(w.id, b); c.mb_update(a, b, i.nops > 1 ? w.r<u32>(O(1))[l] : 1, 0))
      });
  def(
      "mbarrier.try_wait.parity", HD {
        u32 a = 0;
        int par = 0;
        bool first = true;
        EACH(u32 x = w.r<u32>(O(1))[l] + i.a[0]; int y = w.r<u32>(O(2))[l] & 1; if (first) {
          a = x;
          par = y;
          first = false;
        } else if (a != x || par != y) c.fail("mbarrier.try_wait: lanes wait on different barriers"))
        MBar& b = c.mbar(a, "wait");
        c.mb_touch(w.id, a);
        if (!c.mb_done(b, par)) {
          if (i.a[1]) {
            pw(w, O(0), 0, m);
            return;
          }
          w.state = MBAR;
          w.mb = a;
          w.par = par;
          return;
        }
        if (c.cfg.race) {
          Cta::join(c.vc[w.id], b.dvc);
          Cta::join(c.pvc[w.id], b.dpvc);
        }
        pw(w, O(0), ALL, m);
      });
  def(
      "fence.proxy.async", HD {
        if (c.cfg.race) { Cta::join(c.pvc[w.id], c.vc[w.id]); }
      });
  // wgmma
  def("wgmma", wgmma);
  def("mma", mma_sync);
  def(
      "wgmma.fence", HD {
        converged(c, w, m, "wgmma.fence");
        w.fenced = true;
      });
  def(
      "wgmma.commit_group", HD {
        converged(c, w, m, "wgmma.commit_group");
        w.wg_group++;
      });
  def(
      "wgmma.wait_group", HD {
        converged(c, w, m, "wgmma.wait_group");
        int n = w.wg_group - i.a[0];
        if (n > 0) c.wg_wait(w, n);
        w.fenced = false;
      });
}
