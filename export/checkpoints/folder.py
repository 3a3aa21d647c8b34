"""A diffusers folder: our backbone with its weights where we have one, else diffusers' own module."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lehr.engines.graph.weights import WeightSource
from lehr.export.backbones import (
    dit,
    flux,
    hunyuan_dit,
    latent_unet,
    mmdit,
    ncsnpp,
    pixart,
    preset,
    presets,
    sdxl,
    single_stream,
    spacetime_dit,
    unet,
    video_unet,
)
from lehr.export.backbones.preset import Preset
from lehr.export.checkpoints import config as configs
from lehr.export.checkpoints.config import Architecture, NotOurs
from lehr.export.checkpoints.conventions import INDEX, conventions_of, denoiser_folder
from lehr.export.checkpoints.files import Pickles, open_component, open_file
from lehr.export.checkpoints.layouts import DIFFUSERS, layouts, meaning
from lehr.export.checkpoints.mapped import Layout, MappedSource, fit, mapped, shapes
from lehr.export.checkpoints.rules import CopiesDiffer
from lehr.runtime.errors import InvalidInput
from lehr.runtime.paths import VE, VP
from lehr.runtime.prediction import EPSILON, SCORE
from lehr.runtime.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A denoiser read from files.

    Attributes:
        module: ours, on the meta device; or diffusers' own, with its weights.
        weights: under the module's names.
        origin: which weights these are, for people.
        route: ``checkpoint`` or ``diffusers``.
    """

    module: nn.Module
    spec: ModelSpec
    weights: WeightSource
    origin: str
    route: str


def from_folder(folder: Path, *, name: str | None, pickles: Pickles, weights: Path | None = None) -> Checkpoint:
    """Read what ``save_pretrained`` wrote: one module, or a pipeline, of which the denoiser is taken.

    Args:
        folder: with a ``config.json`` or a ``model_index.json``.
        name: the preset it is, which then decides prediction, path and usual sizes.
        pickles: whether pickled weights are read.
        weights: the file to read, where a folder holds several.

    Raises:
        InvalidInput: no such folder, damaged files, weights that are not the configuration's, a preset of another
            architecture, or a class that cannot be exported.
        MissingExtra: the class needs diffusers, which is not installed.
    """
    component = denoiser_folder(folder) if (folder / INDEX).is_file() else folder
    config = configs.read_config(component)
    source = open_component(component, pickles) if weights is None else open_file(weights, pickles)
    try:
        found = configs.architecture(config)
        chosen = _preset(found, name, folder) if name is not None else _described(found, component)
        return _ours(chosen, source, component)
    except (NotOurs, CopiesDiffer) as e:
        if name is not None:
            raise InvalidInput(f"{folder} is not preset {name!r}: {e}. Leave --preset out.") from e
        from lehr.export.checkpoints import diffusers_module

        reason = str(e).partition(". ")[0].rstrip(".")
        module, spec, own = diffusers_module.load(component, config, source)
        return Checkpoint(
            module=module,
            spec=spec,
            weights=own,
            origin=f"weights of {component.name}/, as diffusers' own {config['_class_name']}: {reason}",
            route="diffusers",
        )


def _ours(chosen: Preset, source: WeightSource, component: Path) -> Checkpoint:
    with torch.device("meta"):
        module = chosen.module().eval()
    wanted = shapes(module)
    stored = [layout for layout in layouts(chosen.spec.family, chosen.params) if layout.name == DIFFUSERS]
    layout: Layout = min(stored, key=lambda layout: fit(source, wanted, layout).problems)
    weights: MappedSource = mapped(source, wanted, layout, what=f"{component.name}/{configs.NAME}")
    weights.check_copies()
    return Checkpoint(
        module=module,
        spec=chosen.spec,
        weights=weights,
        origin=f"weights of {component.name}/, read as {chosen.spec.family}",
        route="checkpoint",
    )


# -------------------------------------------------------------------------------------- from config to preset


def _plain(params: Any) -> Any:
    """Params without what a configuration does not decide.

    diffusers' DiT has ways of its own (see ``dit.Params``); Ideogram's two networks have one configuration.
    """
    if isinstance(params, dit.Params):
        return replace(params, frequency_shift=0, norm2_eps=1e-6)
    return replace(params, text=single_stream.Text.JOINED) if isinstance(params, single_stream.Params) else params


def _same(params: Any, other: Any) -> bool:
    return type(params) is type(other) and _plain(params) == _plain(other)


def _preset(found: Architecture, name: str, folder: Path) -> Preset:
    chosen = preset(name)
    if not _same(found.params, chosen.params):
        raise InvalidInput(
            f"{folder} is another architecture than preset {name!r}: {found.params}, expected {chosen.params}. "
            "Leave --preset out; the folder says what it is."
        )
    if isinstance(found.params, single_stream.Params):
        return chosen  # which of the two networks it is, the preset says
    return replace(chosen, params=found.params)


def _described(found: Architecture, component: Path) -> Preset:
    """The module and its spec, after the preset it is where there is one, and with the pipeline's conventions."""
    said = conventions_of(component)
    known = [
        candidate
        for candidate in presets().values()
        if candidate.spec.family == found.family and _same(candidate.params, found.params)
    ]
    sized = [candidate for candidate in known if found.size in (None, _size(candidate.spec))]
    if sized:
        first = sized[0]
        if said is None and any(meaning(other.spec) != meaning(first.spec) for other in sized):
            names = ", ".join(candidate.spec.name for candidate in sized)
            raise InvalidInput(f"{component} fits several presets: {names}. Say which it is with --preset.")
        spec, build = first.spec, first.build
    else:
        spec, build = _SPECS[found.family](known[0].spec.name if known else found.family.replace("_", "-"), found)
    return Preset(params=found.params, build=build, spec=spec if said is None else said.apply(spec))


def _size(spec: ModelSpec) -> int | None:
    return next((dim.default for dim in spec.dims if dim.name == "height"), None)


def _rounded(found: Architecture, usual: int) -> int:
    multiple = int(getattr(found.params, "size_multiple", None) or getattr(found.params, "patch_size", None) or 1)
    return max(multiple, (found.size or usual) // multiple * multiple)


def _spec_unet(name: str, a: Architecture) -> tuple[ModelSpec, Any]:
    return unet.spec(name, a.params, size=_rounded(a, 32), path=VP(), prediction=EPSILON), unet.UNet


def _spec_ncsnpp(name: str, a: Architecture) -> tuple[ModelSpec, Any]:
    path = VE(sigma_max=348.0 if _rounded(a, 32) > 64 else 50.0)  # Song & Ermon 2020: the largest distance in the data
    return ncsnpp.spec(name, a.params, size=_rounded(a, 32), path=path, prediction=SCORE), ncsnpp.NCSNpp


def _spec_latent(name: str, a: Architecture) -> tuple[ModelSpec, Any]:
    path = latent_unet.STABLE_DIFFUSION
    spec = latent_unet.spec(name, a.params, size=_rounded(a, 64), path=path, prediction=EPSILON)
    return spec, latent_unet.LatentUNet


def _spec_sdxl(name: str, a: Architecture) -> tuple[ModelSpec, Any]:
    path = latent_unet.STABLE_DIFFUSION
    return sdxl.spec(name, a.params, size=_rounded(a, 128), path=path, prediction=EPSILON), sdxl.SDXL


def _spec_dit(name: str, a: Architecture) -> tuple[ModelSpec, Any]:
    return dit.spec(name, a.params, size=_rounded(a, 32), path=VP(), prediction=EPSILON), dit.DiT


def _spec_pixart(name: str, a: Architecture) -> tuple[ModelSpec, Any]:
    return pixart.spec(name, a.params, size=_rounded(a, 64)), pixart.PixArt


def _spec_mmdit(name: str, a: Architecture) -> tuple[ModelSpec, Any]:
    size = min(_rounded(a, 128), a.params.pos_embed_max_size * a.params.patch_size)
    return mmdit.spec(name, a.params, size=size), mmdit.MMDiT


def _spec_flux(name: str, a: Architecture) -> tuple[ModelSpec, Any]:
    return flux.spec(name, a.params, text_tokens=512, steps=28), flux.Flux


def _spec_hunyuan(name: str, a: Architecture) -> tuple[ModelSpec, Any]:
    path = hunyuan_dit.PRESETS["hunyuan-dit-1.2"].spec.path
    return hunyuan_dit.spec(name, a.params, size=_rounded(a, 128), path=path), hunyuan_dit.HunyuanDiT


def _spec_spacetime(name: str, a: Architecture) -> tuple[ModelSpec, Any]:
    return spacetime_dit.spec(name, a.params, size=_rounded(a, 64), frames=16), spacetime_dit.Latte


def _spec_single_stream(name: str, a: Architecture) -> tuple[ModelSpec, Any]:
    return single_stream.spec(name, a.params), single_stream.SingleStream


def _spec_video(name: str, a: Architecture) -> tuple[ModelSpec, Any]:
    width = _rounded(a, 128)  # the configuration knows the width alone; the models are trained on 9 : 16 pictures
    multiple = a.params.size_multiple
    height = max(multiple, width * 9 // 16 // multiple * multiple)
    return video_unet.spec(name, a.params, height=height, width=width, frames=14), video_unet.VideoUNet


_SPECS = {
    "dit": _spec_dit,
    "flux": _spec_flux,
    "hunyuan_dit": _spec_hunyuan,
    "latent_unet": _spec_latent,
    "mmdit": _spec_mmdit,
    "ncsnpp": _spec_ncsnpp,
    "pixart": _spec_pixart,
    "sdxl": _spec_sdxl,
    "single_stream": _spec_single_stream,
    "spacetime_dit": _spec_spacetime,
    "unet": _spec_unet,
    "video_unet": _spec_video,
}
