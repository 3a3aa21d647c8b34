"""One verdict from the reports of several machines, by one policy.

Reports are joined only if they speak of the same thing: the same model, weights, graphs and golden data by their
hashes, judged by the very policy that is asked for, with the same Lehr. Limits follow from the model's own noise
floors, which a report does not hold, so one that another policy judged is refused instead of judged anew. What does
not depend on floors is compared with the policy again.

Every engine must have each required level judged in one of its reports; levels of one engine may come from several. A
report may add to the policy's levels, since some are required of models with known features alone, and takes none away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lehr import __version__
from lehr.ci.checks import Check, Outcome, Report
from lehr.ci.gate import MODEL_HASH, model_hash
from lehr.ci.policy import LEVELS, Limits, Policy
from lehr.ci.reports import Reported, of_an_engine
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import InvalidInput

# Measures of which a pass says that they are at least, or at most, their limit.
_LEAST = ("psnr_db", "snr_db", "ssim", "cosine")
_MOST = ("score", "order", "alone", "max_abs", "size", "latency")


def merge(
    reports: Sequence[Reported], policy: Policy, *, expected: Sequence[str] = (), bundle: Bundle | None = None
) -> Report:
    """Join reports into one.

    Args:
        reports: one at least.
        policy: that all of them were judged by.
        expected: targets, or TARGET:RECIPE, of which there must be a report; a missing one is a failure.
        bundle: what is about to be released; reports of anything else are refused.

    Raises:
        InvalidInput: no reports, or some that do not belong together; the message names the files and the difference.
    """
    if not reports:
        raise InvalidInput("there is nothing to merge. Give the reports of lehr gate --json or lehr evidence.")
    for report in reports:
        _check_policy(report, policy)
        _check_same(reports[0], report)
        if bundle is not None:
            _check_bundle(report, bundle)
    checks: list[Check] = []
    environment: dict[str, str] = {}
    hashes: dict[str, str] = {}
    engines = _by_engine(reports)
    for label, of_engine in engines.items():
        found = [_judged_again(check, report, policy) for report in of_engine for check in report.checks]
        checks += [replace(check, name=f"{check.name}[{label}]") for check in found]
        checks += _missing(found, policy, label, of_engine)
        for number, report in enumerate(of_engine):
            where = label if len(of_engine) == 1 else f"{label} ({number + 1})"
            environment |= {f"{where}: {key}": value for key, value in report.environment.items()}
            hashes |= {f"{where}: {n}" if of_an_engine(n) else n: digest for n, digest in report.hashes.items()}
    return Report(
        bundle=" and ".join(sorted({report.bundle for report in reports})),
        model=reports[0].model,
        engine=", ".join(engines),
        target=", ".join(sorted({report.target for report in reports})),
        recipe=", ".join(sorted({report.recipe for report in reports})),
        baseline=None,
        policy=policy.name,
        policy_sha256=policy.sha256,
        required=_required(policy, reports),
        checks=(*_absent(reports, expected), *checks),
        steps=None,
        loops={},
        value_range=(0.0, 1.0),
        environment=environment,
        hashes=dict(sorted(hashes.items())),
    )


def sources(reports: Sequence[Reported]) -> list[dict[str, str]]:
    """What was merged, for the JSON of the verdict."""
    return [{"file": r.file, "engine": r.engine, "target": r.target, "recipe": r.recipe} for r in reports]


# ------------------------------------------------------------------------------------------- belonging together


def _check_policy(report: Reported, policy: Policy) -> None:
    if report.policy_sha256 != policy.sha256:
        raise InvalidInput(
            f"{report.file} was judged by policy {report.policy!r} (SHA-256 {report.policy_sha256[:12]}…), and the "
            f"verdict is asked for by {policy.name!r} ({policy.sha256[:12]}…). Run the gate there again with this one."
        )
    version = report.environment.get("lehr")
    if version != __version__:
        raise InvalidInput(
            f"{report.file} was made by Lehr {version}, and this is Lehr {__version__}, which may judge otherwise. Run "
            "the gate there again with the same version."
        )


def _check_same(first: Reported, other: Reported) -> None:
    if first.model != other.model:
        raise InvalidInput(
            f"{first.file} is about model {first.model!r} and {other.file} about {other.model!r}. Merge reports of one "
            "model."
        )
    ours, theirs = first.shared, other.shared
    for name in sorted(set(ours) & set(theirs)):
        if ours[name] != theirs[name]:
            raise InvalidInput(
                f"{first.file} and {other.file} were made of different bundles: {name} differs. One of them is stale: "
                "copy the same bundle to both machines and run the gate again."
            )
    for report, names in ((first, ours), (other, theirs)):
        if MODEL_HASH not in names:
            raise InvalidInput(f"{report.file} does not say which model description it was made of ({MODEL_HASH}).")


def _check_bundle(report: Reported, bundle: Bundle) -> None:
    known = {name: entry.sha256 for name, entry in bundle.manifest.known_files.items()}
    known[MODEL_HASH] = model_hash(bundle)
    for name, digest in report.hashes.items():
        absent = of_an_engine(name) and name not in known  # built on the device, and stayed there
        if not absent and known.get(name) != digest:
            raise InvalidInput(
                f"{report.file} was not made of {bundle.root.name}: {name} differs. It is stale, or of another bundle: "
                "run the gate again on the machine it came from."
            )


# ---------------------------------------------------------------------------------------------------- judging


def _by_engine(reports: Sequence[Reported]) -> dict[str, list[Reported]]:
    """Reports by engine; two engines of one target and recipe, from two machines, bear the start of their hash."""
    grouped: dict[tuple[tuple[str, str], ...], list[Reported]] = {}
    for report in reports:
        grouped.setdefault(report.of_engine, []).append(report)
    names = [f"{group[0].target}--{group[0].recipe}" for group in grouped.values()]
    made: dict[str, list[Reported]] = {}
    for name, group in zip(names, grouped.values(), strict=True):
        digest = group[0].hashes[f"{group[0].engine}/build.json"]
        made[name if names.count(name) == 1 else f"{name}@{digest[:8]}"] = group
    return made


def _judged_again(check: Check, report: Reported, policy: Policy) -> Check:
    """The check as it counts here: waivers are those of the policy, and a pass must bear its own numbers out."""
    if check.outcome is Outcome.WAIVED and not any(w.covers(check.name, report.recipe) for w in policy.waivers):
        reason = f"{check.reason}; the report calls it waived, and the policy has no waiver for it"
        return replace(check, outcome=Outcome.FAILED, reason=reason)
    if check.outcome is not Outcome.PASSED or check.value is None or check.limit is None:
        return check
    measure = check.name.rpartition(".")[2]
    good = True
    if measure in _LEAST:
        good = check.value >= check.limit
    elif measure in _MOST:
        good = check.value <= check.limit
    asked = _absolute(check, policy.limits_for(report.recipe)).get(measure)
    if not good or (asked is not None and asked != check.limit):
        raise InvalidInput(
            f"{report.file} contradicts itself: {check.name} passed with {check.value:g} against {check.limit:g}"
            + (f", and the policy asks for {asked:g}." if good else ".")
            + " Run the gate there again."
        )
    return check


def _absolute(check: Check, limits: Limits) -> Mapping[str, float]:
    """Limits that are the same for every model, by measure."""
    if check.level == "L2":
        return {"ssim": limits.L2.ssim, "cosine": limits.L2.cosine, "max_abs": limits.L2.max_abs}
    if check.level == "L4":
        return {"size": limits.L4.size_ratio, "latency": limits.L4.latency_ratio}
    return {}


def _missing(checks: Sequence[Check], policy: Policy, label: str, reports: Sequence[Reported]) -> list[Check]:
    """A failure for each required level that none of an engine's reports judged."""
    seen = {check.level for check in checks if check.outcome in (Outcome.PASSED, Outcome.WAIVED, Outcome.FAILED)}
    files = ", ".join(report.file for report in reports)
    return [
        Check(
            name=f"{level}.judged[{label}]",
            outcome=Outcome.FAILED,
            reason=f"the policy requires {level}, and it was not judged in {files}",
        )
        for level in _required(policy, reports)
        if level not in seen
    ]


def _required(policy: Policy, reports: Sequence[Reported]) -> tuple[str, ...]:
    asked = {*policy.required, *(level for report in reports for level in report.required)}
    return tuple(level for level in LEVELS if level in asked)


def _absent(reports: Sequence[Reported], expected: Sequence[str]) -> list[Check]:
    """A failure for each target that was expected and of which there is no report."""
    have = {name for report in reports for name in (report.target, f"{report.target}:{report.recipe}")}
    return [
        Check(
            name=f"L0.reported[{name}]",
            outcome=Outcome.PASSED if name in have else Outcome.FAILED,
            reason="reported" if name in have else "no report of it was given, and one was expected",
        )
        for name in expected
    ]
