"""The release gate: run what a policy asks for, judge it, and say why. Never a pass by default."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lehr import __version__
from lehr.ci import fidelity
from lehr.ci.checks import Check, DistributionSeries, LoopSeries, Outcome, Report, StepSeries
from lehr.ci.cost import baseline_of, cost
from lehr.ci.distribution import Networks, distribution, judgeable
from lehr.ci.locate import as_check, locate
from lehr.ci.policy import LEVELS, Policy
from lehr.ci.stages import judge_pictures, judge_stages
from lehr.ci.window import missing, window
from lehr.runtime.bundle import Bundle
from lehr.runtime.denoiser import Denoiser
from lehr.runtime.engine import EngineRecord
from lehr.runtime.errors import BundleError, InvalidInput
from lehr.runtime.golden import Golden, read
from lehr.runtime.hoisted import load_denoiser
from lehr.runtime.host import cores, cpu_name
from lehr.runtime.jsonlike import encode_json
from lehr.runtime.verify import prepare

MODEL_HASH = "manifest.json#model"  # what names the hash of the model's description, which is no file of its own


def gate(
    bundle: Bundle,
    record: EngineRecord,
    policy: Policy,
    *,
    baseline: Bundle | None = None,
    networks: Networks | None = None,
    stage_recipes: Mapping[str, str] | None = None,
) -> Report:
    """Hold one engine against a policy.

    Args:
        bundle: with golden data.
        record: its engine.
        policy: what to ask.
        baseline: an older bundle of the same model, for L4.
        networks: feature networks that the user names, for L3.
        stage_recipes: of stages that the pipeline runs in another recipe than the denoiser's or fp32.

    Raises:
        InvalidInput: a baseline of another model, or none where the policy requires L4; or no feature network, or
            one that cannot be used, where it requires L3.
        BundleError: damaged files, an engine of another machine or of other weights, or golden data that the policy
            requires and the bundle has not.
    """
    golden = read(bundle)
    if "L2" in policy.required and not golden.trajectories:
        raise BundleError(
            f"policy {policy.name!r} requires L2, and golden data of tier {golden.tier.value!r} holds no loops. Export "
            "the model again with --golden full, or choose a policy without L2."
        )
    if "L4" in policy.required and baseline is None:
        raise InvalidInput(
            f"policy {policy.name!r} requires L4, a comparison of cost: name an older bundle, --baseline."
        )
    given = networks or Networks()
    required = _required(bundle, policy, given)
    old = None if baseline is None else baseline_of(bundle, record, baseline)  # before the work, for a wrong bundle
    denoiser = load_denoiser(bundle, record)
    prepare(denoiser, golden)
    checks, steps, loops = judge(denoiser, record, golden, policy)
    found = locate(bundle, record, denoiser, golden, checks, steps)
    if found is not None:
        checks.append(as_check(found))
    drawn, series = _drawn(bundle, record, denoiser, golden, policy, given, checks)
    checks += drawn
    of_stages, stages = judge_stages(bundle, record, policy, stage_recipes or {})
    checks += of_stages + judge_pictures(bundle, record, stage_recipes or {})
    if old is not None:
        checks += cost(bundle, record, old, golden, policy.limits_for(record.recipe).L4)
    else:
        checks.append(Check(name="L4.cost", outcome=Outcome.NOT_RUN, reason="no baseline was given"))
    return Report(
        bundle=bundle.root.name,
        model=bundle.manifest.model.name,
        engine=record.folder,
        target=record.target,
        recipe=record.recipe,
        baseline=None if baseline is None else baseline.root.name,
        policy=policy.name,
        policy_sha256=policy.sha256,
        required=required,
        checks=(*_waived(checks, policy, record.recipe), *_unused(checks, policy, record.recipe)),
        steps=steps,
        loops=loops,
        value_range=bundle.manifest.model.value_range,
        environment=_environment(record),
        hashes=_hashes(bundle, record, stages),
        culprit=found,
        distribution=series,
        pictures=_pictures(bundle),
        history=_history(bundle, record, baseline),
    )


def judge(
    denoiser: Denoiser, record: EngineRecord, golden: Golden, policy: Policy
) -> tuple[list[Check], StepSeries | None, dict[str, LoopSeries]]:
    """L0 to L2 of an engine that is loaded: checks, and what was measured."""
    limits = policy.limits_for(record.recipe)
    outputs: list[fidelity.Array] = []
    checks, runs = fidelity.structure(denoiser, record, golden, outputs)
    if not runs:
        reason = "not reached: the engine cannot be evaluated"
        return (
            [*checks, *(Check(name=f"{level}.all", outcome=Outcome.NOT_RUN, reason=reason) for level in ("L1", "L2"))],
            None,
            {},
        )
    found, steps = fidelity.steps(denoiser, record, golden, limits, outputs)
    checks += found
    loops = {}
    for trajectory in golden.trajectories:
        found, loops[trajectory.name] = fidelity.loop(denoiser, record, golden, limits, trajectory)
        checks += found
    checks += fidelity.drawn(denoiser, record, golden, limits)
    if not golden.trajectories:
        reason = f"golden data of tier {golden.tier.value!r} holds no loops"
        checks.append(Check(name="L2.loops", outcome=Outcome.NOT_RUN, reason=reason))
    return checks, steps, loops


# ------------------------------------------------------------------------------------------------- L3, many samples


def _required(bundle: Bundle, policy: Policy, given: Networks) -> tuple[str, ...]:
    """The levels that must have been judged, for this model; raises InvalidInput where L3 cannot be and must."""
    if policy.window is not None and (absent := missing(given)):
        raise InvalidInput(f"policy {policy.name!r} judges pictures in absolute windows and needs {'; '.join(absent)}.")
    required = set(policy.required)
    problem = judgeable(bundle, given)
    if problem is None or given.features is not None:
        required |= set(policy.required_with_features)
    if "L3" in required and policy.window is None and problem is not None:
        raise InvalidInput(f"policy {policy.name!r} requires L3, many samples: {problem}.")
    return tuple(level for level in LEVELS if level in required)


def _drawn(
    bundle: Bundle,
    record: EngineRecord,
    denoiser: Denoiser,
    golden: Golden,
    policy: Policy,
    given: Networks,
    before: list[Check],
) -> tuple[list[Check], DistributionSeries | None]:
    limits = policy.limits_for(record.recipe).L3
    problem = judgeable(bundle, given)
    wrong = [check.name for check in before if check.outcome is Outcome.FAILED]
    if wrong and not all(_is_waived(name, policy, record.recipe) for name in wrong):
        problem = f"not reached: {wrong[0]} failed"
    elif not limits.samples and policy.window is None:
        problem = f"policy {policy.name} draws no samples"
    elif policy.window is not None:
        return window(bundle, denoiser, golden, policy.window, given), None
    if problem is not None:
        return [Check(name="L3.samples", outcome=Outcome.NOT_RUN, reason=problem)], None
    return distribution(bundle, denoiser, golden, limits, given)


# --------------------------------------------------------------------------------------------------------- waivers


def _is_waived(name: str, policy: Policy, recipe: str) -> bool:
    return any(waiver.covers(name, recipe) for waiver in policy.waivers)


def _waived(checks: list[Check], policy: Policy, recipe: str) -> list[Check]:
    """The same checks, failures that a waiver covers marked as such."""
    made = []
    for check in checks:
        waiver = next((w for w in policy.waivers if w.covers(check.name, recipe)), None)
        if check.outcome is Outcome.FAILED and waiver is not None:
            reason = f"{check.reason} (waived until {waiver.expires}: {waiver.reason})"
            made.append(replace(check, outcome=Outcome.WAIVED, reason=reason))
        else:
            made.append(check)
    return made


def _unused(checks: list[Check], policy: Policy, recipe: str) -> list[Check]:
    """A note for each waiver of this recipe that nothing needed."""
    failed = [check.name for check in checks if check.outcome is Outcome.FAILED]
    return [
        Check(
            name=f"waiver.{waiver.check}", outcome=Outcome.NOTED, reason="nothing needed it: take it out of the policy"
        )
        for waiver in policy.waivers
        if waiver.recipe in (None, recipe) and not any(waiver.covers(name, recipe) for name in failed)
    ]


# ---------------------------------------------------------------------------------------- what the bundle holds more

MAX_PICTURE = 400_000  # bytes of one picture in a report, and MAX_PICTURES of all of them
MAX_PICTURES = 900_000


def _pictures(bundle: Bundle) -> dict[str, bytes]:
    """Heat maps that calibration left in the bundle, as far as a report has room for them."""
    found: dict[str, bytes] = {}
    for name in bundle.names("calibration/"):
        size = bundle.manifest.files[name].bytes
        if name.endswith(".png") and size <= MAX_PICTURE and size + sum(map(len, found.values())) <= MAX_PICTURES:
            found[name] = bundle.read_bytes(name, MAX_PICTURE)
    return found


def _history(bundle: Bundle, record: EngineRecord, baseline: Bundle | None) -> dict[str, dict[str, float]]:
    """Parity that ``lehr verify`` recorded in the baseline and here: column -> measure -> value."""
    columns = {"this bundle": bundle} if baseline is None else {baseline.root.name: baseline, "this bundle": bundle}
    made: dict[str, dict[str, float]] = {}
    for title, one in columns.items():
        levels: Mapping[str, Any] = next((v for name, v in one.manifest.parity.items() if _same_kind(name, record)), {})
        made[title] = {
            f"{level}.{key}": float(value)
            for level, measures in levels.items()
            if isinstance(measures, dict)
            for key, value in measures.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
    return made if any(made.values()) else {}


def _same_kind(folder: str, record: EngineRecord) -> bool:
    return folder.startswith(f"engines/{record.target}--{record.recipe}--")


# ------------------------------------------------------------------------------------------------- where, of what


def _environment(record: EngineRecord) -> dict[str, str]:
    return {
        "lehr": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        record.library: record.library_version,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": f"{cpu_name()}, {cores()} cores",
    }


def model_hash(bundle: Bundle) -> str:
    """SHA-256 of what the manifest says of the model: path, prediction, sampler, inputs and outputs."""
    return hashlib.sha256(encode_json(bundle.manifest.model.to_json(), "model")).hexdigest()


def _hashes(bundle: Bundle, record: EngineRecord, stages: Sequence[EngineRecord]) -> dict[str, str]:
    """SHA-256 of what was judged and of what it was held against, as the manifest has them."""
    names = {*record.sources, *bundle.names("golden/")}
    for stage in stages:
        names |= {*stage.sources, *bundle.names(f"{stage.folder}/")}
    names |= {entry.golden for entry in bundle.manifest.stages.values() if entry.golden is not None}
    names |= {part for graph in bundle.manifest.graphs.values() for part in (graph.file, graph.weights) if part}
    names |= set(bundle.names(f"{record.folder}/"))
    known = bundle.manifest.known_files
    found = {name: known[name].sha256 for name in sorted(names) if name in known}
    return {**found, MODEL_HASH: model_hash(bundle)}
