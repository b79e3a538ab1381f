import torch
from einops import rearrange, repeat
from torch import Tensor

from hybridlab.kernels.chunks import Chunks, initial, of_case, pick
from hybridlab.kernels.decay import decayed_products, decayed_products_flops, decays, per_token
from hybridlab.kernels.op import Case

CHUNK = 16  # tokens, at most


def delta_rule_chunked(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay=None, state=None, offsets=None, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Same result as the definition: what each token of a chunk writes is the solution of one triangular system."""
    wide = torch.promote_types(v.dtype, torch.float32)
    (time, heads), groups = v.shape[1:3], q.shape[2]
    state = initial(state, v, offsets, heads, q.shape[3], v.shape[3])
    cut = Chunks(time, offsets, chunk or pick(time, offsets, CHUNK))
    parts = (cut.split(x.to(wide)) for x in (q, k, v, beta[..., None], per_token(log_decay, v)))
    q, k, values, beta, g = (rearrange(x, "b n c h k -> b n h c k") for x in parts)
    if g.shape[-1] == 1:
        inside, since, until = decays(g.squeeze(-1))
        since, until = since[..., None], until[..., None]
        read, write = (repeat(x @ k.mT, "b n g i j -> b n (g r) i j", r=heads // groups) * inside for x in (q, k))
    q, k = (repeat(x, "b n g c k -> b n (g r) c k", r=heads // groups) for x in (q, k))
    if g.shape[-1] > 1:
        read, since, until = decayed_products(g, q, k)
        write = decayed_products(g, k, k)[0]
    # u = beta (v - kᵀ S_decayed - Σ_earlier write u): unit lower triangular in u, solved for both right-hand sides
    sides = torch.cat([beta * values, beta * k * since], -1)
    solved = torch.linalg.solve_triangular((beta * write).tril(-1), sides, upper=False, unitriangular=True)
    own, seen = (x.unbind(1) for x in solved.split([v.shape[3], k.shape[-1]], -1))
    left, whole = (k * until).mT.unbind(1), since[..., -1, :, None].unbind(1)

    def step(n: int, s: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        u = own[n] - seen[n] @ s
        return (s, u), whole[n] * s + left[n] @ u

    outs, state = cut.scan(step, state)
    if not outs:
        return torch.empty_like(v), state
    entering, u = (torch.stack(x, 1) for x in zip(*outs, strict=True))
    y = (q * since) @ entering + read @ u
    return cut.join(rearrange(y, "b n h c v -> b n c h v")).to(v.dtype), state


def flops(case: Case) -> int:
    """What the matmuls execute, padding included; the triangular system, another c² (key + value), is none."""
    (chunks, c), heads, key, value = of_case(case, CHUNK), case["heads"], case["key"], case["value"]
    if case["decay"] == "channel":
        scores = 2 * heads * decayed_products_flops(c, key)
    else:
        scores = 4 * case["groups"] * c * c * key
    return chunks * (scores + 2 * heads * c * c * value + 6 * heads * c * key * value)
