"""The executor of `emulator.cpp`, built once for each state of its source."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build"
FLAGS = ("-O1", "-march=native", "-ffp-contract=off", "-std=c++17", "-shared", "-fPIC", "-w")


def build() -> Path | None:
    """Path of the library, built where it is not there; None without a compiler, or an x86-64 with AVX2 and F16C."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    cpu = Path("/proc/cpuinfo")
    flags = set(cpu.read_text().split()) if cpu.is_file() else set()
    if compiler is None or not {"avx2", "fma", "f16c"} <= flags:
        return None
    sources = [HERE / name for name in ("cta.h", "instructions.h", "emulator.cpp")]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources) + "\n".join(flags).encode())
    library = BUILD / f"emulator-{digest.hexdigest()[:16]}.so"
    BUILD.mkdir(exist_ok=True)
    # tests run in several processes, of which one builds
    with open(BUILD / "emulator.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            partial = library.with_suffix(".part")
            subprocess.run([compiler, *FLAGS, "-o", str(partial), str(sources[-1])], check=True)
            partial.replace(library)
    return library


@functools.cache
def library() -> ctypes.CDLL:
    """The library, loaded."""
    path = build()
    if path is None:
        pytest.skip("the emulator needs a C++ compiler, and a processor with AVX2, FMA and F16C")
    loaded = ctypes.CDLL(str(path))
    loaded.emu_op.argtypes = [ctypes.c_char_p]
    loaded.emu_program.restype = ctypes.c_void_p
    return loaded


if __name__ == "__main__":
    print(build() or "no C++ compiler for the emulator, whose tests will be skipped")
