"""A Triton-language driver that compiles for Hopper without a GPU: launchers run, no kernel is started."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from triton.backends.compiler import GPUTarget


class _Utils:
    def __init__(self, driver: FakeHopperDriver) -> None:
        self._driver = driver

    def get_device_properties(self, device: int) -> dict[str, int]:
        del device
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        del device
        self._driver.compiled.append((name, len(kernel), shared))
        self._driver.machine_code[name] = kernel
        return object(), 0, 0, 0, 1024


class _Launcher:
    launch_cooperative_grid = False

    def __init__(self, src: Any, metadata: Any) -> None:
        del src, metadata

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs


class FakeHopperDriver:
    """``compiled`` lists (name, size of the machine code, bytes of shared memory) of every kernel that was launched;
    ``machine_code`` holds the cubin of each name's last one."""

    launcher_cls = _Launcher
    _numbers = itertools.count(1000)

    def __init__(self) -> None:
        # Kernels are kept by device number: no other driver has this one, so none is shared.
        self._number = next(self._numbers)
        self.compiled: list[tuple[str, int, int]] = []
        self.machine_code: dict[str, bytes] = {}
        self.utils = _Utils(self)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self._number

    def get_current_stream(self, device: int) -> int:
        del device
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")
