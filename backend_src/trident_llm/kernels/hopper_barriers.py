"""Barriers in shared memory by which warps of different duties hand buffers on, in Gluon for Hopper."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

barrier = getattr(gl, "barrier", None) or gl.thread_barrier
"""Of the warps that run it. The name depends on Triton's version."""


@gluon.jit
def wait_for(barriers, index, phase):
    mbarrier.wait(barriers.index(index), phase)


@gluon.jit
def begin_fill(full, empty, count, NUM_BYTES: gl.constexpr):
    """The stage of a ring that use number ``count`` fills, once the use before has released it."""
    STAGES: gl.constexpr = full.shape[0]
    stage = count % STAGES
    wait_for(empty, stage, (count // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(stage), NUM_BYTES)
    return stage


@gluon.jit
def wait_filled(full, count):
    """The stage of a ring that use number ``count`` has filled."""
    stage = count % full.shape[0]
    wait_for(full, stage, count // full.shape[0] & 1)
    return stage


@gluon.jit
def release(barriers, index, condition=True):
    mbarrier.arrive(barriers.index(index), count=1, pred=condition)
