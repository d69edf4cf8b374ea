"""What CudaRunner needs of a GPU, on the CPU: graphs that run their work eagerly, and events that have happened."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch

from trident_llm.engine import cuda_first_pass, cuda_runner
from trident_llm.engine.cuda_graphs import CudaGraphs, StepShape
from trident_llm.kernels.triton_language import TritonLanguageKernels
from trident_llm.models import llama


class EagerGraphs(CudaGraphs):
    """Every replay computes what the captured graph would, from the same buffers."""

    def capture(self, progress: Callable[[str], None]) -> Iterator[None]:
        progress("nothing to capture")
        yield

    def replay(self, shape: StepShape) -> None:
        self._forward(shape)


class DoneEvent:
    def record(self, stream: object = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class OnlyStream:
    """Everything happens at once, so there is nothing to wait for."""

    def wait_event(self, event: DoneEvent) -> None:
        pass


def run_gpu_path_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make engines on the CPU use the GPU's runner, sampler and kernels. Needs TRITON_INTERPRET=1."""
    kernels = TritonLanguageKernels(num_processors=4, pdl=False)
    monkeypatch.setattr(llama, "kernels_for", lambda device: kernels)
    for module in (cuda_runner, cuda_first_pass):
        monkeypatch.setattr(module, "CudaGraphs", EagerGraphs)
    monkeypatch.setattr(torch.cuda, "Event", DoneEvent)
    monkeypatch.setattr(torch.cuda, "Stream", OnlyStream)
    monkeypatch.setattr(torch.cuda, "current_stream", OnlyStream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr("trident_llm.engine.runners.runs_on_gpu", lambda device: True)

