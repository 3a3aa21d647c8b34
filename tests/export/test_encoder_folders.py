"""Text encoders out of transformers' folders and out of files with a whole pipeline."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbone_checks import assert_close
from safetensors.torch import load_file, save_file
from small_backbones import randomise
from torch import Tensor, nn

from lehr.engines.graph.weights import SafetensorsFile
from lehr.export.checkpoints.config import NotOurs
from lehr.export.encoders import maps
from lehr.export.encoders.folder import known_encoder_source, text_encoder_source
from lehr.export.encoders.maps import Known
from lehr.export.encoders.outputs import TextOutput
from lehr.export.stages import StageSource
from lehr.runtime.errors import InvalidInput
from lehr.runtime.stage import StageKind

transformers = pytest.importorskip("transformers")
logging.getLogger("transformers").setLevel(logging.ERROR)

SAME = 1e-5
CLIP = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
    "projection_dim": 24,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 98,
}
QWEN = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TINY_CLIP = {"hidden_size": 32, "intermediate_size": 40, "num_heads": 4, "vocab_size": 99, "max_positions": 20}


def filled(reference: nn.Module, seed: int = 0) -> nn.Module:
    randomise(reference, seed, dtype=torch.float32)
    return reference.eval()


def run(found: StageSource, seed: int = 3) -> tuple[dict[str, Tensor], list[Tensor]]:
    feeds = {name: torch.from_numpy(value) for name, value in found.feeds(seed).items()}
    with torch.no_grad():
        got = found.runnable()(**feeds)
    return feeds, list(got) if isinstance(got, tuple) else [got]


def clip_folder(folder: Path, kind: str, **save: Any) -> nn.Module:
    reference = filled(getattr(transformers, kind)(transformers.CLIPTextConfig(**CLIP)))
    reference.save_pretrained(folder, **save)
    return reference


# ------------------------------------------------------------------------------------------------------- folders


@torch.no_grad()
def test_stable_diffusions_encoder_is_read_from_its_pipelines_folder(tmp_path: Path) -> None:
    reference = clip_folder(tmp_path / "text_encoder", "CLIPTextModel")
    found = text_encoder_source(tmp_path, "text_encoder", output=TextOutput.LAST_HIDDEN_STATE, max_length=20)
    assert found.spec.kind is StageKind.TEXT_ENCODER
    assert [tensor.name for tensor in found.spec.inputs] == ["input_ids"]
    assert all(parameter.is_meta for parameter in found.module.parameters())
    feeds, (last,) = run(found)
    assert feeds["input_ids"].shape == (2, 20)
    assert_close(last, reference(**feeds).last_hidden_state, SAME)


@torch.no_grad()
def test_a_folder_of_transformers_4_has_the_prefix_and_position_ids(tmp_path: Path) -> None:
    reference = clip_folder(tmp_path, "CLIPTextModel")
    stored = load_file(tmp_path / "model.safetensors")
    classic = {f"text_model.{name}": value for name, value in stored.items()}
    classic["text_model.embeddings.position_ids"] = torch.arange(20)[None]
    save_file(classic, tmp_path / "model.safetensors")
    found = text_encoder_source(tmp_path, "text_encoder", output=TextOutput.POOLER_OUTPUT)
    feeds, (pooled,) = run(found)
    assert_close(pooled, reference(**feeds).pooler_output, SAME)


@torch.no_grad()
def test_sdxls_second_encoder_returns_two_tensors_from_shards(tmp_path: Path) -> None:
    folder = tmp_path / "text_encoder_2"
    reference = clip_folder(folder, "CLIPTextModelWithProjection", max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").is_file()
    found = text_encoder_source(folder, "text_encoder_2", output=TextOutput.PENULTIMATE_HIDDEN_STATE, max_length=20)
    feeds, (penultimate, projected) = run(found)
    expected = reference(**feeds, output_hidden_states=True)
    assert_close(penultimate, expected.hidden_states[-2], SAME)
    assert_close(projected, expected.text_embeds, SAME)
    assert [tensor.shape for tensor in found.spec.outputs] == [("batch", "tokens", 32), ("batch", 24)]


@pytest.mark.parametrize("stored", ["shared.weight", "encoder.embed_tokens.weight"])
@torch.no_grad()
def test_t5_is_read_under_either_name_of_its_embedding(stored: str, tmp_path: Path) -> None:
    config = {"vocab_size": 99, "d_model": 32, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    reference = filled(transformers.T5EncoderModel(transformers.T5Config(**config, feed_forward_proj="gated-gelu")))
    reference.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    embedding = state.pop("shared.weight")
    save_file({**state, stored: embedding}, tmp_path / "model.safetensors")
    found = text_encoder_source(tmp_path, "text_encoder_2", output=TextOutput.LAST_HIDDEN_STATE, max_length=12)
    feeds, (last,) = run(found)
    assert feeds["attention_mask"].sum() < feeds["attention_mask"].numel()
    assert_close(last, reference(**feeds).last_hidden_state, SAME)


@torch.no_grad()
def test_half_precision_folders_are_read_in_float32(tmp_path: Path) -> None:
    reference = filled(transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP))).to(torch.bfloat16)
    reference.save_pretrained(tmp_path)
    found = text_encoder_source(tmp_path, "text_encoder", output=TextOutput.LAST_HIDDEN_STATE)
    feeds, (last,) = run(found)
    assert last.dtype is torch.float32
    assert_close(last, reference.float()(**feeds).last_hidden_state, SAME)


@pytest.mark.parametrize("make", ["Qwen3Model", "Qwen3ForCausalLM"])
@torch.no_grad()
def test_qwen_gives_chosen_layers_with_or_without_its_head(make: str, tmp_path: Path) -> None:
    reference = filled(getattr(transformers, make)(transformers.Qwen3Config(**QWEN, head_dim=12)))
    reference.save_pretrained(tmp_path)
    found = text_encoder_source(tmp_path, "text_encoder", output=TextOutput.HIDDEN_STATES, max_length=16, layers=(1, 2))
    assert [tensor.name for tensor in found.spec.outputs] == ["hidden_states_1", "hidden_states_2"]
    feeds, got = run(found)
    expected = reference(**feeds, output_hidden_states=True).hidden_states
    for layer, value in zip((1, 2), got, strict=True):
        assert_close(value, expected[layer], SAME)


@torch.no_grad()
def test_a_sentence_encoder_is_read(tmp_path: Path) -> None:
    config = {key: CLIP[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    reference = filled(transformers.BertModel(transformers.BertConfig(**config, num_hidden_layers=2)))
    reference.save_pretrained(tmp_path)
    found = text_encoder_source(tmp_path, "text_encoder", output=TextOutput.LAST_HIDDEN_STATE, max_length=9)
    feeds, (last,) = run(found)
    assert_close(last, reference(**feeds).last_hidden_state, SAME)


# ------------------------------------------------------------------------------------------------- single files


def in_openclip_names(reference: nn.Module) -> dict[str, Tensor]:
    """A CLIP of transformers as OpenCLIP stores it: joint projections, and the last matrix turned."""
    state = reference.state_dict()
    made = {
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "ln_final.weight": state["text_model.final_layer_norm.weight"],
        "ln_final.bias": state["text_model.final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
        "logit_scale": torch.ones(()),
    }
    for i in range(reference.config.num_hidden_layers):
        theirs, ours = f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
        for leaf in ("weight", "bias"):
            parts = [state[f"{ours}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            made[f"{theirs}.attn.in_proj_{leaf}"] = torch.cat(parts)
            made[f"{theirs}.attn.out_proj.{leaf}"] = state[f"{ours}.self_attn.out_proj.{leaf}"]
            made[f"{theirs}.ln_1.{leaf}"] = state[f"{ours}.layer_norm1.{leaf}"]
            made[f"{theirs}.ln_2.{leaf}"] = state[f"{ours}.layer_norm2.{leaf}"]
            made[f"{theirs}.mlp.c_fc.{leaf}"] = state[f"{ours}.mlp.fc1.{leaf}"]
            made[f"{theirs}.mlp.c_proj.{leaf}"] = state[f"{ours}.mlp.fc2.{leaf}"]
    return made


def small(known: Known, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """The real layouts and prefixes, at a size that a test can hold."""
    made = replace(maps.PARAMS[known], **changes)
    monkeypatch.setattr(maps, "PARAMS", {**maps.PARAMS, known: made})


def file_of(path: Path, prefix: str, state: dict[str, Tensor]) -> SafetensorsFile:
    """A file with a whole pipeline: the encoder under ``prefix`` and something else beside it."""
    whole = {prefix + name: value.contiguous() for name, value in state.items()}
    save_file({**whole, "model.diffusion_model.out.2.weight": torch.ones(2)}, path)
    return SafetensorsFile(path)


@pytest.mark.parametrize("prefix", ["conditioner.embedders.1.model.", "conditioner.embedders.0.model."])
@torch.no_grad()
def test_openclip_g_is_found_in_a_file_of_sdxl(prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.CLIPTextConfig(**{**CLIP, "hidden_act": "gelu", "eos_token_id": 2})
    reference = filled(transformers.CLIPTextModelWithProjection(config))
    small(Known.OPENCLIP_G, monkeypatch, **TINY_CLIP, depth=3, projection_dim=24)
    source = file_of(tmp_path / "sdxl.safetensors", prefix, in_openclip_names(reference))
    found = known_encoder_source(
        source, Known.OPENCLIP_G, "text_encoder_2", output=TextOutput.PENULTIMATE_HIDDEN_STATE, max_length=20
    )
    feeds, (penultimate, projected) = run(found)
    expected = reference(**feeds, output_hidden_states=True)
    assert_close(penultimate, expected.hidden_states[-2], SAME)
    assert_close(projected, expected.text_embeds, SAME)


@torch.no_grad()
def test_openclip_h_ends_before_its_last_block_as_diffusers_folder_of_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.CLIPTextConfig(**{**CLIP, "hidden_act": "gelu", "num_hidden_layers": 24})
    reference = filled(transformers.CLIPTextModelWithProjection(config))
    small(Known.OPENCLIP_H, monkeypatch, **TINY_CLIP)
    source = file_of(tmp_path / "sd2.safetensors", "cond_stage_model.model.", in_openclip_names(reference))
    found = known_encoder_source(source, Known.OPENCLIP_H, "text_encoder", output=TextOutput.LAST_HIDDEN_STATE)
    feeds, (last,) = run(found)
    penultimate = reference(**feeds, output_hidden_states=True).hidden_states[-2]
    assert_close(last, reference.text_model.final_layer_norm(penultimate), SAME)


@pytest.mark.parametrize(
    ("known", "prefix"),
    [
        (Known.CLIP_L, "cond_stage_model.transformer."),
        (Known.CLIP_L, "conditioner.embedders.0.transformer."),
        (Known.CLIP_L_PROJECTED, "text_encoders.clip_l.transformer."),
        (Known.OPENCLIP_G, "text_encoders.clip_g.transformer."),
    ],
)
@torch.no_grad()
def test_encoders_in_transformers_names_are_found_under_their_prefix(
    known: Known, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    projected = known is not Known.CLIP_L
    act = maps.PARAMS[known].hidden_act
    config = transformers.CLIPTextConfig(**{**CLIP, "hidden_act": act, "eos_token_id": 2})
    reference = filled(transformers.CLIPTextModelWithProjection(config))
    state = {name: value for name, value in reference.state_dict().items() if projected or "projection" not in name}
    small(known, monkeypatch, **TINY_CLIP, depth=3, **({"projection_dim": 24} if projected else {}))
    source = file_of(tmp_path / "whole.safetensors", prefix, state)
    found = known_encoder_source(source, known, "text_encoder", output=TextOutput.PENULTIMATE_HIDDEN_STATE)
    feeds, got = run(found)
    assert_close(got[0], reference(**feeds, output_hidden_states=True).hidden_states[-2], SAME)
    assert len(got) == 1 + projected


@torch.no_grad()
def test_t5_is_found_in_a_file_of_sd3_and_in_one_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"vocab_size": 99, "d_model": 32, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    reference = filled(transformers.T5EncoderModel(transformers.T5Config(**config, feed_forward_proj="gated-gelu")))
    state = {name: value for name, value in reference.state_dict().items() if name != "encoder.embed_tokens.weight"}
    small(Known.T5_XXL, monkeypatch, vocab_size=99, d_model=32, d_kv=6, d_ff=40, depth=2, num_heads=4)
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "t5.safetensors")
    for source in (
        file_of(tmp_path / "sd3.safetensors", "text_encoders.t5xxl.transformer.", state),
        SafetensorsFile(tmp_path / "t5.safetensors"),
    ):
        found = known_encoder_source(
            source, Known.T5_XXL, "text_encoder_3", output=TextOutput.LAST_HIDDEN_STATE, max_length=10
        )
        feeds, (last,) = run(found)
        assert_close(last, reference(**feeds).last_hidden_state, SAME)


# ------------------------------------------------------------------------------------------------------ refusals


def test_weights_of_another_configuration_are_refused_by_name(tmp_path: Path) -> None:
    clip_folder(tmp_path, "CLIPTextModel")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(InvalidInput, match=r"missing \(16\): .*encoder\.layers\.3"):
        text_encoder_source(tmp_path, "text_encoder", output=TextOutput.LAST_HIDDEN_STATE)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ('{"model_type": "llama"}', "llama"),
        ('{"model_type": "clip_text_model", "hidden_act": "mish"}', "mish"),
        ("[]", "expected an object"),
    ],
)
def test_a_folder_of_something_else_is_refused(config: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InvalidInput, match=reason):
        text_encoder_source(tmp_path, "text_encoder", output=TextOutput.LAST_HIDDEN_STATE)


def test_an_output_that_the_encoder_does_not_have_is_refused(tmp_path: Path) -> None:
    clip_folder(tmp_path, "CLIPTextModel")
    with pytest.raises(NotOurs, match=r"\(1, 3\)"):
        text_encoder_source(tmp_path, "text_encoder", output=TextOutput.HIDDEN_STATES, layers=(1, 3))
    with pytest.raises(InvalidInput, match="no choice of layers"):
        text_encoder_source(tmp_path, "text_encoder", output=TextOutput.LAST_HIDDEN_STATE, layers=(1,))


def test_a_file_without_the_encoder_is_refused(tmp_path: Path) -> None:
    save_file({"model.diffusion_model.out.2.weight": torch.ones(2)}, tmp_path / "unet.safetensors")
    with pytest.raises(InvalidInput, match="clip-l"):
        known_encoder_source(
            SafetensorsFile(tmp_path / "unet.safetensors"),
            Known.CLIP_L,
            "text_encoder",
            output=TextOutput.LAST_HIDDEN_STATE,
        )


def test_golden_inputs_hold_padding_and_depend_on_the_seed(tmp_path: Path) -> None:
    clip_folder(tmp_path, "CLIPTextModel")
    found = text_encoder_source(tmp_path, "text_encoder", output=TextOutput.LAST_HIDDEN_STATE)
    first, again, other = found.feeds(1), found.feeds(1), found.feeds(2)
    assert np.array_equal(first["input_ids"], again["input_ids"])
    assert not np.array_equal(first["input_ids"], other["input_ids"])
    assert (first["input_ids"][0] == 98).sum() > 2
    found.spec.check_feeds(first)
