"""``lehr audit``: measure ranges, judge formats, and keep both in the bundle."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir
from PIL import Image

from lehr.calibration.heat_map import draw
from lehr.calibration.keep_high import Finding, Short, findings, keep_high, recommended
from lehr.calibration.ranges import Ranges, measure
from lehr.engines.audit import AUDIT, AUDIT_VERSION
from lehr.engines.target import Target
from lehr.runtime.bundle import Bundle
from lehr.runtime.hoisted import STEP

ARRAYS, PICTURE = "calibration/ranges.npz", "calibration/ranges.png"

OnStep = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What an audit found.

    Attributes:
        ranges: what was measured.
        found: every format that does not fit a node, in the order of the graph.
        formats: layer -> the recommended format, for layers with a finding; all others can be fp16.
        keep_high: "fp16" and "bf16" -> names of nodes that such a recipe leaves in float32.
        picture: the heat map.
        stored: whether the bundle could be written to.
    """

    ranges: Ranges
    found: tuple[Finding, ...]
    formats: dict[str, str]
    keep_high: dict[str, tuple[str, ...]]
    picture: Image.Image
    stored: bool


def audit(
    bundle: Bundle,
    *,
    target: Target | None = None,
    steps: int | None = None,
    num: int | None = None,
    threads: int = 0,
    on_step: OnStep | None = None,
) -> Audit:
    """Measure a bundle's step graph along its own trajectories and say which formats fit it.

    Everything is stored, whatever the target: it only chooses what is reported.

    Args:
        bundle: holds weights.
        target: report the formats it has, and recommend among them; all formats without one.
        steps: of the sampler; by default the model's own.
        num: samples; by default one a class up to 10, else 2.
        threads: of ONNX Runtime; 0 is one a core.
        on_step: told how many of all evaluations are done.

    Raises:
        BundleError: structure only, or damaged files.
        InvalidInput: another process is writing to the bundle.
        RunFailed: the float32 graph fails, or is not finite itself.
    """
    spec, entry = bundle.manifest.model, bundle.manifest.graphs[STEP]
    ranges = measure(bundle, steps=steps, num=num, threads=threads, on_step=on_step)
    model = ir.load(bundle.path(entry.file))
    found = findings(model, ranges, spec.sample.name)
    kept = {short.value: tuple(sorted(keep_high(model, found, spec.sample.name, short))) for short in Short}
    title = (
        f"{spec.name}: {ranges.samples} samples, {ranges.sampler} with {ranges.evaluations} evaluations, "
        f"conditions: {ranges.conditions}"
    )
    picture = draw(ranges, found, title)
    stored = os.access(bundle.root, os.W_OK)
    if stored:
        _store(bundle, ranges, found, kept, picture)
    allowed = {form.value for form in target.formats} if target is not None else {"fp8", *kept}
    return Audit(
        ranges=ranges,
        found=tuple(finding for finding in found if finding.format in allowed),
        formats=recommended(found, [name for name in kept if name in allowed]),
        keep_high=kept,
        picture=picture,
        stored=stored,
    )


def _store(
    bundle: Bundle, ranges: Ranges, found: Sequence[Finding], kept: dict[str, tuple[str, ...]], picture: Image.Image
) -> None:
    entry = bundle.manifest.graphs[STEP]
    files = [name for name in (entry.file, entry.weights) if name is not None]
    record: dict[str, Any] = {
        "version": AUDIT_VERSION,
        "sources": {name: bundle.manifest.files[name].sha256 for name in files},
        "sampler": ranges.sampler,
        "evaluations": ranges.evaluations,
        "samples": ranges.samples,
        "conditions": ranges.conditions,
        "tensors": [asdict(probe) for probe in ranges.probes],
        "weights": dict(ranges.weights),
        "findings": [asdict(finding) for finding in found],
        "keep_high": {name: list(nodes) for name, nodes in kept.items()},
    }
    pixels = io.BytesIO()
    picture.save(pixels, format="PNG")
    with bundle.edit() as edit:
        edit.add_arrays(ARRAYS, {"peak": ranges.peak, "rms": ranges.rms, "timesteps": ranges.timesteps})
        edit.add_json(AUDIT, record)
        edit.add_bytes(PICTURE, pixels.getvalue())
