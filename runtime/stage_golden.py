"""Golden data of a stage: inputs, what eager PyTorch makes of them, and how far eager moves in other formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.bundle import Bundle, Edit
from lehr.runtime.errors import BundleError
from lehr.runtime.stage import StageSpec

Array = npt.NDArray[Any]

NAME = "golden.npz"
_INPUT, _OUTPUT, _FLOOR = "input.", "output.", "floor."


@dataclass(frozen=True, slots=True, kw_only=True)
class StageGolden:
    """One evaluation of a stage.

    Attributes:
        inputs: by name, as the stage's spec has them.
        outputs: by name, of eager in float32.
        floors: format ("fp16", "bf16") -> output -> relative error of eager in that format; a format that eager cannot
            run in, or overflows in, is not there.
    """

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    floors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def write_stage_golden(edit: Edit, spec: StageSpec, golden: StageGolden) -> str:
    """Add a stage's golden data to a bundle and return the file's name."""
    arrays: dict[str, Array] = {f"{_INPUT}{name}": value for name, value in golden.inputs.items()}
    arrays |= {f"{_OUTPUT}{name}": value for name, value in golden.outputs.items()}
    for form, errors in golden.floors.items():
        arrays |= {f"{_FLOOR}{form}.{name}": np.array(error, np.float64) for name, error in errors.items()}
    name = f"{spec.folder}/{NAME}"
    edit.add_arrays(name, arrays)
    return name


def read_stage_golden(bundle: Bundle, stage: str) -> StageGolden:
    """The golden data of a stage.

    Raises:
        UnknownName: no such stage.
        BundleError: none recorded, or damaged: other inputs or outputs than the stage has.
    """
    entry = bundle.manifest.stage(stage)
    if entry.golden is None or entry.golden not in bundle.manifest.files:
        raise BundleError(
            f"{bundle.root.name} holds no golden data of stage {stage!r}, so nothing can be compared. "
            "Export it again with --golden steps, or pack it with --golden."
        )
    arrays = bundle.read_arrays(entry.golden)
    floors: dict[str, dict[str, float]] = {}
    for key, value in arrays.items():
        if key.startswith(_FLOOR):
            form, _, name = key[len(_FLOOR) :].partition(".")
            floors.setdefault(form, {})[name] = float(value) if value.shape == () else float("nan")
    golden = StageGolden(
        inputs={name[len(_INPUT) :]: value for name, value in arrays.items() if name.startswith(_INPUT)},
        outputs={name[len(_OUTPUT) :]: value for name, value in arrays.items() if name.startswith(_OUTPUT)},
        floors=floors,
    )
    outputs = {tensor.name for tensor in entry.spec.outputs}
    whole = {tensor.name for tensor in entry.spec.inputs} == set(golden.inputs) and outputs == set(golden.outputs)
    if not whole or any(set(floor) != outputs for floor in floors.values()):
        raise BundleError(
            f"the golden data of stage {stage!r} in {bundle.root.name} is damaged: its tensors are {sorted(arrays)}. "
            "Export the model again."
        )
    return golden
