"""Text encoders against transformers, and their graphs against themselves at shapes that were never seen."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from backbone_checks import EXPORTED, ROUNDED, assert_close
from onnx import numpy_helper
from small_backbones import randomise
from torch import nn

from lehr.engines.graph.weights import bind_weights, save_graph
from lehr.export.checkpoints.config import NotOurs
from lehr.export.encoders import bert, clip_text, qwen, t5
from lehr.export.encoders.outputs import TextOutput
from lehr.export.trace import trace
from lehr.export.weights import TorchModuleSource
from lehr.runtime.backends.onnxruntime import BACKEND
from lehr.runtime.errors import InvalidInput
from lehr.runtime.stage import StageSpec

transformers = pytest.importorskip("transformers")
logging.getLogger("transformers").setLevel(logging.ERROR)

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
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 6, "d_ff": 40, "num_layers": 3, "num_heads": 4}
BERT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
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


def ids(batch: int, length: int, *, high: int = 98, eos: int | None = None) -> torch.Tensor:
    made = torch.randint(3, high, (batch, length), generator=torch.Generator().manual_seed(0))
    if eos is not None:  # at a different place in each row, and then again, as padding with it does
        for row in range(batch):
            made[row, length // 2 + row :] = eos
    return made


def mask(batch: int, length: int) -> torch.Tensor:
    return (torch.arange(length)[None] < torch.arange(length, length - batch, -1)[:, None] - 2).long()


def as_float64(reference: nn.Module) -> nn.Module:
    randomise(reference)
    return reference.double().eval()


def told(reference: Any, **more: Any) -> dict[str, Any]:
    """The configuration as ``save_pretrained`` writes it."""
    return {**reference.config.to_dict(), "architectures": [type(reference).__name__], **more}


def in_classic_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers 5 leaves the prefix out where a CLIP text encoder has no projection."""
    return {name if name.startswith("text_") else f"text_model.{name}": value for name, value in state.items()}


def clip(make: Any, **changes: Any) -> tuple[nn.Module, clip_text.Params]:
    reference = as_float64(make(transformers.CLIPTextConfig(**{**CLIP, **changes})))
    return reference, clip_text.from_config(told(reference))


# ----------------------------------------------------------------------------------------- against transformers


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [98, 2])
@torch.no_grad()
def test_clip_with_a_projection_equals_transformers(activation: str, eos: int) -> None:
    reference, params = clip(transformers.CLIPTextModelWithProjection, hidden_act=activation, eos_token_id=eos)
    names = clip_text.outputs_of(params, TextOutput.PENULTIMATE_HIDDEN_STATE)
    assert names == ("penultimate_hidden_state", "text_embeds")
    layers = clip_text.outputs_of(params, TextOutput.HIDDEN_STATES, (0, 1))
    ours = clip_text.ClipText(params, (*names, "pooler_output", "last_hidden_state", *layers)).double()
    ours.load_state_dict(reference.state_dict())
    prompt = ids(3, 20, eos=98)
    penultimate, projected, pooled, last, *states = ours(prompt)
    expected = reference(prompt, output_hidden_states=True)
    assert_close(penultimate, expected.hidden_states[-2], ROUNDED)
    for state, wanted in zip(states, expected.hidden_states[:2], strict=True):
        assert_close(state, wanted, ROUNDED)
    assert_close(projected, expected.text_embeds, ROUNDED)
    assert_close(last, expected.last_hidden_state, ROUNDED)
    assert_close(pooled, reference.text_model(prompt).pooler_output, ROUNDED)


@torch.no_grad()
def test_clip_without_a_projection_equals_transformers() -> None:
    reference, params = clip(transformers.CLIPTextModel)
    assert params.projection_dim is None
    ours = clip_text.ClipText(params, ("last_hidden_state", "pooler_output")).double()
    ours.load_state_dict(in_classic_names(reference.state_dict()))
    prompt = ids(2, 11, eos=98)
    expected = reference(prompt)
    for got, name in zip(ours(prompt), ours.outputs, strict=True):
        assert_close(got, expected[name], ROUNDED)


@torch.no_grad()
def test_clip_pools_the_first_token_where_no_token_ends_the_prompt() -> None:
    reference, params = clip(transformers.CLIPTextModel)
    ours = clip_text.ClipText(params, ("pooler_output",)).double()
    ours.load_state_dict(in_classic_names(reference.state_dict()))
    prompt = ids(2, 7)
    assert_close(ours(prompt)[0], reference(prompt).pooler_output, ROUNDED)


@pytest.mark.parametrize("feed_forward", ["gated-gelu", "relu", "gated-silu"])
@torch.no_grad()
def test_t5_equals_transformers_with_a_mask(feed_forward: str) -> None:
    reference = as_float64(transformers.T5EncoderModel(transformers.T5Config(**T5, feed_forward_proj=feed_forward)))
    ours = t5.T5Encoder(t5.from_config(told(reference)), ("last_hidden_state",)).double()
    state = reference.state_dict()
    del state["encoder.embed_tokens.weight"]
    ours.load_state_dict(state)
    prompt, attention = ids(3, 33), mask(3, 33)
    assert_close(ours(prompt, attention), reference(prompt, attention).last_hidden_state, ROUNDED)


@torch.no_grad()
def test_umt5_equals_transformers() -> None:
    reference = as_float64(transformers.UMT5EncoderModel(transformers.UMT5Config(**T5)))
    ours = t5.T5Encoder(t5.from_config(told(reference)), ("last_hidden_state",)).double()
    state = reference.state_dict()
    del state["encoder.embed_tokens.weight"]
    ours.load_state_dict(state)
    prompt, attention = ids(2, 40), mask(2, 40)
    assert_close(ours(prompt, attention), reference(prompt, attention).last_hidden_state, ROUNDED)


@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (32, 100), (8, 20), (64, 512)])
def test_every_distance_has_the_bucket_that_transformers_gives_it(buckets: int, far: int) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(-far - 50, far + 51)
    expected = T5Attention._relative_position_bucket(distances, num_buckets=buckets, max_distance=far)
    assert [t5.bucket(int(distance), buckets, far) for distance in distances] == expected.tolist()
    # What the module clamps to is what lies beyond, too.
    assert t5.bucket(far, buckets, far) == t5.bucket(far + 50, buckets, far)


@torch.no_grad()
def test_bert_equals_transformers_with_a_mask() -> None:
    reference = as_float64(transformers.BertModel(transformers.BertConfig(**BERT)))
    params = bert.from_config(told(reference))
    ours = bert.Bert(params, ("last_hidden_state", "penultimate_hidden_state", "pooler_output")).double()
    ours.load_state_dict(reference.state_dict())
    prompt, attention = ids(3, 12), mask(3, 12)
    expected = reference(prompt, attention, output_hidden_states=True)
    last, penultimate, pooled = ours(prompt, attention)
    assert_close(last, expected.last_hidden_state, ROUNDED)
    assert_close(penultimate, expected.hidden_states[-2], ROUNDED)
    assert_close(pooled, expected.pooler_output, ROUNDED)


@pytest.mark.parametrize("version", [2, 3])
@torch.no_grad()
def test_qwen_equals_transformers_in_every_layer(version: int) -> None:
    kind = {2: "Qwen2", 3: "Qwen3"}[version]
    more = {"head_dim": 12} if version == 3 else {}
    config = getattr(transformers, f"{kind}Config")(
        **QWEN, **more, rope_parameters={"rope_theta": 5e3, "rope_type": "default"}
    )
    reference = as_float64(getattr(transformers, f"{kind}Model")(config))
    params = qwen.from_config(told(reference))
    names = qwen.outputs_of(params, TextOutput.HIDDEN_STATES, (0, 1, 2, 3))
    ours = qwen.Qwen(params, names).double()
    ours.load_state_dict(reference.state_dict())
    prompt, attention = ids(3, 17), mask(3, 17)
    expected = reference(prompt, attention, output_hidden_states=True)
    for got, state in zip(ours(prompt, attention), expected.hidden_states, strict=True):
        assert_close(got, state, ROUNDED)
    assert_close(expected.hidden_states[-1], expected.last_hidden_state, 0.0)


@torch.no_grad()
def test_the_text_part_of_a_qwen_2_5_vl_equals_transformers() -> None:
    rope = {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [1, 1, 2]}
    config = transformers.Qwen2_5_VLTextConfig(**QWEN, rope_parameters=rope)
    reference = as_float64(transformers.Qwen2_5_VLTextModel(config))
    ours = qwen.Qwen(qwen.from_config(told(reference)), ("last_hidden_state",)).double()
    ours.load_state_dict(reference.state_dict())
    prompt, attention = ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    assert_close(ours(prompt, attention)[0], reference(prompt, attention).last_hidden_state, ROUNDED)


# --------------------------------------------------------------------------------------------------- real weights

MINILM = bert.Params(hidden_size=384, intermediate_size=1536, depth=6)
REAL = Path(os.environ.get("LEHR_REAL_ENCODER", "no-such-folder"))  # all-MiniLM-L6-v2 with weights of 8 bits


@pytest.mark.skipif(not (REAL / "model.onnx").is_file(), reason="LEHR_REAL_ENCODER names no folder with model.onnx")
@torch.no_grad()
def test_a_published_sentence_encoder_returns_the_features_of_its_own_graph() -> None:
    """Its graph multiplies weights of 8 bits by their scales, so both sides compute with the same numbers."""
    graph = onnx.load(REAL / "model.onnx").graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    state = {name.removeprefix("inner."): value for name, value in stored.items() if name.startswith("inner.")}
    for name in [name for name in stored if name.endswith("_q")]:
        value = stored[name].astype(np.float32) * stored[f"{name[:-2]}_scale"]
        if name.startswith("inner."):
            state[name[:-2].removeprefix("inner.")] = value
            continue
        (product,) = readers[name[:-2]]  # a matrix is called by the bias that is added after it
        (addition,) = readers[product.output[0]]
        bias = next(other for other in addition.input if other.endswith(".bias"))
        state[bias.removeprefix("inner.").replace(".bias", ".weight")] = value.T
    ours = bert.Bert(MINILM, ("last_hidden_state",))
    wanted = ours.state_dict()
    ours.load_state_dict({name: torch.from_numpy(np.array(state[name])) for name in wanted})
    prompt, attention = ids(4, 19, high=30000), mask(4, 19)
    session = ort.InferenceSession(REAL / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {"input_ids": prompt.numpy(), "attention_mask": attention.numpy()}
    (expected,) = session.run(None, {**feeds, "token_type_ids": np.zeros_like(feeds["input_ids"])})
    (got,) = ours(prompt, attention)
    real = attention.bool()  # what stands at padding is nobody's business
    assert_close(got[real], torch.from_numpy(expected)[real], 1e-4)


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("read", "config", "reason"),
    [
        (clip_text.from_config, {"architectures": ["CLIPModel"]}, "CLIPModel"),
        (clip_text.from_config, {"hidden_act": "mish"}, "mish"),
        (clip_text.from_config, {"use_attention_mask": True}, "not masked"),
        (clip_text.from_config, {"hidden_size": 30}, "multiple of num_heads"),
        (t5.from_config, {"model_type": "bart"}, "bart"),
        (t5.from_config, {"relative_attention_max_distance": 8}, "max_distance"),
        (bert.from_config, {"position_embedding_type": "relative_key"}, "relative_key"),
        (bert.from_config, {"is_decoder": True}, "BERT encoder"),
        (qwen.from_config, {"model_type": "llama"}, "llama"),
        (qwen.from_config, {"model_type": "qwen3", "rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        (qwen.from_config, {"model_type": "qwen2", "use_sliding_window": True}, "sliding window"),
    ],
)
def test_a_configuration_of_something_else_is_refused_by_name(
    read: Callable[[dict[str, Any]], object], config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(NotOurs, match=reason):
        read(config)


def test_outputs_that_a_family_does_not_have_are_refused() -> None:
    with pytest.raises(InvalidInput, match="only last_hidden_state"):
        t5.outputs_of(t5.Params(), TextOutput.POOLER_OUTPUT)
    with pytest.raises(InvalidInput, match="chosen layers"):
        bert.outputs_of(bert.Params(), TextOutput.HIDDEN_STATES)
    with pytest.raises(InvalidInput, match="12 blocks"):
        clip_text.outputs_of(clip_text.Params(), TextOutput.HIDDEN_STATES, (12,))
    with pytest.raises(InvalidInput, match="37"):
        qwen.outputs_of(qwen.Params(), TextOutput.HIDDEN_STATES, (9, 37))


# ----------------------------------------------------------------------------------------------- published sizes

OPENCLIP_G = clip_text.Params(
    hidden_size=1280, intermediate_size=5120, depth=32, num_heads=20, hidden_act="gelu", projection_dim=1280
)
OPENCLIP_H = clip_text.Params(hidden_size=1024, intermediate_size=4096, depth=23, num_heads=16, hidden_act="gelu")


@pytest.mark.parametrize(
    ("make", "params", "count"),
    [
        (clip_text.ClipText, clip_text.Params(), 123_060_480),  # Stable Diffusion 1
        (clip_text.ClipText, OPENCLIP_H, 340_387_840),  # Stable Diffusion 2
        (clip_text.ClipText, OPENCLIP_G, 694_659_840),  # SDXL's second encoder
        (t5.T5Encoder, t5.Params(), 4_762_310_656),  # v1.1 XXL: PixArt, SD3, FLUX
        (bert.Bert, MINILM, 22_565_376),  # all-MiniLM-L6-v2 without its pooler
        (qwen.Qwen, qwen.Params(), 4_022_468_096),  # Qwen3-4B without its tied head
    ],
)
def test_published_configurations_have_the_published_number_of_parameters(
    make: Callable[..., nn.Module], params: Any, count: int
) -> None:
    with torch.device("meta"):
        module = make(params, ("last_hidden_state",))
    assert sum(parameter.numel() for parameter in module.parameters()) == count


# ------------------------------------------------------------------------------------------------------- graphs


def tiny_encoders() -> dict[str, tuple[nn.Module, StageSpec]]:
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 40, "depth": 2, "num_heads": 4}
    projected = clip_text.Params(**sizes, max_positions=20, projection_dim=24)
    modern = clip_text.Params(**sizes, max_positions=20, eos_token_id=98, hidden_act="gelu")
    gated = t5.Params(vocab_size=99, d_model=32, d_kv=6, d_ff=40, depth=2, num_heads=4)
    umt5 = t5.Params(vocab_size=99, d_model=32, d_kv=6, d_ff=40, depth=2, num_heads=4, bias_every_block=True)
    small = bert.Params(**sizes, max_positions=40)
    three = qwen.Params(**sizes, num_kv_heads=2, head_dim=12)
    two = qwen.Params(**sizes, num_kv_heads=2, head_dim=8, qkv_bias=True, qk_norm=False)
    both = ("penultimate_hidden_state", "text_embeds")
    last = ("last_hidden_state",)
    return {
        "clip, SDXL's": (clip_text.ClipText(projected, both), clip_text.stage_spec("a", projected, outputs=both)),
        "clip, penultimate": (
            clip_text.ClipText(modern, both[:1]),
            clip_text.stage_spec("a", modern, outputs=both[:1]),
        ),
        "clip, pooled": (
            clip_text.ClipText(modern, ("pooler_output",)),
            clip_text.stage_spec("a", modern, outputs=("pooler_output",)),
        ),
        "t5": (t5.T5Encoder(gated, last), t5.stage_spec("a", gated, outputs=last, max_length=160)),
        "umt5": (t5.T5Encoder(umt5, last), t5.stage_spec("a", umt5, outputs=last, max_length=16)),
        "bert": (bert.Bert(small, last), bert.stage_spec("a", small, outputs=last)),
        "qwen3": (
            qwen.Qwen(three, ("hidden_states_1", "last_hidden_state")),
            qwen.stage_spec("a", three, outputs=("hidden_states_1", "last_hidden_state")),
        ),
        "qwen2, one layer": (
            qwen.Qwen(two, ("hidden_states_1",)),
            qwen.stage_spec("a", two, outputs=("hidden_states_1",)),
        ),
    }


@pytest.fixture(scope="module")
def encoders() -> dict[str, tuple[nn.Module, StageSpec]]:
    torch.manual_seed(0)
    return tiny_encoders()


QUICK = ("clip, SDXL's", "clip, pooled", "t5", "bert", "qwen3")  # the others are variations of these


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in tiny_encoders()]
)
@torch.no_grad()
def test_the_graph_computes_what_the_module_does_at_unseen_shapes(
    name: str, encoders: dict[str, tuple[nn.Module, StageSpec]], tmp_path: Path
) -> None:
    module, spec = encoders[name]
    randomise(module, dtype=torch.float32)
    module.eval()
    graph = trace(module, spec)
    bind_weights([graph], TorchModuleSource(module), tmp_path / "w.safetensors")
    save_graph(graph, tmp_path / "model.onnx")
    loaded = BACKEND.load(tmp_path / "model.onnx", {"intra_op_threads": 1, "spinning": False})
    for batch, length in ((3, 11), (2, 1), (1, spec.dim("tokens").default)):
        feeds = {"input_ids": ids(batch, length, eos=98 if length > 5 else None), "attention_mask": mask(batch, length)}
        if length == 1:
            feeds["attention_mask"] = torch.ones(batch, 1, dtype=torch.long)
        feeds = {tensor.name: feeds[tensor.name] for tensor in spec.inputs}
        got = loaded.run({key: value.numpy() for key, value in feeds.items()})
        expected = module(**feeds)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for tensor, value in zip(spec.outputs, expected, strict=True):
            assert_close(torch.from_numpy(np.asarray(got[tensor.name])), value, EXPORTED)


def test_blocks_behind_the_penultimate_layer_are_not_in_the_graph() -> None:
    params = clip_text.Params(
        vocab_size=99, hidden_size=32, intermediate_size=40, depth=2, num_heads=4, max_positions=20
    )
    with torch.device("meta"):
        module = clip_text.ClipText(params, ("penultimate_hidden_state",))
    graph = trace(module, clip_text.stage_spec("a", params, outputs=("penultimate_hidden_state",))).graph
    held = {name for name in graph.initializers if "layers." in name}
    assert held
    assert all(".layers.0." in name for name in held)


@pytest.mark.long
def test_t5_xxl_is_traced_without_its_weights() -> None:
    """4.8 billion parameters on the meta device."""
    import resource

    params = t5.Params()
    with torch.device("meta"):
        module = t5.T5Encoder(params, ("last_hidden_state",))
    graph = trace(module, t5.stage_spec("text_encoder_3", params, outputs=("last_hidden_state",), max_length=512)).graph
    weights = [value for value in graph.initializers.values() if value.const_value is None]
    elements = sum(math.prod(value.shape.numpy()) for value in weights if value.shape is not None)
    assert elements == 4_762_310_656
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 * 2**20  # KiB
