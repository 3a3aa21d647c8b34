"""The registry of backbones: every family and preset keeps the same contract."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest
import torch

from lehr.export.backbones import _table, families, preset, presets
from lehr.runtime.errors import UnknownName
from lehr.runtime.spec import ModelSpec

# Published counts in thousands, from the papers' releases as diffusers counts them. The DiT paper's 675M and 33M
# include the fixed position table (295k and 98k values), which is computed here and no parameter.
PUBLISHED = {
    "adm-imagenet-256": 553_838,
    "ddpm-cifar10": 35_746,
    "sd-1.5": 859_521,
    "sd-2.1": 865_911,
    "sdxl-base": 2_567_464,
    "sdxl-refiner": 2_259_527,
    "pixart-xl-2-256": 610_856,
    "pixart-xl-2-1024": 611_349,
    "sd3-medium": 2_028_328,
    "sd3.5-medium": 2_243_172,
    "sd3.5-large": 8_056_628,
    "flux-dev": 11_901_408,
    "flux-schnell": 11_891_179,
    "dit-xl-2": 675_130 - 295,
    "dit-s-2": 32_963 - 98,
}


def test_the_committed_table_is_what_the_registry_holds():
    committed = files("lehr.export").joinpath("backbones/presets.json").read_text()
    assert committed == _table.text(), "run: python -m lehr.export.backbones._table"


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameters_equal_the_published_count(name):
    rows = {row["name"]: row["parameters"] for row in json.loads(_table.FILE.read_text())}
    assert round(rows[name] / 1000) == PUBLISHED[name]


@pytest.mark.parametrize("name", sorted(presets()))
def test_a_preset_has_a_spec_that_its_module_accepts(name):
    chosen = preset(name)
    assert chosen.spec.name == name
    assert chosen.spec.family in families()
    assert ModelSpec.from_json(json.loads(json.dumps(chosen.spec.to_json()))) == chosen.spec
    sizes = chosen.spec.default_sizes()
    with torch.device("meta"):
        module = chosen.module().eval()
        feeds = {t.name: torch.empty(t.sizes(sizes), dtype=getattr(torch, t.dtype.value)) for t in chosen.spec.inputs}
        output = module(**feeds)
    shapes = [tuple(o.shape) for o in (output if isinstance(output, tuple) else (output,))]
    assert shapes == [t.sizes(sizes) for t in chosen.spec.outputs]


def test_an_unknown_preset_is_refused_with_the_closest_name():
    with pytest.raises(UnknownName, match="dit-xl-2"):
        preset("dit-xl2")


@pytest.mark.parametrize("path", _table.DOCUMENTS, ids=str)
def test_the_table_in_a_document_is_what_the_registry_holds(path):
    if not (_table.ROOT / path).is_file():
        pytest.skip("no source checkout")
    content = (_table.ROOT / path).read_text(encoding="utf-8")
    made = _table.document(path, content, json.loads(_table.FILE.read_text()))
    assert content == made, "run: python -m lehr.export.backbones._table"
    assert path.name == "README.md" or "[flux](../export/backbones/flux.py)" in content


def test_a_document_without_marks_is_left_alone(tmp_path):
    assert _table.document(tmp_path, "no table here", []) == "no table here"
