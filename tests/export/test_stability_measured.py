"""What docs/architectures.md says was measured of the stability options is what the results hold."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest

from lehr.export.backbones import presets

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="no source checkout")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # where it finds its neighbour
    spec = importlib.util.spec_from_file_location("stability_options", BENCHMARKS / "stability_options.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_documents_table_is_what_was_measured(benchmark: ModuleType):
    results = json.loads((BENCHMARKS / "results" / "stability_options.json").read_text(encoding="utf-8"))
    content = benchmark.DOCUMENT.read_text(encoding="utf-8")
    assert content == benchmark.document(content, results), "run: python benchmarks/stability_options.py document"
    assert all(f"| `{row['option']}` |" in content for row in results["rows"])
    assert len({json.dumps(row["training"]) for row in results["rows"]}) == 1  # trained alike, so they compare


def test_a_variant_is_the_baseline_with_one_field_changed(benchmark: ModuleType):
    known, base = dict(presets()), presets()[benchmark.BASELINE].params
    try:
        benchmark.register(10)
        for option in benchmark.OPTIONS:
            params = presets()[benchmark.name_of(option)].params
            changed = [
                field.name for field in fields(params) if getattr(params, field.name) != getattr(base, field.name)
            ]
            assert len(changed) == (option != "baseline"), option
    finally:
        for name in set(presets()) - set(known):
            del presets()[name]
            del benchmark.SCHEDULES[name]
