"""The least time that one evaluation could take on a machine, from its FLOPs and bytes (Williams et al. 2009).

The larger of arithmetic and traffic: FLOPs over the peak of the format, and the weights and inputs, each read once,
over the memory's bandwidth. Activations are left out, so the bound is a lower one, and a share of it never flatters.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from lehr.engines.target import Target
from lehr.runtime.manifest import GraphEntry
from lehr.runtime.recipe import Recipe

# Bytes of a weight; NVFP4 has a scale of one byte for sixteen.
_WIDTH = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "uint8": 1.0, "fp8": 1.0, "int4": 0.5, "nvfp4": 0.5625}
_SIDE, _BYTES, _REPETITIONS = 1536, 1 << 28, 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Roof:
    """What a machine can do at most; ``source`` says where the figures are from."""

    gflops: float | None
    gb_s: float | None
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """One evaluation against a roof.

    Attributes:
        gflop, gb: work and traffic of one evaluation.
        ms: the least time; None where the roof is not known.
        limited_by: "arithmetic" or "memory".
    """

    gflop: float
    gb: float
    ms: float | None
    limited_by: str
    roof: Roof

    def to_json(self) -> dict[str, Any]:
        return {
            "gflop": self.gflop,
            "gb": self.gb,
            "ms": self.ms,
            "limited_by": self.limited_by,
            "roof": {"gflops": self.roof.gflops, "gb_s": self.roof.gb_s, "source": self.roof.source},
        }


def roof_of(target: Target, recipe: Recipe) -> Roof:
    """A target's published figures for a recipe's arithmetic, the largest of its class; None where there are none."""
    peak = target.tflops.get(recipe.arithmetic)
    bandwidth = target.bandwidth_gb_s
    return Roof(
        gflops=None if peak is None else 1000 * peak,
        gb_s=None if bandwidth is None else bandwidth[1],
        source=f"target {target.name}",
    )


def measured_roof() -> Roof:
    """This processor's, measured: a float32 product by numpy's BLAS, and reading memory. Takes about two seconds."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((_SIDE, _SIDE)).astype(np.float32) for _ in range(2))
    block = np.ones(_BYTES // 8)
    product = min(_seconds(lambda: a @ b) for _ in range(_REPETITIONS))
    read = min(_seconds(block.sum) for _ in range(_REPETITIONS))
    return Roof(gflops=2 * _SIDE**3 / product / 1e9, gb_s=_BYTES / read / 1e9, source="measured here, fp32 by numpy")


def bound(graph: GraphEntry, batch: int, weight_bytes: int, input_bytes: int, roof: Roof) -> Bound:
    """The least time of one evaluation of ``graph`` with ``batch`` samples at the model's default sizes."""
    flop, traffic = graph.flops * batch, weight_bytes + input_bytes
    times = {
        "arithmetic": None if roof.gflops is None else flop / roof.gflops / 1e6,
        "memory": None if roof.gb_s is None else traffic / roof.gb_s / 1e6,
    }
    known = {name: ms for name, ms in times.items() if ms is not None}
    slower = max(known, key=lambda name: known[name]) if known else ""
    return Bound(gflop=flop / 1e9, gb=traffic / 1e9, ms=known.get(slower), limited_by=slower, roof=roof)


def stored_bytes(graph: GraphEntry, recipe: Recipe) -> int:
    """Bytes of a graph's weights in a recipe's format, as the machine reads them."""
    return int(graph.parameters * _WIDTH[recipe.weights.value])


def _seconds(call: Any) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
