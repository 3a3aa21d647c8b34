"""``lehr evidence``."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lehr.commands._output import Progress, bundle_argument, emit, engine_options, json_option, table

if TYPE_CHECKING:
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.engine import EngineRecord


@click.command("evidence")
@bundle_argument
@engine_options
@click.option(
    "--policy", "policy_name", default="release", show_default=True, metavar="NAME|FILE.toml", help="What to ask."
)
@click.option("--batch", default=2, show_default=True, type=click.IntRange(1), help="Samples of a timed evaluation.")
@click.option("--seconds", default=5.0, show_default=True, type=click.FloatRange(0.0), help="Of timed evaluations.")
@click.option(
    "--eager",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "no"]),
    help="Measure eager's own noise on this device, where PyTorch is installed.",
)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="REPORT.json", help="The report."
)
@json_option
def command(
    bundle: Path,
    target: str,
    recipe: str,
    policy_name: str,
    batch: int,
    seconds: float,
    eager: str,
    output: Path,
    as_json: bool,
) -> None:
    """Record what an engine does on this machine's hardware; exit 1 if it does not pass the policy.

    Builds the engine first where it is not there, from a build kit if the bundle holds one. The report has the gate's
    verdict, times, memory, power and clocks; lehr gate --merge takes it.

    \b
    Examples:
      lehr evidence d.lehr --target cpu -o cpu.json
      lehr evidence d.lehr --target orin-agx --recipe fp16 -o orin.json && lehr gate --merge orin.json --policy release
    """
    from lehr.ci.evidence import EagerFloors, evidence
    from lehr.ci.policy import policy
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.jsonlike import encode_json
    from lehr.runtime.picture import check_output

    check_output(output, (".json",))
    progress, today = Progress(), dt.datetime.now(tz=dt.timezone.utc).date()
    asked = policy(policy_name, today)
    record = _engine(Bundle.open(bundle), target, recipe, progress)
    report, data = evidence(
        Bundle.open(bundle),
        record,
        asked,
        today=today,
        batch=batch,
        seconds=seconds,
        floors=EagerFloors(eager),
        progress=progress,
    )
    output.write_bytes(encode_json(data, "evidence"))
    emit(as_json, data, _prose(data, output, policy_name))
    if not report.passed:
        raise click.exceptions.Exit(1)


def _engine(opened: Bundle, target: str, recipe: str, progress: Progress) -> EngineRecord:
    """The engine for this machine: the bundle's own if it fits, else one that is built now."""
    from lehr.engines import target as targets
    from lehr.engines.build import build
    from lehr.engines.kit import elsewhere
    from lehr.runtime import engine as engines
    from lehr.runtime.errors import IncompatibleEngine
    from lehr.runtime.recipe import recipe as find_recipe

    wanted, chosen = targets.target(target), find_recipe(recipe)
    if engines.engine_folders(opened, target, recipe):
        record = engines.find(opened, target, recipe)
        if not engines.differences(opened, record):
            return record
    if elsewhere(wanted, chosen):
        raise IncompatibleEngine(
            f"this machine is no {target}, and evidence comes from the hardware itself. Make a build kit with lehr "
            f"build {opened.root.name} --target {target} --recipe {recipe}, copy the bundle there, and run this there."
        )
    progress(f"building for {target} in {recipe}")
    return build(opened.root, wanted, chosen, progress=progress)


def _prose(data: dict[str, Any], output: Path, policy: str) -> str:
    bench, judged = data["measured"]["bench"], data["gate"]
    power = bench["power"]
    watts = power["reason"] if power["watts"] is None else f"{power['watts']:g} W ({power['source']})"
    rows = [
        ("engine", judged["engine"]),
        ("verdict", f"{'passes' if judged['passed'] else 'does NOT pass'} policy {judged['policy']['name']}"),
        ("one evaluation", f"{bench['step_ms']:,.3g} ms, p90 {bench['p90_ms']:,.3g} ms, batch {bench['batch']}"),
        ("one loop", f"{bench['loop_s']:,.3g} s, {bench['loop_steps']} steps"),
        ("start-up", f"{bench['start_s']:,.3g} s, peak {bench['peak_mb']:,.0f} MB"),
        ("power", watts),
        ("eager here", data["measured"]["eager"].get("unavailable") or "floors measured"),
        *sorted(data["measured"]["machine"].items()),
    ]
    return f"{table(('what', 'measured'), rows)}\n{output}: next, lehr gate --merge {output} --policy {policy}"
