"""Absolute windows: the Fréchet distance to real pictures and the CLIP score, as benchmarks publish them.

Both are judged on the whole number of samples that the window speaks of. Until then the gate looks now and then, and
stops at the first look at which it is clear that an end is outside (:mod:`lehr.runtime.sequential`): a distance that is
too large, or a score on either side. Nothing passes early.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.ci.checks import Check, judged
from lehr.ci.distribution import SEED, Networks, asked_for, drawing
from lehr.ci.policy import WindowLimits
from lehr.runtime.arrays import read_arrays
from lehr.runtime.bundle import Bundle
from lehr.runtime.denoiser import Denoiser
from lehr.runtime.distribution import cosine_similarity, frechet_to_statistics
from lehr.runtime.errors import BundleError, InvalidInput, RunFailed
from lehr.runtime.golden import Golden
from lehr.runtime.pipeline import Pipeline, Request
from lehr.runtime.sequential import FrechetBound, outside
from lehr.runtime.stored_tables import StoredTables

Array = npt.NDArray[Any]

CLIP_SCALE = 100.0  # cosines are published as per cent


def missing(given: Networks) -> list[str]:
    """Options without which a window cannot be judged."""
    options = {
        "--features FILE.onnx (pictures to features)": given.features,
        "--text-features FILE.onnx (conditions to features)": given.text_features,
        "--statistics FILE.npz (mu and sigma of real pictures' features)": given.statistics,
    }
    return [option for option, value in options.items() if value is None]


def window(bundle: Bundle, denoiser: Denoiser, golden: Golden, limits: WindowLimits, given: Networks) -> list[Check]:
    """Draw until the windows are decided; checks ``L3.fid`` and ``L3.clip``.

    Raises:
        InvalidInput: something is missing or cannot be used.
    """
    from lehr.engines.feature_network import ImageNetwork, TextNetwork

    if given.features is None or given.text_features is None or given.statistics is None:
        raise InvalidInput(f"this policy's windows need {'; '.join(missing(given))}.")
    image, text = ImageNetwork(given.features), TextNetwork(given.text_features)
    mean, covariance = statistics(given.statistics)
    total = int(limits.samples)
    whole = drawing(bundle, golden, total, given.prompts)
    pipeline, spec = Pipeline(denoiser, tables=StoredTables(bundle)), bundle.manifest.model
    progress = Progress(limits, mean, covariance)
    for first in range(0, total, int(limits.look_every)):
        numbers = range(first, min(first + int(limits.look_every), total))
        try:
            samples = pipeline(_part(whole, numbers, {t.name for t in spec.conditions if t.batched}))
        except RunFailed as e:
            return [judged("L3.fid", False, str(e))]
        asked = asked_for(whole, numbers)
        features = image(samples, spec.value_range).vectors
        if checks := progress.add(features, cosine_similarity(features, text(asked))):
            return checks
    raise RunFailed("the last look did not decide; this cannot be.")


def statistics(file: Any) -> tuple[Array, Array]:
    """``mu`` and ``sigma`` of a .npz file; raises InvalidInput for anything else."""
    try:
        arrays = read_arrays(file)
    except (BundleError, OSError) as e:
        raise InvalidInput(f"cannot read the statistics {file}: {e}") from e
    if not {"mu", "sigma"} <= set(arrays) or arrays["sigma"].shape != (*arrays["mu"].shape, *arrays["mu"].shape):
        raise InvalidInput(f"{file} holds {sorted(arrays)}, expected mu of shape (D,) and sigma of shape (D, D).")
    return arrays["mu"], arrays["sigma"]


class Progress:
    """What was gathered so far; :meth:`add` returns checks as soon as they are decided."""

    def __init__(self, limits: WindowLimits, mean: Array, covariance: Array) -> None:
        self._limits, self._mean, self._covariance = limits, mean, covariance
        self._bound = FrechetBound(mean, covariance)
        self._features: list[Array] = []
        self._scores: list[Array] = []

    def add(self, features: Array, cosines: Array) -> list[Check]:
        """Take one part; checks once all samples are there, or one that failed as soon as it is clear."""
        self._features.append(features)
        self._scores.append(CLIP_SCALE * cosines)
        seen, scores = np.concatenate(self._features), np.concatenate(self._scores)
        if len(seen) >= self._limits.samples:
            return self._final(seen, scores)
        return self._early(seen, scores)

    def _early(self, features: Array, scores: Array) -> list[Check]:
        limits, n, total = self._limits, len(features), int(self._limits.samples)
        if n < self._bound.fewest:
            return []
        half = limits.error / 2
        saved = f"clear after {n} of {total} samples, at a chance of {limits.error:g} to stop a good engine"
        mean, deviation = float(np.mean(scores)), float(np.std(scores, ddof=1))
        clip = (limits.clip_min, limits.clip_max)
        if outside(mean, deviation, n, total, clip, half, tuned_to=total // 4):
            return [judged("L3.clip", False, f"{mean:.3f}, expected {_within(clip)}: {saved}", value=mean)]
        bound, spread = self._bound.estimate(features)
        if outside(bound, spread, n, total, (-np.inf, limits.fid_max), half, tuned_to=total // 4):
            reason = f"at least about {bound:.2f}, expected {_within((limits.fid_min, limits.fid_max))}: {saved}"
            return [judged("L3.fid", False, reason, value=bound, limit=limits.fid_max)]
        return []

    def _final(self, features: Array, scores: Array) -> list[Check]:
        limits, n = self._limits, len(features)
        fid = frechet_to_statistics(features, self._mean, self._covariance)
        clip = float(np.mean(scores))
        return [
            judged(
                name,
                low <= value <= high,
                f"{value:.3f} over {n} samples, expected {_within((low, high))}",
                value=value,
            )
            for name, value, low, high in (
                ("L3.fid", fid, limits.fid_min, limits.fid_max),
                ("L3.clip", clip, limits.clip_min, limits.clip_max),
            )
        ]


def _within(window: tuple[float, float]) -> str:
    return f"{window[0]:g} to {window[1]:g}"


def _part(whole: Request, numbers: range, batched: set[str]) -> Request:
    """The samples ``numbers`` of a request, on seeds of their own, so that stopping changes none of them."""
    rows = slice(numbers.start, numbers.stop)
    return replace(
        whole,
        num=len(numbers),
        seeds=[SEED + k for k in numbers],
        class_labels=tuple(whole.class_labels[k % len(whole.class_labels)] for k in numbers)
        if whole.class_labels
        else (),
        conditions={n: v[rows] if n in batched else v for n, v in whole.conditions.items()},
        unconditional={n: v[rows] for n, v in whole.unconditional.items()},
    )
