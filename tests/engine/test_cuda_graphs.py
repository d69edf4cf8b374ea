"""Which shapes of steps there are, and which of them a step gets. Nothing is captured."""

from __future__ import annotations

import pytest

from trident_llm.engine.cuda_graphs import CudaGraphs, StepShape, graph_shapes

SHAPES = graph_shapes(256, 2048)


def find(
    num_tokens: int, num_decodes: int, num_prefills: int, *, num_samples: int = 1, long_contexts: bool = False
) -> StepShape | None:
    graphs = CudaGraphs(SHAPES, lambda shape: None)
    return graphs.find(
        num_tokens=num_tokens, num_decodes=num_decodes, num_prefills=num_prefills, num_samples=num_samples,
        long_contexts=long_contexts,
    )  # fmt: skip


def test_shapes_differ_and_only_small_ones_with_prompts_are_for_long_contexts() -> None:
    assert len(set(SHAPES)) == len(SHAPES)
    of_long = [shape for shape in SHAPES if shape.long_contexts]
    assert {shape.num_tokens for shape in of_long} == {16, 32, 64, 96, 128, 192, 256}
    assert all(shape.num_prefills for shape in of_long)
    assert len(of_long) == 14


@pytest.mark.parametrize("num_decodes", [0, 3, 200])
def test_a_step_gets_the_shape_for_its_contexts(num_decodes: int) -> None:
    num_tokens = num_decodes + 20
    plain = find(num_tokens, num_decodes, 1)
    split = find(num_tokens, num_decodes, 1, long_contexts=True)
    assert plain is not None and split is not None
    assert (plain.long_contexts, split.long_contexts) == (False, True)
    assert plain.num_tokens == split.num_tokens >= num_tokens


@pytest.mark.parametrize(
    ("num_tokens", "num_decodes", "num_prefills"),
    [(300, 0, 1), (100, 0, 30), (5, 5, 0)],
    ids=["many tokens", "many prompts", "decodes"],
)
def test_a_step_that_no_shape_for_long_contexts_holds_gets_another(
    num_tokens: int, num_decodes: int, num_prefills: int
) -> None:
    plain = find(num_tokens, num_decodes, num_prefills)
    assert plain is not None
    assert find(num_tokens, num_decodes, num_prefills, long_contexts=True) == plain


def test_a_step_too_large_for_every_shape_gets_none() -> None:
    assert find(2049, 0, 1, long_contexts=True) is None
    assert find(16, 0, 1, num_samples=257, long_contexts=True) is None


@pytest.mark.parametrize("max_num_batched_tokens", [16, 200, 2048])
def test_the_largest_prefill_is_one_of_short_contexts(max_num_batched_tokens: int) -> None:
    graphs = CudaGraphs(graph_shapes(8, max_num_batched_tokens), lambda shape: None)
    assert graphs.largest_prefill.num_tokens == max_num_batched_tokens
    assert not graphs.largest_prefill.long_contexts
