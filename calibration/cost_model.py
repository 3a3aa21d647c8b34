"""What layers cost in each format: by a static model of the target, or timed on this machine.

The static model is a roofline without overlap, in multiplications of float32:

    cost = multiplications x rate(format) + bytes of the weight x multiplications a byte

It depends on the graph and the target alone, so a search by it gives the same result anywhere. Timed costs
(:mod:`lehr.calibration.timing`) run each different layer by itself in an engine library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from lehr.calibration.configs import NVFP4_BLOCK, Config, WeightOnly, formats_of
from lehr.calibration.layers import Layer
from lehr.engines.target import Target
from lehr.runtime.recipe import Format

Choices = Mapping[str, Mapping[str, Config]]  # layer -> option -> configuration


class Source(str, Enum):
    """Where costs come from."""

    STATIC = "static"
    MEASURED = "measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a class of machine needs for one multiplication, beside float32's 1, and for one byte of weights."""

    rate: Mapping[Format, float]
    macs_per_byte: float


# An AMD EPYC core pair: 488, 911 and 1,951 billion operations a second in fp32, bf16 and int8, 38 GB/s of memory.
# fp16, fp8 and 4-bit formats are emulated by every CPU library.
CPU = Rates(rate={Format.FP32: 1.0, Format.BF16: 0.54, Format.INT8: 0.25}, macs_per_byte=6.4)
# Dense tensor-core rates of NVIDIA's data sheets are 1 : 2 : 4 : 8 for TF32, 16, 8 and 4 bits (H100, B200); H100 SXM:
# 495 TFLOP/s in TF32 beside 3.35 TB/s. Weights in NVFP4 with 16-bit activations compute in 16 bits.
GPU = Rates(
    rate={Format.FP32: 1.0, Format.FP16: 0.5, Format.BF16: 0.5, Format.INT8: 0.25, Format.FP8: 0.25},
    macs_per_byte=74.0,
)

_BITS = {Format.FP32: 32.0, Format.FP16: 16.0, Format.BF16: 16.0, Format.INT8: 8.0, Format.FP8: 8.0, Format.INT4: 4.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Costs of layers by option.

    Attributes:
        source: of the numbers.
        unit: "MAC" (multiplications of float32) or "ms".
        where: the target, or for measured costs the library and processor.
        values: layer -> option -> cost.
    """

    source: Source
    unit: str
    where: str
    values: Mapping[str, Mapping[str, float]]

    def of(self, plan: Mapping[str, str]) -> float:
        """A plan's cost: the sum over its layers."""
        return float(sum(self.values[layer][option] for layer, option in plan.items()))

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source.value,
            "unit": self.unit,
            "where": self.where,
            "values": {layer: dict(options) for layer, options in self.values.items()},
        }


# ------------------------------------------------------------------------------------------------------ static


def rates(target: Target | None) -> Rates:
    """Of a target; a CPU's without one."""
    return GPU if target is not None and target.sm else CPU


def static_costs(
    found: Iterable[Layer],
    choices: Choices,
    *,
    target: Target | None = None,
    rest: Format = Format.FP32,
) -> Costs:
    """Costs by the static model.

    Args:
        found: the layers, with multiplications counted.
        choices: what each layer can be made.
        target: the class of machine.
        rest: the format of layers, or products, that are not quantised.
    """
    machine = rates(target)
    values = {
        layer.name: {name: _static(layer, config, machine, rest) for name, config in choices[layer.name].items()}
        for layer in found
        if layer.name in choices
    }
    return Costs(source=Source.STATIC, unit="MAC", where=target.name if target else "cpu", values=values)


def _static(layer: Layer, config: Config, machine: Rates, rest: Format) -> float:
    stored, computed = formats_of(config)
    emulated = machine.rate[Format.FP32]
    product = layer.macs * machine.rate.get(computed or rest, emulated)
    weight = layer.nbytes if stored is None else layer.parameters * bits(config, stored) / 8
    return product + weight * machine.macs_per_byte


def bits(config: Config, stored: Format) -> float:
    """Of one weight, its share of the scales included: a float32 a block, fp8 for NVFP4."""
    if stored is Format.NVFP4:
        return 4.0 + 8.0 / NVFP4_BLOCK
    block = config.block if isinstance(config, WeightOnly) else None
    return _BITS[stored] + (32.0 / block if block else 0.0)
