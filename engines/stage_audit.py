"""What a build reads of a stage's range audit: which operators must stay in float32.

The export measures every tensor of a stage on its golden inputs (:mod:`lehr.calibration.stage_audit`); SDXL's decoder
and T5's feed-forward layers are known to leave fp16's range.
"""

from __future__ import annotations

from typing import Any

from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import BundleError, InvalidInput
from lehr.runtime.manifest import StageEntry
from lehr.runtime.recipe import Format

NAME = "ranges.json"  # in a stage's folder
VERSION = 1


def audit_file(entry: StageEntry) -> str:
    """Where a stage's audit stands in its bundle."""
    return f"{entry.spec.folder}/{NAME}"


def audited_stage(bundle: Bundle, stage: str, short: Format) -> frozenset[str]:
    """Names of the nodes that a stage's audit keeps in float32 where the rest computes in ``short``.

    A stage that was never audited, because it was exported without golden data, can be built in bf16: it has float32's
    range.

    Raises:
        InvalidInput: fp16 without an audit, or with one of another graph or other golden data.
        BundleError: what was recorded is damaged.
    """
    form = short.value
    if audit_file(bundle.manifest.stage(stage)) not in bundle.manifest.files:
        if short is Format.BF16:
            return frozenset()
        raise InvalidInput(
            f"stage {stage!r} of {bundle.root.name} was exported without golden data, so nobody knows what of it "
            f"{form} can hold. Export it with --golden steps, or build it in bf16 or fp32: --stage-recipe {stage}=bf16."
        )
    data = _read(bundle, stage)
    try:
        return frozenset(str(node) for node in data["keep_high"][form])
    except (KeyError, TypeError) as e:
        raise _damaged(bundle, stage, repr(e)) from e


def overflowing(bundle: Bundle, stage: str, short: Format) -> frozenset[str]:
    """Names of the nodes that read or write what a format cannot hold; raises as :func:`audited_stage`."""
    form = short.value
    try:
        rows = [row for row in _read(bundle, stage)["findings"] if row["format"] == form]
        return frozenset(str(row["node"]) for row in rows if row["kind"] == "overflows")
    except (KeyError, TypeError) as e:
        raise _damaged(bundle, stage, repr(e)) from e


def _read(bundle: Bundle, stage: str) -> Any:
    name = audit_file(bundle.manifest.stage(stage))
    data: Any = bundle.read_json(name)
    try:
        version, sources = data["version"], dict(data["sources"])
    except (KeyError, TypeError, ValueError) as e:
        raise _damaged(bundle, stage, repr(e)) from e
    if version != VERSION:
        raise _damaged(bundle, stage, f"version {version!r}, expected {VERSION}")
    for source, digest in sources.items():
        known = bundle.manifest.known_files.get(source)
        if known is None or known.sha256 != digest:
            raise InvalidInput(f"{source} has changed since {name} was made. Export the model again.")
    return data


def _damaged(bundle: Bundle, stage: str, problem: str) -> BundleError:
    name = audit_file(bundle.manifest.stage(stage))
    return BundleError(f"{name} of {bundle.root.name} is damaged ({problem}). Export the model again.")
