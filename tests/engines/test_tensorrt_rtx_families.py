"""Every backbone family, small, through the TensorRT-RTX builder in fp16 for three generations of GPUs.

Whether the engines compute what they should can only be seen on such a GPU; that they build is what this shows.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from lehr.engines.graph.lowering.half import write_half
from lehr.engines.graph.split import split
from lehr.engines.graph.weights import bind_weights, save_graph
from lehr.engines.job import Job
from lehr.engines.ranges import input_ranges
from lehr.engines.target import target
from lehr.engines.tensorrt_family import TENSORRT_RTX
from lehr.export.backbones import families, presets
from lehr.export.trace import trace
from lehr.export.weights import TorchModuleSource
from lehr.runtime.engine import STEP
from lehr.runtime.recipe import recipe

pytest.importorskip("tensorrt_rtx", exc_type=ImportError)


def small_configurations() -> ModuleType:
    """The module that makes presets small."""
    file = Path(__file__).parents[1] / "export" / "small_backbones.py"
    spec = importlib.util.spec_from_file_location("small_configurations", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
@pytest.mark.parametrize("family", families())
def test_a_family_builds_in_fp16(family: str, tmp_path: Path) -> None:
    make = small_configurations()
    first = next(iter(importlib.import_module(f"lehr.export.backbones.{family}").PRESETS))
    preset = make.small(presets()[first])
    module, spec = make.randomise(preset.module()), preset.spec
    parts = split(trace(module, spec), spec)
    bind_weights([part.model for part in parts.values()], TorchModuleSource(module), tmp_path / "w.safetensors")
    for name, part in parts.items():
        graph, half = tmp_path / f"{name}.onnx", tmp_path / f"{name}-half"
        save_graph(part.model, graph)
        half.mkdir()
        given = write_half(graph, half, keep_high=()) if name == STEP else graph
        for gpu in ("rtx-30", "rtx-40", "rtx-50"):
            built = tmp_path / f"{name}-{gpu}"
            built.mkdir()
            job = Job(
                name=name,
                graph=given,
                recipe=recipe("fp16" if name == STEP else "fp32"),
                target=target(gpu),
                library="tensorrt_rtx",
                ranges=input_ranges(part.spec, spec),
            )
            plan = TENSORRT_RTX.build_for(job, built, lambda text: None)
            assert (built / plan.file).stat().st_size > 1000
