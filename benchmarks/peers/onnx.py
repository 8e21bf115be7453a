"""ONNX Runtime and OpenVINO on CPU, with the reference model exported by torch.onnx."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..workloads.base import Workload
from . import Peer, unusable
from .plain import plain_module

_OPS = frozenset({"model"})


def _missing(library: str) -> Callable[[Workload, torch.device], str | None]:
    def missing(workload: Workload, device: torch.device) -> str | None:
        if device.type != "cpu":
            return "is measured on CPU only"
        if workload.dtype != "fp32":
            return f"is measured in fp32 only, not {workload.dtype}"
        return unusable("onnxscript", "bench") or unusable(library, "bench")

    return missing


def _export(workload: Workload, folder: str) -> Path:
    path = Path(folder) / "model.onnx"
    model = plain_module(workload, torch.device("cpu"))
    pixels = workload.inputs(torch.device("cpu"), 0)["pixels"]
    torch.onnx.export(model, (pixels,), path, dynamo=True, verbose=False, input_names=["pixels"])
    return path


def _onnxruntime(workload: Workload, device: torch.device) -> Callable[[dict[str, Any]], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # its idle threads would else spin on the cores of whoever is measured next
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder:
        session = onnxruntime.InferenceSession(_export(workload, folder), options, ["CPUExecutionProvider"])

    def run(inputs: dict[str, Any]) -> Tensor:
        return torch.from_numpy(session.run(None, {"pixels": inputs["pixels"].numpy()})[0])

    return run


def _openvino(workload: Workload, device: torch.device) -> Callable[[dict[str, Any]], Tensor]:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        # fp32 in, fp32 through: OpenVINO would else choose a narrower type where the processor has one
        hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = openvino.Core().compile_model(_export(workload, folder), "CPU", hints)

    def run(inputs: dict[str, Any]) -> Tensor:
        return torch.from_numpy(compiled(inputs["pixels"].numpy())[0])

    return run


PEERS = (
    Peer("ONNX Runtime", _OPS, _missing("onnxruntime"), _onnxruntime),
    Peer("OpenVINO", _OPS, _missing("openvino"), _openvino),
)
