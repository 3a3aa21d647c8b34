"""What a denoiser takes and returns: one description for export, engines, run-time checks and feeds.

A :class:`TensorSpec` names one tensor as diffusers names it and says what it varies with; a
:class:`ModelSpec` gathers the tensors of a denoiser with its path and prediction. Both are plain data
and travel in the bundle's manifest as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import InvalidInput
from lehr.runtime.paths import Path, path_from_json
from lehr.runtime.prediction import Prediction
from lehr.runtime.sizes import MAX_ELEMENTS, MAX_EXPRESSION, size_of


class DType(str, Enum):
    """Element types that cross an engine's boundary."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT64 = "int64"
    INT32 = "int32"
    BOOL = "bool"

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.value)


class Varies(str, Enum):
    """How often an input changes, from never to every step (``docs/design.md``, "rate")."""

    CONSTANT = "constant"
    PROMPT = "prompt"  # fixed during one loop: class, text, guidance, ids
    TIMESTEP = "timestep"
    SAMPLE = "sample"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dim:
    """A named size that may differ from call to call: ``multiple`` divides it, ``min <= size <= max``."""

    name: str
    default: int
    min: int = 1
    max: int = 4096
    multiple: int = 1

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise InvalidInput(f"dimension name {self.name!r} must be an identifier, such as 'height'")
        if not 1 <= self.min <= self.default <= self.max:
            raise InvalidInput(
                f"dimension {self.name!r} needs 1 <= min <= default <= max, got {self.min}, {self.default}, {self.max}"
            )
        if self.multiple < 1 or self.default % self.multiple:
            raise InvalidInput(f"dimension {self.name!r}: default {self.default} is no multiple of {self.multiple}")

    def check(self, size: int, where: str) -> None:
        """Raise :class:`InvalidInput` unless ``size`` is allowed."""
        if not self.min <= size <= self.max or size % self.multiple:
            rule = f"between {self.min} and {self.max}" + (
                f", a multiple of {self.multiple}" if self.multiple > 1 else ""
            )
            raise InvalidInput(f"{where}: {self.name} is {size}, expected {rule}.")


BATCH = Dim(name="batch", default=2, max=1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One input or output. ``shape`` mixes fixed sizes with names of :class:`Dim`.

    A size may also be an expression of such names, as ``"height/2"``: a multiple or a share of a dimension that an
    earlier input has by its name. Between the graphs of one model any expression may stand, ``"height*width/4"``.
    """

    name: str
    dtype: DType = DType.FLOAT32
    shape: tuple[int | str, ...]
    varies: Varies

    def __post_init__(self) -> None:
        for size in self.shape:
            if isinstance(size, int) and not 1 <= size <= MAX_ELEMENTS:
                raise InvalidInput(f"{self.name!r}: size {size} in shape {self.shape} must be positive")

    def sizes(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """Concrete shape for sizes given by name; raises KeyError for a size that they do not give."""
        found = [size_of(size, dims) if isinstance(size, str) else size for size in self.shape]
        if None in found:
            raise KeyError(self.shape[found.index(None)])
        return tuple(size for size in found if size is not None)

    @property
    def batched(self) -> bool:
        """Whether the first dimension counts samples."""
        return self.shape[:1] == ("batch",)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype.value, "shape": list(self.shape), "varies": self.varies.value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorSpec:
        shape = tuple(size if isinstance(size, str) else int(size) for size in data["shape"])
        return cls(name=str(data["name"]), dtype=DType(data["dtype"]), shape=shape, varies=Varies(data["varies"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSpec:
    """What one graph of a model takes and returns: the whole denoiser's signature, or a part's.

    A part is fed by name: with the model's inputs, with what earlier parts return, and with ``"<input>.shape"``, the
    shape of an input as int64.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def to_json(self) -> dict[str, Any]:
        return {"inputs": [t.to_json() for t in self.inputs], "outputs": [t.to_json() for t in self.outputs]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GraphSpec:
        """Rebuild; raises InvalidInput, KeyError, TypeError or ValueError for data of another shape."""
        inputs, outputs = (tuple(TensorSpec.from_json(t) for t in data[key]) for key in ("inputs", "outputs"))
        return cls(inputs=inputs, outputs=outputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a model draws well when the caller names nothing; ``sampler`` None is the path's default sampler."""

    sampler: str | None = None
    num_inference_steps: int = 20
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1 or not math.isfinite(self.guidance_scale):
            raise InvalidInput(f"sampling defaults need steps >= 1 and a finite guidance scale, got {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A denoiser's contract.

    ``inputs[0]`` is the sample x_t and ``inputs[1]`` the timestep, a (B,) tensor holding what ``path`` calls
    the timestep. ``outputs[0]`` is the prediction; it may have more channels than the sample (learned variance),
    then the first ones are the prediction. Inputs are batched, but for constants and conditions that all samples of
    a batch share (FLUX's position ids).

    Attributes:
        name: what the bundle's model is called.
        family: backbone family, or "user".
        path: x_t = alpha_t x_0 + sigma_t eps, and how timesteps number the noise levels.
        prediction: what the network outputs.
        num_classes: for class-conditional models, labels are 0 … num_classes - 1.
        null_class: the label that means "no class", what classifier-free guidance subtracts; None if there is none.
        value_range: of x_0, for pictures; (-1, 1) as a rule.
        sampling: defaults of ``lehr run``.
    """

    name: str
    family: str = "user"
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: tuple[Dim, ...] = (BATCH,)
    path: Path
    prediction: Prediction
    num_classes: int | None = None
    null_class: int | None = None
    value_range: tuple[float, float] = (-1.0, 1.0)
    sampling: Sampling = Sampling()
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.inputs) < 2 or not self.outputs:
            raise InvalidInput("a denoiser needs at least a sample and a timestep as inputs, and one output")
        if self.inputs[0].varies is not Varies.SAMPLE or self.inputs[1].varies is not Varies.TIMESTEP:
            raise InvalidInput(
                f"inputs must start with the sample and the timestep, got {[i.name for i in self.inputs]} "
                f"varying with {[i.varies.value for i in self.inputs]}"
            )
        names = [tensor.name for tensor in (*self.inputs, *self.outputs)]
        if len(set(names)) != len(names):
            raise InvalidInput(f"tensor names must differ, got {names}")
        declared = {dim.name for dim in self.dims}
        unknown = undeclared((*self.inputs, *self.outputs), declared)
        if unknown:
            raise InvalidInput(f"shapes use {unknown} but dims declare only {sorted(declared)}")
        if (self.num_classes is not None) != any(tensor.name == "class_labels" for tensor in self.inputs):
            raise InvalidInput("num_classes and an input named class_labels come together")
        for tensor in self.inputs:
            shared = tensor.varies in (Varies.CONSTANT, Varies.PROMPT) and "batch" not in tensor.shape
            if tensor.shape[:1] != ("batch",) and not shared:
                raise InvalidInput(
                    f"input {tensor.name!r} of shape {tensor.shape} must have 'batch' as its first dimension; "
                    "only one that is constant or fixed by the prompt may be shared by the batch, without it"
                )

    # ------------------------------------------------------------------------------------------ shapes and feeds

    @property
    def signature(self) -> GraphSpec:
        """Of the whole denoiser as one graph."""
        return GraphSpec(inputs=self.inputs, outputs=self.outputs)

    @property
    def sample(self) -> TensorSpec:
        return self.inputs[0]

    @property
    def timestep(self) -> TensorSpec:
        return self.inputs[1]

    @property
    def conditions(self) -> tuple[TensorSpec, ...]:
        return self.inputs[2:]

    @property
    def fixed(self) -> tuple[TensorSpec, ...]:
        """The conditions that stay as they are while a loop runs; the others are made anew at every evaluation."""
        return tuple(tensor for tensor in self.conditions if tensor.varies is not Varies.SAMPLE)

    def dim(self, name: str) -> Dim:
        return next(dim for dim in self.dims if dim.name == name)

    def default_sizes(self, **sizes: int) -> dict[str, int]:
        """Every dimension's default, with those in ``sizes`` replaced."""
        return {dim.name: dim.default for dim in self.dims} | sizes

    def sample_shape(self, batch: int, **sizes: int) -> tuple[int, ...]:
        return self.sample.sizes(self.default_sizes(batch=batch, **sizes))

    def check_feeds(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, int]:
        """Hold feeds against the spec; return the dimensions they bind.

        Raises:
            InvalidInput: a missing or unknown input, a wrong dtype or rank, a size that breaks a rule, two
                inputs that disagree on a size, or a class label out of range.
        """
        expected = {tensor.name: tensor for tensor in self.inputs}
        if set(feeds) != set(expected):
            missing, extra = sorted(set(expected) - set(feeds)), sorted(set(feeds) - set(expected))
            raise InvalidInput(
                f"{self.name}: inputs missing {missing}, unexpected {extra}; expected {list(expected)}. "
                "Conditions other than classes are arrays, given in Python: Request(conditions={NAME: array})."
            )
        bound: dict[str, int] = {}
        for name, tensor in expected.items():
            bind_shape(tensor, feeds[name], self.dims, bound)
        if self.num_classes is not None:
            check_labels(feeds["class_labels"], self.num_classes, self.null_class)
        return bound

    def check_outputs(self, outputs: Mapping[str, npt.NDArray[Any]], bound: Mapping[str, int]) -> None:
        """Assert the shapes an engine returned; a baked-in size shows up here and nowhere else.

        Raises:
            InvalidInput: an output is missing or its shape is not the spec's.
        """
        for tensor in self.outputs:
            expected = tensor.sizes(bound)
            if tensor.name not in outputs or outputs[tensor.name].shape != expected:
                got = outputs[tensor.name].shape if tensor.name in outputs else "nothing"
                raise InvalidInput(f"{self.name}: output {tensor.name!r} has shape {got}, expected {expected}.")

    # -------------------------------------------------------------------------------------------------- JSON

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "family": self.family,
            "inputs": [tensor.to_json() for tensor in self.inputs],
            "outputs": [tensor.to_json() for tensor in self.outputs],
            "dims": [
                {"name": d.name, "default": d.default, "min": d.min, "max": d.max, "multiple": d.multiple}
                for d in self.dims
            ],
            "path": self.path.to_json(),
            "prediction": self.prediction.to_json(),
            "num_classes": self.num_classes,
            "null_class": self.null_class,
            "value_range": list(self.value_range),
            "sampling": asdict(self.sampling),
            "notes": dict(self.notes),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Rebuild a spec; raises InvalidInput, KeyError, TypeError or ValueError for data of another shape."""
        low, high = data["value_range"]
        return cls(
            name=str(data["name"]),
            family=str(data["family"]),
            inputs=tuple(TensorSpec.from_json(item) for item in data["inputs"]),
            outputs=tuple(TensorSpec.from_json(item) for item in data["outputs"]),
            dims=tuple(Dim(**item) for item in data["dims"]),
            path=path_from_json(data["path"]),
            prediction=Prediction.from_json(data["prediction"]),
            num_classes=None if data["num_classes"] is None else int(data["num_classes"]),
            null_class=None if data["null_class"] is None else int(data["null_class"]),
            value_range=(float(low), float(high)),
            sampling=Sampling(**data["sampling"]),
            notes={str(k): str(v) for k, v in data["notes"].items()},
        )


def undeclared(tensors: Iterable[TensorSpec], declared: Collection[str]) -> list[str]:
    """Sizes that are neither declared dimensions nor expressions of them, such as "height/2"."""
    ones = dict.fromkeys(declared, MAX_EXPRESSION)  # a value of which no quotient is 0
    sizes = {size for tensor in tensors for size in tensor.shape if isinstance(size, str)}
    return sorted(size for size in sizes if size_of(size, ones) is None)


def bind_shape(tensor: TensorSpec, array: npt.NDArray[Any], dims: tuple[Dim, ...], bound: dict[str, int]) -> None:
    """Check one array against its spec and record in ``bound`` the sizes it fixes."""
    if array.dtype != tensor.dtype.numpy:
        raise InvalidInput(f"input {tensor.name!r} is {array.dtype}, expected {tensor.dtype.value}.")
    if array.ndim != len(tensor.shape):
        raise InvalidInput(f"input {tensor.name!r} has shape {array.shape}, expected {tensor.shape}.")
    by_name = {dim.name: dim for dim in dims}
    for size, declared in zip(array.shape, tensor.shape, strict=True):
        if declared in by_name:
            by_name[str(declared)].check(size, f"input {tensor.name!r}")
            if bound.setdefault(str(declared), size) != size:
                raise InvalidInput(f"input {tensor.name!r}: {declared} is {size}, other inputs have {bound[declared]}.")
        elif size != (size_of(declared, bound) if isinstance(declared, str) else declared):
            raise InvalidInput(f"input {tensor.name!r} has shape {array.shape}, expected {tensor.shape}.")
    if math.prod(array.shape) > MAX_ELEMENTS:
        raise InvalidInput(f"input {tensor.name!r} has {math.prod(array.shape)} elements, at most {MAX_ELEMENTS}.")


def check_labels(labels: npt.NDArray[Any], num_classes: int, null_class: int | None) -> None:
    """Raise :class:`InvalidInput` for a label that the table does not hold; engines would read out of bounds."""
    allowed = (labels >= 0) & (labels < num_classes)
    if null_class is not None:
        allowed |= labels == null_class
    if not bool(np.all(allowed)):
        bad = sorted({int(label) for label in labels[~allowed]})
        raise InvalidInput(f"class label {bad[0]} is out of range; the model knows 0 to {num_classes - 1}.")
