"""Transfusion with its prefix apart, against transformers' Llama over the whole sequence under one mask."""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import onnx
import pytest
import torch
import transformers
from backbone_checks import assert_close, check_export
from small_backbones import normal, random_feeds, randomise
from torch import Tensor

from lehr.export.backbones import presets, transfusion
from lehr.export.backbones.transfusion import Params, Transfusion

PARAMS = Params(in_channels=3, hidden_size=24, depth=2, num_heads=3, mlp_hidden=40, vocab_size=30)


def llama(module: Transfusion) -> transformers.LlamaModel:
    """transformers' trunk with our weights, its attention under any mask it is given."""
    p = module.params
    config = transformers.LlamaConfig(
        hidden_size=p.hidden_size,
        num_hidden_layers=p.depth,
        num_attention_heads=p.num_heads,
        intermediate_size=p.mlp_hidden,
        vocab_size=p.vocab_size,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        attn_implementation="eager",
    )
    trunk = transformers.LlamaModel(config).double().eval()
    ours = module.state_dict()
    trunk.load_state_dict({key: ours[key] for key in trunk.state_dict()})
    dim = p.head_dim
    trunk.rotary_emb.inv_freq = 10_000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return trunk


def made() -> Transfusion:
    module = Transfusion(PARAMS).double().eval()
    randomise(module, dtype=torch.float64)
    return module.requires_grad_(False)


def feeds() -> dict[str, Tensor]:
    return {
        "hidden_states": normal(2, 3, 4, 6),
        "timestep": torch.tensor([3.0, 870.0], dtype=torch.float64),
        "input_ids": torch.tensor([[1, 7, 29, 4, 12], [1, 3, 28, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    }


def whole_sequence(module: Transfusion, given: dict[str, Tensor]) -> Tensor:
    """The definition: each sample's text and patches as one sequence, causal but for the patches among themselves."""
    trunk, outputs = llama(module), []
    for row in range(2):
        ids = given["input_ids"][row][given["attention_mask"][row] == 1]
        patches = module.x_embedder(given["hidden_states"][row : row + 1])
        patches = patches + module.t_embedder(given["timestep"][row : row + 1]).unsqueeze(1)
        x = torch.cat([module.embed_tokens(ids)[None], patches], dim=1)
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        seen[len(ids) :, len(ids) :] = True
        mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)[None, None]
        position_ids = torch.arange(x.shape[1])[None]
        hidden = trunk(inputs_embeds=x, attention_mask=mask, position_ids=position_ids, use_cache=False)
        tokens = module.patch_head(hidden.last_hidden_state[:, len(ids) :])  # (1, 6, 12): 2 x 3 patches
        outputs.append(tokens.reshape(2, 3, 2, 2, 3).permute(4, 0, 2, 1, 3).reshape(1, 3, 4, 6))
    return torch.cat(outputs)


def test_a_prefix_apart_equals_one_sequence_under_the_papers_mask() -> None:
    """transformers rotates in float32 and norms in float32; both are 1e-7 of values of order one."""
    module, given = made(), feeds()
    with torch.no_grad():
        assert_close(module(**given), whole_sequence(module, given), 1e-5)


def test_padding_on_either_side_changes_nothing() -> None:
    module, given = made(), feeds()
    left = given | {
        "input_ids": torch.tensor([[1, 7, 29, 4, 12], [9, 9, 1, 3, 28]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]),
    }
    assert_close(module(**left), module(**given), 1e-12)


def test_text_does_not_see_the_picture_and_the_picture_sees_text_and_itself() -> None:
    module, given = made(), feeds()
    before = module(**given)
    changed = given["hidden_states"].clone()
    changed[:, :, 2:, 4:] += 1.0  # the last patch
    after = module(**(given | {"hidden_states": changed}))
    assert not torch.allclose(after[:, :, :2, :2], before[:, :, :2, :2], rtol=1e-4), "patches see those behind them"
    for key, value in (("input_ids", given["input_ids"] + given["attention_mask"] * 0 - 1), ("timestep", None)):
        new = given["timestep"] + 50.0 if value is None else value.clamp(min=0)
        assert not torch.allclose(module(**(given | {key: new})), before, rtol=1e-3), f"{key} has no influence"


def test_an_export_computes_the_same_at_shapes_it_was_not_traced_at(tmp_path: Path) -> None:
    module = Transfusion(PARAMS).eval()
    randomise(module)
    spec = transfusion.spec("tiny", PARAMS, size=8)
    given = random_feeds(spec, {"batch": 3, "height": 6, "width": 4, "text_tokens": 5})
    given["attention_mask"][:, 0] = 1
    read = check_export(module, spec, tmp_path, given)
    assert "embed_tokens.weight" not in read["step"]
    assert not [name for name in read["step"] if name.startswith("t_embedder")]

    # Keys and values of the prefix come from the prompt's graph, and the step multiplies for patches alone.
    step = onnx.load(tmp_path / "step.onnx", load_external_data=False).graph
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in step.input
    }
    cached = [[size for size in shape if isinstance(size, int)] for shape in shapes.values() if "text_tokens" in shape]
    assert sum(math.prod(sizes) for sizes in cached if sizes) == 2 * PARAMS.depth * PARAMS.hidden_size
    matmuls = sum(node.op_type in ("MatMul", "Gemm") for node in step.node)
    assert matmuls == 7 * PARAMS.depth + 1  # queries, keys, values, output and three of the MLP; the head


def test_presets_have_the_sizes_of_the_paper() -> None:
    names = [name for name, preset in presets().items() if preset.spec.family == "transfusion"]
    assert len(names) == 5
    for name in names:
        with torch.device("meta"):
            module = presets()[name].module()
        head = module.embed_tokens.weight.numel()  # the language head, which the denoiser does without
        count = (sum(p.numel() for p in module.parameters()) + head) / 1e9
        called = float(name.removeprefix("transfusion-").removesuffix("b"))
        assert count == pytest.approx(called, rel=0.04), name  # 7B is Llama's 6.74
        assert [tensor.name for tensor in presets()[name].spec.inputs] == list(
            inspect.signature(module.forward).parameters
        )


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 2 x num_heads"):
        Params(num_heads=7)
