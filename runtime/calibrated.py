"""What ``lehr calibrate`` leaves in a bundle, as far as a device must know: recipes, and whether they still fit.

``calibration/<recipe>/`` holds ``step.onnx``, the quantised step graph, its ``weights.safetensors``, and
``recipe.json``: the recipe, the hashes of what it was made from, the plan and what was chosen for each layer. What was
calibrated of a stage beside the denoiser stands likewise in the stage's folder, its only graph under the same name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import BundleError, InvalidInput, UnknownName
from lehr.runtime.recipe import RECIPES, Recipe
from lehr.runtime.stage import STAGES

CALIBRATED_VERSION = 1
GRAPH, WEIGHTS, RECORD = "step.onnx", "weights.safetensors", "recipe.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """A calibrated recipe in a bundle.

    Attributes:
        recipe: its formats; those of layers that it mixes are among them.
        sources: SHA-256 of the portable graph and weights that it was made from, by file.
        record: all of ``recipe.json``.
        stage: that was calibrated; None for the denoiser.
    """

    recipe: Recipe
    sources: dict[str, str]
    record: dict[str, Any]
    stage: str | None = None


def _results_of(stage: str | None) -> str:
    return "calibration/" if stage is None else f"{STAGES}/{stage}/calibration/"


def calibrated_folder(name: str, stage: str | None = None) -> str:
    """Where the result for a recipe stands in its bundle."""
    return f"{_results_of(stage)}{name}"


def calibrated_names(bundle: Bundle, stage: str | None = None) -> tuple[str, ...]:
    """Recipes that the denoiser or a stage was calibrated for, those of a packed bundle included."""
    start = _results_of(stage)
    found = [name[len(start) :].split("/") for name in bundle.names(start)]
    return tuple(parts[0] for parts in found if len(parts) == 2 and parts[1] == RECORD)


def _again(bundle: Bundle, name: str, stage: str | None) -> str:
    which = "" if stage is None else f" --stage {stage}"
    return f"Run: lehr calibrate {bundle.root.name}{which} --recipe {name}"


def read_calibrated(bundle: Bundle, name: str, stage: str | None = None) -> Calibrated:
    """What calibration left for a recipe, of the denoiser or of a stage.

    Raises:
        InvalidInput: the bundle was not calibrated for it; with the command that does.
        BundleError: what is there is damaged, or of another version.
    """
    again = _again(bundle, name, stage)
    file = f"{calibrated_folder(name, stage)}/{RECORD}"
    if file not in bundle.manifest.files:
        what = bundle.root.name if stage is None else f"stage {stage!r} of {bundle.root.name}"
        raise InvalidInput(f"{what} is not calibrated for recipe {name!r}, which needs scales. {again}")
    data: Any = bundle.read_json(file)
    try:
        if data["version"] != CALIBRATED_VERSION:
            found = f"version {data['version']}, expected {CALIBRATED_VERSION}"
            raise BundleError(f"the calibration of recipe {name!r} has {found}. {again}")
        recipe = Recipe.from_json(data["recipe"])
        sources = {str(key): str(value) for key, value in data["sources"].items()}
        if recipe.name != name or not (recipe.calibrated or recipe.schedule):
            raise ValueError(f"its recipe is {recipe.name!r}")
    except (KeyError, TypeError, ValueError, AttributeError, InvalidInput) as e:
        raise BundleError(f"the calibration of recipe {name!r} in {bundle.root.name} is damaged ({e}). {again}") from e
    return Calibrated(recipe=recipe, sources=sources, record=data, stage=stage)


def check_current(bundle: Bundle, calibrated: Calibrated) -> None:
    """Refuse a calibration of another graph, other weights, or an older version of the recipe.

    Raises:
        InvalidInput: with the command that calibrates again.
    """
    name = calibrated.recipe.name
    again = _again(bundle, name, calibrated.stage)
    for file, digest in calibrated.sources.items():
        entry = bundle.manifest.known_files.get(file)
        if entry is None or entry.sha256 != digest:
            raise InvalidInput(f"{file} has changed since {bundle.root.name} was calibrated for {name!r}. {again}")
    shipped = RECIPES.get(name)
    if shipped is not None and shipped.version != calibrated.recipe.version:
        raise InvalidInput(
            f"recipe {name!r} has version {shipped.version}, and {bundle.root.name} was calibrated for version "
            f"{calibrated.recipe.version}. {again}"
        )


def recipe_of(bundle: Bundle, name: str, stage: str | None = None) -> Recipe:
    """The recipe called ``name``: as the denoiser or a stage was calibrated for it, else as it is shipped.

    Raises:
        UnknownName: neither; with the closest match.
        BundleError: what the bundle holds of it is damaged.
    """
    own = calibrated_names(bundle, stage)
    if name in own:
        return read_calibrated(bundle, name, stage).recipe
    if name not in RECIPES:
        raise UnknownName("recipe", name, {*RECIPES, *own})
    return RECIPES[name]
