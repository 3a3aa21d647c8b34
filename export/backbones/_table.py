"""The committed tables of presets, for machines and people: ``python -m lehr.export.backbones._table``.

``presets.json`` lets ``lehr list`` do without torch; the same rows, by family, stand between two marks in documents.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from lehr.export.backbones import families, presets
from lehr.export.source import shipped_weights

FILE = Path(__file__).with_name("presets.json")
ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (Path("README.md"), Path("docs/models.md"))  # of a source checkout; a document without marks is left alone
BEGIN, END = "<!-- models:begin -->", "<!-- models:end -->"


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


def text(table: list[dict[str, Any]] | None = None) -> str:
    """The file's content, one preset a line."""
    return "[\n" + ",\n".join(json.dumps(row) for row in table or rows()) + "\n]\n"


def markdown(table: list[dict[str, Any]], *, root: str) -> str:
    """One row a family. ``root`` leads from the document to the repository."""
    lines = [
        "| family | presets (parameters) | conditions | prediction / path | checkpoints read |",
        "| --- | --- | --- | --- | --- |",
    ]
    for family in families():
        mine = sorted((row for row in table if row["family"] == family), key=lambda row: row["parameters"])
        inputs = [tensor.name for row in mine for tensor in presets()[row["name"]].spec.conditions]
        cells = (
            f"[{family}]({root}export/backbones/{family}.py)",
            ", ".join(f"{row['name']} ({_count(row['parameters'])}{_trained(row['name'])})" for row in mine),
            ", ".join(f"`{name}`" for name in dict.fromkeys(inputs)) or "none",
            ", ".join(dict.fromkeys(f"{row['prediction']} / {row['path']}" for row in mine)),
            ", ".join(_reads(family)) or "its own layout",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def document(path: Path, content: str, table: list[dict[str, Any]]) -> str:
    """``content`` of the document at ``path`` (relative to the repository) with the table between its marks."""
    made = f"{BEGIN}\n{markdown(table, root='../' * (len(path.parts) - 1))}\n{END}"
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: made, content, flags=re.DOTALL)


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"


def _trained(name: str) -> str:
    return ", trained" if shipped_weights(name) is not None else ""


def _reads(family: str) -> tuple[str, ...]:
    try:
        return tuple(importlib.import_module(f"lehr.export.checkpoints.maps.{family}").READS)
    except ModuleNotFoundError:
        return ()


def main() -> None:
    """Write everything anew."""
    table = rows()
    FILE.write_text(text(table), encoding="utf-8")
    for path in DOCUMENTS:
        if (ROOT / path).is_file():
            content = (ROOT / path).read_text(encoding="utf-8")
            (ROOT / path).write_text(document(path, content, table), encoding="utf-8")


if __name__ == "__main__":
    main()
