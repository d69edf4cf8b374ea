from __future__ import annotations

import pytest
from triton.runtime import driver

from tests.fakes.fake_hopper import FakeHopperDriver
from tests.fakes.gluon.language import emulate
from tests.kernels.cuda_cases import INTERPRETED


@pytest.fixture(autouse=True)
def gluon_kernels_are_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the Triton language's interpreter, which knows no Gluon."""
    if INTERPRETED:
        emulate(monkeypatch.setattr)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> FakeHopperDriver:
    fake = FakeHopperDriver()
    monkeypatch.setattr(driver, "_active", fake)
    return fake
