"""The U-Net families against diffusers' modules with the same random weights, in float64.

Timesteps and sizes are fed in float32: then both sides compute the sinusoids in float32, by the same formula, as
diffusers always does, and the rest in float64. All weights are random, so no zero-initialised layer hides what
stands before it.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lehr.export.backbones import _adm_classifier, adm, latent_unet, ncsnpp, presets, sdxl, unet
from lehr.export.checkpoints.maps import latent_unet as latent_unet_map
from lehr.export.checkpoints.maps import ncsnpp as ncsnpp_map
from lehr.export.checkpoints.maps import sdxl as sdxl_map
from lehr.export.checkpoints.maps import unet as unet_map
from lehr.export.checkpoints.rules import Rule, origin

EXACT = 1e-9  # relative to the largest output; float64 throughout
FAMILIES = {"adm", "latent_unet", "ncsnpp", "sdxl", "unet"}


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Float64 weights of unit gain, biases and norms included."""
    rng = torch.Generator().manual_seed(seed)
    module.double().eval()
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
        if "time_proj" in name:
            parameter.copy_(noise)  # Fourier frequencies: the trained scale, 16, only spreads the phases
        elif parameter.ndim > 1:
            parameter.copy_(noise / math.sqrt(parameter[0].numel()))
        else:
            parameter.copy_(name.endswith("weight") + 0.3 * noise)
    return module


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def take_weights(ours: nn.Module, oracle: nn.Module, rules: Sequence[Rule]) -> None:
    """Load the oracle's weights through the key map; every tensor on either side takes part."""
    theirs = oracle.state_dict()
    origins = {key: origin(rules, key, theirs) for key in ours.state_dict()}
    assert sorted(key for source in origins.values() for key in source.keys) == sorted(theirs)
    ours.double().eval().load_state_dict({key: source.read(theirs.__getitem__) for key, source in origins.items()})


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.dtype == expected.dtype == torch.float64
    assert actual.shape == expected.shape
    assert expected.std() > 1e-3
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error <= tolerance, f"relative error {error:.2e}"


TIMESTEPS = torch.tensor([0.0, 421.0, 999.0])
LABELS = torch.tensor([2, 0, 6])

# ---------------------------------------------------------------------------------------------------- unet


def ddpm_pair(p: unet.Params) -> tuple[unet.UNet, nn.Module]:
    levels = range(len(p.block_out_channels))
    down = ["AttnDownBlock2D" if level in p.attention_levels else "DownBlock2D" for level in levels]
    oracle = diffusers.UNet2DModel(
        in_channels=p.in_channels,
        out_channels=p.out_channels,
        block_out_channels=p.block_out_channels,
        layers_per_block=p.layers_per_block,
        down_block_types=tuple(down),
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        attention_head_dim=p.head_channels,
        norm_num_groups=p.norm_num_groups,
        norm_eps=p.norm_eps,
        downsample_padding=0 if p.down_padding is unet.DownPadding.AFTER else 1,
        flip_sin_to_cos=p.sinusoid_order is unet.SinusoidOrder.COSINES_FIRST,
        freq_shift=p.frequency_shift,
        num_class_embeds=p.num_classes,
    )
    ours = unet.UNet(p)
    take_weights(ours, randomise(oracle, 1), unet_map.DIFFUSERS)
    return ours, oracle


@pytest.mark.parametrize(
    "p",
    [
        unet.Params(block_out_channels=(8, 16, 16), norm_num_groups=4),
        unet.Params(
            in_channels=2,
            out_channels=5,
            block_out_channels=(8, 24),
            layers_per_block=1,
            attention_levels=(0, 1),
            head_channels=4,
            norm_num_groups=2,
            norm_eps=1e-5,
            down_padding=unet.DownPadding.AROUND,
            sinusoid_order=unet.SinusoidOrder.COSINES_FIRST,
            frequency_shift=0,
            num_classes=7,
        ),
    ],
    ids=["as-published", "as-diffusers-trains"],
)
def test_the_ddpm_unet_equals_diffusers(p: unet.Params) -> None:
    ours, oracle = ddpm_pair(p)
    x = normal(3, p.in_channels, 12, 20)
    labels = [] if p.num_classes is None else [LABELS]
    assert_close(ours(x, TIMESTEPS, *labels), oracle(x, TIMESTEPS, *labels).sample, EXACT)


def test_attention_names_of_old_ddpm_folders_are_known() -> None:
    p = unet.Params(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1)
    ours, oracle = ddpm_pair(p)
    new_to_old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pattern = re.compile(r"(attentions\.\d+)\.(to_q|to_k|to_v|to_out\.0)\.")
    old = {
        pattern.sub(lambda found: f"{found[1]}.{new_to_old[found[2]]}.", key): tensor
        for key, tensor in oracle.state_dict().items()
    }
    assert any("proj_attn" in key for key in old)
    for key, tensor in ours.state_dict().items():
        assert torch.equal(origin(unet_map.DIFFUSERS_OLD, key, old).read(old.__getitem__), tensor)


# -------------------------------------------------------------------------------------------------- ncsnpp


@pytest.mark.parametrize(
    ("p", "size"),
    [
        # 128 channels where there is attention: below, diffusers normalises it in 32 groups, score-SDE in fewer
        (ncsnpp.Params(block_out_channels=(32, 128, 32), layers_per_block=1), (12, 20)),
        (ncsnpp.Params(block_out_channels=(8, 16), layers_per_block=2, attention_levels=()), (6, 10)),
        (ncsnpp.Params(block_out_channels=(128,), layers_per_block=1, attention_levels=(0,), head_channels=32), (5, 7)),
    ],
    ids=["three-levels", "no-attention", "one-level"],
)
def test_ncsnpp_equals_diffusers(p: ncsnpp.Params, size: tuple[int, int]) -> None:
    levels = range(len(p.block_out_channels))
    down = ["AttnSkipDownBlock2D" if level in p.attention_levels else "SkipDownBlock2D" for level in levels]
    oracle = diffusers.UNet2DModel(
        block_out_channels=p.block_out_channels,
        layers_per_block=p.layers_per_block,
        down_block_types=tuple(down),
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        attention_head_dim=p.head_channels,
        time_embedding_type="fourier",
        norm_eps=1e-6,
        norm_num_groups=None,
        mid_block_scale_factor=math.sqrt(2),
    )
    ours = ncsnpp.NCSNpp(p)
    take_weights(ours, randomise(oracle, 2), ncsnpp_map.DIFFUSERS)
    x, sigma = normal(3, 3, *size), torch.tensor([0.01, 1.7, 50.0], dtype=torch.float64)
    assert_close(ours(x, sigma), oracle(x, sigma).sample, EXACT)


def test_fir_resampling_is_the_binomial_filter() -> None:
    x = normal(2, 3, 6, 10)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
    blur = torch.outer(taps, taps)[None, None]
    planes = F.pad(x.reshape(6, 1, 6, 10), (1, 1, 1, 1))
    torch.testing.assert_close(ncsnpp.Resize.DOWN(x), F.conv2d(planes, blur, stride=2).reshape(2, 3, 3, 5))
    stuffed = torch.zeros(6, 1, 12, 20, dtype=torch.float64)
    stuffed[:, :, ::2, ::2] = x.reshape(6, 1, 6, 10)
    wide = F.conv2d(F.pad(stuffed, (2, 1, 2, 1)), 4 * blur)
    torch.testing.assert_close(ncsnpp.Resize.UP(x), wide.reshape(2, 3, 12, 20))


# ------------------------------------------------------------------------------------- latent_unet and sdxl


def latent_config(p: latent_unet.Params) -> dict[str, object]:
    channels = [mult * p.model_channels for mult in p.channel_mult]
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in p.transformer_depth]
    return {
        "in_channels": p.in_channels,
        "out_channels": p.out_channels,
        "block_out_channels": tuple(channels),
        "layers_per_block": p.num_res_blocks,
        "down_block_types": tuple(down),
        "up_block_types": tuple(name.replace("Down", "Up") for name in reversed(down)),
        "transformer_layers_per_block": (*(depth or 1 for depth in p.transformer_depth[:-1]), p.middle_depth),
        "attention_head_dim": tuple(p.heads(c) for c in channels),  # diffusers' name for the number of heads
        "cross_attention_dim": p.context_dim,
        "use_linear_projection": p.projection is latent_unet.Projection.LINEAR,
        "time_cond_proj_dim": p.guidance_dim,
    }


@pytest.mark.parametrize(
    "p",
    [
        latent_unet.Params(
            model_channels=64, channel_mult=(1, 2, 1), transformer_depth=(1, 1, 0), num_heads=4, context_dim=12
        ),
        latent_unet.Params(
            in_channels=8,
            out_channels=5,
            model_channels=64,
            channel_mult=(1, 2),
            num_res_blocks=1,
            transformer_depth=(0, 2),
            middle_depth=2,
            num_head_channels=16,
            context_dim=20,
            projection=latent_unet.Projection.LINEAR,
            guidance_dim=10,
        ),
    ],
    ids=["as-sd-1", "as-sd-2-with-guidance-and-joined-channels"],
)
def test_the_latent_unet_equals_diffusers(p: latent_unet.Params) -> None:
    oracle = randomise(diffusers.UNet2DConditionModel(**latent_config(p)), 3)
    ours = latent_unet.LatentUNet(p)
    take_weights(ours, oracle, latent_unet_map.diffusers_rules(p.num_res_blocks))
    joined, text = normal(3, p.in_channels, 8, 12), normal(3, 5, p.context_dim, seed=1)
    guidance = None if p.guidance_dim is None else normal(3, p.guidance_dim, seed=2)
    expected = oracle(joined, TIMESTEPS, text, timestep_cond=guidance).sample
    x, cond = joined.split([p.out_channels, p.condition_channels], dim=1)
    given = {"timestep_cond": guidance, "sample_cond": cond if p.condition_channels else None}
    assert_close(ours(x, TIMESTEPS, text, **given), expected, EXACT)


@pytest.mark.parametrize(
    "p",
    [
        sdxl.Params(
            model_channels=64,
            channel_mult=(1, 2, 2),
            transformer_depth=(0, 1, 2),
            middle_depth=2,
            num_head_channels=16,
            context_dim=12,
            pooled_dim=9,
            time_id_dim=8,
        ),
        sdxl.Params(
            model_channels=64,
            channel_mult=(1, 2, 1),
            num_res_blocks=1,
            transformer_depth=(0, 2, 0),
            middle_depth=2,
            num_head_channels=8,
            context_dim=12,
            pooled_dim=7,
            time_ids=5,
            time_id_dim=4,
            guidance_dim=6,
        ),
    ],
    ids=["as-base", "as-refiner-with-guidance"],
)
def test_sdxl_equals_diffusers(p: sdxl.Params) -> None:
    oracle = diffusers.UNet2DConditionModel(
        **latent_config(p),
        addition_embed_type="text_time",
        addition_time_embed_dim=p.time_id_dim,
        projection_class_embeddings_input_dim=p.pooled_dim + p.time_ids * p.time_id_dim,
    )
    ours = sdxl.SDXL(p)
    take_weights(ours, randomise(oracle, 4), sdxl_map.diffusers_rules(p.num_res_blocks))
    x, text, pooled = normal(3, 4, 8, 12), normal(3, 5, p.context_dim, seed=1), normal(3, p.pooled_dim, seed=2)
    time_ids = torch.tensor([[1024, 768, 0, 64, 1024, 1024], [512, 512, 8, 0, 640, 896], [64, 96, 0, 0, 2048, 512]])
    time_ids = time_ids[:, : p.time_ids].float()
    guidance = None if p.guidance_dim is None else normal(3, p.guidance_dim, seed=5)
    expected = oracle(
        x,
        TIMESTEPS,
        text,
        timestep_cond=guidance,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
    ).sample
    rest = [] if guidance is None else [guidance]
    assert_close(ours(x, TIMESTEPS, text, pooled, time_ids, *rest), expected, EXACT)


@pytest.mark.parametrize(("family", "table"), [(latent_unet, latent_unet_map), (sdxl, sdxl_map)])
def test_the_original_single_file_differs_by_a_prefix(family: object, table: object) -> None:
    name = {latent_unet: "sd-1.5", sdxl: "sdxl-base"}[family]
    with torch.device("meta"):
        keys = presets()[name].module().state_dict()
    sources = {origin(table.ORIGINAL, key, ()).keys for key in keys}
    assert sources == {(f"model.diffusion_model.{key}",) for key in keys}


# ----------------------------------------------------------------------------------------------------- adm

_RESNET = {  # ours -> diffusers'
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def adm_blocks(p: adm.Params) -> dict[str, str]:
    """Our layers' names -> diffusers' for ADM as ``UNet2DModel`` expresses it."""
    levels, per = len(p.channel_mult), p.num_res_blocks + 1
    names = {"input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}
    names |= {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
    names |= {"label_emb": "class_embedding"}
    names |= {
        f"middle_block.{i}": f"mid_block.{part}" for i, part in enumerate(("resnets.0", "attentions.0", "resnets.1"))
    }
    for level in range(levels):
        attended = 2**level in p.attention_downsampling
        for j in range(p.num_res_blocks):
            names[f"input_blocks.{1 + per * level + j}.0"] = f"down_blocks.{level}.resnets.{j}"
            names[f"input_blocks.{1 + per * level + j}.1"] = f"down_blocks.{level}.attentions.{j}"
        names[f"input_blocks.{per * (level + 1)}.0"] = f"down_blocks.{level}.downsamplers.0"
        up = levels - 1 - level
        for j in range(per):
            names[f"output_blocks.{per * up + j}.0"] = f"up_blocks.{up}.resnets.{j}"
            names[f"output_blocks.{per * up + j}.1"] = f"up_blocks.{up}.attentions.{j}"
        names[f"output_blocks.{per * up + per - 1}.{1 + attended}"] = f"up_blocks.{up}.upsamplers.0"
    return names


def adm_as_diffusers(p: adm.Params, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names, found = adm_blocks(p), {}
    for key, tensor in weights.items():
        block = next(name for name in sorted(names, key=len, reverse=True) if key.startswith(f"{name}."))
        inner, _, leaf = key.removeprefix(f"{block}.").rpartition(".")
        if inner in _RESNET:
            found[f"{names[block]}.{_RESNET[inner]}.{leaf}"] = tensor
        elif inner == "qkv":
            packed = tensor.reshape(tensor.shape[0], -1)  # a convolution's weight, or a bias
            heads = p.heads(packed.shape[0] // 3)
            if p.qkv_order is adm.QKVOrder.HEADS_FIRST:
                packed = packed.reshape(heads, 3, -1, packed.shape[1]).transpose(0, 1).reshape(packed.shape)
            for name, part in zip(("to_q", "to_k", "to_v"), packed.chunk(3), strict=True):
                found[f"{names[block]}.{name}.{leaf}"] = part.squeeze(-1) if leaf == "bias" else part
        elif inner == "proj_out":
            found[f"{names[block]}.to_out.0.{leaf}"] = tensor.squeeze(-1) if leaf == "weight" else tensor
        else:
            inner = {"norm": ".group_norm", "": ""}[inner]
            found[f"{names[block]}{inner}.{leaf}"] = tensor
    return found


def adm_oracle(p: adm.Params) -> nn.Module:
    levels = range(len(p.channel_mult))
    attended = [2**level in p.attention_downsampling for level in levels]
    return diffusers.UNet2DModel(
        in_channels=p.in_channels,
        out_channels=p.out_channels,
        block_out_channels=tuple(int(mult * p.model_channels) for mult in p.channel_mult),
        layers_per_block=p.num_res_blocks,
        down_block_types=tuple("AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attended),
        up_block_types=tuple("AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attended)),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=p.num_head_channels,
        attn_norm_num_groups=adm.NUM_GROUPS,
        num_class_embeds=p.num_classes,
    )


def adm_params(order: adm.QKVOrder, num_classes: int | None) -> adm.Params:
    return adm.Params(
        model_channels=64,
        channel_mult=(1, 2, 3),
        num_res_blocks=1,
        attention_downsampling=(2,),
        num_head_channels=16,
        num_classes=num_classes,
        qkv_order=order,
    )


@pytest.mark.parametrize("order", list(adm.QKVOrder))
def test_adm_equals_diffusers(order: adm.QKVOrder) -> None:
    p = adm_params(order, num_classes=7)
    ours = randomise(adm.ADM(p), 5)
    oracle = adm_oracle(p).double().eval()
    oracle.load_state_dict(adm_as_diffusers(p, ours.state_dict()))
    x = normal(3, 3, 12, 20)
    assert_close(ours(x, TIMESTEPS, LABELS), oracle(x, TIMESTEPS, LABELS).sample, EXACT)


def test_the_noisy_classifier_is_the_encoder_under_clips_attention_pooling() -> None:
    encoder = adm_params(adm.QKVOrder.HEADS_FIRST, num_classes=None)
    p = _adm_classifier.Params(encoder=encoder, image_size=12, num_classes=11)
    ours = randomise(_adm_classifier.NoisyClassifier(p), 6)
    x = normal(3, 3, 12, 12)

    oracle, seen = adm_oracle(encoder).double().eval(), []
    weights = {key: tensor for key, tensor in ours.state_dict().items() if not key.startswith("out.")}
    loaded = oracle.load_state_dict(adm_as_diffusers(encoder, weights), strict=False)
    assert not loaded.unexpected_keys
    assert all(key.startswith(("up_blocks.", "conv_norm_out.", "conv_out.")) for key in loaded.missing_keys)
    oracle.mid_block.register_forward_hook(lambda module, args, output: seen.append(output))
    oracle(x, TIMESTEPS)

    norm, _, pool = ours.out
    pixels = F.silu(norm(seen[0])).flatten(2).permute(2, 0, 1)  # (L, B, C), as CLIP arranges them
    tokens = torch.cat([pixels.mean(0, keepdim=True), pixels]) + pool.positional_embedding.T[:, None]
    attention = nn.MultiheadAttention(pool.positional_embedding.shape[0], pool.num_heads).double()
    attention.in_proj_weight.copy_(pool.qkv_proj.weight.squeeze(-1))
    attention.in_proj_bias.copy_(pool.qkv_proj.bias)
    attention.out_proj.weight.copy_(torch.eye(len(attention.out_proj.bias)))
    attention.out_proj.bias.zero_()
    pooled = attention(tokens, tokens, tokens, need_weights=False)[0][0]
    expected = F.linear(pooled, pool.c_proj.weight.squeeze(-1), pool.c_proj.bias)
    assert_close(ours(x, TIMESTEPS), expected, EXACT)


def test_noisy_classifiers_have_their_published_sizes() -> None:
    counts = {}
    for name, p in _adm_classifier.CLASSIFIERS.items():
        with torch.device("meta"):
            module = _adm_classifier.NoisyClassifier(p)
        counts[name] = round(sum(parameter.numel() for parameter in module.parameters()) / 1e6)
    # with the denoisers' 554 M and 559 M: "ADM-G" of 608 M and 613 M (Peebles & Xie 2023, table 6)
    assert counts == {"adm-imagenet-64": 65, "adm-imagenet-128": 43, "adm-imagenet-256": 54, "adm-imagenet-512": 54}


def test_a_noisy_classifier_is_described_and_refuses_what_it_cannot_be() -> None:
    p = _adm_classifier.CLASSIFIERS["adm-imagenet-64"]
    inputs, outputs, dims = _adm_classifier.signature(p)
    assert [tensor.sizes({"batch": 2}) for tensor in (*inputs, *outputs)] == [(2, 3, 64, 64), (2,), (2, 1000)]
    assert {dim.name for dim in dims} == {"batch"}
    with pytest.raises(ValueError, match="must be a multiple of 8"):
        _adm_classifier.Params(encoder=p.encoder, image_size=60)
    with pytest.raises(ValueError, match="must be None"):
        _adm_classifier.Params(encoder=adm.Params(), image_size=64)


# ------------------------------------------------------------------------------------------------- presets

THOUSANDS = {  # diffusers' published configurations; the ADM models: table 11 of the paper in millions
    "ddpm-cifar10": 35_746,
    "ncsnpp-cifar10": 61_895,
    "adm-imagenet-64": 295_904,
    "adm-imagenet-128": 421_530,
    "adm-imagenet-256": 553_838,
    "adm-imagenet-512": 558_998,
    "sd-1.5": 859_521,
    "sd-2.1": 865_911,
    "lcm-sd-1.5": 859_603,
    "sdxl-base": 2_567_464,
    "sdxl-turbo": 2_567_464,
    "sdxl-lightning": 2_567_464,
    "sdxl-refiner": 2_259_527,
}


@pytest.mark.parametrize("name", sorted(THOUSANDS))
def test_presets_have_their_published_sizes(name: str) -> None:
    with torch.device("meta"):
        module = presets()[name].module()
    assert round(sum(parameter.numel() for parameter in module.parameters()) / 1000) == THOUSANDS[name]


@pytest.mark.parametrize("name", sorted(name for name, found in presets().items() if found.spec.family in FAMILIES))
def test_a_spec_names_the_inputs_of_forward_in_order(name: str) -> None:
    found = presets()[name]
    with torch.device("meta"):
        accepted = list(inspect.signature(found.module().forward).parameters)
    described = [tensor.name for tensor in found.spec.inputs]
    assert [name for name in accepted if name in described] == described
    assert set(accepted) - set(described) <= {"class_labels", "timestep_cond", "sample_cond", "residuals"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: unet.Params(block_out_channels=(128, 200)), "multiples of norm_num_groups"),
        (lambda: unet.Params(head_channels=96), "multiples of 96"),
        (lambda: ncsnpp.Params(block_out_channels=(130,)), "multiples of 4"),
        (lambda: latent_unet.Params(transformer_depth=(1, 1)), "one number a level"),
        (lambda: latent_unet.Params(model_channels=100), "multiple of 32"),
        (lambda: latent_unet.Params(num_heads=7), "do not divide into attention heads"),
        (lambda: adm.Params(channel_mult=(0.1,)), "multiple of 32"),
    ],
)
def test_impossible_architectures_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
