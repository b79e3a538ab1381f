import torch
from einops import rearrange, repeat
from torch import Tensor

from hybridlab.kernels.chunks import Chunks, initial, of_case, pick
from hybridlab.kernels.decay import decayed_products, decayed_products_flops, decays, per_token
from hybridlab.kernels.op import Case

CHUNK = 32  # tokens, at most


def linear_recurrence_chunked(
    q: Tensor, k: Tensor, v: Tensor, log_decay=None, state=None, offsets=None, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Same result as the definition: matmuls within chunks of `chunk` tokens, one state handed on per chunk.

    chunk  a power of two; picked by size if None
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    state = initial(state, v, offsets, v.shape[2], q.shape[3], v.shape[3])
    cut = Chunks(v.shape[1], offsets, chunk or pick(v.shape[1], offsets, CHUNK))
    parts = [cut.split(x.to(wide)) for x in (q, k, v, per_token(log_decay, v))]
    y, state = (_per_head if parts[3].shape[-1] == 1 else _per_channel)(cut, parts, state)
    return cut.join(y).to(v.dtype), state


def _per_head(cut: Chunks, parts: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """parts q, k [b n c g k], v [b n c h v], g [b n c h 1]; state [rows h k v] -> y [b n c h v], state

    Decays stand on the value side, so that all heads of a group share the products of their q and k.
    """
    q, k, v, g = parts
    groups = q.shape[3]
    q, k = (rearrange(x, "b n c g k -> b n g c k") for x in (q, k))
    v = rearrange(v, "b n c (g r) v -> b n g r c v", g=groups)
    inside, since, until = decays(rearrange(g, "b n c (g r) 1 -> b n g r c", g=groups))
    near = ((q @ k.mT).unsqueeze(3) * inside) @ v
    local = k.mT @ rearrange(v * until[..., None], "b n g r c v -> b n g c (r v)")
    whole = repeat(since[..., -1], "b n g r -> b n g 1 (r v)", v=v.shape[-1])
    state = rearrange(state, "b (g r) k v -> b g k (r v)", g=groups)
    entering, state = _carry(cut, local, whole, state)
    far = rearrange(q @ entering, "b n g c (r v) -> b n g r c v", v=v.shape[-1])
    y = rearrange(torch.addcmul(near, far, since[..., None]), "b n g r c v -> b n c (g r) v")
    return y, rearrange(state, "b g k (r v) -> b (g r) k v", v=v.shape[-1])


def _per_channel(cut: Chunks, parts: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """Like `_per_head`, with g [b n c h k]."""
    q, k, v, g = parts
    q, k = (repeat(x, "b n c g k -> b n (g r) c k", r=v.shape[3] // x.shape[3]) for x in (q, k))
    v, g = (rearrange(x, "b n c h k -> b n h c k") for x in (v, g))
    scores, since, until = decayed_products(g, q, k)
    local = (k * until).mT @ v
    entering, state = _carry(cut, local, since[..., -1, :, None], state)
    return rearrange(scores @ v + (q * since) @ entering, "b n h c v -> b n c h v"), state


def _carry(cut: Chunks, local: Tensor, whole: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """What each chunk adds and keeps, [b n ...] -> the states that enter the chunks, and the last one of each row."""
    adds, keeps = local.unbind(1), whole.unbind(1)
    entering, state = cut.scan(lambda n, s: (s, torch.addcmul(adds[n], keeps[n], s)), state)
    return torch.stack(entering, 1) if entering else local, state


def flops(case: Case) -> int:
    """What the matmuls execute, padding included: scores (once per group), near values, and states made and read."""
    (chunks, c), heads, key, value = of_case(case, CHUNK), case["heads"], case["key"], case["value"]
    if case["decay"] == "channel":
        scores = heads * decayed_products_flops(c, key)
    else:
        scores = 2 * case["groups"] * c * c * key
    return chunks * (scores + 2 * heads * c * c * value + 4 * heads * c * key * value)
