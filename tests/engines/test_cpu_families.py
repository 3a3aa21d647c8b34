"""Families whose configurations are tiny, from export to verified engines of both libraries for processors, in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_backbones import TINY

from lehr.engines.build import build
from lehr.engines.builders import installed
from lehr.engines.target import target
from lehr.export.package import Options, export
from lehr.runtime.bundle import Bundle
from lehr.runtime.golden import Tier
from lehr.runtime.recipe import recipe
from lehr.runtime.verify import verify

FACTORY = """
import sys
from importlib import import_module
sys.path.insert(0, {tests!r})
from small_backbones import randomise, small

def make():
    preset = small(next(iter(import_module("lehr.export.backbones.{family}").PRESETS.values())))
    return randomise(preset.module()), preset.spec
"""
QUICK = "transfusion"


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name == QUICK else [pytest.mark.long]) for name in sorted(TINY)]
)
def test_engines_of_both_libraries_compute_what_eager_does(family: str, tmp_path: Path) -> None:
    source, root = tmp_path / "model.py", tmp_path / "m.lehr"
    source.write_text(FACTORY.format(tests=str(Path(__file__).parents[1] / "export"), family=family))
    export(f"{source}:make", root, Options(tier=Tier.STEPS), progress=lambda text: None)
    tried = [library for library in ("onnxruntime", "openvino") if installed(library)]
    for library in tried:
        record = build(root, target("cpu"), recipe("fp32"), library=library, threads=1)
        assert set(record.achieved_precision) <= {"float", "double"}
        verdict = verify(Bundle.open(root), record)
        assert verdict.passed, f"{library}: {verdict.to_json()}"
    assert "onnxruntime" in tried
