"""``lehr gate``."""

from __future__ import annotations

import datetime as dt
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lehr.commands._output import emit, engine_options, json_option, table
from lehr.commands._stages import stage_recipe_option, stage_recipes

if TYPE_CHECKING:
    from lehr.ci.checks import Report
    from lehr.ci.distribution import Networks
    from lehr.ci.policy import Policy
    from lehr.runtime.errors import LehrError

_SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"


@click.command("gate")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="NAME.lehr")
@click.option(
    "--policy",
    "policy_name",
    required=True,
    metavar="NAME|FILE.toml",
    help="strict, release, smoke, mlperf-sdxl, or a file.",
)
@engine_options
@stage_recipe_option
@click.option("--baseline", type=click.Path(path_type=Path), metavar="OLD.lehr", help="Compare the cost with this one.")
@click.option(
    "--features", type=click.Path(path_type=Path), metavar="FILE.onnx", help="Network whose features L3 compares."
)
@click.option(
    "--text-features",
    type=click.Path(path_type=Path),
    metavar="FILE.onnx",
    help="Network from the model's conditions to the same features, for text-image similarity.",
)
@click.option(
    "--statistics",
    type=click.Path(path_type=Path),
    metavar="FILE.npz",
    help="mu and sigma of real pictures' features, for policies with absolute windows.",
)
@click.option(
    "--prompts", type=click.Path(path_type=Path), metavar="FILE.npz", help="Conditions to draw with, one row a sample."
)
@click.option("--merge", is_flag=True, help="Join reports of several machines: lehr gate --merge [NAME.lehr] A.json …")
@click.option(
    "--expect",
    multiple=True,
    metavar="TARGET[:RECIPE]",
    help="With --merge: fail without a report of this target. May be repeated.",
)
@click.option("--junit", type=click.Path(path_type=Path), metavar="FILE.xml", help="Also write JUnit XML.")
@click.option("--sarif", type=click.Path(path_type=Path), metavar="FILE.sarif", help="Also write SARIF 2.1.0.")
@click.option(
    "--report", type=click.Path(path_type=Path), metavar="DIR", help="Also write DIR/report.html and DIR/report.json."
)
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    paths: tuple[Path, ...],
    policy_name: str,
    target: str,
    recipe: str,
    stage_recipe: tuple[str, ...],
    baseline: Path | None,
    features: Path | None,
    text_features: Path | None,
    statistics: Path | None,
    prompts: Path | None,
    merge: bool,
    expect: tuple[str, ...],
    junit: Path | None,
    sarif: Path | None,
    report: Path | None,
    as_json: bool,
) -> None:
    """Hold an engine against a release policy; exit 1 if it must not be released.

    L0 is structure, L1 single evaluations, L2 whole loops, L3 many samples, L4 cost beside a baseline. Where
    GITHUB_STEP_SUMMARY names a file, the table is appended to it as Markdown. Stages beside the denoiser are held
    against L0 and L1; one without an engine or without golden data fails.

    With --merge the reports of several machines, of lehr gate --json or lehr evidence, become one verdict. A bundle
    among them must be the one that all of them were made of.

    \b
    Examples:
      lehr gate d.lehr --policy release
      lehr gate d.lehr --policy strict --baseline old.lehr --junit gate.xml --report gate/ --json
      lehr gate --merge d.lehr x86.json orin.json --policy release --expect cpu --expect orin-agx:fp16
    """
    from lehr.ci import junit as xml
    from lehr.ci import sarif as findings
    from lehr.ci.distribution import Networks
    from lehr.ci.markdown import append_summary
    from lehr.ci.page import make_folder, write_report
    from lehr.ci.policy import policy
    from lehr.runtime.errors import LehrError
    from lehr.runtime.picture import check_output

    _check_usage(ctx, paths, merge, expect)
    if junit is not None:
        check_output(junit, (".xml",))
    if sarif is not None:
        check_output(sarif, (".sarif", ".json"))
    if report is not None:
        make_folder(report)
    networks = Networks(features=features, text_features=text_features, statistics=statistics, prompts=prompts)
    try:
        asked = policy(policy_name, dt.datetime.now(tz=dt.timezone.utc).date())
        if merge:
            made, data = _merged(paths, asked, expect)
        else:
            made, data = _gated(paths[0], asked, target, recipe, stage_recipe, baseline, networks)
    except LehrError as e:
        _write_errors(paths[0].name, e, junit, sarif)
        raise
    if junit is not None:
        xml.write(junit, made)
    if sarif is not None:
        findings.write(sarif, made)
    if report is not None:
        write_report(report, made, data)
    if os.environ.get(_SUMMARY_VARIABLE):
        append_summary(Path(os.environ[_SUMMARY_VARIABLE]), made)
    emit(as_json, data, _prose(made))
    if not made.passed:
        raise click.exceptions.Exit(1)


def _check_usage(ctx: click.Context, paths: tuple[Path, ...], merge: bool, expect: tuple[str, ...]) -> None:
    given = {
        name
        for name in (
            "target",
            "recipe",
            "stage_recipe",
            "baseline",
            "features",
            "text_features",
            "statistics",
            "prompts",
        )
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
    }
    if merge and given:
        raise click.UsageError(
            f"--{min(given).replace('_', '-')} says what to judge, and --merge joins what was judged already.", ctx
        )
    if not merge and expect:
        raise click.UsageError("--expect goes with --merge.", ctx)
    if not merge and len(paths) != 1:
        raise click.UsageError(f"expected one bundle, got {len(paths)}. To join reports, add --merge.", ctx)


def _gated(
    path: Path,
    asked: Policy,
    target: str,
    recipe: str,
    stage_recipe: tuple[str, ...],
    baseline: Path | None,
    networks: Networks,
) -> tuple[Report, dict[str, Any]]:
    from lehr.ci.gate import gate
    from lehr.runtime import engine as engines
    from lehr.runtime.bundle import Bundle

    opened = Bundle.open(path)
    old = None if baseline is None else Bundle.open(baseline)
    made = gate(
        opened,
        engines.find(opened, target, recipe),
        asked,
        baseline=old,
        networks=networks,
        stage_recipes=stage_recipes(opened.manifest.stages, stage_recipe),
    )
    return made, made.to_json()


def _merged(paths: tuple[Path, ...], asked: Policy, expect: tuple[str, ...]) -> tuple[Report, dict[str, Any]]:
    from lehr.ci.merge import merge, sources
    from lehr.ci.reports import read_report
    from lehr.engines import target as targets
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.errors import InvalidInput
    from lehr.runtime.recipe import recipe as find_recipe

    for name in expect:
        wanted, _, formats = name.partition(":")
        targets.target(wanted)  # a name that is misspelt is no missing report
        if formats:
            find_recipe(formats)
    bundles = [path for path in paths if path.is_dir()]
    if len(bundles) > 1:
        raise InvalidInput(f"expected one bundle beside the reports, got {', '.join(map(str, bundles))}.")
    reports = [read_report(path) for path in paths if path not in bundles]
    made = merge(reports, asked, expected=expect, bundle=Bundle.open(bundles[0]) if bundles else None)
    return made, {**made.to_json(), "reports": sources(reports)}


def _write_errors(name: str, error: LehrError, junit: Path | None, sarif: Path | None) -> None:
    """What kept the gate from judging: a build server shows a missing file as nothing at all."""
    from lehr.ci import junit as xml
    from lehr.ci import sarif as findings

    if junit is not None:
        xml.write_error(junit, name, error)
    if sarif is not None:
        findings.write_error(sarif, error)


def _prose(made: Report) -> str:
    rows = [(check.name, check.outcome.value, check.reason) for check in made.checks]
    return f"{table(('check', 'outcome', 'reason'), rows)}\n{made.engine} {made.verdict}"
