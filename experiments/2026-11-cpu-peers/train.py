"""Training steps of whole language models beside transformers' and mambapy's of equal shape, interleaved: tokens/s.

    python train.py [--threads 2] [--bf16] [mamba mambapy mamba-loop mamba2-64 mamba2-256 llama]

d_model 256, 4 layers, vocabulary 4,096, batch 4 of 512 tokens, AdamW (fused), cross-entropy. Both sides run under the
allocator settings of our trainer, which help both.
"""

import argparse
from collections.abc import Callable

import peers
import torch
import torch.nn.functional as F
from torch import nn

from hybridlab.models.block import Block
from hybridlab.models.ffn.gated import SwiGLU
from hybridlab.models.lm import HybridLM
from hybridlab.models.mixers.attention import Attention
from hybridlab.models.mixers.mamba import Mamba
from hybridlab.models.mixers.mamba2 import Mamba2
from hybridlab.training.device import keep_memory

D, LAYERS, VOCAB, TIME = 256, 4, 4096, 512
MIXERS: dict[str, Callable[[int], nn.Module]] = {
    "mamba": Mamba,
    "mamba2": lambda d: Mamba2(d, d_state=64),
    "llama": lambda d: Attention(d, n_heads=4),
}


def ours(name: str) -> nn.Module:
    ffn = (lambda d: SwiGLU(d, d_hidden=688)) if name == "llama" else None
    blocks = {"layer": lambda d: Block(d, mixer=MIXERS[name], ffn=ffn)}
    return HybridLM(vocab_size=VOCAB, d_model=D, pattern=["layer"], n_layers=LAYERS, blocks=blocks)


def peer(name: str, chunk: int = 64, use_mambapy: bool = False) -> nn.Module:
    import transformers as hf

    common = dict(vocab_size=VOCAB, hidden_size=D, num_hidden_layers=LAYERS, tie_word_embeddings=False)
    if name == "llama":
        heads = dict(num_attention_heads=4, num_key_value_heads=4, intermediate_size=688)
        return hf.LlamaForCausalLM(hf.LlamaConfig(**common, **heads))
    if name == "mamba2":
        sizes = dict(num_heads=8, head_dim=64, state_size=64, n_groups=1, chunk_size=chunk)
        return hf.Mamba2ForCausalLM(hf.Mamba2Config(**common, **sizes))
    return hf.MambaForCausalLM(hf.MambaConfig(**common, use_mambapy=use_mambapy))


def stepper(model: nn.Module, batch: int, bf16: bool, time: int = TIME) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, VOCAB, (batch, time + 1))
    model.train()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(tokens[:, :-1]).logits
        F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


CASES = {  # name: (ours, the peer, batch, rounds)
    "llama": ("llama", lambda: peer("llama"), 4, 7),
    "mamba2-64": ("mamba2", lambda: peer("mamba2", 64), 4, 7),
    "mamba2-256": ("mamba2", lambda: peer("mamba2", 256), 4, 7),
    "mambapy": ("mamba", lambda: peer("mamba", use_mambapy=True), 4, 5),
    "mamba-loop": ("mamba", lambda: peer("mamba"), 1, 2),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=list(CASES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    keep_memory()
    print(peers.versions(), "bf16" if asked.bf16 else "fp32")
    for what in asked.what:
        torch.manual_seed(0)
        name, build, batch, rounds = CASES[what]
        one, two = ours(name), build()
        sizes = [sum(p.numel() for p in model.parameters()) for model in (one, two)]
        steps = [stepper(model, batch, asked.bf16) for model in (one, two)]
        for step in steps:
            step()
        mine, theirs, ratio = peers.interleaved(*steps, rounds)
        speeds = [f"{batch * TIME / t:,.0f}" for t in (mine, theirs)]
        print(f"{what} B{batch} T{TIME}: {' and '.join(speeds)} tokens/s, {ratio:.2f}x; parameters {sizes}", flush=True)
