"""Every family of the registry, exported: what ONNX Runtime computes is what the module does, at shapes never seen.

The configurations are those of ``small_backbones``.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_checks import check_export
from small_backbones import TINY, randomise, small

from lehr.export.backbones import families, presets

SOURCES = Path(__file__).resolve().parents[2] / "src"
LARGEST = 20_000_000  # parameters of a configuration that counts as small

_TRACED_ELSEWHERE = {"adm", "dit", "sit", *TINY}  # by test_trace and by test_backbone_FAMILY; SiT's layers are DiT's


def representatives() -> Iterator[Any]:
    """The first preset of each family; with -m long, all that differ in more than size."""
    seen = set()
    for family in families():
        for number, (name, preset) in enumerate(
            importlib.import_module(f"lehr.export.backbones.{family}").PRESETS.items()
        ):
            if (family, small(preset).params) not in seen:
                seen.add((family, small(preset).params))
                yield pytest.param(name, marks=[pytest.mark.long] if number or family in _TRACED_ELSEWHERE else [])


@pytest.mark.parametrize("name", list(representatives()))
def test_a_family_computes_the_same_after_export_at_shapes_it_was_not_traced_at(name: str, tmp_path: Path) -> None:
    preset = small(presets()[name])
    module = randomise(preset.module())
    assert sum(parameter.numel() for parameter in module.parameters()) < LARGEST, "teach SMALL this family's names"
    check_export(module, preset.spec, tmp_path)


# ------------------------------------------------------------------------------------------------- structure only

_STRUCTURE = """
import sys, torch
from pathlib import Path
from lehr.export.backbones import preset
from lehr.export.trace import trace
from lehr.engines.graph.weights import parameter_count, save_graph
from lehr.runtime.host import peak_rss_mb
chosen = preset(sys.argv[1])
with torch.device("meta"):
    module = chosen.module()
graph = trace(module, chosen.spec)
save_graph(graph, Path(sys.argv[2]))
print(parameter_count(graph) - sum(b.numel() for b in module.buffers()), peak_rss_mb())
"""
_DEFAULT = ("dit-s-8", "flux-dev")  # a small one and one of 12 billion parameters


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in _DEFAULT else [pytest.mark.long]) for name in sorted(presets())]
)
def test_a_preset_is_traced_without_weights_in_1200_megabytes(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _STRUCTURE, name, str(tmp_path / "step.onnx")]
    environment = {**os.environ, "PYTHONPATH": str(SOURCES), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stderr
    parameters, megabytes = (float(word) for word in done.stdout.split())
    with torch.device("meta"):
        expected = sum(parameter.numel() for parameter in presets()[name].module().parameters())
    assert parameters == expected
    assert megabytes <= 1200
