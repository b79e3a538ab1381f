"""AdamW and Muon: which rule and which decay each parameter gets, and the one optimizer that applies both."""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.optim.adamw import adamw

from hybridlab.models.ffn.moe import Experts
from hybridlab.training.schedules import Cosine, WarmupStableDecay


class _Settings:
    """Checks what both rules' settings share."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            above_zero = name in ("tokens", "lr", "adamw_lr") and not value > 0
            below_one = name in ("momentum", "beta1", "beta2") and not 0 <= value < 1
            if above_zero or below_one or name == "weight_decay" and value < 0:
                rule = "above 0" if above_zero else "from 0 to below 1" if below_one else "0 or more"
                raise ValueError(f"{name}={value}: give a number {rule}")


@dataclass(frozen=True, kw_only=True)
class AdamW(_Settings):
    """AdamW (Loshchilov & Hutter 2019) over a schedule of `tokens` tokens; only matrices inside layers are decayed."""

    tokens: int
    lr: float = 2e-3
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    schedule: WarmupStableDecay | Cosine = field(default_factory=WarmupStableDecay)

    def build(self, model: nn.Module) -> "Optimizer":
        adam = {"rule": "adamw", "lr": self.lr, "betas": (self.beta1, self.beta2)}
        return Optimizer(model, {**adam, "weight_decay": self.weight_decay}, adam)


@dataclass(frozen=True, kw_only=True)
class Muon(_Settings):
    """Orthogonalised momentum (Jordan et al. 2024) for matrices inside layers, AdamW at `adamw_lr` for all else.

    An update is scaled to the root mean square 0.2 that AdamW's have (Liu et al. 2025), whatever the matrix's shape.
    """

    tokens: int
    lr: float = 6e-3
    momentum: float = 0.95
    weight_decay: float = 0.1
    adamw_lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    schedule: WarmupStableDecay | Cosine = field(default_factory=WarmupStableDecay)

    def build(self, model: nn.Module) -> "Optimizer":
        muon = {"rule": "muon", "lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}
        return Optimizer(model, muon, {"rule": "adamw", "lr": self.adamw_lr, "betas": (self.beta1, self.beta2)})


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
                wide = torch.promote_types(p.dtype, torch.float32)
                zeros = {k: torch.zeros_like(p, dtype=wide) for k in ("exp_avg", "exp_avg_sq")}
                self.state[p].update(step=torch.zeros((), device=p.device), **zeros)
        state = {k: [self.state[p][k] for p in params] for k in ("exp_avg", "exp_avg_sq", "step")}
        beta1, beta2 = group["betas"]
        adamw(
            params, [p.grad for p in params], state["exp_avg"], state["exp_avg_sq"], [], state["step"], fused=True,
            amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=1e-8,
            maximize=False,
        )  # fmt: skip

    def _muon(self, params: list[Tensor], group: dict) -> None:
        alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            m = self.state[p]["momentum"].lerp_(p.grad.to(self.state[p]["momentum"].dtype), 1 - group["momentum"])
            ahead = p.grad.lerp(m, group["momentum"])
            wide = ahead if p.shape[-2] <= p.shape[-1] else rearrange(ahead, "... a b -> ... b a")
            alike[tuple(wide.shape[-2:])].append((p, wide.reshape(-1, *wide.shape[-2:])))
        for (_, long), found in alike.items():
            updates = orthogonalise(torch.cat([u for _, u in found]).to(self.work_dtype))
            for (p, _), update in zip(found, updates.split([len(u) for _, u in found]), strict=True):
                turned = update if p.shape[-2] <= p.shape[-1] else rearrange(update, "e a b -> e b a")
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(turned.reshape(p.shape), alpha=-0.2 * group["lr"] * long**0.5)


def orthogonalise(x: Tensor) -> Tensor:
    """x [n, a, b], a <= b -> about the nearest matrices with orthonormal rows, by five Newton–Schulz steps.

    The quintic's coefficients bring singular values near 1 fast instead of exactly to it (Jordan et al. 2024).
    """
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)  # an expert without tokens has gradient 0
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x
