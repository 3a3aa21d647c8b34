"""``lehr audit``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lehr.commands._output import Progress, bundle_argument, emit, json_option, table

if TYPE_CHECKING:
    from lehr.calibration.audit import Audit

_SHOWN = 12  # layers in prose; --json has all


@click.command("audit")
@bundle_argument
@click.option("--target", help="Judge by the formats of this class of machine.  [default: fp16, bf16 and fp8]")
@click.option("--steps", type=click.IntRange(1), help="Number of sampler steps.  [default: the model's own]")
@click.option("--num", type=click.IntRange(1), help="Samples drawn.  [default: one a class up to 10, else 2]")
@click.option("--threads", default=0, show_default=True, type=click.IntRange(0), help="0: one a core.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write the heat map to this FILE.png.")
@json_option
def command(
    bundle: Path,
    target: str | None,
    steps: int | None,
    num: int | None,
    threads: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure activations over the timesteps, and say which layers do not fit fp16, bf16 or fp8.

    Draws samples in fp32. What it finds is kept in the bundle, with a heat map (calibration/ranges.png); recipe fp16
    keeps in fp32 what the audit says.

    \b
    Examples:
      lehr audit d.lehr
      lehr audit d.lehr --steps 50 --num 4 -o ranges.png --json
    """
    from lehr.engines import target as targets
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.errors import MissingExtra
    from lehr.runtime.picture import check_output

    try:
        from lehr.calibration.audit import audit
    except ModuleNotFoundError as e:
        raise MissingExtra(e.name or "onnx_ir", "export") from e

    if output is not None:
        check_output(output, (".png",))
    chosen = targets.target(target) if target is not None else None
    progress = Progress()
    progress(f"measuring {bundle}")
    made = audit(
        Bundle.open(bundle),
        target=chosen,
        steps=steps,
        num=num,
        threads=threads,
        on_step=lambda done, total: progress.steps(done, total, "evaluation"),
    )
    if output is not None:
        made.picture.save(output, format="PNG")
    if not made.stored:
        progress(f"{bundle} cannot be written to, so the audit is not kept in it")
    emit(as_json, _data(made), _prose(made, bundle))


def _data(made: Audit) -> dict[str, Any]:
    ranges = made.ranges
    tensors = [
        {**asdict(probe), "layer": probe.layer, "peak": peak, "rms": rms}
        for probe, peak, rms in zip(ranges.probes, ranges.peak.tolist(), ranges.rms.tolist(), strict=True)
    ]
    return {
        "sampler": ranges.sampler,
        "evaluations": ranges.evaluations,
        "samples": ranges.samples,
        "conditions": ranges.conditions,
        "timesteps": ranges.timesteps.tolist(),
        "tensors": tensors,
        "findings": [asdict(finding) for finding in made.found],
        "formats": made.formats,
        "keep_high": {name: list(nodes) for name, nodes in made.keep_high.items()},
        "stored": made.stored,
    }


def _prose(made: Audit, bundle: Path) -> str:
    ranges = made.ranges
    title = (
        f"{len(ranges.probes)} tensors, {ranges.samples} samples, {ranges.sampler} with {ranges.evaluations} "
        f"evaluations, conditions: {ranges.conditions}; the largest magnitude is {ranges.peak.max():.4g}."
    )
    parts = [title]
    worst: dict[tuple[str, str, str], Any] = {}
    for finding in made.found:
        key = (finding.layer, finding.format, finding.kind.value)
        seen = worst.get(key)
        if seen is None or abs(finding.value - finding.limit) > abs(seen.value - seen.limit):
            worst[key] = finding
    if worst:
        rows = [
            (
                f.layer,
                f.format,
                f.kind.value,
                f"{f.value:.3g}",
                f"{f.limit:.3g}",
                f"{f.timestep:g}",
                _best(made, f.layer),
            )
            for f in list(worst.values())[:_SHOWN]
        ]
        header = ("layer", "format", "finding", "value", "limit", "timestep", "recommended")
        more = f"\n({len(worst) - _SHOWN} more: --json)" if len(worst) > _SHOWN else ""
        parts.append(table(header, rows) + more)
    else:
        parts.append("Every layer fits every format.")
    kept = ", ".join(f"{name} keeps {len(nodes)} operators in fp32" for name, nodes in made.keep_high.items())
    parts.append(f"{kept}.\nNext: lehr build {bundle} --recipe fp16")
    return "\n\n".join(parts)


def _best(made: Audit, layer: str) -> str:
    return made.formats.get(layer, "fp16")
