"""AdamW and Muon: which rule and which decay each parameter gets, and the one optimizer that applies both."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.optim.adamw import adamw

from hybridlab.models.ffn.moe import Experts
from hybridlab.training.schedules import Cosine, WarmupStableDecay
from hybridlab.training.settings import Settings


@dataclass(frozen=True, kw_only=True)
class _Adaptive(Settings):
    """What both have: a schedule of `tokens` tokens, decay of matrices inside layers, and AdamW for all else."""

    tokens: int
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    schedule: WarmupStableDecay | Cosine = field(default_factory=WarmupStableDecay)

    def _adamw(self, lr: float) -> dict[str, Any]:
        return {"rule": "adamw", "lr": lr, "betas": (self.beta1, self.beta2), "fused": True}


@dataclass(frozen=True, kw_only=True)
class AdamW(_Adaptive):
    """AdamW (Loshchilov & Hutter 2019) for every parameter."""

    lr: float = 2e-3

    def build(self, model: nn.Module) -> "Optimizer":
        adam = self._adamw(self.lr)
        return Optimizer(model, {**adam, "weight_decay": self.weight_decay}, adam)


@dataclass(frozen=True, kw_only=True)
class Muon(_Adaptive):
    """Orthogonalised momentum (Jordan et al. 2024) for matrices inside layers, AdamW at `adamw_lr` for all else.

    An update is scaled to the root mean square 0.2 that AdamW's have (Liu et al. 2025), whatever the matrix's shape.
    """

    lr: float = 6e-3
    momentum: float = 0.95
    adamw_lr: float = 3e-3

    def build(self, model: nn.Module) -> "Optimizer":
        muon = {"rule": "muon", "lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}
        return Optimizer(model, muon, self._adamw(self.adamw_lr))


def partition(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(matrices, rest) by name: the weights of linear layers and stacked experts [e d f] against all other parameters.

    Embeddings, the head, routers, norms, biases, convolutions, decays and step sizes are the rest.
    """
    matrices: dict[str, nn.Parameter] = {}
    rest: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        outside = {"head", "embed", "router"} & set(path.split("."))
        for name, p in module.named_parameters(path, recurse=False):
            matrix = isinstance(module, Experts) or (isinstance(module, nn.Linear) and p.ndim == 2)
            (matrices if matrix and not outside else rest)[name] = p
    return matrices, rest


class Optimizer(torch.optim.Optimizer):
    """Applies to each group its `rule`, adamw or muon; all state is float32 or wider.

    work_dtype   what Muon orthogonalises in; bfloat16 pays where the device multiplies it natively
    """

    def __init__(self, model: nn.Module, for_matrices: dict, for_rest: dict):
        groups = []
        for name, params, options in zip(("matrices", "rest"), partition(model), (for_matrices, for_rest), strict=True):
            named = {"name": name, "names": list(params), "params": list(params.values())}
            groups.append({"weight_decay": 0.0, **options, "base_lr": options["lr"], **named})
        super().__init__(groups, {})
        self.work_dtype = torch.float32

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                (self._muon if group["rule"] == "muon" else self._adamw)(params, group)

    def _adamw(self, params: list[Tensor], group: dict) -> None:
        for p in params:
            if not self.state[p]:
                zeros = {"exp_avg": _wide_zeros(p), "exp_avg_sq": _wide_zeros(p)}
                self.state[p] = {"step": torch.zeros((), device=p.device), **zeros}
        means, squares, steps = ([self.state[p][k] for p in params] for k in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = group["betas"]
        adamw(
            params, [p.grad for p in params if p.grad is not None], means, squares, [], steps, fused=group["fused"],
            amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
            eps=1e-8, maximize=False,
        )  # fmt: skip

    def _muon(self, params: list[Tensor], group: dict) -> None:
        alike: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p in params:
            if not self.state[p]:
                self.state[p] = {"momentum": _wide_zeros(p)}
            m, grad = self.state[p]["momentum"], p.grad
            assert grad is not None  # as `step` has seen
            m.lerp_(grad.to(m.dtype), 1 - group["momentum"])
            wide = _turned(grad.lerp(m, group["momentum"]), like=p)
            alike[wide.shape[-2:]].append((p, wide.reshape(-1, *wide.shape[-2:])))
        for (_, long), found in alike.items():
            updates = orthogonalise(torch.cat([u for _, u in found]).to(self.work_dtype))
            for (p, _), update in zip(found, updates.split([len(u) for _, u in found]), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(_turned(update, like=p).reshape(p.shape), alpha=-0.2 * group["lr"] * long**0.5)


def _wide_zeros(p: Tensor) -> Tensor:
    return torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))


def _turned(t: Tensor, like: Tensor) -> Tensor:
    """The matrices t, transposed where those of `like` are tall; so there and back again."""
    return t if like.shape[-2] <= like.shape[-1] else rearrange(t, "... a b -> ... b a")


def orthogonalise(x: Tensor) -> Tensor:
    """x [n, a, b], a <= b -> about the nearest matrices with orthonormal rows, by five Newton–Schulz steps.

    The quintic's coefficients bring singular values near 1 fast instead of exactly to it (Jordan et al. 2024).
    """
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)  # an expert without tokens has gradient 0
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x
