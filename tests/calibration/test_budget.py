"""Budgets: what may be asked for, and when a measurement has seen enough."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lehr.calibration.budget import LEAST, LEAST_FID, Budget, Losses, Measure, parse_budget
from lehr.calibration.budgeted import Wish
from lehr.runtime.errors import InvalidInput, UnknownName


def losses(values: list[float], score_error: float | None = None) -> Losses:
    kept = tuple(values)
    return Losses(psnr_db=kept, snr_db=kept, ssim=kept, cosine=kept, score_error=score_error)


@pytest.mark.parametrize(
    "text, measure, limit",
    [
        ("psnr>=35", Measure.PSNR, 35.0),
        (" psnr >= 35.5 dB ", Measure.PSNR, 35.5),
        ("ssim>=0.98", Measure.SSIM, 0.98),
        ("cosine>=.5", None, 0.5),
        ("score_error<=2e-2", Measure.SCORE_ERROR, 0.02),
        ("sqnr>=40dB", Measure.SQNR, 40.0),
    ],
)
def test_a_budget_is_read_as_it_is_written(text: str, measure: Measure | None, limit: float) -> None:
    if measure is None:
        with pytest.raises(InvalidInput, match="no budget"):
            parse_budget(text)
        return
    assert parse_budget(text) == Budget(measure=measure, limit=limit)
    assert parse_budget(str(parse_budget(text))) == parse_budget(text)


@pytest.mark.parametrize(
    "text",
    [
        "psnr<=35",
        "score_error>=0.1",
        "sqnr<=40",
        "fid>=2",
        "fid<=-1",
        "ssim>=1.5",
        "score_error<=-1",
        "35",
        "psnr>=nan",
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_budget(text)


def test_an_unknown_measure_names_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="psnr"):
        parse_budget("psnrr>=3")


def test_a_distance_of_distributions_is_known_when_all_samples_are_drawn() -> None:
    budget = parse_budget("fid<=5")
    assert budget == Budget(measure=Measure.FID, limit=5.0)
    assert parse_budget(str(budget)) == budget
    half = losses([40.0] * (2 * LEAST))
    assert not budget.decided(half)
    assert not budget.met(half)  # nothing was measured, so nothing is kept
    whole = Losses(psnr_db=half.psnr_db, fid=4.9)
    assert budget.met(whole)
    assert budget.margin(whole) == pytest.approx(0.1)
    assert Losses.from_json(whole.to_json()) == whole
    assert whole.extended(half).fid == 4.9


def test_a_budget_on_fid_asks_for_a_network_and_enough_samples(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="--features"):
        Wish(budget=parse_budget("fid<=5"), num=LEAST_FID)
    with pytest.raises(InvalidInput, match=f"--held-out {LEAST_FID}"):
        Wish(budget=parse_budget("fid<=5"), num=64, features=tmp_path / "f.onnx")


@given(st.lists(st.floats(-50, 90), min_size=2, max_size=40), st.floats(-40, 80))
def test_a_budget_is_met_exactly_where_the_mean_keeps_the_limit(values: list[float], limit: float) -> None:
    measured = losses(values, score_error=abs(values[0]))
    assert Budget(measure=Measure.PSNR, limit=limit).met(measured) == (math.fsum(values) / len(values) - limit >= 0)
    on_score = Budget(measure=Measure.SCORE_ERROR, limit=abs(limit))
    assert on_score.met(measured) == (abs(limit) - abs(values[0]) >= 0)


def test_a_budget_on_evaluations_is_judged_by_their_mean_and_needs_few_samples() -> None:
    budget = parse_budget("sqnr>=40")
    drawn = losses([35.0] * LEAST)
    assert not budget.met(drawn)  # no evaluation was compared
    assert not budget.decided(drawn)
    compared = replace(drawn, sqnr_db=(39.0, 42.0))
    assert budget.met(compared)
    assert budget.decided(compared)
    assert budget.margin(compared) == 0.5
    assert not budget.met(replace(drawn, sqnr_db=(39.0, 40.9)))
    assert compared.summary()["sqnr"] == {"mean": 40.5, "worst": 39.0}


@given(st.floats(20, 50), st.floats(0.01, 3))
def test_a_measurement_ends_early_only_where_the_answer_is_clear(mean: float, spread: float) -> None:
    values = [mean + spread * (-1) ** k for k in range(LEAST)]
    error = losses(values).standard_error(Measure.PSNR)
    assert Budget(measure=Measure.PSNR, limit=mean - 4 * error).decided(losses(values))
    assert Budget(measure=Measure.PSNR, limit=mean + 4 * error).decided(losses(values))
    assert not Budget(measure=Measure.PSNR, limit=mean + 2 * error).decided(losses(values))
    assert not Budget(measure=Measure.PSNR, limit=mean - 4 * error).decided(losses(values[: LEAST - 1]))


def test_losses_come_back_from_json_as_they_were() -> None:
    measured = replace(losses([1.5, 2.25], score_error=0.125), sqnr_db=(41.5, 38.25))
    assert Losses.from_json(measured.to_json()) == measured
    older = {key: value for key, value in measured.to_json().items() if key != "sqnr_db"}
    assert Losses.from_json(older) == replace(measured, sqnr_db=())
    assert measured.extended(losses([3.0])).psnr_db == (1.5, 2.25, 3.0)
    assert measured.worst(Measure.PSNR) == 1.5
