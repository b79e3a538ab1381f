"""One decode step beside transformers': Mamba-2 beside its Mamba-2, a 3:1 hybrid beside its Llama of equal size.

    python decode.py [--threads 1] [--vocab 2048] [--kv-heads 4] [--rounds 200]

d_model 256, 4 layers, batch 1, fp32, weights untrained. Contexts are prefilled (Mamba-2) or filled with random keys and
values (attention, whose step does not depend on them); both sides take turns in one process.
"""

import argparse
from functools import partial

import peers
import torch
from torch import Tensor

from hybridlab.models.block import Block
from hybridlab.models.ffn.gated import SwiGLU
from hybridlab.models.lm import HybridLM
from hybridlab.models.mixer import State
from hybridlab.models.mixers.attention import Attention, AttentionState
from hybridlab.models.mixers.mamba2 import Mamba2

D_MODEL, LAYERS = 256, 4


class Ours:
    """A model that steps on its own state with every call."""

    def __init__(self, model: HybridLM, state: State):
        self.model, self.state = model.eval(), state

    def __call__(self) -> Tensor:
        logits, self.state = self.model.step(torch.randint(self.model.vocab_size, (1,)), self.state)
        return logits


class Theirs:
    """A model of transformers that steps on its own cache with every call."""

    def __init__(self, model, name: str, cache):
        self.model, self.name, self.cache = model.eval(), name, cache

    def __call__(self) -> Tensor:
        tokens = torch.randint(self.model.config.vocab_size, (1, 1))
        return self.model(tokens, **{self.name: self.cache}, use_cache=True).logits


def params(model: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M"


def mamba2(vocab: int) -> HybridLM:
    return HybridLM(
        vocab_size=vocab, d_model=D_MODEL, pattern=["ssm"], n_layers=LAYERS, tied=True,
        blocks={"ssm": partial(Block, mixer=Mamba2)},
    )  # fmt: skip


def their_mamba2(vocab: int, context: int) -> Theirs:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    model = Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=vocab, hidden_size=D_MODEL, num_hidden_layers=LAYERS, num_heads=8, head_dim=64, state_size=128,
            n_groups=1, tie_word_embeddings=True,
        )
    )  # fmt: skip
    return Theirs(model, "cache_params", model(torch.randint(vocab, (1, context)), use_cache=True).cache_params)


def prefilled(model: HybridLM, context: int, piece: int = 2048) -> Ours:
    state = model.init_state(1, context + 10_000)
    for start in range(0, context, piece):
        tokens = torch.randint(model.vocab_size, (1, min(piece, context - start)))
        _, state = model.prefill(tokens, state)
    return Ours(model, state)


def hybrid(vocab: int, kv_heads: int, context: int) -> Ours:
    """As many parameters as the Llama beside it; its one attention layer has seen `context` tokens."""
    blocks = {
        "ssm": partial(Block, mixer=Mamba2, ffn=partial(SwiGLU, d_hidden=512)),
        "attn": partial(
            Block, mixer=partial(Attention, n_heads=4, n_kv_heads=kv_heads), ffn=partial(SwiGLU, d_hidden=512)
        ),
    }
    model = HybridLM(vocab_size=vocab, d_model=D_MODEL, pattern=["ssm"] * 3 + ["attn"], blocks=blocks, tied=True)

    def filled(state: State) -> State:
        if not isinstance(state, AttentionState):
            return state
        k, v = torch.randn(2, *state.k.shape).unbind()
        return AttentionState(k, v, torch.full_like(state.length, context))

    return Ours(model, tuple(map(filled, model.init_state(1, context + 1000))))


def llama(vocab: int, context: int) -> Theirs:
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab, hidden_size=D_MODEL, intermediate_size=704, num_hidden_layers=LAYERS, num_attention_heads=4,
        max_position_embeddings=context + 1000, tie_word_embeddings=True,
    )  # fmt: skip
    cache = DynamicCache(config=config)
    for layer in range(LAYERS):
        cache.update(*torch.randn(2, 1, 4, context, D_MODEL // 4).unbind(), layer)
    return Theirs(LlamaForCausalLM(config), "past_key_values", cache)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in {"threads": 1, "vocab": 2048, "kv-heads": 4, "rounds": 200}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(peers.versions(), f"vocabulary {args.vocab}, {args.kv_heads} kv heads in the hybrid")

    model, peer = mamba2(args.vocab), their_mamba2(args.vocab, 1024)
    short, long = prefilled(model, 1024), prefilled(model, 65_536)
    for _ in range(20):
        short(), long(), peer()
    ours, theirs, ratio = peers.interleaved(short, peer, args.rounds)
    print(f"Mamba-2 at 1k: {1e3 * ours:.2f} ms, transformers {1e3 * theirs:.2f} ms, {ratio:.1f}x "
          f"({params(model)}, {params(peer.model)})", flush=True)  # fmt: skip
    ours, theirs, ratio = peers.interleaved(short, long, args.rounds)
    print(f"Mamba-2 at 64k beside 1k: {1e3 * theirs:.2f} ms, {1e3 * ours:.2f} ms, {ratio:.3f}x", flush=True)

    for context, rounds in ((1024, 50), (65_536, 10)):
        mine, other = hybrid(args.vocab, args.kv_heads, context), llama(args.vocab, context)
        ours, theirs, ratio = peers.interleaved(mine, other, rounds)
        print(f"3:1 hybrid at {context}: {1e3 * ours:.2f} ms, Llama {1e3 * theirs:.2f} ms, {ratio:.1f}x "
              f"({params(mine.model)}, {params(other.model)})", flush=True)  # fmt: skip


main()
