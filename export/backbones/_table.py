"""The committed table of presets, so that ``lehr list`` needs no torch: ``python -m lehr.export.backbones._table``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lehr.export.backbones import presets

FILE = Path(__file__).with_name("presets.json")


def rows() -> list[dict[str, Any]]:
    """name, family, parameters, prediction and path of every preset, counted on the meta device."""
    table = []
    for name, preset in sorted(presets().items()):
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in preset.module().parameters())
        spec = preset.spec
        table.append(
            {
                "name": name,
                "family": spec.family,
                "parameters": count,
                "prediction": spec.prediction.kind.value,
                "path": spec.path.to_json()["kind"],
            }
        )
    return table


def text() -> str:
    """The file's content, one preset a line."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows()) + "\n]\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
