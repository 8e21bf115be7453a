"""The calls to CUDA that a graph takes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WARM_UP = 2


@dataclass(frozen=True)
class Captured:
    """A graph: `replay()` computes `outputs` from what lies in `static`, into the same memory each time."""

    static: Tensor
    outputs: Any
    replay: Callable[[], None]


class Cuda:
    """The calls to CUDA. Tests put an emulation in its place."""

    def accepts(self, x: Tensor) -> bool:
        """Whether a forward of this tensor can be a graph."""
        # inside somebody else's capture the forward becomes part of theirs
        return x.is_cuda and not torch.cuda.is_current_stream_capturing()

    def stream(self, device: torch.device) -> Any:
        """The caller's stream."""
        return torch.cuda.current_stream(device)

    def event(self) -> Any:
        """An event to order streams by."""
        return torch.cuda.Event()

    def pool(self) -> Any:
        """A handle of a memory pool that graphs share."""
        return torch.cuda.graph_pool_handle()

    def pool_bytes(self, pool: Any) -> int:
        """Device memory that a pool holds."""
        return sum(segment["total_size"] for segment in torch.cuda.memory_snapshot(pool))

    def warm_up(self, function: Callable[[Tensor], Any], sample: Tensor) -> None:
        """Let `function` compile and allocate what it will, on the stream that `capture` takes next."""
        with torch.cuda.device(sample.device):
            stream, self._side = torch.cuda.current_stream(), torch.cuda.Stream()
            self._side.wait_stream(stream)
            try:
                with torch.cuda.stream(self._side):
                    for _ in range(WARM_UP):
                        function(sample)
            finally:
                stream.wait_stream(self._side)

    def capture(self, function: Callable[[Tensor], Any], sample: Tensor, pool: Any) -> Captured:
        """Capture `function` of a tensor like `sample`."""
        first: Exception | None = None
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph stays on its stream where a capture fails; the block around it does not
        with torch.cuda.device(sample.device), torch.cuda.stream(self._side):
            try:
                # other threads may allocate meanwhile
                with torch.cuda.graph(graph, pool=pool, stream=self._side, capture_error_mode="thread_local"):
                    try:
                        # in the pool, which is not handed out again while a launched replay may read it
                        static = torch.empty_like(sample)
                        outputs = function(static)
                    except Exception as error:
                        first = error
                        raise
            except Exception as error:
                # a capture that cannot be ended leaves the allocator waiting for its end
                with suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(sample.device.index, pool)
                # the end's own complaint says less
                raise first or error from None
        # padding is never what the memory held
        static.zero_()
        return Captured(static, outputs, graph.replay)
