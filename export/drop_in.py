"""A bundle's engines in diffusers' own pipelines, as ``pipe.unet``, ``pipe.transformer`` or ``pipe.vae``.

    pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5")
    pipe.unet = lehr.export.as_diffusers("sd.lehr")
    pipe.vae = lehr.export.as_diffusers("sd.lehr", component="vae")

Arrays go to the engine and come back; everything else (prompts, schedulers, guidance, callbacks) stays diffusers'. What
pipelines ask a module's configuration for follows from the bundle's own contracts, so that it works for bundles of
single files, too. There are no parameters: nothing here can be trained, adapted or saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput, Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from lehr.runtime.bundle import Bundle
from lehr.runtime.denoiser import Denoiser
from lehr.runtime.errors import InvalidInput, UnknownName
from lehr.runtime.hoisted import Residency
from lehr.runtime.pipeline import open_denoiser
from lehr.runtime.pipeline_spec import LatentSpec
from lehr.runtime.spec import ModelSpec
from lehr.runtime.stages import Stages, StageSet

Array = npt.NDArray[Any]

DECODER, ENCODER = "vae_decoder", "vae_encoder"
SIZE_EMBEDDING = 256  # channels of one of SDXL's time ids; the sum with the pooled text is what pipelines check
_TRANSFORMERS = ("dit", "sit")  # families that diffusers calls so although their sample bears a U-Net's name


class Component(str, Enum):
    """What of a pipeline is replaced."""

    DENOISER = "denoiser"  # pipe.unet, pipe.transformer
    VAE = "vae"


def as_diffusers(
    bundle: Bundle | Path | str,
    *,
    component: Component | str = Component.DENOISER,
    target: str = "cpu",
    recipe: str = "fp32",
    residency: Residency = Residency.AUTO,
) -> nn.Module:
    """A module for a pipeline of diffusers that computes with an engine of ``bundle``.

    Args:
        bundle: opened, or where it stands.
        component: the denoiser, or the autoencoder, whose engines are those of the stages ``vae_decoder`` and
            ``vae_encoder``.
        target: class of machine.
        recipe: how numbers are represented; a half of the autoencoder that was not built in it runs in fp32.
        residency: what stays in memory between calls.

    Returns:
        A module with the call, the configuration and the output class of the one it stands in for. Tensors may be on
        any device and of any floating dtype; the engine gets and gives float32 on the host.

    Raises:
        UnknownName: another component.
        BundleError, IncompatibleEngine: no such engine, or one of another machine.
        InvalidInput: the bundle holds no autoencoder.
    """
    if component not in tuple(Component):
        raise UnknownName("component", str(component), [known.value for known in Component])
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    if component == Component.DENOISER:
        return denoiser_module(open_denoiser(opened.root, target=target, recipe=recipe, residency=residency))
    latent = None if opened.manifest.pipeline is None else opened.manifest.pipeline.latent
    if latent is None or DECODER not in opened.manifest.stages:
        raise InvalidInput(
            f"{opened.root.name} holds no autoencoder. Export the whole pipeline: lehr export FOLDER -o NAME.lehr"
        )
    return AutoencoderDropIn(Stages(opened, target=target, recipes=recipe, residency=residency), latent)


def denoiser_module(denoiser: Denoiser) -> nn.Module:
    """The same for a denoiser that is open: a U-Net or a transformer, as diffusers calls it."""
    spec = denoiser.spec
    is_transformer = spec.sample.name == "hidden_states" or spec.family in _TRANSFORMERS
    return TransformerDropIn(denoiser) if is_transformer else UNetDropIn(denoiser)


# ------------------------------------------------------------------------------------------------ configuration


def denoiser_config(spec: ModelSpec) -> dict[str, Any]:
    """What pipelines read of a denoiser's configuration, out of its contract."""
    inputs = {tensor.name: tensor for tensor in spec.inputs}
    dims = {dim.name: dim for dim in spec.dims}

    def last(name: str) -> int | None:
        size = inputs[name].shape[-1] if name in inputs else None
        return size if isinstance(size, int) else None

    def channels(name: str) -> int:
        tensor = inputs.get(name)
        size = tensor.shape[1] if tensor is not None and len(tensor.shape) == 4 else 0
        return size if isinstance(size, int) else 0

    config: dict[str, Any] = {
        "in_channels": channels(spec.sample.name) + channels("sample_cond") or last(spec.sample.name),
        "out_channels": spec.outputs[0].shape[1] if len(spec.outputs[0].shape) == 4 else last(spec.sample.name),
        "cross_attention_dim": last("encoder_hidden_states"),
        "joint_attention_dim": last("encoder_hidden_states"),
        "caption_channels": last("encoder_hidden_states"),
        "pooled_projection_dim": last("pooled_projections"),
        "time_cond_proj_dim": last("timestep_cond"),
        "guidance_embeds": "guidance" in inputs,
        "num_embeds_ada_norm": spec.num_classes,
        "use_additional_conditions": "resolution" in inputs,
    }
    if "height" in dims:
        height, width = dims["height"], dims["width"]
        config["sample_size"] = height.default if height.default == width.default else (height.default, width.default)
        config["patch_size"] = height.multiple
    else:  # latents are packed by the pipeline (FLUX)
        config["patch_size"] = 1
    if (ids := last("time_ids")) is not None and (pooled := last("text_embeds")) is not None:
        config["addition_embed_type"] = "text_time"
        config["addition_time_embed_dim"] = SIZE_EMBEDDING
        config["projection_class_embeddings_input_dim"] = SIZE_EMBEDDING * ids + pooled
    return config


def autoencoder_config(latent: LatentSpec) -> dict[str, Any]:
    """What pipelines read of an autoencoder's configuration; of ``block_out_channels`` that is its length."""
    levels = 1 + round(math.log2(latent.factor))
    return {
        "latent_channels": latent.channels,
        "block_out_channels": (0,) * levels,
        "scaling_factor": latent.scaling_factor,
        "shift_factor": latent.shift_factor,
        "latents_mean": None,
        "latents_std": None,
        "force_upcast": False,  # an engine computes in what it was built for
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


# ----------------------------------------------------------------------------------------------------- modules


class DropIn(ModelMixin, ConfigMixin):
    """What all stand-ins share: a configuration, and a device and dtype to be asked for."""

    config_name = "config.json"  # type: ignore[assignment]  # None there, and a str in every subclass

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.register_to_config(**config)  # type: ignore[no-untyped-call]
        # Pipelines move and ask modules as a whole, and take both from what a module holds.
        self.register_buffer("_place", torch.zeros(()), persistent=False)

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Refused: there is nothing to save.

        Raises:
            InvalidInput: always.
        """
        raise InvalidInput(f"{type(self).__name__} holds an engine and no weights. Keep the bundle instead.")


class DenoiserDropIn(DropIn):
    """A denoiser's engine; the subclasses have diffusers' two calls."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser_config(denoiser.spec))
        self.denoiser = denoiser

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Pipelines name the branch of guidance that they evaluate; an engine keeps conditions by their content."""
        yield

    def evaluate(self, sample: Tensor, timestep: Tensor | float, given: Mapping[str, Any]) -> Tensor:
        """One call of the network: the prediction, with the extra channels of a learned variance.

        Raises:
            InvalidInput: an argument that the engine has no input for, or one that it lacks.
        """
        spec = self.denoiser.spec
        x = _array(sample)
        conditions = {name: value for name, value in given.items() if _is_given(value)}
        if "sample_cond" in {tensor.name for tensor in spec.conditions}:  # inpainting: what stands beside x_t
            own = int(spec.sample.shape[1])
            x, conditions["sample_cond"] = x[:, :own], torch.from_numpy(x[:, own:])
        wanted = {tensor.name: tensor for tensor in spec.conditions}
        missing, unknown = sorted(set(wanted) - set(conditions)), sorted(set(conditions) - set(wanted))
        if missing or unknown:
            raise InvalidInput(
                f"{spec.name}: the pipeline passes {', '.join(unknown) or 'nothing'} that the engine does not take, "
                f"and leaves out {', '.join(missing) or 'nothing'}. Expected {', '.join(wanted) or 'no conditions'}: "
                "use the pipeline that the bundle was exported from."
            )
        feeds = {}
        for name, tensor in wanted.items():
            value = _array(conditions[name])
            if value.ndim == len(tensor.shape) + 1 and not tensor.batched:  # ids, which older pipelines repeat
                value = value[0]
            feeds[name] = np.ascontiguousarray(value, dtype=tensor.dtype.numpy)
        x = np.ascontiguousarray(x, dtype=spec.sample.dtype.numpy)
        times = np.broadcast_to(_array(timestep).astype(np.float64).reshape(-1), (len(x),))
        output: Array | None = None
        for time in np.unique(times):  # one, but for pipelines that denoise each sample at its own pace
            rows = np.flatnonzero(times == time)
            some = {name: value[rows] if wanted[name].batched else value for name, value in feeds.items()}
            part = self.denoiser.with_variance(x[rows], float(time), some)
            output = np.empty((len(x), *part.shape[1:]), part.dtype) if output is None else output
            output[rows] = part
        if output is None:
            raise InvalidInput(f"{spec.name}: the batch is empty.")
        return torch.from_numpy(output).to(sample.device, sample.dtype)


class UNetDropIn(DenoiserDropIn):
    """In place of a ``UNet2DConditionModel``."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser)
        width = self.config.get("projection_class_embeddings_input_dim")
        if width is not None:  # SDXL's pipelines hold the width of their micro-conditions against this
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        down_block_additional_residuals: tuple[Tensor, ...] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: tuple[Tensor, ...] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """As diffusers' module; arguments that the engine has no input for must be None or empty.

        Raises:
            InvalidInput: they are not, or a condition is missing.
        """
        given = {
            "encoder_hidden_states": encoder_hidden_states,
            "class_labels": class_labels,
            "timestep_cond": timestep_cond,
            "attention_mask": attention_mask,
            "cross_attention_kwargs": cross_attention_kwargs,
            "down_block_additional_residuals": down_block_additional_residuals,
            "mid_block_additional_residual": mid_block_additional_residual,
            "down_intrablock_additional_residuals": down_intrablock_additional_residuals,
            "encoder_attention_mask": encoder_attention_mask,
            **(added_cond_kwargs or {}),
        }
        output = self.evaluate(sample, timestep, given)
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)


class TransformerDropIn(DenoiserDropIn):
    """In place of diffusers' DiT, PixArt, SD3 and FLUX transformers; pipelines name all arguments but the first."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        timestep: Tensor | float | None = None,
        img_ids: Tensor | None = None,
        txt_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        class_labels: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        block_controlnet_hidden_states: list[Tensor] | None = None,
        skip_layers: list[int] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """As diffusers' modules; arguments that the engine has no input for must be None or empty.

        Raises:
            InvalidInput: they are not, or a condition is missing.
        """
        if timestep is None:
            raise InvalidInput(f"{self.denoiser.spec.name} needs a timestep.")
        given = {
            "encoder_hidden_states": encoder_hidden_states,
            "pooled_projections": pooled_projections,
            "img_ids": img_ids,
            "txt_ids": txt_ids,
            "guidance": guidance,
            "class_labels": class_labels,
            "encoder_attention_mask": encoder_attention_mask,
            "joint_attention_kwargs": joint_attention_kwargs,
            "cross_attention_kwargs": cross_attention_kwargs,
            "block_controlnet_hidden_states": block_controlnet_hidden_states,
            "skip_layers": skip_layers,
            **(added_cond_kwargs or {}),
        }
        output = self.evaluate(hidden_states, timestep, given)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


class AutoencoderDropIn(DropIn):
    """In place of an ``AutoencoderKL`` or ``AutoencoderTiny``."""

    def __init__(self, stages: StageSet, latent: LatentSpec) -> None:
        super().__init__(autoencoder_config(latent))
        self.stages = stages

    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents (B, Z, H, W) -> pictures (B, 3, f H, f W), about [-1, 1]."""
        sample = self._run(DECODER, "latent_sample", z)["sample"]
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Pictures (B, 3, f H, f W) in [-1, 1] -> a distribution over latents, or the latents where it has no width.

        Raises:
            InvalidInput: the bundle holds no encoder.
        """
        if ENCODER not in self.stages.names():
            raise InvalidInput("the bundle holds no encoder of pictures. Export the whole pipeline again.")
        found = self._run(ENCODER, "sample", x)
        if "std" not in found:
            return AutoencoderTinyOutput(latents=found["mean"]) if return_dict else (found["mean"],)
        spread = torch.cat([found["mean"], 2 * found["std"].log()], dim=1)
        distribution = DiagonalGaussianDistribution(spread)
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encode to the middle of the distribution and decode."""
        encoded = self.encode(sample)
        latents = encoded.latent_dist.mode() if isinstance(encoded, AutoencoderKLOutput) else encoded.latents
        return self.decode(latents, return_dict=return_dict)

    def _run(self, stage: str, name: str, value: Tensor) -> dict[str, Tensor]:
        with self.stages.using(stage) as run:
            outputs = run({name: np.ascontiguousarray(_array(value), dtype=np.float32)})
        return {key: torch.from_numpy(array).to(value.device, value.dtype) for key, array in outputs.items()}


# ----------------------------------------------------------------------------------------------------- tensors


def _is_given(value: Any) -> bool:
    """Whether an optional argument says anything: neither None nor an empty collection."""
    return value is not None and (isinstance(value, Tensor) or bool(value))


def _array(value: Tensor | float) -> Array:
    """On the host; numpy has no bfloat16."""
    tensor = torch.as_tensor(value).detach().cpu()
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
