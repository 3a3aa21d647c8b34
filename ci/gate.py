"""The release gate: run what a policy asks for, judge it, and say why. Never a pass by default."""

from __future__ import annotations

import platform
from dataclasses import replace

import numpy as np

from lehr import __version__
from lehr.ci import fidelity
from lehr.ci.checks import Check, LoopSeries, Outcome, Report, StepSeries
from lehr.ci.cost import baseline_of, cost
from lehr.ci.policy import Policy
from lehr.runtime.bundle import Bundle
from lehr.runtime.denoiser import Denoiser
from lehr.runtime.engine import EngineRecord
from lehr.runtime.errors import BundleError, InvalidInput
from lehr.runtime.golden import INDEX_FILE, STEPS_FILE, Golden, read
from lehr.runtime.hoisted import load_denoiser
from lehr.runtime.host import cores, cpu_name
from lehr.runtime.verify import prepare


def gate(bundle: Bundle, record: EngineRecord, policy: Policy, *, baseline: Bundle | None = None) -> Report:
    """Hold one engine against a policy.

    Args:
        bundle: with golden data.
        record: its engine.
        policy: what to ask.
        baseline: an older bundle of the same model, for L4.

    Raises:
        InvalidInput: a baseline of another model, or none where the policy requires L4.
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
    old = None if baseline is None else baseline_of(bundle, record, baseline)  # before the work, for a wrong bundle
    denoiser = load_denoiser(bundle, record)
    prepare(denoiser, golden)
    checks, steps, loops = judge(denoiser, record, golden, policy)
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
        required=policy.required,
        checks=(*_waived(checks, policy, record.recipe), *_unused(checks, policy, record.recipe)),
        steps=steps,
        loops=loops,
        value_range=bundle.manifest.model.value_range,
        environment=_environment(record),
        hashes=_hashes(bundle, record),
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
    if not golden.trajectories:
        reason = f"golden data of tier {golden.tier.value!r} holds no loops"
        checks.append(Check(name="L2.loops", outcome=Outcome.NOT_RUN, reason=reason))
    return checks, steps, loops


# --------------------------------------------------------------------------------------------------------- waivers


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


def _hashes(bundle: Bundle, record: EngineRecord) -> dict[str, str]:
    """SHA-256 of what was judged and of what it was held against, as the manifest has them."""
    names = [*record.sources, f"{record.folder}/build.json", INDEX_FILE, STEPS_FILE]
    names += [f"{record.folder}/{plan.file}" for plan in record.plans.values()]
    return {name: bundle.manifest.files[name].sha256 for name in sorted(names) if name in bundle.manifest.files}
