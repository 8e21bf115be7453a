"""PTX text of a compiled kernel as the arrays that the emulator executes.

Registers are numbered, constants have registers of their own, branch targets and reconvergence points are resolved. An
instruction is an operation's number, a guard, operands and up to eight numbers of its own (`aux`); what they mean to an
operation stands beside its handler in `instructions.h`.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.emulate._flow import reconvergence
from tests.emulate._library import library

# as in cta.h; a multiple of the widest swizzle's atom
SHARED_BASE = 1024
# bytes of a register of each type
WIDTH = {
    name: width
    for width, names in {
        1: "b8 u8 s8",
        2: "b16 u16 s16 f16 bf16",
        4: "b32 u32 s32 f32 f16x2 bf16x2 s16x2 u16x2 tf32",
        8: "b64 u64 s64 f64",
    }.items()
    for name in names.split()
}
_AXES = tuple(enumerate("xyz"))
# numbers of `special` in cta.h
SPECIAL = {
    **{f"%{what}.{axis}": 3 * i + j for i, what in enumerate(("tid", "ntid", "ctaid", "nctaid")) for j, axis in _AXES},
    "%laneid": 12,
    "%warpid": 13,
    "%cluster_ctarank": 14,
    "%cluster_nctarank": 15,
    "%clusterid.x": 6,
    "%cluster_ctaid.x": 14,
    "%lanemask_eq": 16,
    "%lanemask_lt": 17,
}
# of an instruction: operation, guard, number of operands, where they start, aux[8], its place
FIELDS = 13


class PtxError(Exception):
    """What this parser or the emulator does not know."""


@dataclass
class Kernel:
    """One parsed kernel.

    Attributes:
        name: of the entry.
        params: (name, offset, bytes, alignment), in order.
        param_bytes: of them all.
        threads: of a CTA.
        text: each instruction as PTX writes it.
        locs: each instruction's source position (file, line), None where unknown.
        program: the emulator's handle.
        lines: each instruction's line in the PTX.
    """

    name: str
    params: list[tuple[str, int, int, int]]
    param_bytes: int
    threads: int
    text: list[str]
    locs: list[tuple[str, int] | None]
    program: int
    lines: list[int]

    def hits(self) -> np.ndarray:
        """How often each instruction ran, over all launches so far."""
        out = np.zeros(len(self.text), np.uint64)
        library().emu_hits(ctypes.c_void_p(self.program), out.ctypes.data_as(ctypes.c_void_p), len(out))
        return out

    def where(self, pc: int) -> str:
        """An instruction in words."""
        if not 0 <= pc < len(self.text):
            return ""
        loc = self.locs[pc]
        return f"[pc {pc}] {self.text[pc][:120]}" + (f"   ({loc[0]}:{loc[1]})" if loc else "")


def address(array: np.ndarray) -> ctypes.c_void_p:
    """Of an array's memory, for the library."""
    return array.ctypes.data_as(ctypes.c_void_p)


def _split(s: str) -> list[str]:
    out, depth, cur = [], 0, ""
    for ch in s:
        if ch in "{[":
            depth += 1
        elif ch in "}]":
            depth -= 1
        if ch == "," and depth == 0:
            out.append(cur.strip())
            cur = ""
        else:
            cur += ch
    if cur.strip():
        out.append(cur.strip())
    return out


def _statements(body: str):
    """Statements of a function body, with "{" and "}" of scopes and "name:" of labels as statements of their own."""
    i, n = 0, len(body)
    while i < n:
        if body[i].isspace() or body[i] == ";":
            i += 1
            continue
        if body[i] in "{}":
            yield body[i], i
            i += 1
            continue
        m = re.compile(r"[$%A-Za-z_][\w$.]*\s*:(?!:)").match(body, i)
        if m:
            yield re.sub(r"\s", "", m.group()), i
            i = m.end()
            continue
        j = body.find(";", i)
        if j < 0:
            return
        yield " ".join(body[i:j].split()), i
        i = j + 1


class _Parser:
    def __init__(self, text: str) -> None:
        text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
        files = {int(n): Path(p).name for n, p in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, flags=re.M)}
        text = re.sub(r"//.*", "", text)
        text = re.sub(r"^\s*\.file\b.*$", "", text, flags=re.M)
        text = re.sub(r"^(\s*\.loc\s+\d+\s+\d+\s+\d+)[^\n]*$", r"\1;", text, flags=re.M)
        m = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", text, flags=re.S)
        if m is None:
            raise PtxError("no .entry")
        self.name = m[1]
        self.files = files
        self.params: list[tuple[str, int, int, int]] = []
        at = 0
        for p in _split(m[2]):
            q = re.match(
                r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+)?(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?([\w$]+)(?:\[(\d+)\])?$",
                p,
            )
            if q is None:
                raise PtxError(f"parameter {p!r}")
            w = WIDTH.get(q[2], 1 if q[2] == "pred" else 0)
            size = w * int(q[4] or 1)
            align = int(q[1] or w)
            at = -(-at // align) * align
            self.params.append((q[3], at, size, align))
            at += size
        self.param_bytes = at
        head = m[3]
        t = re.search(r"\.reqntid\s+(\d+)", head) or re.search(r"\.maxntid\s+(\d+)", head)
        self.threads = int(t[1]) if t else 0
        r = re.search(r"\.maxnreg\s+(\d+)", head)
        self.maxnreg = int(r[1]) if r else 0
        depth, j = 1, m.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[j], 0)
            j += 1
        self.body = text[m.end() : j - 1]
        self.first_line = text.count("\n", 0, m.end()) + 1
        self.lines: list[int] = []
        self.regs: dict[tuple[int, str], tuple[str, int]] = {}  # (scope, name) -> (type, offset or predicate index)
        self.prefixes: dict[str, str] = {}
        self.named: dict[tuple[int, str], str] = {}
        self.bytes = 0
        self.npred = 2  # 0 false, 1 true
        self.init: dict[tuple, tuple[int, int, int]] = {}
        self.ops: list[int] = []
        self.instrs: list[list[int]] = []
        self.text: list[str] = []
        self.locs: list = []
        self.labels: dict[tuple[int, str], int] = {}
        self.fix: list[tuple[int, tuple[int, ...], str]] = []
        self.tables: dict[str, list[str]] = {}
        self.scopes = [0]
        self.shared_symbols: dict[str, int] = {"global_smem": SHARED_BASE}
        self.unknown: set[str] = set()

    # operands
    def _alloc(self, width: int) -> int:
        size = width * 32
        at = -(-self.bytes // size) * size if size >= 64 else self.bytes
        self.bytes = at + max(size, 64)
        return at

    def _type(self, name: str) -> tuple[int, str] | None:
        for s in reversed(self.scopes):
            if (s, name) in self.named:
                return s, self.named[s, name]
        m = re.match(r"(%[a-z]+)\d+$", name)
        return (0, self.prefixes[m[1]]) if m and m[1] in self.prefixes else None

    def reg(self, name: str) -> tuple[str, int]:
        found = self._type(name)
        if found is None:
            raise PtxError(f"unknown register {name!r}")
        scope, kind = found
        if (scope, name) not in self.regs:
            if kind == "pred":
                self.regs[scope, name] = (kind, self.npred)
                self.npred += 1
            else:
                self.regs[scope, name] = (kind, self._alloc(WIDTH[kind]))
        return self.regs[scope, name]

    def const(self, value: int, width: int, flag: int = 0) -> int:
        value &= (1 << 64) - 1
        key = (value, width, flag)
        if key not in self.init:
            self.init[key] = (self._alloc(width), value, width | flag)
        return self.init[key][0]

    def number(self, s: str, width: int) -> int | None:
        if m := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", s):
            v = int(m[1], 16)
            return v if width == 4 else int(np.array(v, np.uint32).view(np.float32).astype(np.float64).view(np.uint64))
        if m := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", s):
            return int(m[1], 16)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", s):
            return int(s.rstrip("U"), 0)
        if m := re.fullmatch(r"([\w$]+)(?:\+(\d+))?", s):
            if m[1] in self.shared_symbols:
                return self.shared_symbols[m[1]] + int(m[2] or 0)
        return None

    def val(self, s: str, width: int) -> int:
        """Offset of an operand: a register, a constant, a special register, or -1 for the sink."""
        if s == "_":
            return -1
        if s in SPECIAL:
            return self.const(SPECIAL[s], width, 256)
        for name, at, _, _ in self.params:
            if s == name:
                return self.const(at, width, 512)
        n = self.number(s, width)
        if n is not None:
            return self.const(n, width)
        kind, at = self.reg(s)
        if kind == "pred" or WIDTH[kind] != width:
            raise PtxError(f"register {s} is {kind}, but {width} bytes are expected")
        return at

    def pred(self, s: str) -> int:
        neg = s.startswith("!")
        s = s.lstrip("!")
        if s == "_":
            return -1
        if re.fullmatch(r"-?\d+", s):
            return int((int(s) != 0) != neg)
        kind, at = self.reg(s)
        if kind != "pred":
            raise PtxError(f"{s} is no predicate")
        return at | (int(neg) << 20)

    def vec(self, s: str) -> list[str]:
        return _split(s.strip()[1:-1]) if s.strip().startswith("{") else [s.strip()]

    def addr(self, s: str) -> tuple[str, int]:
        """Base operand and immediate offset of "[base+offset]"."""
        s = s.strip()[1:-1].strip()
        m = re.fullmatch(r"([%$\w.]+)(?:\s*\+\s*(-?\w+))?", s)
        if m is None:
            raise PtxError(f"address {s!r}")
        return m[1], int(m[2] or "0", 0)

    def sbase(self, b: str) -> tuple[int, int]:
        """Operand and register width of a shared address."""
        if b in self.shared_symbols or (b not in SPECIAL and re.fullmatch(r"\d+", b)):
            return self.val(b, 4), 4
        w = WIDTH[self.reg(b)[0]]
        return self.val(b, w), w

    # instructions
    def emit(self, op: str, guard: int, ops: list[int], aux: list[int] = ()) -> None:  # type: ignore[assignment]
        k = library().emu_op(op.encode())
        if k < 0:
            self.unknown.add(op)
            k = 0
        aux = list(aux) + [0] * (8 - len(aux))
        self.instrs.append([k, guard, len(ops), len(self.ops), *aux, len(self.instrs)])
        self.ops += ops

    def instruction(self, st: str) -> None:
        guard = -1
        m = re.match(r"@(!?)([%\w$]+)\s+(.*)$", st, flags=re.S)
        if m:
            guard = self.pred(m[1] + m[2])
            st = m[3]
        m = re.match(r"([a-z_][\w.:]*)\s*(.*)$", st, flags=re.S)
        if m is None:
            raise PtxError(f"statement {st!r}")
        full, rest = m[1], m[2]
        p = full.split(".")
        a = _split(rest)
        o, last = p[0], p[-1]
        w = WIDTH.get(last, 4)
        E = self.emit
        if o == "bra":
            self.fix.append((len(self.instrs), tuple(self.scopes), a[0]))
            return E("bra", guard, [], [0, -1])
        if o == "brx":
            self.fix.append((len(self.instrs), tuple(self.scopes), a[1]))
            return E("brx.idx", guard, [self.val(a[0], 4)] + [0] * len(self.tables[a[1]]))
        if o in ("ret", "exit"):
            return E("ret", guard, [])
        if o == "trap":
            return E("trap", guard, [])
        if o == "setmaxnreg":
            return E("setmaxnreg", guard, [], [int(a[0]), int("inc" in p)])
        if full == "griddepcontrol.wait":
            return E(full, guard, [])
        if full.startswith("fence.proxy.async"):
            return E("fence.proxy.async", guard, [])
        if o in ("griddepcontrol", "prefetch", "fence", "membar", "pmevent"):
            return E("nop", guard, [])
        if o in ("bar", "barrier"):
            if p[1] == "warp":
                return E("bar.warp.sync", guard, [])
            if "sync" not in p:
                raise PtxError(full)
            return E("bar.sync", guard, [self.val(x, 4) for x in a])
        if o == "mbarrier":
            kind = next(k for k in ("init", "inval", "arrive", "expect_tx", "try_wait", "test_wait") if k in p)
            if kind in ("try_wait", "test_wait"):
                if "parity" not in p:
                    raise PtxError(full)
                b, off = self.addr(a[1])
                return E(
                    "mbarrier.try_wait.parity",
                    guard,
                    [self.pred(a[0]), self.val(b, 4), self.val(a[2], 4)],
                    [off, int(kind == "test_wait")],
                )
            if kind == "arrive" and a[0].startswith("[") is False:
                a = a[1:]
            if kind == "arrive" and "expect_tx" in p:
                kind = "arrive.expect_tx"
            b, off = self.addr(a[0])
            return E("mbarrier." + kind, guard, [self.val(b, 4)] + [self.val(x, 4) for x in a[1:]], [off])
        if full.startswith("cp.async.bulk.tensor"):
            rank = int(next(x for x in p if re.fullmatch(r"\dd", x))[0])
            if "im2col" in full or "multicast" in full or "gather" in full:
                raise PtxError(full)
            if "complete_tx::bytes" in full:
                d, doff = self.addr(a[0])
                t, co = [x.strip() for x in a[1].strip()[1:-1].split(",", 1)]
                b, boff = self.addr(a[2])
                return E(
                    "tma.load",
                    guard,
                    [self.val(d, 4), self.val(t, 8), *[self.val(x, 4) for x in self.vec(co)], self.val(b, 4)],
                    [rank, doff, boff],
                )
            if "bulk_group" in p:
                t, co = [x.strip() for x in a[0].strip()[1:-1].split(",", 1)]
                s, soff = self.addr(a[1])
                return E(
                    "tma.store",
                    guard,
                    [self.val(t, 8), *[self.val(x, 4) for x in self.vec(co)], self.val(s, 4)],
                    [rank, soff],
                )
            raise PtxError(full)
        if full.startswith("cp.async.bulk.commit_group"):
            return E("bulk.commit_group", guard, [])
        if full.startswith("cp.async.bulk.wait_group"):
            return E("bulk.wait_group" + (".read" if "read" in p else ""), guard, [], [int(a[0])])
        if full.startswith("cp.async.commit_group"):
            return E("cp.async.commit_group", guard, [])
        if full.startswith("cp.async.wait_group"):
            return E("cp.async.wait_group", guard, [], [int(a[0])])
        if full.startswith("cp.async.wait_all"):
            return E("cp.async.wait_all", guard, [])
        if full.startswith(("cp.async.cg", "cp.async.ca")):
            d, doff = self.addr(a[0])
            s, soff = self.addr(a[1])
            return E(
                "cp.async",
                guard,
                [self.val(d, 4), self.val(s, 8)] + [self.val(x, 4) for x in a[3:4]],
                [int(a[2], 0), doff, soff, int(len(a) > 3)],
            )
        if o == "elect":
            d, q = (x.strip() for x in a[0].split("|"))
            return E("elect", guard, [self.val(d, 4), self.pred(q)])
        if o == "shfl":
            d, _, q = a[0].partition("|")
            return E(
                "shfl." + p[2],
                guard,
                [self.val(d.strip(), 4)] + [self.val(x, 4) for x in a[1:5]] + ([self.pred(q.strip())] if q else []),
                [int(bool(q))],
            )
        if o == "vote":
            return E(
                "vote." + p[2], guard, [self.val(a[0], 4) if p[2] == "ballot" else self.pred(a[0]), self.pred(a[1])]
            )
        if o == "wgmma":
            return self.wgmma(full, p, a, guard)
        if o == "mma":
            return self.mma(full, p, a, guard)
        if o in ("ldmatrix", "stmatrix"):
            n = int(next(x for x in p if re.fullmatch(r"x[124]", x))[1])
            if "b16" not in p:
                raise PtxError(full)
            regs, ad = (a[0], a[1]) if o == "ldmatrix" else (a[1], a[0])
            b, off = self.addr(ad)
            at, aw = self.sbase(b)
            rs = [self.val(x, 4) for x in self.vec(regs)]
            return E(o, guard, [*rs, at] if o == "ldmatrix" else [at, *rs], [n, int("trans" in p), off, aw])
        if o in ("atom", "red"):
            space = "shared" if any(x.startswith("shared") for x in p) else "global"
            fn = next(x for x in p if x in ("add", "min", "max", "exch", "cas"))
            dst = o == "atom"
            k = 1 if dst else 0
            b, off = self.addr(a[k])
            at, aw = self.sbase(b) if space == "shared" else (self.val(b, 8), 8)
            return E(
                f"atom.{space}.{fn}.{last}",
                guard,
                ([self.val(a[0], w)] if dst else []) + [at] + [self.val(x, w) for x in a[k + 1 :]],
                [0, 0, off, 0, 0, aw, int(dst)],
            )
        if o in ("ld", "st"):
            space = next((s for s in ("global", "shared", "param") if any(x.startswith(s) for x in p)), None)
            if space is None:
                raise PtxError(full)
            n = next((int(x[1]) for x in p if re.fullmatch(r"v[248]", x)), 1)
            regs, ad = (a[0], a[1]) if o == "ld" else (a[1], a[0])
            names = self.vec(regs)
            b, off = self.addr(ad)
            if space == "shared":
                at, aw = self.sbase(b)
            else:
                at, aw = self.val(b, 8), 8
            rw = next((WIDTH[self.reg(x)[0]] for x in names if x.startswith("%") and x not in SPECIAL), w)
            if len(names) != n:
                raise PtxError(f"{full}: {len(names)} registers")
            rs = [self.val(x, rw) for x in names]
            return E(
                f"{o}.{space}",
                guard,
                [*rs, at] if o == "ld" else [at, *rs],
                [w, n, off, rw, int(last[0] == "s" and last != "b"), aw],
            )
        if o == "cvta":
            return E("mov.b64", guard, [self.val(a[0], 8), self.val(a[1], 8)])
        if o == "mov":
            if last == "pred":
                return E("mov.pred", guard, [self.pred(a[0]), self.pred(a[1])])
            if a[0].startswith("{"):
                parts = self.vec(a[0])
                pw = w // len(parts)
                return E("unpack", guard, [self.val(x, pw) for x in parts] + [self.val(a[1], w)], [len(parts), pw])
            if a[1].startswith("{"):
                parts = self.vec(a[1])
                pw = w // len(parts)
                return E("pack", guard, [self.val(a[0], w)] + [self.val(x, pw) for x in parts], [len(parts), pw])
            return E("mov." + last, guard, [self.val(a[0], w), self.val(a[1], w)])
        if last == "pred":
            return E(f"{o}.pred", guard, [self.pred(x) for x in a])
        if o == "setp":
            if "|" in a[0] or (len(p) > 3 and p[2] not in ("ftz",)):
                raise PtxError(full)
            return E(f"setp.{p[1]}.{last}", guard, [self.pred(a[0]), self.val(a[1], w), self.val(a[2], w)])
        if o == "selp":
            return E("selp." + last, guard, [self.val(a[0], w), self.val(a[1], w), self.val(a[2], w), self.pred(a[3])])
        if o == "cvt":
            mods = [x for x in p[1:-2] if x not in ("rn", "ftz", "rna", "satfinite", "rz")]
            if "rz" in p[1:-2] or "relu" in p or "sat" in p:
                raise PtxError(full)
            if p[-2] == "tf32" and "rn" in p[1:-2]:
                mods = ["rn"]
            dw, sw = WIDTH[p[-2]], WIDTH[last]
            if 1 in (dw, sw):  # 8 bits live in wider registers
                src, dst = self.reg(a[1])[0] if a[1].startswith("%") else "b32", self.reg(a[0])[0]
                narrow = p[-2] if dw == 1 else last
                if dw == 1 or p[-2] in ("u16", "s16", "u32", "s32", "u64", "s64"):
                    if mods:
                        raise PtxError(full)
                    return E(
                        "ext8",
                        guard,
                        [self.val(a[0], WIDTH[dst]), self.val(a[1], WIDTH[src])],
                        [WIDTH[src], int(narrow == "s8"), WIDTH[dst]],
                    )
                tmp = self._alloc(4)
                E("ext8", guard, [tmp, self.val(a[1], WIDTH[src])], [WIDTH[src], int(narrow == "s8"), 4])
                self.text.append(self.text[-1])
                self.locs.append(self.locs[-1])
                self.lines.append(self.lines[-1])
                return E(".".join(["cvt", *mods, p[-2], "s32"]), guard, [self.val(a[0], dw), tmp])
            return E(
                ".".join(["cvt", *mods, p[-2], last]), guard, [self.val(a[0], dw)] + [self.val(x, sw) for x in a[1:]]
            )
        if o in ("shl", "shr"):
            return E(f"{o}.{last}", guard, [self.val(a[0], w), self.val(a[1], w), self.val(a[2], 4)])
        if o in ("mul", "mad") and "wide" in p:
            return E(
                f"{o}.wide.{last}",
                guard,
                [self.val(a[0], 2 * w), self.val(a[1], w), self.val(a[2], w)] + [self.val(x, 2 * w) for x in a[3:]],
            )
        if o in ("bfe", "bfi"):
            k = 2 if o == "bfe" else 3
            return E(f"{o}.{last}", guard, [self.val(x, w) for x in a[:k]] + [self.val(x, 4) for x in a[k:]])
        if o == "lop3":
            return E("lop3.b32", guard, [self.val(x, 4) for x in a[:4]], [int(a[4], 0)])
        if o in ("popc", "clz"):
            return E(f"{o}.{last}", guard, [self.val(a[0], 4), self.val(a[1], w)])
        keep = [x for x in p[1:-1] if x not in ("rn", "approx", "full", "ftz", "rp", "rm")]
        if o in ("ex2", "rsqrt") and "ftz" in p:
            keep = ["ftz"]
        if "sat" in keep or "rz" in keep:
            raise PtxError(full)
        return E(".".join([o, *keep, last]), guard, [self.val(x, w) for x in a])

    def wgmma(self, full: str, p: list[str], a: list[str], guard: int) -> None:
        if p[1] in ("fence", "commit_group"):
            return self.emit("wgmma." + p[1], guard, [])
        if p[1] == "wait_group":
            return self.emit("wgmma.wait_group", guard, [], [int(a[0])])
        shape = next(x for x in p if re.fullmatch(r"m64n\d+k\d+", x))
        n, k = (int(x) for x in re.fullmatch(r"m64n(\d+)k(\d+)", shape).groups())  # type: ignore[union-attr]
        at, bt = p[-2], p[-1]
        ct = p[-3]
        if at != bt or at not in ("bf16", "f16", "tf32") or ct not in ("f32", "f16") or "sp" in p:
            raise PtxError(full)
        half = ct == "f16"
        acc = [self.val(x, 4) for x in self.vec(a[0])]
        if len(acc) != n // (4 if half else 2):
            raise PtxError(f"{full}: {len(acc)} accumulators")
        in_regs = a[1].startswith("{")
        ops = acc + ([self.val(x, 4) for x in self.vec(a[1])] if in_regs else [self.val(a[1], 8)]) + [self.val(a[2], 8)]
        if re.fullmatch(r"-?\d+", a[3]):
            scale_d = int(int(a[3]) != 0)
        else:
            scale_d = -1
            ops.append(self.pred(a[3]))
        imm = [int(x) for x in a[4:]]
        sa, sb, tr = imm[0], imm[1], imm[2:]
        ta, tb = (0, 0) if not tr else (0, tr[0]) if in_regs else (tr[0], tr[1])
        flags = ta | tb << 1 | (sa == -1) << 2 | (sb == -1) << 3
        self.emit(
            "wgmma",
            guard,
            ops,
            [n, k, {"bf16": 0, "f16": 1, "tf32": 2}[at], int(in_regs), scale_d, flags, int(half), len(acc)],
        )

    def mma(self, full: str, p: list[str], a: list[str], guard: int) -> None:
        shape = next(x for x in p if re.fullmatch(r"m16n8k\d+", x))
        k = int(shape[6:])
        dt, at, bt, ct = p[-4:]
        if (
            at != bt
            or at not in ("bf16", "f16", "tf32")
            or dt != ct
            or dt not in ("f32", "f16")
            or p[p.index("row") + 1] != "col"
        ):
            raise PtxError(full)
        d, x, y, c = (self.vec(v) for v in a)
        self.emit(
            "mma",
            guard,
            [self.val(v, 4) for v in d + x + y + c],
            [k, {"bf16": 0, "f16": 1, "tf32": 2}[at], len(x), len(y), int(dt == "f16")],
        )

    def run(self) -> Kernel:
        loc = None
        scope = 0
        table = None
        first, seen = self.first_line, 0
        for st, at in _statements(self.body):
            first += self.body.count("\n", seen, at)
            seen = at
            if st == "{":
                scope += 1
                self.scopes.append(scope)
            elif st == "}":
                self.scopes.pop()
            elif st.endswith(":"):
                table = st[:-1]
                self.labels[self.scopes[-1], table] = len(self.instrs)
            elif st.startswith(".loc"):
                _, f, line, _ = st.split()[:4]
                loc = (self.files.get(int(f), f), int(line)) if int(line) else loc
            elif st.startswith(".reg"):
                for kind, names in re.findall(r"\.reg\s+\.(\w+)\s+(.*)$", st):
                    for nm in names.split(","):
                        nm = nm.strip()
                        m = re.fullmatch(r"(%\w+?)<(\d+)>", nm)
                        if m:
                            self.prefixes[m[1]] = kind
                        else:
                            self.named[self.scopes[-1], nm] = kind
            elif st.startswith(".branchtargets"):
                del self.labels[self.scopes[-1], table]
                self.tables[table] = [x.strip() for x in st[len(".branchtargets") :].split(",")]
            elif st.startswith(".pragma"):
                pass
            elif st.startswith("."):
                raise PtxError(f"directive {st!r}")
            else:
                self.text.append(st)
                self.locs.append(loc)
                self.lines.append(first)
                try:
                    self.instruction(st)
                except (PtxError, KeyError, IndexError, StopIteration, ValueError, TypeError) as e:
                    raise PtxError(f"{type(e).__name__} {e} in {st[:200]!r}") from e
        if self.unknown:
            raise PtxError(f"unknown instructions: {sorted(self.unknown)}")
        for at, scopes, name in self.fix:
            if name in self.tables:
                base = self.instrs[at][3]
                for k, t in enumerate(self.tables[name]):
                    self.ops[base + 1 + k] = self._label(scopes, t)
            else:
                self.instrs[at][4] = self._label(scopes, name)
        bra, brx, ret = (library().emu_op(name) for name in (b"bra", b"brx.idx", b"ret"))
        kinds = {kind: {at: i for at, i in enumerate(self.instrs) if i[0] == kind} for kind in (bra, brx, ret)}
        meets = reconvergence(
            len(self.instrs),
            {at: i[4] for at, i in kinds[bra].items()},
            {at: self.ops[i[3] + 1 : i[3] + i[2]] for at, i in kinds[brx].items()},
            set(kinds[ret]),
            {at for some in kinds.values() for at, i in some.items() if i[1] >= 0},
        )
        for at, meet in meets.items():
            self.instrs[at][5] = meet
        code = np.array(self.instrs, np.int32).reshape(-1, FIELDS)
        ops = np.array(self.ops or [0], np.int32)
        init = list(self.init.values())
        at, val, wd = (
            np.array([x[0] for x in init], np.uint64),
            np.array([x[1] for x in init], np.uint64),
            np.array([x[2] for x in init], np.int32),
        )

        c = address

        prog = library().emu_program(
            c(code),
            len(code),
            c(ops),
            len(ops),
            ctypes.c_uint64(self.bytes + 256),
            self.npred,
            c(at),
            c(val),
            c(wd),
            len(init),
        )
        library().emu_maxnreg(ctypes.c_void_p(prog), self.maxnreg)
        return Kernel(self.name, self.params, self.param_bytes, self.threads, self.text, self.locs, prog, self.lines)

    def _label(self, scopes: tuple[int, ...], name: str) -> int:
        for s in reversed(scopes):
            if (s, name) in self.labels:
                return self.labels[s, name]
        raise PtxError(f"label {name!r}")


def parse(text: str) -> Kernel:
    """Parse the PTX of a compiled kernel.

    Raises:
        PtxError: something in it is not known here.
    """
    return _Parser(text).run()
