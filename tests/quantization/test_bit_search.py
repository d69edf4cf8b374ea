"""``isq_max_loss``: what a layer costs against the divergence it really causes, and the choice of bits from costs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.fakes.paged_steps import Chunk, PagedSteps
from tests.fakes.tiny_decoders import MAX_LEN, TinyDecoder
from tests.quantization.tiny import TinyModel, tiny_model, token_samples
from trident_llm.errors import BadRequest
from trident_llm.quantization.bit_choice import choices, choose_bits, cost_of, lowest_bits
from trident_llm.quantization.installation import EMBEDDING
from trident_llm.quantization.modules import HEAD, model_modules
from trident_llm.quantization.scheme import LinearScheme, Plan, QuantizationSettings, average_bits, make_plan
from trident_llm.quantization.search import search_plan
from trident_llm.quantization.sensitivity import Sensitivity
from trident_llm.quantization.walk import Walk


def walk(model: TinyModel, plan: Plan, tokens: Tensor, held_out: Tensor | None = None) -> Walk:
    return Walk(
        model.reader,
        model.config,
        plan,
        max_model_len=MAX_LEN,
        embedding=model.reader.read(EMBEDDING),
        samples=tokens,
        progress=lambda text: None,
        held_out=held_out,
    )


def log_probabilities(model: TinyModel, plan: Plan, tokens: Tensor) -> Tensor:
    decoder = model.decoder_of(dict(walk(model, plan, tokens).parameters()))
    num, length = tokens.shape
    rows = TinyDecoder(model.oracle, decoder, model.config).run(
        PagedSteps(num, max_len=MAX_LEN, block_size=8), tokens.tolist(), [[Chunk(i, 0, length) for i in range(num)]]
    )
    return torch.log_softmax(torch.cat(rows), -1)


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
def test_a_layers_cost_is_the_divergence_it_causes(method):
    model, tokens = tiny_model("llama-biases"), token_samples(24)
    plan = {**make_plan(QuantizationSettings(method), model.config), HEAD: None}
    with torch.no_grad():
        costs = Sensitivity(
            model.reader,
            model.config,
            max_model_len=MAX_LEN,
            embedding=model.reader.read(EMBEDDING),
            samples=tokens,
            progress=lambda text: None,
        ).measure(plan)
    assert set(costs) == {module.name for module in model_modules(model.config)} - {HEAD}
    nothing = dict.fromkeys(plan)
    whole = log_probabilities(model, nothing, tokens)
    causes = {}
    for name in costs:
        other = log_probabilities(model, {**nothing, name: plan[name]}, tokens)
        causes[name] = (whole.exp() * (whole - other)).sum(-1).mean().item()
    ratios = torch.tensor([costs[name] / causes[name] for name in costs])
    assert ratios.median().item() == pytest.approx(1, abs=0.2)
    assert ratios.min() > 0.4 and ratios.max() < 2.5


def test_the_walk_measures_the_loss_of_the_quantized_model():
    model, tokens = tiny_model("llama-tied"), token_samples(4)
    plan = make_plan(QuantizationSettings("gptq"), model.config)
    walked = walk(model, plan, token_samples(6), held_out=tokens)
    decoder = model.decoder_of(dict(walked.parameters()))
    rows = TinyDecoder(model.oracle, decoder, model.config).run(
        PagedSteps(4, max_len=MAX_LEN, block_size=8), tokens.tolist(), [[Chunk(i, 0, 40) for i in range(4)]]
    )
    losses = [torch.nn.functional.cross_entropy(row[:-1], ids[1:]) for row, ids in zip(rows, tokens, strict=True)]
    assert walked.held_out_loss == pytest.approx(torch.stack(losses).mean().item(), abs=1e-4)


def test_without_a_scheme_the_walk_measures_full_precision():
    model, tokens = tiny_model(), token_samples(4)
    whole = walk(model, dict.fromkeys(make_plan(QuantizationSettings("rtn"), model.config)), tokens, held_out=tokens)
    assert not list(whole.parameters())
    with torch.inference_mode():
        expected = model.oracle(tokens, labels=tokens).loss.item()
    assert whole.held_out_loss == pytest.approx(expected, abs=1e-4)


def test_costs_at_other_bits_follow_the_step_of_the_grid():
    measured = LinearScheme("gptq", 4, 64)
    assert [scheme and scheme.bits for scheme in choices(measured)] == [4, 5, 6, 8, None]
    costs = [cost_of(choice, measured, 2.0) for choice in choices(measured)]
    assert costs == pytest.approx([2.0, 2.0 * (15 / 31) ** 2, 2.0 * (15 / 63) ** 2, 2.0 * (15 / 255) ** 2, 0])
    assert [scheme and scheme.bits for scheme in choices(LinearScheme("smoothquant", 8, 576))] == [8, None]
    assert lowest_bits(LinearScheme("rtn", 8, 64)) == measured.__class__("rtn", 4, 64)


@pytest.mark.parametrize("seed", range(4))
def test_no_other_choice_within_the_same_cost_is_much_smaller(seed):
    """Against all combinations for four layers; the others are left in full precision."""
    config = tiny_model().config
    names = [module.name for module in model_modules(config)]
    plan = {**dict.fromkeys(names), **dict.fromkeys(names[:4], LinearScheme("rtn", 4, 32))}
    generator = torch.Generator().manual_seed(seed)
    costs = dict(zip(names[:4], torch.exp(2 * torch.randn(4, generator=generator) - 3).tolist(), strict=True))
    budget = 0.3 * sum(costs.values())
    chosen = choose_bits(plan, costs, config, budget)
    measured = LinearScheme("rtn", 4, 32)

    def total(candidate: Plan) -> float:
        return sum(cost_of(candidate[name], measured, costs[name]) for name in costs)

    best = min(
        average_bits(candidate, config)
        for combination in itertools.product(choices(measured), repeat=4)
        if total(candidate := {**plan, **dict(zip(names[:4], combination, strict=True))}) <= budget
    )
    assert total(chosen) <= budget
    # Lagrangian choices are the best for what they cost; only what is left of the budget may buy a little more.
    assert average_bits(chosen, config) <= best + 0.25


class FakeModel:
    """A plan is a number of steps; the loss is what its budget says, times a factor that the costs do not know."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.measured: list[Plan] = []

    def choose(self, budget: float) -> Plan:
        return {"layer": LinearScheme("rtn", 4, max(round(budget * 1e5), 1))}

    def measure(self, plan: Plan) -> float:
        self.measured.append(plan)
        return plan["layer"].group_size / 1e5 * self.factor


@pytest.mark.parametrize("factor", [0.2, 0.7, 1.0, 1.3, 3.0, 10.0])
def test_the_budget_is_corrected_until_the_measured_loss_is_within_the_bound(factor):
    model = FakeModel(factor)
    trial = search_plan(0.05, model.choose, model.measure)
    assert 0.75 * 0.05 < trial.loss <= 0.05
    assert trial.plan == model.measured[-1] and len(model.measured) <= 6


def test_the_best_plan_is_made_once_more_when_a_later_one_was_too_bold():
    losses = iter([0.01, 0.09, 0.09, 0.09, 0.09, 0.01])
    model = FakeModel(1)
    trial = search_plan(0.05, model.choose, lambda plan: model.measure(plan) * 0 + next(losses))
    assert trial.loss == pytest.approx(math.expm1(0.01)) and trial.plan == model.measured[0] == model.measured[-1]


def test_a_bound_that_nothing_meets_is_refused():
    with pytest.raises(BadRequest, match=r"isq_max_loss: 0\.001 is less than .* the least was 0\.0513"):
        search_plan(0.001, FakeModel(1).choose, lambda plan: 0.05)
