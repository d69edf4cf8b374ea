"""The end of a model on calibration text: final norm, head, and the loss of the tokens that follow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.quantized_weight import QuantizedWeight
from ..models.model_config import ModelConfig
from ..models.weights import WeightReader
from .float_layer import read_merged
from .modules import head_module


class HeadLoss:
    """Reads the final norm, and the head unless a quantized one is given."""

    def __init__(self, reader: WeightReader, config: ModelConfig, head: QuantizedWeight | None = None) -> None:
        self._norm = reader.read("model.norm.weight").clone()
        self._eps = config.rms_norm_eps
        self._head = (
            read_merged(reader, head_module(config), "weight") if head is None else head.dequantize(self._norm.dtype)
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [length, H], the last layer's output -> [length, vocab] float32."""
        return F.linear(torch.rms_norm(hidden, self._norm.shape, self._norm, self._eps), self._head).float()

    def mean(self, hidden: Tensor, tokens: Tensor) -> float:
        """Mean negative log-likelihood in nats of every token [N, length] but a sequence's first."""
        losses = [
            F.cross_entropy(self.logits(states[:-1]), ids[1:].to(states.device))
            for states, ids in zip(hidden, tokens, strict=True)
        ]
        return float(torch.stack(losses).mean().item())

    def sampled_gradient(self, hidden: Tensor, generator: torch.Generator) -> Tensor:
        """hidden [N, length, H] -> gradient of the same shape, float32: of the sum of the log-likelihoods of tokens
        drawn from the model's own distribution."""
        gradients = []
        for states in hidden:
            with torch.enable_grad():
                leaf = states.detach().clone().requires_grad_(True)
                logits = self.logits(leaf)
                # Drawn on the CPU, so that every device draws alike.
                uniform = torch.rand(logits.shape[0], 1, generator=generator).to(logits.device)
                cumulative = torch.softmax(logits.detach(), -1).cumsum(-1)
                drawn = (cumulative < uniform * cumulative[:, -1:]).sum(-1).clamp_(max=logits.shape[1] - 1)
                F.cross_entropy(logits, drawn, reduction="sum").backward()
            assert leaf.grad is not None
            gradients.append(leaf.grad.float())
        return torch.stack(gradients)
