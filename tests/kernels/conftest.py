from __future__ import annotations

import pytest

from tests.fakes.gluon.language import emulate
from tests.kernels.cuda_cases import INTERPRETED
from trident_llm.kernels import (
    prefill_attention_hopper,
    quantized_matmul_hopper,
    quantized_vector,
    scaled_matmul_hopper,
)

_WITH_GLUON_KERNELS = (prefill_attention_hopper, quantized_matmul_hopper, quantized_vector, scaled_matmul_hopper)


@pytest.fixture(autouse=True)
def gluon_kernels_are_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, which knows no Gluon."""
    if INTERPRETED:
        for module in _WITH_GLUON_KERNELS:
            emulate(module, monkeypatch.setattr)
