"""Eager's own noise floors on the machine at hand, for evidence: another device rounds otherwise than the exporter's.

Run as ``python -m lehr.export.device_floors BUNDLE``, where PyTorch is installed. Prints one JSON object: ``device``,
``torch``, ``rel_error`` of eager in float32 against what was recorded, and ``floors`` by format, of single evaluations;
or ``unavailable`` with the reason, where the bundle's source cannot be made again here.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import Any

import torch

from lehr.export.eager import eager
from lehr.export.golden import FORMATS, floor
from lehr.export.source import resolve
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import LehrError
from lehr.runtime.golden import read
from lehr.runtime.verify import step_errors

OTHER_WEIGHTS = 0.05  # float32 repeats itself to 1e-4 even with TF32 off and on; other weights are off by the signal


def measured(bundle: Bundle) -> dict[str, Any]:
    """What is printed.

    Raises:
        LehrError: the source cannot be resolved, or there is no golden data.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = resolve(bundle.manifest.source, preset=None, seed=0, structure_only=False)
    module, golden = source.runnable().eval(), replace(read(bundle), trajectories=())
    named = torch.cuda.get_device_name() if device == "cuda" else device
    found: dict[str, Any] = {"device": named, "torch": torch.__version__}
    error = max(step_errors(eager(module, bundle.manifest.model, device=device), golden))
    if error > OTHER_WEIGHTS:
        return {**found, "unavailable": f"{bundle.manifest.source} has other weights here (error {error:.1e})"}
    floors = {
        name: asdict(floor(module, bundle.manifest.model, golden, dtype, device))
        for name, dtype in FORMATS.items()
        if name != "fp64"
    }
    return {**found, "rel_error": error, "floors": floors}


def main(root: str) -> None:
    """Measure and print."""
    try:
        found = measured(Bundle.open(root))
    except LehrError as e:
        found = {"unavailable": str(e)}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
