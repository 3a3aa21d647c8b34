"""The stages beside the denoiser, judged: L0 and L1 of the engines that the pipeline would run with this denoiser."""

from __future__ import annotations

from collections.abc import Mapping

from lehr.ci.checks import Check, Outcome, judged
from lehr.ci.policy import Policy
from lehr.runtime.bundle import Bundle
from lehr.runtime.engine import EngineRecord, engines
from lehr.runtime.errors import BundleError
from lehr.runtime.picture_golden import verify_pictures
from lehr.runtime.stages import DENOISER, stage_engine
from lehr.runtime.verify_stage import Tolerance, verify_stage


def judge_stages(
    bundle: Bundle, record: EngineRecord, policy: Policy, recipes: Mapping[str, str]
) -> tuple[list[Check], list[EngineRecord]]:
    """Checks of every stage, and the engines that they are about. A stage that cannot be judged fails.

    Args:
        bundle: with golden data of its stages.
        record: the denoiser's engine; its target and recipe decide which engines the stages run with.
        policy: whose limits of L1 hold.
        recipes: of stages that run in another recipe.

    Raises:
        BundleError: damaged files, or an engine of another machine.
        UnknownName: ``recipes`` names a stage that the bundle has not.
    """
    checks: list[Check] = []
    found: list[EngineRecord] = []
    for name in recipes:
        bundle.manifest.stage(name)
    for name, entry in bundle.manifest.stages.items():
        engines(bundle, name)  # raises for a damaged one; below, what is not there
        try:
            stage = stage_engine(bundle, name, record.target, {DENOISER: record.recipe, **recipes})
        except BundleError as e:
            checks.append(judged(f"L0.{name}", False, str(e)))
            continue
        found.append(stage)
        if entry.golden not in bundle.manifest.files:
            reason = (
                "it was exported without golden data, which above 2 billion parameters is the default, so nothing can "
                "be compared. Export it again: lehr export SOURCE -o NAME.lehr --golden steps"
            )
            checks.append(judged(f"L1.{name}", False, reason))
            continue
        checks += _judged(bundle, stage, name, policy)
    return checks, found


def judge_pictures(bundle: Bundle, record: EngineRecord, recipes: Mapping[str, str]) -> list[Check]:
    """L2 of the pipeline as a whole, where its pictures were recorded at export; arguments and errors as above."""
    level = verify_pictures(bundle, record.target, record.recipe, recipes)
    if level is None:
        return []
    if level.passed is None:
        return [Check(name="L2.picture", outcome=Outcome.NOT_RUN, reason=level.reason)]
    value, limit = (level.measures.get(key) for key in ("psnr_db", "limit_psnr_db"))
    return [judged("L2.picture.psnr_db", level.passed, level.reason, value=value, limit=limit)]


def _judged(bundle: Bundle, stage: EngineRecord, name: str, policy: Policy) -> list[Check]:
    limits = policy.limits_for(stage.recipe).L1
    verdict = verify_stage(bundle, stage, Tolerance(factor=limits.floor_factor, least=limits.rel_error))
    l0, l1 = verdict.levels["L0"], verdict.levels["L1"]
    made = [judged(f"L0.{name}", l0.passed is True, f"{stage.recipe}: {l0.reason}")]
    if l1.passed is None:
        return [*made, Check(name=f"L1.{name}", outcome=Outcome.NOT_RUN, reason=l1.reason)]
    error, limit = float(l1.measures["max_rel_error"]), float(l1.measures["limit"])
    return [*made, judged(f"L1.{name}.rel_error", l1.passed, f"{stage.recipe}: {l1.reason}", value=error, limit=limit)]
