"""What a newcomer waits for: the demo as a whole, start-up times, and each verb on the reference models.

``python benchmarks/main_job.py`` runs every command as a process of its own, in turn, and keeps medians. Start-up is
stated over bare interpreters and over bare numpy, measured alternately, because the machine's load cancels that way.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from environment import write

REPEATS = 7
MODELS = ("digits-dit", "digits-adm")


def seconds(*command: str) -> float:
    """Wall time of one process; fails if the command does."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return time.perf_counter() - started


def median(*command: str, repeats: int = REPEATS) -> float:
    """Median wall time."""
    return round(statistics.median(seconds(*command) for _ in range(repeats)), 3)


def difference(command: tuple[str, ...], base: tuple[str, ...]) -> float:
    """Median of paired differences in wall time."""
    return round(statistics.median(seconds(*command) - seconds(*base) for _ in range(REPEATS)), 3)


def verbs(model: str, folder: Path) -> dict[str, Any]:
    """Each verb on one reference model."""
    bundle = str(folder / f"{model}.lehr")
    export = seconds("-m", "lehr", "export", model, "-o", bundle)
    build = seconds("-m", "lehr", "build", bundle)
    run = ("-m", "lehr", "run", bundle, "--num", "20", "-o", str(folder / "o.npz"))
    done = subprocess.run(
        [sys.executable, "-m", "lehr", "verify", bundle, "--json"], check=True, capture_output=True, text=True
    )
    levels = json.loads(done.stdout)["levels"]
    return {
        "export_s": round(export, 2),
        "build_s": round(build, 2),
        "run_20_samples_s": median(*run, repeats=3),
        "verify_s": median("-m", "lehr", "verify", bundle, repeats=3),
        "max_rel_error": levels["L1"]["max_rel_error"],
        "psnr_db": levels["L2"]["psnr_db"],
        "snr_db": levels["L2"]["snr_db"],
    }


def main() -> None:
    """Measure and write ``results/main_job.json``."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        results = {
            "demo_s": round(seconds("-m", "lehr", "demo", "-o", str(folder / "demo")), 1),
            "import_runtime_over_numpy_s": difference(("-c", "import numpy, lehr.runtime"), ("-c", "import numpy")),
            "help_s": median("-m", "lehr", "--help"),
            "models": {model: verbs(model, folder) for model in MODELS},
        }
    print(write("main_job", results).read_text())


if __name__ == "__main__":
    main()
