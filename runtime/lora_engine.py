"""LoRAs in an engine that is loaded, without building it again.

Which libraries can: ONNX Runtime takes other values for the initialisers of a saved graph, and a TensorRT plan without
weights is refitted with changed ones. Others compile weights into their engine; they are refused with the commands that
merge instead. Nothing on disk changes, so a model loaded without LoRAs is what it was, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import IncompatibleEngine, InvalidInput
from lehr.runtime.lora import Applied, changed_weights, merged
from lehr.runtime.lora_onnx import Initializer, find, initializers
from lehr.runtime.refit import CHANGED, TensorFile, rounded

Array = npt.NDArray[Any]

OVERLAY = "overlay"  # options of a plan: element type and values for each of its initialisers that has others


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """A stored weight before and after, in its own shape and element type; bfloat16 as its bits."""

    kind: str
    before: Array
    after: Array


def changed(
    weights: Path, applied: Sequence[Applied], component: str, names: Iterable[str] | None = None
) -> dict[str, Changed]:
    """What LoRAs make of a component's stored weights, by name; of those among ``names``, if they are given.

    A weight keeps the element type that it is stored in, as it does where it is merged at export.

    Raises:
        InvalidInput: an adapter of another model.
        BundleError: damaged weights.
    """
    file = TensorFile(weights)
    known, updates = set(file.names()), changed_weights(applied, component)
    if unknown := sorted(set(updates) - known):
        raise InvalidInput(
            f"a LoRA changes {unknown[0]!r} of the {component}, which {weights.name} does not hold. "
            "It was converted for another model: convert it for this one with lehr lora."
        )
    found = {}
    for name in updates if names is None else [name for name in names if name in updates]:
        kind, shape = file.kind(name), file.shape(name)
        before = file.read(name, kind).reshape(shape)
        values = before if kind == "float64" else file.read(name, "float32").reshape(shape)
        after = merged(values, updates[name], name)
        wide = "float64" if after.dtype == np.float64 else "float32"
        found[name] = Changed(kind=kind, before=before, after=after if wide == kind else rounded(after, wide, kind))
    return found


def with_loras(
    options: Mapping[str, Any],
    applied: Sequence[Applied],
    component: str,
    *,
    library: str,
    graph: Path,
    plan: Path,
    weights: Path,
    rebuild: str,
) -> Mapping[str, Any]:
    """Options with which a plan is loaded so that it computes with LoRAs.

    Args:
        options: the plan's own, its files located.
        applied: the LoRAs.
        component: whose plan it is: "denoiser" or a stage's name.
        library: the engine library.
        graph: the portable graph of the plan.
        plan: the compiled one.
        weights: the stored weights.
        rebuild: the command that builds the engine.

    Raises:
        InvalidInput: a LoRA of another model.
        IncompatibleEngine: the library cannot, or the engine does not hold a changed weight as such.
    """
    portable = initializers(graph)
    here = changed(weights, applied, component, portable)
    if not here:
        return options
    if "refit" in options:
        return {**options, "refit": {**options["refit"], CHANGED: _refitted(options["refit"], here, plan, rebuild)}}
    if library == "onnxruntime":
        return {**options, OVERLAY: _overlay(here, portable, plan, weights, rebuild)}
    raise IncompatibleEngine(
        f"{library} compiles the weights into its engine, so a LoRA cannot be put into {plan.name} while it is loaded. "
        f"Merge it: lehr export SOURCE --lora FILE:SCALE -o NAME.lehr, then {rebuild}"
    )


def _refitted(
    sources: Mapping[str, Any], here: Mapping[str, Changed], plan: Path, rebuild: str
) -> dict[str, tuple[str, Array]]:
    rows = sources["tensors"].values()
    stored = {row["key"] for row in rows if row["in"] == "stored"}
    if missing := sorted(set(here) - stored):
        raise _folded(plan, missing[0], rebuild)
    return {name: (change.kind, change.after.reshape(-1)) for name, change in here.items()}


def _overlay(
    here: Mapping[str, Changed],
    stored: Mapping[str, Initializer],
    plan: Path,
    weights: Path,
    rebuild: str,
) -> dict[str, tuple[str, Array]]:
    compiled = initializers(plan)
    read = cache(lambda name: compiled[name].read())
    file = TensorFile(weights)
    overlay: dict[str, tuple[str, Array]] = {}
    for name, change in here.items():
        found = find(change.before, change.kind, compiled, read)
        twins = [other for other in stored if other != name and _same(change, other, stored[other], file)]
        if twins and name in found:  # weights of one content are told apart by name, where the engine kept it
            found = {name: found[name]}
        elif twins:
            found = {key: layout for key, layout in found.items() if key.startswith(f"{name.removesuffix('.weight')}/")}
        if not found:
            raise _folded(plan, name, rebuild)
        for key, layout in found.items():
            kind = compiled[key].kind
            after = change.after if kind == change.kind else rounded(change.after, change.kind, kind)
            values = layout(after).reshape(compiled[key].shape)
            overlay[key] = kind, np.ascontiguousarray(values)
    return overlay


def _same(change: Changed, other: str, initializer: Initializer, file: TensorFile) -> bool:
    """Whether another stored weight has the content of this one."""
    if initializer.shape != change.before.shape or file.kind(other) != change.kind:
        return False
    return np.array_equal(file.read(other, change.kind), change.before.reshape(-1))


def _folded(plan: Path, name: str, rebuild: str) -> IncompatibleEngine:
    return IncompatibleEngine(
        f"{plan.name} does not hold the weight {name!r} as it is stored: the engine library folded it into something "
        "else, or the recipe rounds it to integers. Merge the LoRA instead: "
        f"lehr export SOURCE --lora FILE:SCALE -o NAME.lehr, then {rebuild}"
    )
