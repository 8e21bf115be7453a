"""Tuning: the tile sizes of every launch of a model, measured where they run.

    result = tune("vit_base_patch16_224", batch=256, dtype="bf16", device=torch.device("cuda"), budget_s=300)

A kernel alone finds its inputs where a loop left them and has the memory system for itself, so its best tiles are not
a model's. Here the whole of embedding, blocks and norm is one CUDA graph per candidate, in which only the op under test
differs, and the graphs are timed against each other, interleaved. As many blocks stand in a row as it takes to pass
the last-level cache. One launch after the other gets its share of the budget: candidates are held to the parity rule,
then halved by their times until two are left, and the best replaces the present config only if their p20..p80 do not
overlap. A candidate that does not compile, or is wrong, is counted and left out.

What is tuned are the fields of each op's `Config`: tiles, warps, stages, parts of K, for `linear` from sm_90 on the
descriptor or the pointer kernel, and torch's own GEMM or attention where an op can go there. A folded LayerNorm has no
such route, so a model is tuned twice: with its norms folded into the GEMMs, and with them by themselves.

Entries go to `<out>/<op>/<device>.json`, by default to the user's own folder (`vitfast.kernels._config.user_folder`),
beside one file with all of the evidence if `report` names it. `unpack` lays such a file out as committed configs.
Nothing here runs by itself: no import and no forward tunes.
"""

from .files import unpack
from .search import tune

__all__ = ["tune", "unpack"]
