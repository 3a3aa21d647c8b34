"""Any other denoiser of diffusers: its own module, and a spec derived from its configuration.

What the module takes is read off ``forward`` and the configuration. Where an argument's meaning or shape is in
neither, the class is refused by name: a guessed input would export and be wrong. Heights and widths are those of the
configuration, because modules that were not written for export bake them in; the batch and the number of text tokens
stay free.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lehr.engines.graph.weights import WeightSource
from lehr.export.checkpoints.conventions import Conventions, conventions_of
from lehr.export.checkpoints.mapped import Layout, mapped, shapes
from lehr.export.checkpoints.rules import Rule
from lehr.export.weights import TorchModuleSource, load_into
from lehr.runtime.errors import InvalidInput, MissingExtra, UnknownName
from lehr.runtime.paths import VP, LinearFlow
from lehr.runtime.prediction import EPSILON, FLOW_PREDICTION
from lehr.runtime.spec import BATCH, Dim, DType, ModelSpec, TensorSpec, Varies

_TOKENS = Dim(name="text_tokens", default=77, max=1024)
_WIDTHS = {  # an input -> the options that may hold the size of its last dimension
    "encoder_hidden_states": (
        "caption_channels",
        "joint_attention_dim",
        "text_embed_dim",
        "caption_feat_dim",
        "cap_feat_dim",
        "cross_attention_dim",
    ),
    "pooled_projections": ("pooled_projection_dim",),
    "timestep_cond": ("time_cond_proj_dim",),
}
_OPTIONAL = {  # arguments that change nothing when they are left out, whatever the configuration
    "attention_kwargs",
    "attention_mask",
    "block_controlnet_hidden_states",
    "controlnet_block_samples",
    "cross_attention_kwargs",
    "down_block_additional_residuals",
    "down_intrablock_additional_residuals",
    "encoder_attention_mask",
    "joint_attention_kwargs",
    "mid_block_additional_residual",
    "return_dict",
    "skip_layers",
}
_NEEDED_IF = {  # arguments that a configuration may ask for -> the options that do
    "added_cond_kwargs": ("addition_embed_type", "encoder_hid_dim_type", "use_additional_conditions"),
}
_FLOWS = {  # classes whose models were trained as linear flows, for folders without a scheduler
    "AuraFlowTransformer2DModel",
    "FluxTransformer2DModel",
    "SD3Transformer2DModel",
    "SanaTransformer2DModel",
}


class DiffusersDenoiser(nn.Module):
    """A module of diffusers behind the inputs that a spec can describe; returns a tensor, not an object."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        sample: Tensor | None = None,
        hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        guidance: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """Evaluate the network; the spec says which arguments it takes, and their shapes."""
        feeds = {
            "sample": sample,
            "hidden_states": hidden_states,
            "timestep": timestep,
            "encoder_hidden_states": encoder_hidden_states,
            "class_labels": class_labels,
            "pooled_projections": pooled_projections,
            "guidance": guidance,
            "timestep_cond": timestep_cond,
        }
        given = {name: value for name, value in feeds.items() if value is not None}
        return self.model(**given, return_dict=False)[0]


def load(
    component: Path, config: Mapping[str, Any], source: WeightSource
) -> tuple[DiffusersDenoiser, ModelSpec, WeightSource]:
    """diffusers' module of ``config`` with the weights of ``source``, its spec, and its weights under its names.

    Raises:
        InvalidInput: a class that is no denoiser, whose inputs cannot be derived, or wrong weights.
        MissingExtra: diffusers, or something the class needs, is not installed.
        UnknownName: diffusers has no such class.
    """
    kind = _class(str(config["_class_name"]))
    spec = derive(kind, config, conventions_of(component))
    try:
        module = DiffusersDenoiser(kind.from_config(dict(config))).eval().float()
    except ImportError as e:
        raise MissingExtra(e.name or "a package that this class needs", "diffusers") from e
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as e:
        raise InvalidInput(f"{component / 'config.json'} is no configuration that {kind.__name__} takes: {e}") from e
    layout = Layout("diffusers", (Rule("model.{rest}", ("{rest}",)),))
    load_into(module, mapped(source, shapes(module), layout, what=kind.__name__))
    _try(module, spec)
    return module, spec, TorchModuleSource(module)


def _try(module: DiffusersDenoiser, spec: ModelSpec) -> None:
    """Run the module on tensors without values, and compare the shape that comes out."""
    sizes = spec.default_sizes()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
            output = module(
                **{t.name: torch.zeros(t.sizes(sizes), dtype=getattr(torch, t.dtype.value)) for t in spec.inputs}
            )
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        first = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise InvalidInput(
            f"{spec.name} cannot be exported: it does not run on the inputs that its configuration describes "
            f"({', '.join(f'{t.name} {t.shape}' for t in spec.inputs)}): {first} Write a FILE.py:FACTORY that returns "
            "the module and its spec."
        ) from e
    expected = spec.outputs[0].sizes(sizes)
    if tuple(output.shape) != expected:
        raise InvalidInput(
            f"{spec.name} cannot be exported: it returns {tuple(output.shape)} where its configuration describes "
            f"{expected}. Write a FILE.py:FACTORY that returns the module and its spec."
        )


def _class(name: str) -> Any:
    try:
        import diffusers
    except ModuleNotFoundError as e:
        raise MissingExtra("diffusers", "diffusers") from e
    kind = getattr(diffusers, name, None) if name.isidentifier() and not name.startswith("_") else None
    if not isinstance(kind, type):
        raise UnknownName("diffusers class", name, [known for known in dir(diffusers) if known.endswith("Model")])
    if not issubclass(kind, diffusers.ModelMixin):
        raise InvalidInput(f"{name} is no model of diffusers. Expected the folder of a denoiser.")
    return kind


# ------------------------------------------------------------------------------------------------------- spec


@dataclass(frozen=True, slots=True)
class _Options:
    """A configuration with the class's defaults behind it."""

    kind: type
    config: Mapping[str, Any]

    def get(self, name: str) -> Any:
        if name in self.config:
            return self.config[name]
        parameter = inspect.signature(self.kind.__init__).parameters.get(name)  # type: ignore[misc]
        return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default

    def size(self, *names: str) -> int | None:
        """The first of the options that is a positive integer."""
        found = (self.get(name) for name in names)
        return next((value for value in found if type(value) is int and value > 0), None)


def derive(kind: type, config: Mapping[str, Any], said: Conventions | None) -> ModelSpec:
    """Inputs, outputs and conventions of a class of diffusers.

    Raises:
        InvalidInput: naming the class and what cannot be derived.
    """
    o, name = _Options(kind, config), kind.__name__
    forward: Any = kind.forward  # type: ignore[attr-defined]
    arguments = {key: value for key, value in inspect.signature(forward).parameters.items() if key != "self"}
    sample = next(iter(arguments), "")
    if sample not in ("sample", "hidden_states") or "timestep" not in arguments:
        raise InvalidInput(
            f"{name} is no denoiser that can be exported: its forward takes {', '.join(arguments)}; expected a sample "
            "(or hidden_states) and a timestep."
        )
    conditions, refused = [], []
    for key, parameter in arguments.items():
        if key in (sample, "timestep"):
            continue
        found = _input(o, key)
        if found is not None:
            conditions.append(found)
        elif not _leaves_out(o, key, parameter):
            refused.append(key)
    if refused:
        raise InvalidInput(
            f"{name} cannot be exported: its forward takes {', '.join(refused)}, and no option of its configuration "
            "says what that is. Write a FILE.py:FACTORY that returns the module and its spec."
        )
    channels = o.size("in_channels")
    if channels is None or o.size("num_frames", "sample_frames", "temporal_patch_size", "patch_size_t") is not None:
        raise InvalidInput(
            f"{name} cannot be exported: its configuration does not describe pictures. Expected in_channels and no "
            "frames; a FILE.py:FACTORY can describe any other input."
        )
    returned = o.size("out_channels") or channels
    if returned < channels:
        raise InvalidInput(
            f"{name} cannot be exported: it takes {channels} channels and returns {returned}, so the others are a "
            "condition, and its configuration does not say which. Write a FILE.py:FACTORY that joins the two inputs."
        )
    height, width = _sample_size(o, name)
    latents = ("batch", channels, height, width)
    inputs = [
        TensorSpec(name=sample, shape=latents, varies=Varies.SAMPLE),
        TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
        *conditions,
    ]
    classes = _classes(o) if any(tensor.name == "class_labels" for tensor in inputs) else None
    flow = name in _FLOWS
    spec = ModelSpec(
        name=name,
        family="diffusers",
        inputs=tuple(inputs),
        outputs=(TensorSpec(name="output", shape=("batch", returned, height, width), varies=Varies.SAMPLE),),
        dims=(BATCH, *([_TOKENS] if any(_TOKENS.name in tensor.shape for tensor in inputs) else [])),
        path=LinearFlow() if flow else VP(),
        prediction=FLOW_PREDICTION if flow else EPSILON,
        num_classes=classes,
        null_class=classes if o.get("norm_type") == "ada_norm_zero" else None,  # its table has one row more
        notes={} if said else {"conventions": "assumed from the class: the folder has no scheduler"},
    )
    return spec if said is None else said.apply(spec)


def _sample_size(o: _Options, name: str) -> tuple[int, int]:
    value = o.get("sample_size")
    sizes = (value, value) if type(value) is int else tuple(value) if isinstance(value, (list, tuple)) else ()
    if len(sizes) != 2 or any(type(size) is not int or size < 1 for size in sizes):
        raise InvalidInput(
            f"{name} cannot be exported: sample_size is {value!r}. Expected the height and width of the sample; add "
            "it to config.json."
        )
    return sizes[0], sizes[1]


def _input(o: _Options, key: str) -> TensorSpec | None:
    """The input that the argument ``key`` is under this configuration, if it is one."""
    if key == "class_labels" and _classes(o) is not None:
        return TensorSpec(name=key, dtype=DType.INT64, shape=("batch",), varies=Varies.PROMPT)
    if key == "guidance" and (o.get("guidance_embeds") or o.get("guidance_embed")):
        return TensorSpec(name=key, shape=("batch",), varies=Varies.PROMPT)
    width = o.size(*_WIDTHS.get(key, ()))
    if width is None:
        return None
    tokens = (_TOKENS.name,) if key == "encoder_hidden_states" else ()
    return TensorSpec(name=key, shape=("batch", *tokens, width), varies=Varies.PROMPT)


def _classes(o: _Options) -> int | None:
    if o.get("class_embed_type") is not None:
        return None
    if o.get("norm_type") in ("ada_norm", "ada_norm_zero"):
        return o.size("num_embeds_ada_norm")
    return o.size("num_class_embeds")


def _leaves_out(o: _Options, key: str, parameter: inspect.Parameter) -> bool:
    if parameter.default is inspect.Parameter.empty:
        return False
    if key in _NEEDED_IF:
        return not any(o.get(option) for option in _NEEDED_IF[key])
    if key == "class_labels":
        return o.get("class_embed_type") is None and not o.get("num_class_embeds")
    return key in _OPTIONAL or key in ("guidance", "encoder_hidden_states", *_WIDTHS)
