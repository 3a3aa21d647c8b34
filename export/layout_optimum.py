"""A diffusers pipeline as the folder of ONNX graphs that Hugging Face's Optimum loads with ONNX Runtime.

    lehr export stable-diffusion-v1-5 --layout optimum -o sd-onnx
    ORTDiffusionPipeline.from_pretrained("sd-onnx")          # package optimum-onnx

Graphs are those of a bundle, traced without weights and checked against eager PyTorch, under the names and with the
conventions of ``optimum.onnxruntime`` 0.1: one graph a component, a U-Net's timestep a scalar, every hidden layer of
CLIP an output, the autoencoder's latent as mean and log variance. Configurations, tokenizers and scheduler are the
source's own files.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lehr.engines.graph.split import Part as Traced
from lehr.engines.graph.weights import WeightSource
from lehr.export.autoencoders.folder import decoder_source, encoder_source
from lehr.export.checkpoints.config import NAME as CONFIG
from lehr.export.checkpoints.config import read_json
from lehr.export.checkpoints.conventions import INDEX, denoiser_folder
from lehr.export.checkpoints.files import Pickles
from lehr.export.checkpoints.mapped import MappedSource
from lehr.export.checkpoints.rules import Origin
from lehr.export.eager import evaluate
from lehr.export.encoders import clip_text, t5
from lehr.export.encoders.folder import TextEncoder, read_encoder
from lehr.export.encoders.outputs import HIDDEN, LAST, POOLED, PROJECTED
from lehr.export.golden import default_tier
from lehr.export.graphs import GRAPH_REL_ERROR, write_graphs
from lehr.export.source import resolve
from lehr.export.trace import trace
from lehr.export.weights import load_into
from lehr.runtime.errors import ExportFailed, InvalidInput
from lehr.runtime.files import storage_errors
from lehr.runtime.golden import Tier
from lehr.runtime.parity import WORST, relative_error
from lehr.runtime.spec import Dim, DType, GraphSpec, ModelSpec, TensorSpec

Array = npt.NDArray[Any]

GRAPH = "model"  # unet/model.onnx
PIPELINES = frozenset(  # what optimum-onnx 0.1 has a class for
    {
        "FluxPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
        "LatentConsistencyModelPipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
        "StableDiffusion3Pipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLPipeline",
    }
)
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
FOLDERS = ("tokenizer", "tokenizer_2", "tokenizer_3", "scheduler", "feature_extractor")  # copied as they are
_INNER = "net"  # what a wrapper calls the module in it


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One component as Optimum wants it: what a trace needs to know, the module and its weights.

    Attributes:
        name: the folder's, such as "vae_decoder".
        config: the folder whose ``config.json`` goes along.
        feeds: inputs to compare graph and module on.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: tuple[Dim, ...]
    module: nn.Module
    weights: WeightSource
    config: Path
    feeds: Callable[[], dict[str, Array]]

    def dim(self, name: str) -> Dim:
        return next(dim for dim in self.dims if dim.name == name)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutSummary:
    """What was laid out: operators and parameters of each graph by the folder's name."""

    folder: str
    seconds: float
    nodes: Mapping[str, int]
    parameters: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def lay_out(
    source: Path, output: Path, *, pickles: Pickles, overwrite: bool, progress: Callable[[str], None]
) -> LayoutSummary:
    """Write the folder ``output``, all of it or nothing.

    Args:
        source: a pipeline's folder, with ``model_index.json``.
        output: the folder to make.
        pickles: whether pickled weights are read.
        overwrite: replace a folder that holds a pipeline.
        progress: takes a line of text now and then.

    Raises:
        InvalidInput: no pipeline, one that Optimum has no class for, damaged files, or an output that is in the way.
        ExportFailed: a module cannot be traced, or its graph computes something else.
        RunFailed: the disk is full.
    """
    started = time.monotonic()
    _check_output(output, overwrite)
    nodes, parameters = {}, {}
    with storage_errors(f"writing {output}"):
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.absolute().parent))
    try:
        for part in parts(source, pickles=pickles):
            progress(f"{part.name}: {part.parameters:,} parameters")
            nodes[part.name], parameters[part.name] = _write(part, staging / part.name), part.parameters
        with storage_errors(f"writing {output}"):
            shutil.copy(source / INDEX, staging / INDEX)
            for name in FOLDERS:
                if (source / name).is_dir():
                    shutil.copytree(source / name, staging / name)
            if output.exists():
                shutil.rmtree(output)
            staging.chmod(0o755)  # mkdtemp's is private
            staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return LayoutSummary(
        folder=str(output), seconds=round(time.monotonic() - started, 2), nodes=nodes, parameters=parameters
    )


def parts(folder: Path, *, pickles: Pickles = Pickles.REFUSED) -> Iterator[Part]:
    """The components of a pipeline that become graphs, read one at a time.

    Raises:
        InvalidInput: see :func:`lay_out`.
    """
    if not (folder / INDEX).is_file():
        raise InvalidInput(f"{folder} is no pipeline's folder. Expected {INDEX} in it, as save_pretrained writes it.")
    index = read_json(folder / INDEX)
    name = str(index.get("_class_name"))
    if name not in PIPELINES:
        raise InvalidInput(
            f"{folder} is a {name}, which Optimum has no class for; it has {', '.join(sorted(PIPELINES))}. Export a "
            "bundle instead: leave --layout out."
        )
    yield _denoiser(folder, pickles)
    for stage in TEXT_ENCODERS:
        if (folder / stage / CONFIG).is_file():
            yield _text_encoder(folder / stage, pickles)
    yield from _autoencoder(folder / "vae")


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not overwrite:
        raise InvalidInput(f"{output} exists. Give another name, or --overwrite.")
    if not (output / INDEX).is_file():
        raise InvalidInput(f"{output} is no pipeline's folder, so it is not replaced. Give another name.")


# ---------------------------------------------------------------------------------------------------- denoiser


class _UNet(nn.Module):
    """A U-Net with one timestep for the whole batch and, for inpainting, all channels in one tensor."""

    def __init__(self, net: nn.Module, own_channels: int, names: tuple[str, ...]) -> None:
        super().__init__()
        self.net, self.own_channels, self.names = net, own_channels, names

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        given = {
            "encoder_hidden_states": encoder_hidden_states,
            "timestep_cond": timestep_cond,
            "text_embeds": text_embeds,
            "time_ids": time_ids,
            "sample_cond": sample[:, self.own_channels :],
        }
        inputs = {name: given[name] for name in self.names}
        found = self.net(sample[:, : self.own_channels], timestep.expand(sample.shape[0]), **inputs)
        return found[0] if isinstance(found, tuple) else found


def _denoiser(folder: Path, pickles: Pickles) -> Part:
    component = denoiser_folder(folder)
    found = resolve(str(folder), preset=None, seed=0, structure_only=False, pickles=pickles)
    spec, weights = found.spec, found.weights
    if weights is None:
        raise InvalidInput(f"{component} holds no weights.")
    if component.name == "transformer":
        return Part(
            name="transformer",
            inputs=spec.inputs,
            outputs=(replace(spec.outputs[0], name="out_hidden_states"),),
            dims=spec.dims,
            module=found.module,
            weights=weights,
            config=component,
            feeds=lambda: _random(spec.inputs, spec),
        )
    own = int(spec.sample.shape[1])
    beside = next((int(tensor.shape[1]) for tensor in spec.conditions if tensor.name == "sample_cond"), 0)
    conditions = tuple(tensor for tensor in spec.conditions if tensor.name != "sample_cond")
    batch, _, *sizes = spec.sample.shape
    inputs = (
        replace(spec.sample, shape=(batch, own + beside, *sizes)),
        replace(spec.timestep, shape=()),
        *conditions,
    )
    return Part(
        name="unet",
        inputs=inputs,
        outputs=(replace(spec.outputs[0], name="out_sample"),),
        dims=spec.dims,
        module=_UNet(found.module, own, tuple(tensor.name for tensor in spec.conditions)).eval(),
        weights=_inside(weights),
        config=component,
        feeds=lambda: _random(inputs, spec),
    )


def _random(inputs: tuple[TensorSpec, ...], spec: ModelSpec) -> dict[str, Array]:
    """Normals for floats, ones for ids and masks, and a time in the middle of the path."""
    rng, sizes = np.random.default_rng(0), spec.default_sizes(batch=2)
    middle = 0.5 * (spec.path.first_timestep + spec.path.last_timestep)
    feeds: dict[str, Array] = {}
    for tensor in inputs:
        shape = tensor.sizes(sizes)
        if tensor.name == spec.timestep.name:
            feeds[tensor.name] = np.full(shape, middle, dtype=tensor.dtype.numpy)
        elif tensor.dtype is DType.FLOAT32:
            feeds[tensor.name] = rng.standard_normal(shape).astype(np.float32)
        else:
            feeds[tensor.name] = np.ones(shape, dtype=tensor.dtype.numpy)
    return feeds


# ------------------------------------------------------------------------------------------------ text encoders


class _Unmasked(nn.Module):
    """An encoder of whole prompts: SD3 and FLUX let T5 see the padding."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.net(input_ids, torch.ones_like(input_ids))


def _text_encoder(folder: Path, pickles: Pickles) -> Part:
    found = read_encoder(folder, pickles=pickles)
    stage = found.stage(folder.name, _outputs(found))
    masked = len(stage.spec.inputs) > 1
    weights = stage.weights
    if weights is None:
        raise InvalidInput(f"{folder} holds no weights.")
    return Part(
        name=folder.name,
        inputs=stage.spec.inputs[:1],
        outputs=tuple(
            replace(tensor, name=tensor.name.replace(HIDDEN, "hidden_states.")) for tensor in stage.spec.outputs
        ),
        dims=stage.spec.dims,
        module=_Unmasked(stage.module) if masked else stage.module,
        weights=_inside(weights) if masked else weights,
        config=folder,
        feeds=lambda: {"input_ids": stage.feeds(0)["input_ids"]},
    )


def _outputs(found: TextEncoder) -> tuple[str, ...]:
    """In Optimum's order: pipelines take the first one by its place, and hidden layers by number."""
    if found.family == t5.FAMILY:
        return (LAST,)
    if found.family != clip_text.FAMILY:
        raise InvalidInput(f"{found.what}: Optimum's pipelines have no text encoder of the family {found.family}.")
    first = (LAST, POOLED) if found.params.projection_dim is None else (PROJECTED, LAST)
    return (*first, *(f"{HIDDEN}{layer}" for layer in range(found.params.depth)))


# -------------------------------------------------------------------------------------------------- autoencoder


class _Parameters(nn.Module):
    """An encoder of pictures that returns the mean and the logarithm of the variance in one tensor."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, sample: Tensor) -> Tensor:
        mean, std = self.net(sample)
        return torch.cat([mean, 2 * std.log()], dim=1)


def _autoencoder(folder: Path) -> Iterator[Part]:
    for stage in (encoder_source(folder), decoder_source(folder)):
        spec, weights = stage.spec, stage.weights
        if weights is None:
            raise InvalidInput(f"{folder} holds no weights.")
        outputs, module = spec.outputs, stage.module
        if spec.name == "vae_encoder":
            batch, channels, *sizes = outputs[0].shape
            if len(outputs) == 1:  # an autoencoder without a distribution
                outputs = (replace(outputs[0], name="latent_sample"),)
            else:
                shape = (batch, 2 * int(channels), *sizes)
                outputs = (replace(outputs[0], name="latent_parameters", shape=shape),)
                module, weights = _Parameters(module).eval(), _inside(weights)
        yield Part(
            name=spec.name,
            inputs=spec.inputs,
            outputs=outputs,
            dims=spec.dims,
            module=module,
            weights=weights,
            config=folder,
            feeds=lambda stage=stage: stage.feeds(0),  # type: ignore[misc]
        )


# ----------------------------------------------------------------------------------------------------- writing


def _inside(weights: WeightSource) -> WeightSource:
    """``weights`` under the names that a wrapper's state dict has."""
    return MappedSource(weights, {f"{_INNER}.{name}": Origin(parts=((name,),)) for name in weights.names()})


def _write(part: Part, folder: Path) -> int:
    """Graph, weights and configuration; the number of operators."""
    with storage_errors(f"writing {folder}"):
        folder.mkdir()
        shutil.copy(part.config / CONFIG, folder / CONFIG)
    model = trace(part.module, part)
    signature = GraphSpec(inputs=part.inputs, outputs=part.outputs)
    sizes = {dim.name: dim.default for dim in part.dims}
    entry = write_graphs({GRAPH: Traced(model=model, spec=signature)}, part.weights, folder, part.name, sizes)[GRAPH]
    if default_tier(part.parameters) is not Tier.NONE:
        _compare(part, folder / f"{GRAPH}.onnx")
    return entry.nodes


def _compare(part: Part, file: Path) -> None:
    """Raise ExportFailed unless the saved graph computes what the module does."""
    from lehr.runtime.backends.onnxruntime import BACKEND

    module, feeds = part.module, part.feeds()
    if any(parameter.is_meta for parameter in module.parameters()):
        module = load_into(module, part.weights)
    expected = evaluate(module.eval().float(), part, feeds)
    got = BACKEND.load(file, {"intra_op_threads": 0, "spinning": False}).run(feeds)
    for name, value in expected.items():
        error = relative_error(value, got[name]) if value.shape == got[name].shape else WORST
        if error > GRAPH_REL_ERROR:
            raise ExportFailed(
                f"the exported graph of {part.name} differs from eager by {error:.1e} in {name!r} (at most "
                f"{GRAPH_REL_ERROR:.0e}). The module probably depends on Python state that tracing froze."
            )
