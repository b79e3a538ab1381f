"""Every mixer, with every option that changes its path, under the laws of a token mixer."""

from collections.abc import Callable

import pytest
import torch

from hybridlab.models.block import Parallel
from hybridlab.models.mixer import TokenMixer
from hybridlab.models.mixers.attention import Attention
from hybridlab.models.mixers.deltanet import DeltaNet
from hybridlab.models.mixers.gated_delta import GatedDelta
from hybridlab.models.mixers.gla import GLA
from hybridlab.models.mixers.hgrn2 import HGRN2
from hybridlab.models.mixers.kda import KDA
from hybridlab.models.mixers.lightning import Lightning
from hybridlab.models.mixers.linear_attention import LinearAttention
from hybridlab.models.mixers.mamba import Mamba
from hybridlab.models.mixers.mamba2 import Mamba2
from hybridlab.models.mixers.mamba3 import Mamba3
from hybridlab.models.mixers.mlstm import MLSTM
from hybridlab.models.mixers.retention import Retention
from hybridlab.models.mixers.rglru import RGLRU
from hybridlab.models.mixers.short_conv import GatedShortConv
from hybridlab.testing.mixer_laws import MixerLaws


def laws(mixer: type[TokenMixer], core: Callable[[int], int] | None = None, **options) -> type[MixerLaws]:
    """A test class for one mixer with options; `core` gives its FLOPs beside the projections, worked out by hand."""

    class Laws(MixerLaws):
        def build(self, d_model: int) -> TokenMixer:
            return mixer(d_model, **options)

        def core_flops(self, length: int) -> int | None:
            return None if core is None else core(length)

    return Laws


def pairs(length: int, window: int) -> int:
    return sum(min(i + 1, window) for i in range(length))


# 4 heads of 8: scores and weighted values, a multiply-add each
TestAttention = laws(Attention, lambda n: 2 * 2 * 4 * 8 * pairs(n, n), n_heads=4)
TestGroupedQueries = laws(Attention, lambda n: 2 * 2 * 4 * 16 * pairs(n, n), n_heads=4, n_kv_heads=2, head_dim=16)
TestSlidingWindow = laws(Attention, lambda n: 2 * 2 * 4 * 8 * pairs(n, 5), n_heads=4, window=5)
TestNoPositions = laws(Attention, n_heads=4, rope_dims=0, qk_norm=True)
TestPartialRope = laws(Attention, n_heads=4, n_kv_heads=1, rope_dims=4, output_gate=True)
TestSinks = laws(Attention, n_heads=4, n_kv_heads=2, sinks=True, window=16)
TestSoftCap = laws(Attention, n_heads=4, soft_cap=2.0)
TestAllOptions = laws(
    Attention, n_heads=4, n_kv_heads=2, window=7, rope_dims=4, qk_norm=True, sinks=True, output_gate=True, soft_cap=3.0
)  # fmt: skip

# 64 channels: convolution 2·4, state 7 per number, D 2, gate 2
TestMamba = laws(Mamba, lambda n: n * 64 * (8 + 7 * 16 + 2 + 2))
TestMambaWithNorms = laws(Mamba, d_state=4, d_conv=2, norms=True)
# 64 channels, B and C of 8 each: convolution 2·4 of 80, state 5 per number, Δ 1, D 2, gate 1
TestMamba2 = laws(Mamba2, lambda n: n * (80 * 8 + 64 * (5 * 8 + 4)), head_dim=16, d_state=8)
TestMamba2Groups = laws(Mamba2, head_dim=8, d_state=4, n_groups=2, expand=1, d_conv=3)
TestMamba2NormFirst = laws(Mamba2, n_heads=3, head_dim=8, d_state=4, norm="before_gate", dt_min=0.5)
TestMamba2NoNorm = laws(Mamba2, expand=1, head_dim=8, d_state=4, n_groups=2, norm="none")
# 4 heads of 16, B and C of 8: state 5 per number, B, C and their product 4, 12 per turning pair; strength, D and gate 4
TestMamba3 = laws(Mamba3, lambda n: n * (64 * (5 * 8 + 4) + 4 * (4 * 8 + 12 * 2)), head_dim=16, d_state=8)
TestMamba3Options = laws(Mamba3, head_dim=8, d_state=6, n_groups=2, expand=1, rope_dims=6, output_norm=True)
# 32 channels: convolution 2·4, recurrence, gates and branch 8
TestRGLRU = laws(RGLRU, lambda n: n * 32 * (8 + 8), n_blocks=4)
TestRGLRUWide = laws(RGLRU, n_blocks=3, width=36, d_conv=2)
# convolution 2·3, two gates
TestShortConv = laws(GatedShortConv, lambda n: n * 32 * (6 + 2))
TestShortConvOfOneToken = laws(GatedShortConv, width=1)
# 4 heads of 8 and a column for the sum of keys
TestLinearAttention = laws(LinearAttention, lambda n: n * 4 * 4 * 8 * 9, n_heads=4)
TestLinearAttentionUnnormalised = laws(
    LinearAttention, lambda n: n * 4 * 4 * 4 * 8, n_heads=4, key_dim=4, feature="identity", normalised=False
)  # fmt: skip
# 2 heads of 16, q and k of 3: features 1 + 3 + 9
TestTaylorFeatures = laws(LinearAttention, lambda n: n * 4 * 2 * 13 * 17, n_heads=2, key_dim=3, feature="taylor")
TestRetention = laws(Retention, lambda n: n * (5 * 4 * 8 * 16 + 64), n_heads=4)
TestRetentionSquare = laws(Retention, n_heads=2, value_ratio=1)
# 4 heads of 8: convolution 2·4 of 96, state 7 per number, gate 1
TestGatedDelta = laws(GatedDelta, lambda n: n * (96 * 8 + 7 * 4 * 8 * 8 + 32), n_heads=4)
TestGatedDeltaGroups = laws(
    GatedDelta, n_heads=2, n_value_heads=4, key_dim=8, value_dim=6, d_conv=1, negative_eigenvalues=True
)  # fmt: skip
TestGatedDeltaWithoutConvolution = laws(GatedDelta, n_heads=4, d_conv=None)
# 4 heads of 8: state 5 per number, gate 1
TestLightning = laws(Lightning, lambda n: n * (5 * 4 * 8 * 8 + 32), n_heads=4, depth_ratio=0.5)
# 4 heads with keys of 4 and values of 8: state 5 per number, gate 1
TestGLA = laws(GLA, lambda n: n * (5 * 4 * 4 * 8 + 32), n_heads=4)
# 4 heads with keys of 6 and values of 8: state 5 per number
TestHGRN2 = laws(HGRN2, lambda n: n * 5 * 4 * 6 * 8, n_heads=4, key_dim=6, lower_bound=0.5)
# 4 heads with keys of 4 and values of 8 and a column for the normaliser: state 5 per number, gate 1
TestMLSTM = laws(MLSTM, lambda n: n * (5 * 4 * 4 * 9 + 32), n_heads=4)
# 4 heads of 8: convolution 2·4 of 96, state 6 per number
TestDeltaNet = laws(DeltaNet, lambda n: n * (96 * 8 + 6 * 4 * 8 * 8), n_heads=4)
TestDeltaNetOptions = laws(
    DeltaNet, n_heads=2, key_dim=8, value_dim=6, d_conv=None, output_gate=True, negative_eigenvalues=True
)  # fmt: skip
# 4 heads of 8: convolution 2·4 of 96, state 7 per number, gate 1
TestKDA = laws(KDA, lambda n: n * (96 * 8 + 7 * 4 * 8 * 8 + 32), n_heads=4)
TestKDAOptions = laws(
    KDA, n_heads=2, key_dim=8, value_dim=6, d_conv=2, gate_rank=4, negative_eigenvalues=True, decay_bound=-5.0
)  # fmt: skip


class TestParallel(MixerLaws):
    def build(self, d_model: int) -> TokenMixer:
        return Parallel(
            d_model,
            mixers={
                "attn": lambda d: Attention(d, n_heads=4, window=8),
                "ssm": lambda d: Mamba2(d, head_dim=16, d_state=8),
            },
            combine="normalised",
        )


@pytest.mark.long
class TestManyPackings:
    """R18 asks for 200 random packings."""

    @pytest.mark.parametrize(
        "one",
        [
            TestAllOptions, TestMamba, TestMamba2, TestMamba3, TestRGLRU, TestRetention, TestGatedDelta, TestAttention,
            TestGLA, TestHGRN2, TestMLSTM, TestDeltaNet, TestKDA,
        ],
    )  # fmt: skip
    def test_documents_are_isolated(self, one: type[MixerLaws]) -> None:
        law = one()
        law.n_packings = 200
        law.test_a_change_in_one_document_changes_the_others_by_exactly_0(torch.float32)
        law.test_packed_documents_equal_the_same_documents_alone(torch.float64)
        # where retention's norm meets outputs near zero, fp32 gradients lose digits: 3.6e-4 at worst, 6e-17 in fp64
        law.tolerance = {torch.float32: 1e-3}
        law.test_packed_documents_equal_the_same_documents_alone(torch.float32)


@pytest.mark.parametrize("one", [
    TestSinks, TestMamba, TestMamba2, TestMamba3, TestRGLRU, TestGatedDelta, TestGLA, TestMLSTM, TestKDA
])  # fmt: skip
def test_the_laws_hold_over_several_chunks(one: type[MixerLaws]) -> None:
    law = one()
    law.batch, law.time, law.n_packings = 1, 100, 1
    law.test_the_future_is_invisible(torch.float32)
    law.test_gradients_flow_through_a_split_prefill(torch.float32)
    law.test_packed_documents_equal_the_same_documents_alone(torch.float32)
