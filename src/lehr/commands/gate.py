"""``lehr gate``."""

from __future__ import annotations

import datetime as dt
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lehr.commands._output import bundle_argument, emit, engine_options, json_option, table

if TYPE_CHECKING:
    from lehr.ci.checks import Report

_SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"


@click.command("gate")
@bundle_argument
@click.option(
    "--policy", "policy_name", required=True, metavar="NAME|FILE.toml", help="strict, release, smoke, or a file."
)
@engine_options
@click.option("--baseline", type=click.Path(path_type=Path), metavar="OLD.lehr", help="Compare the cost with this one.")
@click.option("--junit", type=click.Path(path_type=Path), metavar="FILE.xml", help="Also write JUnit XML.")
@click.option("--report", type=click.Path(path_type=Path), metavar="DIR", help="Also write DIR/report.html.")
@json_option
def command(
    bundle: Path,
    policy_name: str,
    target: str,
    recipe: str,
    baseline: Path | None,
    junit: Path | None,
    report: Path | None,
    as_json: bool,
) -> None:
    """Hold an engine against a release policy; exit 1 if it must not be released.

    L0 is structure, L1 single evaluations, L2 whole loops, L4 cost beside a baseline. Where GITHUB_STEP_SUMMARY names
    a file, the table is appended to it as Markdown.

    \b
    Examples:
      lehr gate d.lehr --policy release
      lehr gate d.lehr --policy strict --baseline old.lehr --junit gate.xml --report gate/ --json
    """
    from lehr.ci import junit as xml
    from lehr.ci.gate import gate
    from lehr.ci.markdown import append_summary
    from lehr.ci.page import make_folder, write_report
    from lehr.ci.policy import policy
    from lehr.runtime import engine as engines
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.errors import LehrError
    from lehr.runtime.picture import check_output

    if junit is not None:
        check_output(junit, (".xml",))
    if report is not None:
        make_folder(report)
    try:
        asked = policy(policy_name, dt.datetime.now(tz=dt.timezone.utc).date())
        opened = Bundle.open(bundle)
        old = None if baseline is None else Bundle.open(baseline)
        made = gate(opened, engines.find(opened, target, recipe), asked, baseline=old)
    except LehrError as e:
        if junit is not None:
            xml.write_error(junit, bundle.name, e)  # a build server shows a missing file as nothing at all
        raise
    if junit is not None:
        xml.write(junit, made)
    if report is not None:
        write_report(report, made)
    if os.environ.get(_SUMMARY_VARIABLE):
        append_summary(Path(os.environ[_SUMMARY_VARIABLE]), made)
    emit(as_json, made.to_json(), _prose(made))
    if not made.passed:
        raise click.exceptions.Exit(1)


def _prose(made: Report) -> str:
    rows = [(check.name, check.outcome.value, check.reason) for check in made.checks]
    return f"{table(('check', 'outcome', 'reason'), rows)}\n{made.engine} {made.verdict}"
