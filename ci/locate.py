"""What to look at first when an engine fails: the layer, or what reaches the graphs, or what is made of their results.

The graphs are run by hand with their tensors shown (:mod:`lehr.engines.divergence`). Where a layer parts from the
reference, it is named. Where all of them follow it, the graphs are right and something around them is not: then the
engine's answer is compared with what the graphs would have answered to other inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.ci.checks import Check, Found, Outcome, StepSeries
from lehr.runtime.bundle import Bundle
from lehr.runtime.denoiser import Denoiser
from lehr.runtime.engine import EngineRecord
from lehr.runtime.errors import BundleError, LehrError, MissingExtra, RunFailed
from lehr.runtime.golden import Golden
from lehr.runtime.hoisted import load_denoiser
from lehr.runtime.parity import relative_error

Array = npt.NDArray[Any]

SAME = 1e-3  # relative: an answer to other inputs than those asked for is told apart from rounding
_NAMES = ("L0.values", "L1.", "L2.")
_MEASURED = (Outcome.FAILED,)


def locate(
    bundle: Bundle,
    record: EngineRecord,
    denoiser: Denoiser,
    golden: Golden,
    checks: Sequence[Check],
    steps: StepSeries | None,
) -> Found | None:
    """Say what is to blame for failures of L0 to L2; None where nothing of theirs failed.

    Args:
        bundle: with the portable graphs, as far as this copy of it holds them.
        record: of the engine.
        denoiser: the engine as it was judged.
        golden: recorded inputs.
        checks: what was judged.
        steps: errors by timestep; None where the engine could not be evaluated.
    """
    failed = [c.name for c in checks if c.outcome in _MEASURED and c.name.startswith(_NAMES)]
    if not failed or steps is None:
        return None
    k = int(np.argmax(np.asarray(steps.rel_error) / np.asarray(steps.limits)))
    output = _output(denoiser, golden, k)
    row = 0 if output is None else _worst_row(golden.steps.outputs[k], output)
    try:
        found = _layer(bundle, record, golden, k, row)
    except (RunFailed, BundleError, MissingExtra) as e:
        return Found(kind="unknown", text=f"the layers could not be compared: {e}")
    if found is not None:
        return found
    if all(name.startswith("L2.") for name in failed):
        return _around_loops(checks, failed, golden)
    if output is not None and (other := _other_inputs(bundle, record, golden, k, output)):
        return other
    return Found(
        kind="inputs",
        text="every layer follows the reference when the graphs are run by hand on the recorded inputs: look at what "
        "reaches them (timesteps, conditions kept from another prompt, order of the samples)",
    )


def as_check(found: Found) -> Check:
    """A line for the table; it is a fact and not judged."""
    return Check(name="L1.culprit", outcome=Outcome.NOTED, reason=found.text)


# ------------------------------------------------------------------------------------------------------ in the graphs


def _layer(bundle: Bundle, record: EngineRecord, golden: Golden, k: int, row: int) -> Found | None:
    try:
        from lehr.engines.divergence import Culprit, portable_culprit, recorded_culprit
    except ModuleNotFoundError as e:
        raise MissingExtra(e.name or "onnx_ir", "export") from e
    steps = golden.steps
    alone: Culprit | None = None
    culprit: Culprit | None = None
    reasons = []
    try:
        alone = portable_culprit(bundle, record, steps, k, row)
    except (BundleError, MissingExtra) as e:  # a copy of the bundle without its graphs
        reasons.append(str(e))
    try:
        culprit = recorded_culprit(bundle, record, steps)
    except BundleError as e:  # the recording is damaged
        reasons.append(str(e))
    if culprit is None and alone is None:
        if reasons:
            raise BundleError(" ".join(reasons))
        return None
    if culprit is None or (alone is not None and alone.layer == culprit.layer):
        where = "in the engine alone" if alone is not None else "in the engine"
    else:
        where = "in the bundle's graphs or weights, since the portable graph has it too"
    named = culprit or alone
    if named is None:
        return None
    return Found(
        kind="layer",
        text=f"{named}; {where}",
        graph=named.graph,
        layer=named.layer,
        unseen=named.unseen,
        tensor=named.tensor,
        timestep=named.timestep,
    )


# ---------------------------------------------------------------------------------------------------- around the graphs


def _around_loops(checks: Sequence[Check], failed: Sequence[str], golden: Golden) -> Found:
    wrong = {name.split(".")[1] for name in failed}
    if wrong == {"run"}:
        return Found(
            kind="noise",
            text="recorded loops agree, samples drawn by seed do not: look at the noise and the order of the samples",
        )
    wrong -= {"run"}
    guided = {loop.name for loop in golden.trajectories if loop.guidance_scale != 1.0}
    first = next((c.reason for c in checks if c.name == f"L2.{min(wrong)}.drift"), "")
    plain = {loop.name for loop in golden.trajectories} - guided
    if wrong <= guided and plain:
        return Found(
            kind="guidance",
            text=f"single evaluations and unguided loops agree: look at guidance, its scale and its halves; {first}",
        )
    return Found(
        kind="sampler",
        text=f"single evaluations agree and loops do not: look at the sampler and its table; {first}",
    )


def _other_inputs(bundle: Bundle, record: EngineRecord, golden: Golden, k: int, output: Array) -> Found | None:
    """Inputs other than those asked for that explain what the engine answered."""
    steps = golden.steps
    try:
        fresh = load_denoiser(bundle, record)
    except LehrError:
        return None
    asked = float(steps.timesteps[k])
    tried = [(f"timestep {t:g} instead of {asked:g}", t, steps.conditions) for t in (asked - 1, asked + 1)]
    tried += [
        (f"timestep {float(t):g} instead of {asked:g}", float(t), steps.conditions)
        for j, t in enumerate(steps.timesteps)
        if abs(j - k) == 1
    ]
    batched = {tensor.name for tensor in fresh.spec.conditions if tensor.batched}
    for shift, words in ((1, "its neighbour's"), (-1, "its neighbour's")):
        moved = {n: np.roll(v, shift, axis=0) if n in batched else v for n, v in steps.conditions.items()}
        tried.append((f"each sample with {words} conditions", asked, moved))
    first = {n: np.repeat(v[:1], len(v), axis=0) if n in batched else v for n, v in steps.conditions.items()}
    tried.append(("every sample with the first one's conditions", asked, first))
    if relative_error(steps.outputs[k], output) <= SAME:
        return None
    for words, timestep, conditions in tried:
        try:
            answer = fresh(steps.inputs[k], timestep, conditions)
        except LehrError:
            continue
        if relative_error(answer, output) <= SAME:
            return Found(
                kind="inputs",
                text=f"the layers are right and the engine answered to other inputs: {words}",
                timestep=asked,
            )
    return None


def _output(denoiser: Denoiser, golden: Golden, k: int) -> Array | None:
    try:
        return denoiser(golden.steps.inputs[k], float(golden.steps.timesteps[k]), golden.steps.conditions)
    except RunFailed:
        return None


def _worst_row(expected: Array, output: Array) -> int:
    axes = tuple(range(1, expected.ndim))
    error = np.square(output.astype(np.float64) - expected).sum(axis=axes)
    return int(np.argmax(np.where(np.isfinite(error), error, np.inf)))
