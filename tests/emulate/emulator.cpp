// The emulator's C interface.
#include "instructions.h"

extern "C" {
int emu_op(const char* n) {
  static bool once = (init(), true);
  (void)once;
  auto it = names().find(n);
  return it == names().end() ? -1 : it->second.first;
}
void emu_maxnreg(void* p, int n) { ((Program*)p)->maxnreg = n / 8 * 8; }
void* emu_program(const s32* code, int n, const s32* ops, int nops, u64 regbytes, int npred, const u64* at,
                  const u64* val, const s32* wd, int ninit) {
  Program* p = new Program;
  p->code.resize(n);
  memcpy(p->code.data(), code, sizeof(Ins) * n);
  p->ops.assign(ops, ops + nops);
  p->regbytes = regbytes;
  p->npred = npred;
  p->init_at.assign(at, at + ninit);
  p->init_val.assign(val, val + ninit);
  p->init_w.assign(wd, wd + ninit);
  p->hits.assign(n, 0);
  for (auto& i : p->code) p->fn.push_back(handlers()[i.op]);
  return p;
}
void emu_hits(void* p, u64* out, int n) { memcpy(out, ((Program*)p)->hits.data(), 8 * n); }
void emu_free(void* p) { delete (Program*)p; }
// returns 0 ok, 1 error (message in out); out also receives the race reports, one a line: "pc other text"
int emu_run(void* pv, int dependent, u64 seed, int race, double early, int quantum, int elect, u64 max_steps, u32 smem, int nthreads,
            const u32* grid, const u32* order, int norder, const u64* ranges, int nranges, u8* params, u64* stats,
            char* out, int outlen) {
  Program& p = *(Program*)pv;
  Config c{};
  c.dependent = dependent;
  c.seed = seed;
  c.race = race;
  c.early = early;
  c.quantum = quantum;
  c.max_steps = max_steps;
  c.elect = elect;
  std::vector<Range> r;
  for (int i = 0; i < nranges; i++) r.push_back({ranges[2 * i], ranges[2 * i + 1]});
  std::string text;
  int rc = 0;
  u64 total = 0;
  u32 id[3] = {0, 0, 0};
  try {
    if (smem > 255 * 1024) throw Err("more shared memory than the emulator has");
    Cta cta(p, c, smem, nthreads, r, params);
    memcpy(cta.ncta, grid, 12);
    for (int k = 0; k < norder; k++) {
      u32 n = order[k];
      id[0] = n % grid[0];
      id[1] = n / grid[0] % grid[1];
      id[2] = n / grid[0] / grid[1];
      cta.start(id);
      try {
        cta.run();
      } catch (Err&) {
        total += cta.steps;
        for (auto& q : cta.reports) text += fmt("%d %d ", q.pc, q.other) + q.text + "\n";
        throw;
      }
      total += cta.steps;
      cta.steps = 0;
    }
    for (auto& q : cta.reports) text += fmt("%d %d ", q.pc, q.other) + q.text + "\n";
  } catch (Err& e) {
    rc = 1;
    text = fmt("CTA (%u, %u, %u) seed %llu: ", id[0], id[1], id[2], (unsigned long long)seed) + e.what() + "\n" + text;
  }
  stats[0] = total;
  snprintf(out, outlen, "%s", text.c_str());
  return rc;
}
}
