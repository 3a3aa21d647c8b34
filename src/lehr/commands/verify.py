"""``lehr verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lehr.commands._output import bundle_argument, emit, engine_options, json_option, table


def rows(levels: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(level, verdict, reason) of every rung, for people."""
    words = {True: "pass", False: "FAIL", None: "-"}
    return [(name, words[level["passed"]], level["reason"]) for name, level in levels.items()]


@click.command("verify")
@bundle_argument
@engine_options
@json_option
def command(bundle: Path, target: str, recipe: str, as_json: bool) -> None:
    """Hold an engine against eager PyTorch's recorded results; exit 1 if it differs.

    L0 is structure, L1 one evaluation at several timesteps (score error), L2 whole loops on the same noise.

    \b
    Examples:
      lehr verify d.lehr
      lehr verify d.lehr --target cpu --recipe fp32 --json
    """
    from lehr.runtime import engine as engines
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.verify import record_parity, verify

    opened = Bundle.open(bundle)
    verdict = verify(opened, engines.find(opened, target, recipe))
    record_parity(opened, verdict)
    data = verdict.to_json()
    result = "passed" if verdict.passed else "FAILED"
    emit(as_json, data, table(("level", "verdict", "reason"), rows(data["levels"])) + f"\n{verdict.engine} {result}")
    if not verdict.passed:
        raise click.exceptions.Exit(1)
