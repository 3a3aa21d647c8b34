"""How one layer is quantised, as values. The type of a configuration chooses what rewrites the layer.

Everything but :data:`ZeroPoint.OWN` is symmetric around zero: TensorRT takes nothing else, and a CPU's unsigned
activations are the same numbers shifted by 128 (:mod:`lehr.engines.graph.lowering.unsigned`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any

from lehr.runtime.errors import InvalidInput, UnknownName
from lehr.runtime.recipe import QUANTISED, Format

INT4_BLOCK = 32  # the smallest that ONNX Runtime's and TensorRT's kernels take
NVFP4_BLOCK = 16  # by definition of the format
ALPHAS = tuple(round(0.05 * k, 2) for k in range(20))  # shares of an outlier that weights may be given


class Range(str, Enum):
    """How the largest number that a scale represents is chosen; all but the first clip what lies beyond.

    Clipping serves images worse than its own error says: what is rare in the data is not rare where it matters. On both
    reference models MIN_MAX gives the better final samples (docs/quantisation.md).
    """

    MIN_MAX = "min-max"
    PERCENTILE = "percentile"  # 99.99 % of the magnitudes
    MSE = "mse"  # least mean squared error of rounding and clipping together
    ENTROPY = "entropy"  # least divergence between the histogram and its quantised one


class ZeroPoint(str, Enum):
    """Where the integers of an activation have their zero."""

    CENTRE = "centre"  # in the middle, which every engine library takes
    OWN = "own"  # where the range needs it: SiLU's results reach from -0.28 to 5, and lose a bit with the other


class Rounding(str, Enum):
    """How weights are rounded."""

    NEAREST = "nearest"
    GPTQ = "gptq"  # each column makes up for the errors of those before it (arXiv:2210.17323)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """The layer computes as before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightOnly:
    """The weight is stored in few bits, and the layer computes as before.

    Attributes:
        format: INT8, FP8, INT4 or NVFP4.
        block: consecutive input channels that share a scale; None is one scale for each output channel. NVFP4 has 16.
        alphas: exponents tried for scaling input channels by what the activations make of them (AWQ,
            arXiv:2306.00978); empty for none.
        rounding: of the weight.
    """

    format: Format = Format.INT8
    block: int | None = None
    alphas: tuple[float, ...] = ()
    rounding: Rounding = Rounding.NEAREST

    def __post_init__(self) -> None:
        _hold(self.format in QUANTISED - {Format.UINT8}, self, f"{self.format.value} is no quantised format of weights")
        _hold(self.block is None or self.block >= NVFP4_BLOCK, self, f"block is {self.block}, expected 16 or more")
        if self.format is Format.NVFP4:
            _hold(self.block in (None, NVFP4_BLOCK), self, f"block is {self.block}; nvfp4 has blocks of {NVFP4_BLOCK}")
        _hold(self.format is not Format.FP8 or self.block is None, self, "fp8 has no blocks")
        _check_alphas(self, self.alphas)


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8:
    """Weight and activation in 8 bits, the product in integers. Of attention both products.

    Attributes:
        activation: how the activation's range is chosen.
        zero: of the activation, or of attention's probabilities; weights, queries, keys and values are symmetric.
        alphas: exponents tried for moving outliers from the activation into the weight (SmoothQuant,
            arXiv:2211.10438), the best by predicted error is taken; empty for none.
        rounding: of the weight.
    """

    activation: Range = Range.MIN_MAX
    zero: ZeroPoint = ZeroPoint.CENTRE
    alphas: tuple[float, ...] = ()
    rounding: Rounding = Rounding.NEAREST

    def __post_init__(self) -> None:
        _check_alphas(self, self.alphas)


@dataclass(frozen=True, slots=True, kw_only=True)
class Float8:
    """Weight and activations in E4M3. Of attention both products and the softmax between them.

    Attributes:
        activation: how the activation's range is chosen; E4M3 rounds relatively, so the largest number fits best.
        rounding: of the weight, if there is one.
    """

    activation: Range = Range.MIN_MAX
    rounding: Rounding = Rounding.NEAREST


@dataclass(frozen=True, slots=True, kw_only=True)
class Float4(WeightOnly):
    """The weight in NVFP4: E2M1 in blocks of 16, whose scales are E4M3 beneath one scale of the tensor."""

    format: Format = Format.NVFP4
    block: int | None = NVFP4_BLOCK


Config = Keep | WeightOnly | Int8 | Float8 | Float4
CONFIGS: dict[str, type[Config]] = {kind.__name__: kind for kind in (Keep, WeightOnly, Int8, Float8, Float4)}


def formats_of(config: Config) -> tuple[Format | None, Format | None]:
    """What the weight is stored in and what the product computes in; None for as before."""
    if isinstance(config, WeightOnly):
        return config.format, None
    if isinstance(config, Int8):
        return Format.INT8, Format.INT8
    if isinstance(config, Float8):
        return Format.FP8, Format.FP8
    return None, None


def rounds_together(config: Config) -> bool:
    """Whether the weight's rounding needs the products of the layer's inputs."""
    return not isinstance(config, Keep) and config.rounding is Rounding.GPTQ


def to_nearest(config: Config) -> Config:
    """The same with every number of the weight rounded by itself."""
    if isinstance(config, Keep) or config.rounding is Rounding.NEAREST:
        return config
    return replace(config, rounding=Rounding.NEAREST)


def config_to_json(config: Config) -> dict[str, Any]:
    """What :func:`config_from_json` reads."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return {"type": type(config).__name__} | {k: v.value if isinstance(v, Enum) else v for k, v in plain.items()}


def config_from_json(data: Any) -> Config:
    """Read what :func:`config_to_json` wrote.

    Raises:
        InvalidInput: an unknown type, a field that it has not, or a value out of range.
    """
    if not isinstance(data, dict) or not isinstance(data.get("type"), str):
        raise InvalidInput(f"a layer's configuration is {data!r}, expected an object with a type.")
    if data["type"] not in CONFIGS:
        raise UnknownName("layer configuration", data["type"], CONFIGS)
    kind = CONFIGS[data["type"]]
    readers = {"format": Format, "activation": Range, "zero": ZeroPoint, "rounding": Rounding, "alphas": tuple}
    try:
        return kind(**{key: readers.get(key, _same)(value) for key, value in data.items() if key != "type"})
    except (TypeError, ValueError) as e:
        raise InvalidInput(f"a layer's configuration of type {data['type']} is damaged: {e}.") from e


def _same(value: Any) -> Any:
    return value


def _check_alphas(config: Config, alphas: tuple[float, ...]) -> None:
    _hold(all(0 <= alpha <= 1 for alpha in alphas), config, f"alphas are {alphas}, expected shares from 0 to 1")


def _hold(good: bool, config: Config, what: str) -> None:
    if not good:
        raise InvalidInput(f"{type(config).__name__}: {what}.")
