"""How tokens choose experts."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hybridlab.models.parts.init import Module


class Routing(NamedTuple):
    """Where each token goes; floating tensors are float32 or wider."""

    weights: Tensor  # [tokens, top_k]: factor of each chosen expert's output
    experts: Tensor  # int64 [tokens, top_k]: the chosen experts, all different
    logits: Tensor  # [tokens, experts]: what the z loss reads
    probs: Tensor  # [tokens, experts], sum 1, over all experts: what the balance loss and the entropy read


class Router(Module, ABC):
    """Chooses experts for each token by itself. Its parameters are its own, so they stay float32 or wider."""

    @abstractmethod
    def forward(self, x: Tensor, tokens: Tensor | None = None) -> Routing:
        """x [tokens, d_model], tokens int64 [tokens] -> routing; computed in float32 or wider, autocast or not."""


class SoftmaxTopK(Router):
    """The `top_k` experts of highest logit; equal logits choose the lowest index.

    renormalise   weights sum to 1 over the chosen, or are their probabilities among all. None: unless top_k is 1, where
                  a weight of constantly 1 would give the router no task gradient; asking for that is refused.
    """

    def __init__(self, d_model: int, *, n_experts: int, top_k: int, renormalise: bool | None = None):
        super().__init__()
        if not 1 <= top_k <= n_experts:
            raise ValueError(f"top_k={top_k} must be from 1 to n_experts={n_experts}")
        if renormalise and top_k == 1:
            raise ValueError("renormalise=True with top_k=1 makes every weight 1; use renormalise=False")
        self.top_k, self.renormalise = top_k, top_k > 1 if renormalise is None else renormalise
        self.weight = nn.Parameter(torch.empty(d_model, n_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # logits of about 0.1 start near the greatest entropy; unit logits would start 0.5 below it
        nn.init.normal_(self.weight, std=0.1 * self.weight.shape[0] ** -0.5)

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> Routing:
        with torch.autocast(x.device.type, enabled=False):
            logits = x.to(torch.promote_types(x.dtype, self.weight.dtype)) @ self.weight
        experts = logits.detach().sort(dim=-1, descending=True, stable=True).indices[:, : self.top_k]
        probs = logits.softmax(-1)
        weights = logits.gather(1, experts).softmax(-1) if self.renormalise else probs.gather(1, experts)
        return Routing(weights, experts, logits, probs)
