"""``lehr bench``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lehr.commands._output import Progress, bundle_argument, emit, json_option, table

if TYPE_CHECKING:
    from lehr.engines.bench import Row
    from lehr.engines.roofline import Bound


@click.command("bench")
@bundle_argument
@click.option("--target", help="Only engines of this target.  [default: all that run here]")
@click.option("--recipe", "recipes", multiple=True, help="Only engines of this recipe; may be repeated.")
@click.option("--batch", default=2, show_default=True, type=click.IntRange(1), help="Samples of one evaluation.")
@click.option("--steps", type=click.IntRange(1), help="Of the loop.  [default: the model's own]")
@click.option("--seconds", default=10.0, show_default=True, type=click.FloatRange(0.0), help="Of evaluations in all.")
@click.option("--peers", is_flag=True, help="Beside eager, torch.compile, plain ONNX Runtime and plain OpenVINO.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write the JSON to this file.")
@json_option
def command(
    bundle: Path,
    target: str | None,
    recipes: tuple[str, ...],
    batch: int,
    steps: int | None,
    seconds: float,
    peers: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure engines in turn: a step, a loop, start-up, memory, size and the output's error.

    Each engine has a process of its own, and all the same inputs. With --peers the model runs there in other ways, too
    (needs lehr[export]). A step is one in the middle of the loop; the loop has its precision schedule, where an engine
    has one, and the error is the worst of all recorded steps, those at its ends included.

    \b
    Examples:
      lehr bench d.lehr
      lehr bench d.lehr --recipe fp32 --peers --batch 2 -o bench.json
    """
    from lehr.engines.bench import compare
    from lehr.engines.contestants import (
        check_same_weights,
        contestants,
        evaluations,
        least_time,
        named,
        runnable,
    )
    from lehr.engines.contestants import peers as peers_of
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.errors import BundleError, InvalidInput
    from lehr.runtime.host import cores, cpu_name
    from lehr.runtime.timing import write_inputs

    progress, opened = Progress(), Bundle.open(bundle)
    if output is not None and not output.absolute().parent.is_dir():
        raise InvalidInput(f"{output.parent} is no folder; -o names a file to write. Make the folder first.")
    spec = opened.manifest.model
    records = runnable(opened, target, recipes)
    feeds, recorded = evaluations(opened, batch)
    entrants, loop_steps = contestants(opened, records), steps or spec.sampling.num_inference_steps
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / f"inputs-{k}.npz" for k in range(len(feeds))]
        for file, given in zip(files, feeds, strict=True):
            write_inputs(file, given)
        if peers:
            progress(f"plain torch.onnx.export of {opened.manifest.source}")
            entrants = [*peers_of(opened.manifest.source, files[0], Path(scratch)), *entrants]
        rows = compare(entrants, files, references=recorded, loop_steps=loop_steps, seconds=seconds, progress=progress)
    check_same_weights(opened, rows)
    if not any(row.step_ms for row in rows):
        raise BundleError(f"nothing could be measured: {'; '.join(row.reason for row in rows)}")
    least = {named(record, records): least_time(opened, record, feeds[0]) for record in records}
    data = {
        "bundle": str(bundle),
        "model": spec.name,
        "batch": batch,
        "loop_steps": loop_steps,
        "reference": "golden data" if recorded else rows[0].name,
        "machine": {"processor": cpu_name(), "cores": cores()},
        "rows": [{**row.to_json(), "roofline": _share(row, least.get(row.name))} for row in rows],
    }
    if output is not None:
        output.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    emit(as_json, data, _prose(data))


def _share(row: Row, found: Bound | None) -> dict[str, Any] | None:
    if found is None or row.step_ms is None:
        return None
    return {**found.to_json(), "share": None if found.ms is None else round(found.ms / row.step_ms, 3)}


def _prose(data: dict[str, Any]) -> str:
    def shown(value: Any, form: str = ",.3g") -> str:
        return "" if value is None else format(value, form)

    cells = [
        (
            row["name"],
            shown(row["step_ms"]),
            shown(row["p90_ms"]),
            shown(row["ratio"], ".2f"),
            shown(row["sqnr_db"], ".1f"),
            shown(row["loop_s"]),
            shown(row["start_s"], ".2f"),
            shown(row["engine_mb"], ".0f"),
            shown(None if row["bytes"] is None else row["bytes"] / 1e6, ".1f"),
            shown(row["roofline"]["share"] if row["roofline"] else None, ".2f"),
        )
        for row in data["rows"]
    ]
    header = ("engine", "step ms", "p90", "ratio", "SQNR dB", "loop s", "start s", "MB", "files MB", "of roof")
    failed = [f"{row['name']}: {row['reason']}" for row in data["rows"] if row["reason"]]
    about = f"{data['model']}, batch {data['batch']}, loops of {data['loop_steps']} steps; SQNR against "
    about += f"{data['reference']}; {data['machine']['processor']}, {data['machine']['cores']} cores"
    return "\n".join([table(header, cells), about, *failed])
