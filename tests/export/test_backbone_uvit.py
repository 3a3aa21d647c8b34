"""U-ViT against the paper's equations, written out over its weights, and against its published sizes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from backbone_checks import EXACT, assert_close
from small_backbones import normal, randomise
from torch import Tensor
from torch.nn import functional as F

from lehr.export.backbones import _table, presets, uvit

PUBLISHED = {"uvit-m-4": 131, "uvit-l-2": 287, "uvit-h-2": 501}  # millions; table 1 of the paper


def by_the_paper(weights: dict[str, Tensor], p: uvit.Params, sample: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
    """The network of section 3 for one picture, matrix by matrix and head by head."""

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ weights[f"{name}.weight"].T
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    def norm(x: Tensor, name: str) -> Tensor:
        variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def block(x: Tensor, name: str) -> Tensor:
        q, k, v = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").chunk(3, dim=-1)
        width = p.hidden_size // p.num_heads
        heads = []
        for first in range(0, p.hidden_size, width):
            part = slice(first, first + width)
            heads.append(torch.softmax(q[:, part] @ k[:, part].T / width**0.5, dim=-1) @ v[:, part])
        x = x + linear(torch.cat(heads, dim=-1), f"{name}.attn.proj")
        hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        return x + linear(hidden * (1 + torch.erf(hidden / 2**0.5)) / 2, f"{name}.mlp.fc2")

    side = p.size // p.patch_size
    patches = F.unfold(sample[None], p.patch_size, stride=p.patch_size)[0].T  # (L, C p²)
    x = patches @ weights["patch_embed.proj.weight"].flatten(1).T + weights["patch_embed.proj.bias"]
    half = p.hidden_size // 2
    phase = (timestep + p.timestep_offset) * 10_000.0 ** (-torch.arange(half) / half)
    time = torch.cat([phase.cos(), phase.sin()])
    x = torch.stack([weights["label_emb.weight"][label], time, *x]) + weights["pos_embed"][0]
    skips = []
    for number in range(p.depth // 2):
        x = block(x, f"in_blocks.{number}")
        skips.append(x)
    x = block(x, "mid_block")
    for number in range(p.depth // 2):
        x = linear(torch.cat([x, skips.pop()], dim=-1), f"skips.{number}.fusion.linear")
        x = block(x, f"out_blocks.{number}")
    x = linear(norm(x, "norm"), "decoder_pred")[2:]
    x = x.reshape(side, side, p.patch_size, p.patch_size, p.in_channels).permute(4, 0, 2, 1, 3)
    x = x.reshape(p.in_channels, p.size, p.size)
    if p.final_conv:
        x = F.conv2d(x[None], weights["final_layer.weight"], weights["final_layer.bias"], padding=1)[0]
    return x


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_published_model_computes_the_papers_equations(name: str, monkeypatch: pytest.MonkeyPatch):
    p = replace(presets()[name].params, hidden_size=24, depth=5, num_heads=3, num_classes=7, size=8)
    torch.set_default_dtype(torch.float64)
    try:
        module = randomise(uvit.UViT(p), dtype=torch.float64)
        sample, timestep, labels = normal(3, p.in_channels, 8, 8), torch.tensor([3.0, 431.5, 999.0]), torch.arange(3)
        with torch.no_grad():
            got = module(sample, timestep, labels)
            expected = [
                by_the_paper(module.state_dict(), p, *each) for each in zip(sample, timestep, labels, strict=True)
            ]
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(got, torch.stack(expected), EXACT)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_preset_has_the_published_parameters(name: str):
    parameters = {row["name"]: row["parameters"] for row in json.loads(_table.FILE.read_text(encoding="utf-8"))}
    assert round(parameters[name] / 1e6) == PUBLISHED[name]


def test_learned_positions_fix_the_size_and_computed_ones_do_not():
    assert [dim.name for dim in presets()["uvit-l-2"].spec.dims] == ["batch"]
    assert [dim.name for dim in presets()["uvit-digits"].spec.dims] == ["batch", "height", "width"]
    module = presets()["uvit-digits"].module()
    assert module(torch.zeros(1, 1, 36, 20), torch.zeros(1), torch.zeros(1, dtype=torch.int64)).shape == (1, 1, 36, 20)
