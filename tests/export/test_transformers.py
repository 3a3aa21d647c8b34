"""Transformer backbones against diffusers' modules with the same random weights, in float64.

diffusers rounds to float32 in a few places even in a float64 model: timestep sinusoids, sin-cos tables, rotary
angles, the mean square of its RMSNorm. Each comparison therefore runs twice: as it is (1e-5), and with the source of
exactly those functions recompiled in float64 (1e-9), so that nothing of the architecture hides behind the rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import diffusers.models.embeddings
import diffusers.models.normalization
import diffusers.models.transformers.transformer_flux
import pytest
import torch
from backbone_checks import EXACT, ROUNDED, assert_close, load_mapped, without_rounding
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.loaders import single_file_utils
from small_backbones import normal, randomise
from torch import Tensor, nn
from torch.nn import functional as F

from lehr.export.backbones import dit, flux, mmdit, pixart, presets, sit
from lehr.export.checkpoints import rules
from lehr.export.checkpoints.maps import dit as dit_map
from lehr.export.checkpoints.maps import flux as flux_map
from lehr.export.checkpoints.maps import mmdit as mmdit_map
from lehr.export.checkpoints.maps import pixart as pixart_map
from lehr.export.checkpoints.maps import sit as sit_map
from lehr.runtime.spec import Varies

Feeds = dict[str, Tensor]

# ------------------------------------------------------------------------------------------------- the oracle

_ROUNDING: tuple[tuple[ModuleType, str], ...] = (
    (diffusers.models.embeddings, "get_timestep_embedding"),
    (diffusers.models.embeddings, "get_2d_sincos_pos_embed"),
    (diffusers.models.embeddings, "PatchEmbed"),
    (diffusers.models.embeddings, "get_1d_rotary_pos_embed"),
    (diffusers.models.embeddings, "apply_rotary_emb"),
    (diffusers.models.normalization, "RMSNorm"),
    (diffusers.models.transformers.transformer_flux, "FluxPosEmbed"),
)


@pytest.fixture(params=[ROUNDED, EXACT], ids=["rounded", "exact"])
def tolerance(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """The tolerance; for EXACT, diffusers' own source with float64 in place of float32 wherever it is imported."""
    if request.param == EXACT:
        without_rounding(monkeypatch, _ROUNDING)
    return float(request.param)


# -------------------------------------------------------------------------------------------------- the cases


@dataclass(frozen=True, kw_only=True)
class Case:
    """One small and odd-shaped configuration of a family, here and in diffusers."""

    oracle: type[nn.Module]
    config: Mapping[str, Any]
    build: Callable[[Any], nn.Module]
    params: Any
    map: ModuleType
    feeds: Callable[[], Feeds]
    added: tuple[str, ...] = ()  # inputs that diffusers wants in a dictionary

    def reference(self) -> nn.Module:
        torch.manual_seed(0)
        module = self.oracle(**self.config).double().eval()
        randomise(module, dtype=torch.float64)
        return module

    def ours(self, reference: nn.Module) -> nn.Module:
        """Our module with the reference's weights, by the key map alone."""
        module = self.build(self.params).double().eval()
        load_mapped(module, reference, self.map.DIFFUSERS, self.map.DIFFUSERS_IGNORED)
        return module

    def expected(self, reference: nn.Module, feeds: Feeds) -> Tensor:
        plain = {name: value for name, value in feeds.items() if name not in self.added}
        if self.oracle is DiTTransformer2DModel:
            plain["hidden_states"] = plain.pop("sample")
        if self.added:
            plain["added_cond_kwargs"] = {name: feeds[name] for name in self.added}  # type: ignore[assignment]
        with torch.no_grad():
            return reference(**plain, return_dict=False)[0]


def dit_feeds(times: float) -> Feeds:
    return {
        "sample": normal(3, 3, 10, 10),
        "timestep": torch.tensor([0.25, 0.5, 0.97], dtype=torch.float64) * times,
        "class_labels": torch.tensor([0, 6, 7]),  # 7 is "no class"
    }


def pixart_feeds(size: tuple[int, int]) -> Feeds:
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[0, 5:], mask[2, 1:] = 0, 0
    return {
        "hidden_states": normal(3, 3, *size),
        "timestep": torch.tensor([1.0, 499.0, 981.0], dtype=torch.float64),
        "encoder_hidden_states": normal(3, 7, 20, seed=1),
        "encoder_attention_mask": mask,
    }


def sized_pixart_feeds() -> Feeds:
    ratio = torch.tensor([[0.5], [1.0], [1.7]], dtype=torch.float64)
    return pixart_feeds((10, 10)) | {"resolution": 512 + 100 * normal(3, 2, seed=2), "aspect_ratio": ratio}


def mmdit_feeds() -> Feeds:
    return {
        "hidden_states": normal(3, 5, 6, 14),
        "timestep": torch.tensor([1.0, 500.0, 987.5], dtype=torch.float64),
        "encoder_hidden_states": normal(3, 7, 20, seed=1),
        "pooled_projections": normal(3, 13, seed=2),
    }


def flux_feeds() -> Feeds:
    rows, columns = torch.meshgrid(torch.arange(3), torch.arange(5), indexing="ij")
    img_ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(15, 3)
    return {
        "hidden_states": normal(2, 15, 8),
        "timestep": torch.tensor([0.125, 0.9], dtype=torch.float64),
        "encoder_hidden_states": normal(2, 7, 20, seed=1),
        "pooled_projections": normal(2, 13, seed=2),
        "img_ids": img_ids.double(),
        "txt_ids": normal(7, 3, seed=3).round(),
    }


DIT = {
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "in_channels": 3,
    "out_channels": 6,
    "num_layers": 3,
    "sample_size": 10,
    "num_embeds_ada_norm": 7,
}
DIT_PARAMS = {"in_channels": 3, "hidden_size": 24, "depth": 3, "num_heads": 3, "num_classes": 7}
PIXART = {
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "in_channels": 3,
    "out_channels": 6,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "caption_channels": 20,
    "sample_size": 10,
}
PIXART_PARAMS = {"in_channels": 3, "hidden_size": 24, "depth": 2, "num_heads": 3, "caption_channels": 20}
SD3 = {
    "in_channels": 5,
    "out_channels": 5,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "joint_attention_dim": 20,
    "caption_projection_dim": 24,
    "pooled_projection_dim": 13,
    "pos_embed_max_size": 11,
    "sample_size": 8,
}
SD3_PARAMS = {
    "in_channels": 5,
    "hidden_size": 24,
    "depth": 3,
    "num_heads": 3,
    "context_dim": 20,
    "pooled_dim": 13,
    "pos_embed_max_size": 11,
    "base_size": 4,
}
FLUX = {
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 10,
    "num_attention_heads": 3,
    "joint_attention_dim": 20,
    "pooled_projection_dim": 13,
    "axes_dims_rope": (4, 2, 4),
}
FLUX_PARAMS = {
    "in_channels": 8,
    "vec_in_dim": 13,
    "context_in_dim": 20,
    "hidden_size": 30,
    "num_heads": 3,
    "depth": 2,
    "depth_single_blocks": 3,
    "axes_dim": (4, 2, 4),
}

CASES = {
    "dit": Case(
        # With diffusers' conventions where they differ from the release: see dit.Params.
        oracle=DiTTransformer2DModel,
        config=DIT | {"norm_eps": 1e-5},
        build=dit.DiT,
        params=dit.Params(**DIT_PARAMS, frequency_shift=1, norm2_eps=1e-5),
        map=dit_map,
        feeds=lambda: dit_feeds(999.0),
    ),
    "sit": Case(
        oracle=DiTTransformer2DModel,
        config=DIT | {"norm_eps": 1e-6},
        build=sit.SiT,
        params=dit.Params(**DIT_PARAMS, frequency_shift=1),
        map=sit_map,
        feeds=lambda: dit_feeds(1.0),
    ),
    "pixart": Case(
        oracle=PixArtTransformer2DModel,
        config=PIXART,
        build=pixart.PixArt,
        params=pixart.Params(**PIXART_PARAMS, base_size=5),
        map=pixart_map,
        feeds=lambda: pixart_feeds((10, 10)),
    ),
    "pixart at another size": Case(
        oracle=PixArtTransformer2DModel,
        config=PIXART | {"interpolation_scale": 2},
        build=pixart.PixArt,
        params=pixart.Params(**PIXART_PARAMS, base_size=5, position_scale=2.0),
        map=pixart_map,
        feeds=lambda: pixart_feeds((6, 14)),
    ),
    "pixart with size conditioning": Case(
        oracle=PixArtTransformer2DModel,
        config=PIXART | {"use_additional_conditions": True},
        build=pixart.PixArt,
        params=pixart.Params(**PIXART_PARAMS, base_size=5, size_conditioning=True),
        map=pixart_map,
        feeds=sized_pixart_feeds,
        added=("resolution", "aspect_ratio"),
    ),
    "sd3": Case(
        oracle=SD3Transformer2DModel,
        config=SD3,
        build=mmdit.MMDiT,
        params=mmdit.Params(**SD3_PARAMS),
        map=mmdit_map,
        feeds=mmdit_feeds,
    ),
    "sd3.5": Case(
        oracle=SD3Transformer2DModel,
        config=SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
        build=mmdit.MMDiT,
        params=mmdit.Params(**SD3_PARAMS, qk_norm=mmdit.QKNorm.RMS, dual_attention=2),
        map=mmdit_map,
        feeds=mmdit_feeds,
    ),
    "flux-dev": Case(
        oracle=FluxTransformer2DModel,
        config=FLUX | {"guidance_embeds": True},
        build=flux.Flux,
        params=flux.Params(**FLUX_PARAMS),
        map=flux_map,
        # diffusers' float32 sinusoid of 1000 x guidance costs 2.3e-5 at a scale of 3.5, 5e-6 at 1.
        feeds=lambda: flux_feeds() | {"guidance": torch.tensor([1.0, 0.5], dtype=torch.float64)},
    ),
    "flux-schnell": Case(
        oracle=FluxTransformer2DModel,
        config=FLUX,
        build=flux.Flux,
        params=flux.Params(**FLUX_PARAMS, guidance_embed=False),
        map=flux_map,
        feeds=flux_feeds,
    ),
}


def share_embedders(reference: nn.Module) -> None:
    """diffusers' DiT has the label and the time table once a block; the architecture has them once."""
    first, *others = reference.transformer_blocks  # type: ignore[misc]
    for block in others:
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())


@pytest.mark.parametrize("name", CASES)
def test_network_equals_diffusers_with_the_same_weights(name: str, tolerance: float) -> None:
    case = CASES[name]
    reference = case.reference()
    if case.oracle is DiTTransformer2DModel:
        share_embedders(reference)
    ours, feeds = case.ours(reference), case.feeds()
    expected = case.expected(reference, feeds)
    with torch.no_grad():
        got = ours(**feeds)
    if name == "sit":
        expected = expected[:, :3]  # the second half is discarded, as in SiT's release
    assert_close(got, expected, tolerance)


@pytest.mark.parametrize("name", CASES)
def test_every_input_reaches_the_output(name: str) -> None:
    case = CASES[name]
    module = case.build(case.params).double().eval()
    randomise(module, dtype=torch.float64)
    feeds = case.feeds()
    with torch.no_grad():
        before = module(**feeds)
        for key, value in feeds.items():
            if key == "encoder_attention_mask":
                changed = 1 - value
            else:
                changed = (value + 1) % 7 if value.dtype == torch.int64 else value + 0.3 * normal(*value.shape, seed=9)
            after = module(**(feeds | {key: changed}))
            assert not torch.allclose(after, before, rtol=1e-4), f"{key} has no influence"


def test_dit_checkpoint_whose_embedders_differ_by_block_is_refused_by_name() -> None:
    case = CASES["dit"]
    with pytest.raises(rules.CopiesDiffer, match=r"transformer_blocks\.1\.norm1\.emb"):
        case.ours(case.reference())


def original_file(module: nn.Module, original: ModuleType) -> dict[str, Tensor]:
    """The module's weights under the names of the authors' single file."""
    state = module.state_dict()
    tensors = {}
    for key, value in state.items():
        origin = rules.origin(original.ORIGINAL, key, ())
        if origin.transform is None:
            tensors[origin.keys[0]] = value
        else:  # the one table that our rows and columns come from
            grid = module.get_submodule("pos_embed")
            tensors[origin.keys[0]] = grid(*state["pos_embed.rows"].shape[:1] * 2)
    return tensors


@pytest.mark.parametrize(
    ("name", "converter"),
    [
        ("sd3", single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers),
        ("sd3.5", single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers),
        ("flux-dev", single_file_utils.convert_flux_transformer_checkpoint_to_diffusers),
        ("flux-schnell", single_file_utils.convert_flux_transformer_checkpoint_to_diffusers),
    ],
)
def test_single_file_and_folder_of_one_model_give_the_same_tensors(
    name: str, converter: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    """diffusers' own conversion of single files links the two maps: file -> folder -> ours is where we began."""
    case = CASES[name]
    if name.startswith("flux"):  # its width is written into diffusers' function
        source = inspect.getsource(converter).replace("inner_dim = 3072", "inner_dim = 30")
        namespace = dict(vars(single_file_utils))
        exec(compile(source, "single_file_utils (narrow)", "exec"), namespace)
        converter = namespace[converter.__name__]
    module = case.build(case.params).double()
    randomise(module, dtype=torch.float64)
    file = original_file(module, case.map)
    folder = case.oracle(**case.config).double()
    folder.load_state_dict(converter(file))
    assert not file, "diffusers does not know these names"
    for key, value in case.ours(folder).state_dict().items():
        assert torch.equal(value, module.state_dict()[key]), key


# ------------------------------------------------------------------------------- DiT's other conditionings


def tiny_dit(conditioning: dit.Conditioning) -> dit.DiT:
    module = dit.DiT(dit.Params(**DIT_PARAMS, conditioning=conditioning)).double().eval()
    randomise(module, dtype=torch.float64)
    return module


def torch_layer(layer: nn.Module, block: Any) -> nn.Module:
    """PyTorch's own pre-norm transformer layer with the weights of one of our blocks."""
    layer = layer.double().eval()
    attention: nn.MultiheadAttention = layer.self_attn  # type: ignore[assignment]
    pairs: list[tuple[Any, Any]] = [
        (layer.norm1, block.norm1),
        (attention.out_proj, block.attn.proj),
        (layer.linear1, block.mlp.fc1),
        (layer.linear2, block.mlp.fc2),
    ]
    attention.in_proj_weight, attention.in_proj_bias = block.attn.qkv.weight, block.attn.qkv.bias
    if isinstance(layer, nn.TransformerDecoderLayer):
        cross, ours = layer.multihead_attn, block.cross_attn
        cross.in_proj_weight = nn.Parameter(torch.cat([ours.q_linear.weight, ours.kv_linear.weight]))
        cross.in_proj_bias = nn.Parameter(torch.cat([ours.q_linear.bias, ours.kv_linear.bias]))
        pairs += [(cross.out_proj, ours.proj), (layer.norm2, block.norm_cross), (layer.norm3, block.norm2)]
    else:
        pairs += [(layer.norm2, block.norm2)]
    for theirs, source in pairs:
        theirs.load_state_dict(source.state_dict())
    return layer


LAYER = {
    "d_model": 24,
    "nhead": 3,
    "dim_feedforward": 96,
    "activation": lambda x: F.gelu(x, approximate="tanh"),
    "layer_norm_eps": 1e-6,
    "batch_first": True,
    "norm_first": True,
}


@torch.no_grad()
def test_cross_attention_dit_equals_a_stack_of_torch_decoder_layers() -> None:
    module, feeds = tiny_dit(dit.Conditioning.CROSS_ATTENTION), dit_feeds(999.0)
    x = module.x_embedder(feeds["sample"])
    x = x + module.positions(5, 5, like=x)
    context = torch.stack([module.t_embedder(feeds["timestep"]), module.y_embedder(feeds["class_labels"])], dim=1)
    for block in module.blocks:
        x = torch_layer(nn.TransformerDecoderLayer(**LAYER), block)(x, context)  # type: ignore[arg-type]
    expected = F.fold(patches(module, x), (10, 10), 2, stride=2)
    assert_close(module(**feeds), expected, EXACT)


@torch.no_grad()
def test_in_context_dit_equals_torch_encoder_layers_over_two_more_tokens() -> None:
    module, feeds = tiny_dit(dit.Conditioning.IN_CONTEXT), dit_feeds(999.0)
    x = module.x_embedder(feeds["sample"])
    x = x + module.positions(5, 5, like=x)
    tokens = [module.t_embedder(feeds["timestep"])[:, None], module.y_embedder(feeds["class_labels"])[:, None]]
    x = torch.cat([x, *tokens], dim=1)
    for block in module.blocks:
        x = torch_layer(nn.TransformerEncoderLayer(**LAYER), block)(x)  # type: ignore[arg-type]
    expected = F.fold(patches(module, x[:, :25]), (10, 10), 2, stride=2)
    assert_close(module(**feeds), expected, EXACT)


def patches(module: dit.DiT, x: Tensor) -> Tensor:
    """Output tokens (B, L, p p C) as the columns (B, C p p, L) that ``fold`` takes."""
    return module.final_layer(x).unflatten(2, (4, 6)).transpose(2, 3).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("conditioning", list(dit.Conditioning))
@pytest.mark.parametrize("size", [(4, 12), (20, 2)])
def test_every_conditioning_takes_any_size_and_depends_on_timestep_and_class(
    conditioning: dit.Conditioning, size: tuple[int, int]
) -> None:
    module = tiny_dit(conditioning)
    sample, t, y = normal(2, 3, *size), torch.tensor([10.0, 700.0], dtype=torch.float64), torch.tensor([1, 4])
    with torch.no_grad():
        out = module(sample, t, y)
        assert out.shape == (2, 6, *size)
        assert not torch.allclose(out, module(sample, t.flip(0), y), rtol=1e-3)
        assert not torch.allclose(out, module(sample, t, y.flip(0)), rtol=1e-3)


def test_adaln_zero_starts_training_with_zero_output_in_every_conditioning() -> None:
    for conditioning in dit.Conditioning:
        module = dit.DiT(dit.Params(**DIT_PARAMS, conditioning=conditioning))
        out = module(torch.ones(1, 3, 4, 4), torch.tensor([5.0]), torch.tensor([1]))
        assert not out.any()


# ---------------------------------------------------------------------------------------------------- presets

PARAMETERS = {
    # Counted with diffusers' modules at the published configurations, in thousands. DiT's own table 1 counts the
    # stored position table as well (98k for S/2), which here is computed.
    "dit-s-2": 32_865,
    "dit-xl-2": 674_835,
    "sit-s-2": 32_865,
    "sit-xl-2": 674_835,
    "pixart-xl-2-256": 610_856,
    "pixart-xl-2-1024": 611_349,
    "sd3-medium": 2_028_328,
    "sd3.5-medium": 2_243_172,
    "sd3.5-large": 8_056_628,
    "flux-dev": 11_901_408,
    "flux-krea": 11_901_408,
    "flux-schnell": 11_891_179,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_preset_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        module = presets()[name].module()
    assert round(sum(p.numel() for p in module.parameters()) / 1000) == PARAMETERS[name]


@pytest.mark.parametrize("family", [dit, sit, pixart, mmdit, flux], ids=lambda family: family.__name__.split(".")[-1])
def test_spec_names_the_arguments_of_forward_in_order(family: ModuleType) -> None:
    for name, preset in family.PRESETS.items():
        arguments = list(inspect.signature(preset.build.forward).parameters)[1:]
        declared = [tensor.name for tensor in preset.spec.inputs]
        assert declared == [argument for argument in arguments if argument in declared], name
        assert preset.spec.name == name
        assert preset.spec.inputs[0].varies is Varies.SAMPLE


def test_position_grid_of_a_fresh_mmdit_is_the_one_that_diffusers_makes() -> None:
    reference = SD3Transformer2DModel(**SD3)
    table = reference.state_dict()["pos_embed.pos_embed"].reshape(11, 11, 24)
    grid = mmdit.PositionGrid(mmdit.Params(**SD3_PARAMS))
    torch.testing.assert_close(grid(11, 11).reshape(11, 11, 24), table, rtol=0, atol=1e-6)
    torch.testing.assert_close(grid(4, 7).reshape(4, 7, 24), table[3:7, 2:9], rtol=0, atol=1e-6)


def test_pixart_and_flux_refuse_a_missing_or_superfluous_condition() -> None:
    sized = pixart.PixArt(pixart.Params(**PIXART_PARAMS, size_conditioning=True)).double()
    with pytest.raises(ValueError, match="pass resolution and aspect_ratio"):
        sized(**pixart_feeds((10, 10)))
    for guidance_embed, message in ((True, "needs guidance"), (False, "takes no guidance")):
        module = flux.Flux(flux.Params(**FLUX_PARAMS, guidance_embed=guidance_embed)).double()
        feeds = flux_feeds() if guidance_embed else flux_feeds() | {"guidance": torch.ones(2)}
        with pytest.raises(ValueError, match=message):
            module(**feeds)


@pytest.mark.parametrize(
    ("params", "settings", "message"),
    [
        (dit.Params, {"hidden_size": 30, "num_heads": 4}, "multiple of num_heads"),
        (dit.Params, {"hidden_size": 30, "num_heads": 3}, "multiple of 4"),
        (pixart.Params, {"hidden_size": 16, "num_heads": 2, "size_conditioning": True}, "of 3"),
        (mmdit.Params, {"hidden_size": 30, "num_heads": 4}, "multiple of num_heads"),
        (mmdit.Params, {"dual_attention": 25}, "between 0 and depth 24"),
        (flux.Params, {"axes_dim": (16, 56, 55)}, "add up to the 128"),
        (flux.Params, {"num_heads": 7}, "multiple of num_heads"),
    ],
)
def test_params_refuse_sizes_that_do_not_fit(params: type, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        params(**settings)


# ----------------------------------------------------------------------------------------- PixArt with a draft


def test_a_draft_is_a_second_picture_of_the_pooled_text_alone() -> None:
    """Tokens of x_t and of the draft add up, so a sample moved by the draft's patches is the sample without it."""
    torch.manual_seed(0)
    params = pixart.Params(**PIXART_PARAMS, base_size=5, pooled_dim=6, draft_dim=10)
    network = pixart.PixArt(params).double().eval()
    randomise(network, dtype=torch.float64)
    network.draft_embedder.load_state_dict(network.x_embedder.state_dict())
    with torch.no_grad():
        network.x_embedder.proj.bias.zero_()
        network.draft_embedder.proj.bias.zero_()
    feeds, pooled = pixart_feeds((10, 10)), normal(3, 6, seed=4)
    draft = network.draft(pooled)
    moved = feeds | {"hidden_states": feeds["hidden_states"] - draft}
    plain = pixart.PixArt(pixart.Params(**PIXART_PARAMS, base_size=5, pooled_dim=6)).double().eval()
    plain.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("draft")})
    with torch.no_grad():
        torch.testing.assert_close(
            network(**moved, pooled_projections=pooled), plain(**feeds, pooled_projections=pooled)
        )


@pytest.mark.parametrize("size", [(5, 5), (5, 10), (3, 7)])
def test_a_draft_is_resized_to_the_nearest_cell(size: tuple[int, int]) -> None:
    x = normal(2, 3, 5, 5)
    expected = torch.nn.functional.interpolate(x, size=size, mode="nearest")
    torch.testing.assert_close(pixart.nearest(x, *size), expected)


def test_pixart_asks_for_pooled_text_where_it_is_conditioned_on_it() -> None:
    with pytest.raises(ValueError, match="set pooled_dim"):
        pixart.Params(draft_dim=4)
    network = pixart.PixArt(pixart.Params(**PIXART_PARAMS, base_size=5, pooled_dim=6)).double()
    with pytest.raises(ValueError, match="pass pooled_projections"):
        network(**pixart_feeds((10, 10)))
