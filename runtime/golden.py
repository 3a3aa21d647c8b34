"""Golden data: the eager side of parity, recorded at export, read where the engine runs.

Tier ``steps`` holds single evaluations at several timesteps; tier ``full`` adds whole loops. Both carry their own
inputs, so that reading them back needs neither PyTorch nor an equal random generator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.bundle import Bundle, Edit
from lehr.runtime.calibrated import calibrated_names, read_calibrated
from lehr.runtime.errors import BundleError
from lehr.runtime.recipe import RECIPES
from lehr.runtime.solver_table import SolverTable

Array = npt.NDArray[Any]

STEPS_FILE = "golden/steps.npz"
INDEX_FILE = "golden/golden.json"


class Tier(str, Enum):
    """How much eager data a bundle carries."""

    NONE = "none"
    STEPS = "steps"
    FULL = "full"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsGolden:
    """K evaluations along one eager trajectory.

    Attributes:
        timesteps, alphas, sigmas: (K,) float64.
        inputs: (K, B, C, …) what the network saw.
        outputs: (K, B, C, …) its prediction in float32.
        conditions: name -> (B, …), the same at every timestep.
    """

    timesteps: Array
    alphas: Array
    sigmas: Array
    inputs: Array
    outputs: Array
    conditions: Mapping[str, Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One eager loop.

    Attributes:
        name: of the case.
        table: the solver table it ran.
        guidance_scale: w; 1 without guidance.
        conditions, unconditional: name -> (B, …); the second is empty without guidance.
        x_T: (B, C, …) starting sample.
        inputs: (N, B, C, …) what the network saw at every evaluation.
        final: (B, C, …).
        seed: that ``x_T`` was drawn from, sample k of it being sample k; None in bundles that did not record it.
    """

    name: str
    table: SolverTable
    guidance_scale: float
    conditions: Mapping[str, Array]
    unconditional: Mapping[str, Array]
    x_T: Array
    inputs: Array
    final: Array
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """How far eager itself moves in another format: (K,) score errors, and the worst loop; or why it cannot run.

    ``psnr_db`` and ``snr_db`` are None in tier ``steps``. A ``stated`` one is no measurement but what a quantised
    recipe is allowed, which holds as it is: eager has no such format to measure.
    """

    rel_error: tuple[float, ...] = ()
    psnr_db: float | None = None
    snr_db: float | None = None
    unavailable: str | None = None
    stated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """All of a bundle's golden data; ``floors`` maps a format ("fp16", "bf16", "fp64") to eager's own error in it."""

    tier: Tier
    steps: StepsGolden
    trajectories: tuple[Trajectory, ...]
    floors: Mapping[str, Floor]


# ------------------------------------------------------------------------------------------------ write and read


def write(edit: Edit, golden: Golden) -> None:
    """Add golden data and its solver tables to a bundle."""
    s = golden.steps
    arrays = {"timesteps": s.timesteps, "alphas": s.alphas, "sigmas": s.sigmas, "inputs": s.inputs}
    arrays |= {"outputs": s.outputs} | {f"condition.{name}": value for name, value in s.conditions.items()}
    edit.add_arrays(STEPS_FILE, arrays)
    cases: list[dict[str, Any]] = []
    for t in golden.trajectories:
        table = f"tables/{t.table.sampler}-{len(t.table)}.npz"
        edit.add_bytes(table, t.table.to_bytes())
        arrays = {"x_T": t.x_T, "inputs": t.inputs, "final": t.final}
        arrays |= {f"condition.{name}": value for name, value in t.conditions.items()}
        arrays |= {f"unconditional.{name}": value for name, value in t.unconditional.items()}
        edit.add_arrays(f"golden/{t.name}.npz", arrays)
        cases.append({"name": t.name, "table": table, "guidance_scale": t.guidance_scale, "seed": t.seed})
    floors = {
        name: {
            "rel_error": list(floor.rel_error),
            "psnr_db": floor.psnr_db,
            "snr_db": floor.snr_db,
            "unavailable": floor.unavailable,
        }
        for name, floor in golden.floors.items()
        if not floor.stated
    }
    edit.add_json(INDEX_FILE, {"tier": golden.tier.value, "trajectories": cases, "floors": floors})


def read(bundle: Bundle) -> Golden:
    """Load a bundle's golden data.

    Raises:
        BundleError: there is none, or it is damaged.
    """
    if INDEX_FILE not in bundle.manifest.files:
        raise BundleError(
            f"{bundle.root.name} holds no golden data, so nothing can be compared. "
            "Export it again with --golden steps or --golden full."
        )
    index = bundle.read_json(INDEX_FILE)
    try:
        arrays = bundle.read_arrays(STEPS_FILE)
        conditions = _prefixed(arrays, "condition.")
        steps = StepsGolden(**{name: value for name, value in arrays.items() if "." not in name}, conditions=conditions)
        trajectories = tuple(_read_trajectory(bundle, case) for case in index["trajectories"])
        floors = {
            str(name): Floor(**{**floor, "rel_error": tuple(floor["rel_error"])})
            for name, floor in index["floors"].items()
        }
        floors |= _stated(bundle, len(steps.timesteps)) | _borrowed(bundle, floors)
        return Golden(tier=Tier(index["tier"]), steps=steps, trajectories=trajectories, floors=floors)
    except (KeyError, TypeError, ValueError) as e:
        raise BundleError(f"the golden data of {bundle.root.name} is damaged: {e}. Export the model again.") from e


def _stated(bundle: Bundle, timesteps: int) -> dict[str, Floor]:
    """What quantised recipes are allowed: those that are shipped, and those that the bundle was calibrated for."""
    known = {name: recipe for name, recipe in RECIPES.items() if recipe.calibrated}
    known |= {name: read_calibrated(bundle, name).recipe for name in calibrated_names(bundle)}
    return {
        name: Floor(rel_error=(float(recipe.rel_error),) * timesteps, psnr_db=recipe.psnr_db, stated=True)
        for name, recipe in known.items()
        if recipe.rel_error is not None
    }


def _borrowed(bundle: Bundle, floors: Mapping[str, Floor]) -> dict[str, Floor]:
    """Floors of recipes that are no format and state no loss: that of their format in which eager errs most."""
    found: dict[str, Floor] = {}
    recipes = {name: read_calibrated(bundle, name).recipe for name in calibrated_names(bundle)}
    for name, made in {**RECIPES, **recipes}.items():
        if made.rel_error is None and (name not in {*floors, "fp32"} or name in recipes):
            formats = {form.value for form in made.computes}
            known = [floors[form] for form in sorted(formats) if form in floors]
            measured = [floor for floor in known if floor.rel_error] or known
            if measured:
                found[name] = max(measured, key=lambda floor: max(floor.rel_error, default=0.0))
    return found


def _read_trajectory(bundle: Bundle, case: Mapping[str, Any]) -> Trajectory:
    arrays = bundle.read_arrays(f"golden/{case['name']}.npz")
    return Trajectory(
        name=str(case["name"]),
        table=SolverTable.from_arrays(bundle.read_arrays(case["table"])),
        guidance_scale=float(case["guidance_scale"]),
        conditions=_prefixed(arrays, "condition."),
        unconditional=_prefixed(arrays, "unconditional."),
        x_T=np.asarray(arrays["x_T"]),
        inputs=np.asarray(arrays["inputs"]),
        final=np.asarray(arrays["final"]),
        seed=None if case.get("seed") is None else int(case["seed"]),
    )


def _prefixed(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {name[len(prefix) :]: value for name, value in arrays.items() if name.startswith(prefix)}
