"""What a user may ask for (``psnr>=35``), and what was measured to answer it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from lehr.runtime.errors import InvalidInput, UnknownName

CONFIDENCE = 3.0  # standard errors: a measurement that stops early is wrong about 3 in 1000 times at each look
LEAST = 16  # samples before a measurement may stop early
LEAST_FID = 256  # samples whose features a distance of distributions is taken of

_BUDGET = re.compile(r"\s*([a-z_]+)\s*(>=|<=)\s*([-+]?\d+(?:\.\d*)?(?:e[-+]?\d+)?)\s*(?:dB)?\s*")


class Measure(str, Enum):
    """What a budget can be stated in; the mean over held-out samples is meant."""

    PSNR = "psnr"  # dB of the final sample, the peak being the width of the value range
    SNR = "snr"  # dB, variance of the reference sample over the mean squared error
    SSIM = "ssim"
    COSINE = "cosine"
    SCORE_ERROR = "score_error"  # of single evaluations, relative to the score
    SQNR = "sqnr"  # dB, outputs of single evaluations; the mean over those of a loop
    FID = "fid"  # Fréchet distance to the reference's samples of the same noise, in a network's features

    @property
    def higher_is_better(self) -> bool:
        return self not in (Measure.SCORE_ERROR, Measure.FID)

    @property
    def on_evaluations(self) -> bool:
        """Whether single evaluations are compared, at the reference's inputs, and not samples."""
        return self in (Measure.SCORE_ERROR, Measure.SQNR)


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Final samples beside the reference's, one value a sample; what else was measured.

    Attributes:
        psnr_db, snr_db, ssim, cosine: one value a sample.
        score_error: the mean over single evaluations.
        sqnr_db: one value an evaluation.
        fid: of all samples as one distribution.
    """

    psnr_db: tuple[float, ...] = ()
    snr_db: tuple[float, ...] = ()
    ssim: tuple[float, ...] = ()
    cosine: tuple[float, ...] = ()
    score_error: float | None = None
    sqnr_db: tuple[float, ...] = ()
    fid: float | None = None

    @property
    def samples(self) -> int:
        return len(self.psnr_db)

    def values(self, measure: Measure) -> tuple[float, ...]:
        """One value a sample or evaluation; of the score error and the distance, which are one number, that or none."""
        if measure in (Measure.SCORE_ERROR, Measure.FID):
            whole = self.score_error if measure is Measure.SCORE_ERROR else self.fid
            return () if whole is None else (whole,)
        values: tuple[float, ...] = {
            Measure.PSNR: self.psnr_db,
            Measure.SNR: self.snr_db,
            Measure.SSIM: self.ssim,
            Measure.COSINE: self.cosine,
            Measure.SQNR: self.sqnr_db,
        }[measure]
        return values

    def mean(self, measure: Measure) -> float:
        """Over samples or evaluations; nan where nothing was measured."""
        values = self.values(measure)
        return math.fsum(values) / len(values) if values else math.nan

    def worst(self, measure: Measure) -> float:
        """Of all samples or evaluations; nan where nothing was measured."""
        values = self.values(measure)
        if not values:
            return math.nan
        return min(values) if measure.higher_is_better else max(values)

    def standard_error(self, measure: Measure) -> float:
        """Of the mean; infinite below two samples."""
        values = self.values(measure)
        if len(values) < 2:
            return math.inf
        mean = self.mean(measure)
        variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
        return math.sqrt(variance / len(values))

    def extended(self, other: Losses) -> Losses:
        """These samples and another's; what is measured once is this one's."""
        return replace(
            self,
            psnr_db=self.psnr_db + other.psnr_db,
            snr_db=self.snr_db + other.snr_db,
            ssim=self.ssim + other.ssim,
            cosine=self.cosine + other.cosine,
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "psnr_db": list(self.psnr_db),
            "snr_db": list(self.snr_db),
            "ssim": list(self.ssim),
            "cosine": list(self.cosine),
            "score_error": self.score_error,
            "sqnr_db": list(self.sqnr_db),
            "fid": self.fid,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Losses:
        lists = {name: tuple(map(float, data[name])) for name in ("psnr_db", "snr_db", "ssim", "cosine")}
        each = tuple(map(float, data.get("sqnr_db", ())))
        return cls(**lists, score_error=data["score_error"], sqnr_db=each, fid=data.get("fid"))

    def summary(self) -> dict[str, Any]:
        """Mean and worst of each measure, for reports."""
        found: dict[str, Any] = {"samples": self.samples}
        for measure in Measure:
            if self.values(measure):
                found[measure.value] = {"mean": self.mean(measure), "worst": self.worst(measure)}
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A limit that the mean over held-out samples must keep. ``parse_budget("psnr>=35")`` makes one.

    On ``sqnr`` and ``score_error`` the mean is over evaluations of a held-out loop; ``fid`` is of all samples together.
    """

    measure: Measure
    limit: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.limit):
            raise InvalidInput(f"the limit of a budget must be finite, got {self.limit}.")
        if self.measure in (Measure.SSIM, Measure.COSINE) and not -1 <= self.limit <= 1:
            raise InvalidInput(f"{self.measure.value} lies in [-1, 1], so {self.limit:g} is no budget for it.")
        if not self.measure.higher_is_better and self.limit < 0:
            raise InvalidInput(f"{self.measure.value} is never negative, so {self.limit:g} is no budget for it.")

    def __str__(self) -> str:
        sign = ">=" if self.measure.higher_is_better else "<="
        return f"{self.measure.value}{sign}{self.limit:g}"

    def margin(self, losses: Losses) -> float:
        """How far the mean is on the good side of the limit; negative if it misses, nan if it was not measured."""
        distance = losses.mean(self.measure) - self.limit
        return distance if self.measure.higher_is_better else -distance

    def met(self, losses: Losses) -> bool:
        return self.margin(losses) >= 0

    def decided(self, losses: Losses) -> bool:
        """Whether more samples would hardly change the answer: a sequential test on the mean."""
        if self.measure is Measure.FID:
            return False  # of all samples together
        if self.measure.on_evaluations:
            return bool(losses.values(self.measure)) and losses.samples >= LEAST
        if losses.samples < LEAST:
            return False
        return abs(self.margin(losses)) > CONFIDENCE * losses.standard_error(self.measure)


def parse_budget(text: str) -> Budget:
    """Read ``psnr>=35``, ``snr>=30``, ``ssim>=0.98``, ``cosine>=.999``, ``score_error<=.02``, ``sqnr>=40``, ``fid<=5``.

    Raises:
        UnknownName: another measure.
        InvalidInput: another form, or a sign that does not go with the measure.
    """
    found = _BUDGET.fullmatch(text)
    if found is None:
        raise InvalidInput(f"{text!r} is no budget; write one like psnr>=35 or score_error<=0.02.")
    name, sign, limit = found.groups()
    known = [measure.value for measure in Measure]
    if name not in known:
        raise UnknownName("measure", name, known)
    measure = Measure(name)
    if (sign == ">=") != measure.higher_is_better:
        other = ">=" if measure.higher_is_better else "<="
        raise InvalidInput(f"a budget on {name} is a limit of the other kind: {name}{other}{limit}.")
    return Budget(measure=measure, limit=float(limit))
