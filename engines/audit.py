"""What an engine's build reads of a range audit: which operators must stay in float32."""

from __future__ import annotations

from typing import Any

from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import BundleError, InvalidInput

AUDIT = "calibration/ranges.json"  # in a bundle
AUDIT_VERSION = 1


def audited(bundle: Bundle, form: str) -> frozenset[str]:
    """Names of the nodes that the bundle's range audit keeps in float32 under ``form`` ("fp16" or "bf16").

    Raises:
        InvalidInput: there was no audit, or it was of other graphs or weights; with the command that makes one.
        BundleError: what was recorded is damaged.
    """
    again = f"Run: lehr audit {bundle.root.name}"
    if AUDIT not in bundle.manifest.files:
        raise InvalidInput(
            f"{bundle.root.name} has no range audit, which decides what recipe {form!r} must keep in fp32. {again}"
        )
    data: Any = bundle.read_json(AUDIT)
    try:
        version, sources = data["version"], dict(data["sources"])
        names = frozenset(str(name) for name in data["keep_high"][form])
    except (KeyError, TypeError, ValueError) as e:
        raise BundleError(f"the range audit of {bundle.root.name} is damaged ({e!r}). {again}") from e
    if version != AUDIT_VERSION:
        raise BundleError(f"the range audit has version {version}, expected {AUDIT_VERSION}. {again}")
    for name, digest in sources.items():
        entry = bundle.manifest.files.get(name)
        if entry is None or entry.sha256 != digest:
            raise InvalidInput(f"{name} has changed since the range audit of {bundle.root.name}. {again}")
    return names


def summary(bundle: Bundle) -> dict[str, Any] | None:
    """How the range audit in a bundle was made and how much it found; None without one.

    Raises:
        BundleError: what was recorded is damaged.
    """
    if AUDIT not in bundle.manifest.files:
        return None
    data = bundle.read_json(AUDIT)
    try:
        kept = {name: len(nodes) for name, nodes in data["keep_high"].items()}
        fields = {name: data[name] for name in ("sampler", "evaluations", "samples", "conditions")}
        return {**fields, "findings": len(data["findings"]), "keep_high": kept}
    except (KeyError, TypeError, AttributeError) as e:
        raise BundleError(
            f"the range audit of {bundle.root.name} is damaged ({e!r}). Run: lehr audit {bundle.root.name}"
        ) from e
