"""The diagrams in docs/architectures.md are what the code gives, and their colours what the split by rate says."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from small_backbones import randomise
from torch import nn

from lehr.engines.graph.rates import Depends, Rate, label, rate_of
from lehr.export.backbones import families, uvit
from lehr.export.backbones._skips import SkipGate
from lehr.export.backbones.dit import Conditioning
from lehr.export.backbones.preset import Preset
from lehr.export.trace import trace

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "architecture_diagrams.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="no source checkout")


@pytest.fixture(scope="module")
def diagrams() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architecture_diagrams", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def small_uvit(**changed: object) -> Preset:
    base = uvit.PRESETS["uvit-digits"]
    params = replace(base.params, hidden_size=24, num_heads=3, depth=5, size=8, **changed)
    spec = uvit.spec("tiny", params, path=base.spec.path, prediction=base.spec.prediction)
    return Preset(params=params, build=uvit.UViT, spec=spec)


def test_the_documents_diagrams_are_what_the_code_gives(diagrams: ModuleType):
    content = diagrams.DOCUMENT.read_text(encoding="utf-8")
    assert all(f"<code>{family}</code>" in content for family in families())
    assert diagrams.document(content) == content, "run: python benchmarks/architecture_diagrams.py"


def test_blocks_of_a_list_are_one_box_with_their_number(diagrams: ModuleType):
    drawn = diagrams.diagram(small_uvit())
    assert len(drawn.places["in_blocks Block"].modules) == 2
    assert '["in_blocks: Block × 2"]' in diagrams.mermaid(drawn)


def test_a_long_skip_is_an_arrow_and_without_it_there_is_none(diagrams: ModuleType):
    assert ("in_blocks Block", "skips LongSkip") in diagrams.diagram(small_uvit()).arrows
    without = diagrams.diagram(small_uvit(skip_fusion=uvit.SkipFusion.NONE))
    assert "skips LongSkip" not in without.places
    assert ("mid_block", "out_blocks Block") in without.arrows


def test_colours_are_the_rates_of_the_exported_graph(diagrams: ModuleType):
    preset = small_uvit(conditioning=Conditioning.ADALN_ZERO, skip_gate=SkipGate.TIME)
    drawn = diagrams.diagram(preset)
    graph = trace(randomise(preset.module()), preset.spec).graph
    labels = label(graph, preset.spec.inputs)
    found: dict[str, Depends] = {}
    for node in graph:
        owner = next((name for name, place in drawn.places.items() if _made_by(node.name or "", place.modules)), None)
        if owner is not None:
            found[owner] = found.get(owner, Depends.NOTHING) | labels.depends[node.outputs[0]]
    shown = {name: rate_of(drawn.places[name].depends) for name in found}
    assert shown == {name: rate_of(depends & ~Depends.SIZES) for name, depends in found.items()}
    assert set(shown.values()) == {Rate.PROMPT, Rate.SCHEDULE, Rate.STEP}


def test_lists_that_are_handed_down_and_changed_stay_the_same_lists(diagrams: ModuleType):
    class Inner(nn.Module):
        def forward(self, kept: list[torch.Tensor]) -> torch.Tensor:
            return kept.pop()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

    module, given = Outer(), [torch.zeros(1)]
    diagrams.Tracer(module)
    module.inner(given)
    assert given == []


def _made_by(node: str, modules: set[str]) -> bool:
    return any(node.startswith(f"{path}/") or f"/{path}/" in node for path in modules)
