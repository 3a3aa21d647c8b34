"""The stability options of U-ViT, each by the property that defines it; all of them exported and run."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from backbone_checks import check_export
from hypothesis import given, settings
from hypothesis import strategies as st
from small_backbones import normal, randomise
from torch import Tensor, nn
from torch.nn import functional as F

from lehr.export.backbones import uvit
from lehr.export.backbones._feed_forward import FeedForward, feed_forward
from lehr.export.backbones._skips import (
    OPEN,
    AddFusion,
    AttentionFusion,
    ConcatFusion,
    FrequencyFusion,
    Grid,
    LongSkip,
    NormalisedFusion,
    SkipFusion,
    SkipGate,
    TimeGate,
    low_pass,
)
from lehr.export.backbones.dit import Conditioning
from lehr.export.backbones.mmdit import QKNorm
from lehr.runtime.paths import VP, Curve, Interpolant, LinearFlow
from lehr.runtime.prediction import FLOW_PREDICTION

DIM, HEADS = 24, 3
GRID = Grid(2, 5, 4)
TOKENS = GRID.extras + GRID.rows * GRID.columns
TINY = replace(uvit.PRESETS["uvit-digits"].params, hidden_size=DIM, num_heads=HEADS, depth=3, size=16)


@pytest.fixture(autouse=True)
def double_precision() -> None:
    """New parameters in float64, so that what is equal in exact arithmetic is equal to 1e-12."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tokens(seed: int = 0) -> Tensor:
    return normal(2, TOKENS, DIM, seed=seed)


def gates(*kinds: SkipGate) -> list[SkipGate]:
    return list(kinds or [kind for kind in SkipGate if kind is not SkipGate.NONE])


def gate_of(kind: SkipGate, *, seed: int | None = None) -> nn.Module:
    """A gate as it starts, or with random parameters."""
    skip = LongSkip(SkipFusion.ADD, kind, DIM, HEADS, 0.25)
    skip.reset_gate()
    if seed is not None:
        randomise(skip, seed, torch.float64)
    return skip.gate


# ----------------------------------------------------------------------------------------------------- fusions


def test_concatenation_is_one_matrix_for_the_deep_and_one_for_the_skipped_features():
    fusion, d, s = randomise(ConcatFusion(DIM), dtype=torch.float64), tokens(0), tokens(1)
    deep, skipped = fusion.linear.weight.chunk(2, dim=1)
    expected = d @ deep.T + s @ skipped.T + fusion.linear.bias
    torch.testing.assert_close(fusion(d, s, None, GRID), expected)


def test_addition_does_not_know_which_of_the_two_is_deep():
    d, s = tokens(0), tokens(1)
    torch.testing.assert_close(AddFusion()(d, s, None, GRID), AddFusion()(s, d, None, GRID))
    torch.testing.assert_close(AddFusion()(d, s, None, GRID), d + s)


@given(scale=st.floats(1e-1, 1e3), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_normalised_fusion_keeps_its_range_whatever_the_scale_of_the_skip(scale: float, seed: int):
    fusion = randomise(NormalisedFusion(DIM), seed, torch.float64)
    d, s = (normal(1, 4000, DIM, seed=2 * seed + k) for k in range(2))
    fused = fusion(d, scale * s, None, Grid(0, 40, 100))
    torch.testing.assert_close(fused, fusion(d, s, None, Grid(0, 40, 100)), atol=2e-2, rtol=0)  # the norm's epsilon
    assert float(fused.detach().square().mean().sqrt()) == pytest.approx(1, abs=0.03)


def test_a_gate_of_the_normalised_fusion_is_not_undone_by_its_norm():
    fusion, d, s = NormalisedFusion(DIM), tokens(0), tokens(1)
    closed = fusion(d, s, torch.zeros(1, 1, 1), GRID)
    torch.testing.assert_close(closed, d)
    assert not torch.allclose(fusion(d, s, torch.full((1, 1, 1), 0.5), GRID), fusion(d, s, None, GRID))


def test_attention_fusion_mixes_the_skip_with_weights_that_sum_to_one():
    fusion = randomise(AttentionFusion(DIM, HEADS), dtype=torch.float64)
    d = tokens()
    same = normal(1, 1, DIM, seed=3).expand(2, TOKENS, DIM)  # where all tokens are equal, so is every mixture of them
    values = fusion.attn.kv_linear(F.layer_norm(same, (DIM,)))[..., DIM:]
    torch.testing.assert_close(fusion(d, same, None, GRID), d + fusion.attn.proj(values))


def test_frequency_fusion_with_equal_gains_is_addition():
    fusion, d, s = FrequencyFusion(DIM, 0.25), tokens(0), tokens(1)
    torch.testing.assert_close(fusion(d, s, None, GRID), d + s)


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 8),
    cutoff=st.sampled_from([0.0, 0.1, 0.25, 0.4, 0.5]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_the_frequency_split_is_what_the_fast_fourier_transform_does(rows: int, columns: int, cutoff: float, seed: int):
    fusion = randomise(FrequencyFusion(DIM, cutoff), seed, torch.float64)
    picture = normal(2, rows, columns, DIM, seed=seed)
    low = torch.fft.fftfreq(rows).abs()[:, None] <= cutoff
    low = low & (torch.fft.fftfreq(columns).abs() <= cutoff)
    gains = torch.where(low[..., None], fusion.low_gain, fusion.high_gain)
    expected = torch.fft.ifft2(torch.fft.fft2(picture, dim=(1, 2)) * gains, dim=(1, 2))
    assert expected.imag.abs().max() < 1e-12
    torch.testing.assert_close(fusion.filter(picture), expected.real, atol=1e-11, rtol=0)


def test_without_its_low_gain_the_frequency_split_takes_the_mean_away():
    fusion = FrequencyFusion(DIM, 0.25)
    nn.init.zeros_(fusion.low_gain)
    assert fusion.filter(3 + normal(2, 5, 4, DIM)).mean(dim=(1, 2)).abs().max() < 1e-12


@pytest.mark.parametrize("size", [1, 6, 7, 64])
def test_the_low_pass_is_a_projection(size: int):
    matrix = low_pass(size, 0.25, like=torch.zeros(()))
    torch.testing.assert_close(matrix @ matrix, matrix)
    torch.testing.assert_close(matrix, matrix.T)
    assert matrix.trace() == pytest.approx(2 * (size // 4) + 1)  # as many frequencies as are kept


def test_a_low_pass_of_single_precision_is_as_good_at_large_sizes():
    single, double = (low_pass(256, 0.25, like=torch.zeros((), dtype=d)) for d in (torch.float32, torch.float64))
    assert (single - double).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------------- gates


@pytest.mark.parametrize("kind", gates())
def test_a_gate_starts_open_and_the_same_for_all_inputs(kind: SkipGate):
    at_data = torch.zeros(2)
    gate = gate_of(kind)(tokens(0), tokens(1), at_data, GRID)
    patches = gate.expand(2, TOKENS, DIM)[:, GRID.extras :]
    torch.testing.assert_close(patches, torch.full_like(patches, 1 / (1 + math.exp(-OPEN))))


@pytest.mark.parametrize("kind", gates())
def test_a_gate_is_a_share_whatever_its_parameters(kind: SkipGate):
    for seed in range(5):
        gate = gate_of(kind, seed=seed)(30 * tokens(0), 30 * tokens(1), torch.tensor([0.0, 1000.0]), GRID)
        assert gate.min() >= 0
        assert gate.max() <= 1


@given(
    bias=st.floats(-8, 8),
    steepness=st.floats(-30, 30),
    times=st.lists(st.floats(0, 1000), min_size=2, max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_the_time_gate_falls_with_the_noise_for_any_parameters(bias: float, steepness: float, times: list[float]):
    gate = TimeGate(DIM)
    nn.init.constant_(gate.bias, bias)
    nn.init.constant_(gate.steepness, steepness)
    t = torch.tensor(sorted(times), dtype=torch.float64)
    opened = gate(torch.zeros(len(t), 1, DIM), torch.zeros(len(t), 1, DIM), t, GRID)
    assert (opened.diff(dim=0) <= 0).all()


@pytest.mark.parametrize("path", [LinearFlow(), VP()])
def test_timesteps_of_the_presets_paths_grow_with_the_noise(path: VP | LinearFlow):
    alpha, sigma = path.alpha_sigma(np.linspace(path.last_timestep + 1, path.first_timestep - 1, 50))
    assert (np.diff(sigma / alpha) > 0).all()


def test_a_path_whose_timesteps_fall_with_the_noise_is_refused():
    with pytest.raises(ValueError, match="grow with the noise"):
        uvit.spec("wrong", TINY, path=Interpolant(curve=Curve.LINEAR), prediction=FLOW_PREDICTION)


def test_the_channel_gate_is_the_same_for_all_tokens_and_their_order():
    gate, d, s = gate_of(SkipGate.CHANNEL, seed=1), tokens(0), tokens(1)
    opened, order = gate(d, s, torch.zeros(2), GRID), torch.randperm(TOKENS)
    assert opened.shape == (2, 1, DIM)
    torch.testing.assert_close(gate(d[:, order], s[:, order], torch.zeros(2), GRID), opened)
    assert opened.std(dim=-1).min() > 0.01


def test_the_spatial_gate_is_the_same_for_all_channels_and_sees_its_neighbours_alone():
    gate, d, s = gate_of(SkipGate.SPATIAL, seed=1), tokens(0), tokens(1)
    opened = gate(d, s, torch.zeros(2), GRID)
    assert opened.shape == (2, TOKENS, 1)
    assert (opened[:, : GRID.extras] == 1).all()
    corner = s.clone()
    corner[:, GRID.extras] += 1  # the patch at row 0, column 0
    changed = ((gate(d, corner, torch.zeros(2), GRID) - opened).abs() > 1e-9)[0, GRID.extras :, 0]
    assert changed.reshape(GRID.rows, GRID.columns).nonzero().max() == 1
    assert changed.sum() == 4


def test_the_cross_attention_gate_decides_for_each_token_by_what_it_asks():
    gate, d, s = gate_of(SkipGate.CROSS_ATTENTION, seed=1), tokens(0), tokens(1)
    opened = gate(d, s, torch.zeros(2), GRID)
    assert opened.shape == (2, TOKENS, DIM)
    order = torch.randperm(TOKENS)
    torch.testing.assert_close(gate(d, s[:, order], torch.zeros(2), GRID), opened)  # answers have no order
    torch.testing.assert_close(gate(d[:, order], s, torch.zeros(2), GRID), opened[:, order])


# ------------------------------------------------------------------------------------------------------ blocks


def block_of(**changed: object) -> uvit.Block:
    """A block of a model, as initialised."""
    torch.manual_seed(0)
    return uvit.UViT(replace(TINY, **changed)).mid_block


@pytest.mark.parametrize(
    "changed", [{"block_init": uvit.BlockInit.ZERO}, {"conditioning": Conditioning.ADALN_ZERO}], ids=["zero", "adaln"]
)
def test_a_block_that_starts_at_zero_is_the_identity(changed: dict[str, object]):
    x, c = tokens(), normal(2, DIM)
    assert torch.equal(block_of(**changed)(x, c), x)
    assert not torch.allclose(block_of()(x, c), x, atol=1e-4)


def test_a_post_norm_block_that_starts_at_zero_keeps_what_is_normalised():
    x = F.layer_norm(tokens(), (DIM,))
    block = block_of(block_init=uvit.BlockInit.ZERO, norm_placement=uvit.NormPlacement.POST)
    torch.testing.assert_close(block(x, None), x, atol=1e-4, rtol=0)


def test_post_norm_ends_every_block_at_variance_one_and_pre_norm_does_not():
    x = 10 * tokens()
    after = block_of(norm_placement=uvit.NormPlacement.POST)(x, None)
    torch.testing.assert_close(after.mean(dim=-1), torch.zeros(2, TOKENS), atol=1e-9, rtol=0)
    torch.testing.assert_close(after.var(dim=-1, unbiased=False), torch.ones(2, TOKENS), atol=1e-3, rtol=0)
    assert block_of()(x, None).var(dim=-1).min() > 20


@given(beta=st.floats(0, 2))
@settings(max_examples=20, deadline=None)
def test_beta_scales_each_residual_branch(beta: float):
    block, x = randomise(block_of(), dtype=torch.float64), tokens()
    block.scale = beta
    middle = x + beta * block.attn(block.norm1(x))
    torch.testing.assert_close(block(x, None), middle + beta * block.mlp(block.norm2(middle)))
    if beta == 0:
        assert torch.equal(block(x, None), x)


@pytest.mark.parametrize("kind", list(FeedForward))
def test_feed_forward_layers_of_one_width_have_equally_many_weights(kind: FeedForward):
    def weights(kind: FeedForward) -> int:
        return sum(p.numel() for name, p in feed_forward(kind, 24, 96).named_parameters() if name.endswith("weight"))

    assert weights(kind) == weights(FeedForward.GELU) == 2 * 24 * 96


@pytest.mark.parametrize("kind", list(FeedForward))
def test_a_feed_forward_layer_computes_its_formula(kind: FeedForward):
    layer, x = randomise(feed_forward(kind, DIM, 4 * DIM), dtype=torch.float64), tokens()
    w2 = layer.fc2.weight.T
    if kind is FeedForward.GELU:
        a = x @ layer.fc1.weight.T + layer.fc1.bias
        expected = (a * 0.5 * (1 + torch.erf(a / math.sqrt(2)))) @ w2 + layer.fc2.bias
    else:  # Shazeer 2020, equation 5, with W and V in one matrix
        w, v = layer.fc1.weight.T.chunk(2, dim=1)
        a, b = x @ w, x @ v
        expected = {
            FeedForward.GLU: lambda: 1 / (1 + torch.exp(-a)) * b,
            FeedForward.REGLU: lambda: a.clamp(min=0) * b,
            FeedForward.GEGLU: lambda: a * 0.5 * (1 + torch.erf(a / math.sqrt(2))) * b,
            FeedForward.SWIGLU: lambda: a / (1 + torch.exp(-a)) * b,
        }[kind]() @ w2
    torch.testing.assert_close(layer(x), expected)


@given(scale=st.floats(1e-1, 1e4), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_normalised_queries_and_keys_bound_the_scores_whatever_the_input(scale: float, seed: int):
    def largest(qk_norm: QKNorm) -> float:
        attention = block_of(qk_norm=qk_norm).attn
        q, k, _ = attention.heads(scale * normal(2, TOKENS, DIM, seed=seed))
        return float((q @ k.transpose(-1, -2)).detach().abs().max()) / math.sqrt(DIM // HEADS)

    assert largest(QKNorm.RMS) <= math.sqrt(DIM // HEADS) + 1e-9
    if scale > 1e3:
        assert largest(QKNorm.NONE) > math.sqrt(DIM // HEADS)


# ------------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"depth": 4}, "odd"),
        ({"skip_fusion": SkipFusion.NONE, "skip_gate": SkipGate.TIME}, "no skip to gate"),
        ({"conditioning": Conditioning.CROSS_ATTENTION}, "in_context or adaln_zero"),
        ({"conditioning": Conditioning.ADALN_ZERO, "norm_placement": uvit.NormPlacement.POST}, "must be pre"),
        ({"skip_cutoff": 0.6}, "cycles a token"),
        ({"hidden_size": 26}, "multiple of num_heads"),
        ({"size": 27}, "multiple of patch_size"),
    ],
)
def test_options_that_contradict_each_other_are_refused(changed: dict[str, object], words: str):
    with pytest.raises(ValueError, match=words):
        replace(TINY, **changed)


def test_a_long_skip_without_a_fusion_is_refused():
    with pytest.raises(ValueError, match="leave the layer out"):
        LongSkip(SkipFusion.NONE, SkipGate.NONE, DIM, HEADS, 0.25)


OPTIONS = {
    "skip_fusion": SkipFusion,
    "skip_gate": SkipGate,
    "norm_placement": uvit.NormPlacement,
    "block_init": uvit.BlockInit,
    "feed_forward": FeedForward,
    "qk_norm": QKNorm,
    "positions": uvit.Positions,
}
ADALN = Conditioning.ADALN_ZERO
TOGETHER = {  # every value of every option, in few models
    "plain": {"skip_fusion": SkipFusion.NONE, "positions": uvit.Positions.LEARNED},
    "time": {"skip_gate": SkipGate.TIME, "norm_placement": uvit.NormPlacement.POST, "feed_forward": FeedForward.GLU},
    "channel": {"skip_fusion": SkipFusion.ADD, "skip_gate": SkipGate.CHANNEL, "qk_norm": QKNorm.RMS},
    "spatial": {"skip_fusion": SkipFusion.NORMALISED, "skip_gate": SkipGate.SPATIAL, "feed_forward": FeedForward.REGLU},
    "attention": {
        "skip_fusion": SkipFusion.ATTENTION,
        "skip_gate": SkipGate.CROSS_ATTENTION,
        "feed_forward": FeedForward.GEGLU,
        "residual_scale": 0.7,
    },
    "frequency": {
        "skip_fusion": SkipFusion.FREQUENCY,
        "skip_gate": SkipGate.SPATIAL,
        "feed_forward": FeedForward.SWIGLU,
        "conditioning": ADALN,
        "block_init": uvit.BlockInit.ZERO,
    },
}


def alone() -> list[tuple[str, dict[str, object]]]:
    """Every value of every option by itself, and each gate with the fusions that apply it in places of their own."""
    found = [(f"{field}-{value.value}", {field: value}) for field, kinds in OPTIONS.items() for value in kinds]
    fusions = (SkipFusion.FREQUENCY, SkipFusion.NORMALISED, SkipFusion.ATTENTION)
    pairs = itertools.product(fusions, gates())
    return found + [
        (f"{fusion.value}-{gate.value}", {"skip_fusion": fusion, "skip_gate": gate}) for fusion, gate in pairs
    ]


def test_the_models_that_are_exported_have_every_value_of_every_option():
    used = [replace(TINY, **changed) for changed in TOGETHER.values()]
    for field, kinds in OPTIONS.items():
        assert {getattr(params, field) for params in used} == set(kinds)
    assert {params.conditioning for params in used} == {Conditioning.IN_CONTEXT, ADALN}


@pytest.mark.parametrize(
    "changed",
    [
        *(pytest.param(changed, id=name) for name, changed in TOGETHER.items()),
        *(pytest.param(changed, id=name, marks=pytest.mark.long) for name, changed in alone()),
    ],
)
def test_an_option_computes_the_same_after_export_at_shapes_it_was_not_traced_at(
    changed: dict[str, object], tmp_path: Path
):
    torch.set_default_dtype(torch.float32)
    params = replace(TINY, **changed)
    module = randomise(uvit.UViT(params))
    check_export(module, uvit.spec("tiny", params, path=LinearFlow(), prediction=FLOW_PREDICTION), tmp_path)
