"""``lehr demo``."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import click

from lehr.commands._output import Progress, emit, json_option, table

MODELS = ("digits-dit", "digits-adm")
ROWS, ZOOM, SEED = 2, 4, 7  # rows of ten digits a model, pixels a pixel, noise of the picture
EACH = 4  # pictures of a prompt, unless --num says otherwise


def _lehr(progress: Progress, *arguments: str) -> dict[str, Any]:
    """Run another verb as its user would, in a process that imports no torch, and return its JSON."""
    progress("$ lehr " + " ".join(arguments))
    done = subprocess.run(
        [sys.executable, "-m", "lehr", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode not in (0, 1):
        raise click.exceptions.Exit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@click.command("demo")
@click.option("-o", "--output", default="lehr-demo", show_default=True, type=click.Path(path_type=Path), help="Folder.")
@click.option("--prompt", "prompts", multiple=True, help="Draw this with the text-to-image model; repeat for several.")
@click.option("--num", type=click.IntRange(1, 16), help=f"With --prompt: pictures of each.  [default: {EACH}]")
@json_option
def command(output: Path, prompts: tuple[str, ...], num: int | None, as_json: bool) -> None:
    """Do the main job on the shipped models: export, build, run, verify, a picture and a report.

    With --prompt, draw from words instead, by the shipped emoji model: engines on the left, eager PyTorch on the right.

    \b
    Examples:
      lehr demo
      lehr demo -o /tmp/demo --json
      lehr demo --prompt "a red heart" --prompt "a cat with sunglasses"
    """
    from lehr.runtime import picture
    from lehr.runtime.errors import InvalidInput

    if num is not None and not prompts:
        raise click.UsageError("--num needs --prompt; the digits are drawn as they are.")
    started, progress = time.monotonic(), Progress()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InvalidInput(f"cannot make the folder {output}: {e.strerror}. Choose another with -o.") from e
    if prompts:
        picture.check_output(output / "emoji.png", (".png",))
        _from_words(output, prompts, num or EACH, started, progress, as_json)
        return
    _digits(output, started, progress, as_json)


def _from_words(
    output: Path, prompts: tuple[str, ...], num: int, started: float, progress: Progress, as_json: bool
) -> None:
    """The fields of the digits' demo, told of the text-to-image model."""
    _import_export(progress)
    from lehr.commands._demo_emoji import draw

    emoji = draw(output, prompts, num, lehr=partial(_lehr, progress), progress=progress)
    report = output / "report.txt"
    report.write_text(f"{emoji.prose}\n", encoding="utf-8")
    data = {
        "passed": emoji.passed,
        "image": str(emoji.image),
        "report": str(report),
        "bundles": [str(emoji.bundle)],
        "psnr_db": {str(emoji.bundle): emoji.psnr_db},
        "prompts": list(prompts),
        "seconds": round(time.monotonic() - started, 1),
    }
    emit(as_json, data, f"{emoji.prose}; {data['seconds']} s in all")
    if not emoji.passed:
        raise click.exceptions.Exit(1)


def _digits(output: Path, started: float, progress: Progress, as_json: bool) -> None:
    import numpy as np

    from lehr.runtime import picture

    image = output / "digits.png"
    picture.check_output(image, (".png",))
    bundles = _export(output, progress)
    sheets, rows, verdicts = [], [], {}
    for bundle in bundles:
        built = _lehr(progress, "build", str(bundle), "--target", "cpu", "--library", "onnxruntime")
        drawn = output / f"{bundle.stem}.npz"
        ran = _lehr(progress, "run", str(bundle), "--num", str(10 * ROWS), "--seed", str(SEED), "-o", str(drawn))
        verdict = verdicts[bundle] = _lehr(progress, "verify", str(bundle))
        with np.load(drawn) as arrays:
            sheets.append(picture.to_bytes(arrays["samples"], (-1.0, 1.0)))
        l1, l2 = verdict["levels"]["L1"], verdict["levels"]["L2"]
        rows.append(
            (
                bundle.stem,
                ran["sampler"],
                ran["evaluations"],
                f"{ran['seconds']:.2f}",
                f"{built['seconds']:.1f}",
                f"{l1.get('max_rel_error', float('nan')):.1e}",
                f"{l2.get('psnr_db', float('nan')):.1f}",
                "pass" if verdict["passed"] else "FAIL",
            )
        )
    picture.save_png(image, picture.grid(np.concatenate(sheets), columns=10, zoom=ZOOM))
    header = ("model", "sampler", "steps", f"{10 * ROWS} samples, s", "build, s", "score error", "PSNR, dB", "parity")
    report = table(header, rows)
    (output / "report.txt").write_text(
        f"{report}\n\nParity is the CPU engine against eager PyTorch on the same noise. Picture: {image.name}, "
        f"classes 0 to 9, {ROWS} rows a model ({', '.join(MODELS)}).\n",
        encoding="utf-8",
    )
    passed = all(verdict["passed"] for verdict in verdicts.values())
    data = {
        "passed": passed,
        "image": str(image),
        "report": str(output / "report.txt"),
        "bundles": [str(bundle) for bundle in bundles],
        "psnr_db": {str(bundle): verdict["levels"]["L2"].get("psnr_db") for bundle, verdict in verdicts.items()},
        "seconds": round(time.monotonic() - started, 1),
    }
    prose = f"{report}\n\n{image}: classes 0 to 9, {ROWS} rows a model; {data['seconds']} s in all"
    emit(as_json, data, f'{prose}\nPictures from words: lehr demo --prompt "a red heart"')
    if not passed:
        raise click.exceptions.Exit(1)


def _import_export(progress: Progress) -> None:
    """Import PyTorch, which takes seconds, once for all exports of this process."""
    from lehr.runtime.errors import MissingExtra

    progress("importing PyTorch")
    try:
        importlib.import_module("lehr.export.package")
    except ModuleNotFoundError as e:
        raise MissingExtra(e.name or "torch", "export") from e


def _export(output: Path, progress: Progress) -> list[Path]:
    """Export both models."""
    _import_export(progress)
    from lehr.export.package import Options, export

    bundles = []
    for name in MODELS:
        bundle = output / f"{name}.lehr"
        progress(f"$ lehr export {name} -o {bundle}")
        export(name, bundle, Options(overwrite=True, command=("lehr", "export", name)), progress=progress)
        bundles.append(bundle)
    return bundles
