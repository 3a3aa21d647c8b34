"""Policies: what the shipped ones say, and every wrong line refused by its number."""

from __future__ import annotations

import datetime as dt
import itertools
import re
from dataclasses import fields

import pytest

from lehr.ci.policy import LEVELS, CostLimits, DistributionLimits, LoopLimits, StepLimits, policies, policy, read_policy
from lehr.runtime.errors import InvalidInput, UnknownName

TODAY = dt.date(2030, 1, 15)
WAIVER = '[[waivers]]\ncheck = "{check}"\nexpires = {expires}\nreason = "{reason}"\n'
THRESHOLD = re.compile(r"\s*[\w.]+ = -?[\d.]+")


def written(tmp_path, *changes, more="", name="release"):
    """A copy of a shipped policy with (from, to) replacements, and lines at its end."""
    text = policies()[name].read_text()
    for before, after in changes:
        assert text.count(before) >= 1, before
        text = text.replace(before, after, 1)
    file = tmp_path / "mine.toml"
    file.write_text(text + more)
    return file


def line_of(file, start):
    return next(k for k, line in enumerate(file.read_text().splitlines(), 1) if line.startswith(start))


# ------------------------------------------------------------------------------------------------- shipped ones


@pytest.mark.parametrize("name", sorted(policies()))
def test_a_shipped_policy_is_read_and_bears_its_file_name(name):
    made = policy(name, TODAY)
    assert made.name == name
    assert set(made.required) <= set(LEVELS)
    assert not made.waivers


@pytest.mark.parametrize("name", sorted(policies()))
def test_every_threshold_of_a_shipped_policy_has_its_reason_on_the_line(name):
    lines = policies()[name].read_text().splitlines()
    thresholds = [line for line in lines if THRESHOLD.match(line) and not line.startswith("schema")]
    expected = sum(len(fields(kind)) for kind in (StepLimits, LoopLimits, DistributionLimits, CostLimits))
    assert len(thresholds) >= expected
    assert [line for line in thresholds if len(line.partition("#")[2].strip()) < 8] == []


def test_strict_asks_at_least_what_release_does_and_release_what_smoke_does():
    ladder = [policy(name, TODAY) for name in ("smoke", "release", "strict")]
    for recipe in ("fp32", "fp16", "bf16"):
        for looser, tighter in itertools.pairwise(ladder):
            a, b = looser.limits_for(recipe), tighter.limits_for(recipe)
            assert b.L1.floor_factor <= a.L1.floor_factor
            assert b.L1.rel_error <= a.L1.rel_error
            assert b.L2.max_abs <= a.L2.max_abs
            for name in ("psnr_db", "snr_db", "ssim", "cosine"):
                assert getattr(b.L2, name) >= getattr(a.L2, name), (recipe, name)
            assert set(looser.required) <= set(tighter.required)


def test_a_recipe_of_its_own_changes_only_what_it_names():
    made = policy("release", TODAY)
    assert made.limits_for("bf16").L2.psnr_db == 40
    assert made.limits_for("bf16").L1 == made.limits.L1
    assert made.limits_for("fp32") == made.limits


def test_an_unknown_policy_names_the_known_ones():
    with pytest.raises(UnknownName, match=r"release.*Did you mean 'strict'"):
        policy("strikt", TODAY)


def test_a_policy_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="no such policy file"):
        policy(str(tmp_path / "gone.toml"), TODAY)


# ------------------------------------------------------------------------------------------------- wrong lines


@pytest.mark.parametrize(
    ("change", "where", "says"),
    [
        (("psnr_db = 60.0", "psnr = 60.0"), "psnr =", r"L2\.psnr is unknown"),
        (("psnr_db = 60.0", "psnr_db = 0"), "psnr_db = 0", r"L2\.psnr_db is 0, expected more than 0"),
        (("psnr_db = 60.0", "psnr_db = nan"), "psnr_db = nan", r"is nan"),
        (("psnr_db = 60.0", "psnr_db = true"), "psnr_db = true", r"is True, expected a number"),
        (("ssim = 0.999", "ssim = 1.5"), "ssim = 1.5", r"L2\.ssim is 1\.5"),
        (("rel_error = 1e-4", "rel_error = -1e-4"), "rel_error", r"L1\.rel_error is -0\.0001"),
        (("floor_factor = 10.0", "floor_factor = 0.5"), "floor_factor = 0.5", r"floor_factor is 0\.5"),
        (("confidence = 0.99", "confidence = 95"), "confidence", r"L3\.confidence is 95"),
        (("latency_ratio = 1.10", "latency_ratio = '1.1'"), "latency_ratio", r"expected a number"),
        (("max_seconds = 30.0", "max_seconds = inf"), "max_seconds", r"max_seconds is inf"),
        (("schema = 1", "schema = 2"), "schema", r"schema is 2, this Lehr reads 1"),
        (("schema = 1", "schema = true"), "schema", r"schema is True"),
        (('required = ["L0", "L1", "L2"]', 'required = ["L0", "L9"]'), "required", r"expected some of L0"),
        (('required = ["L0", "L1", "L2"]', "required = []"), "required", r"required is \[\]"),
        (("ssim = 0.999 ", "# "), "[L2]", r"L2 lacks ssim"),
        (("L2.psnr_db = 40.0", "L2.psnr = 40.0"), "L2.psnr = 40", r"recipes\.bf16\.L2\.psnr is unknown"),
        (("L2.ssim = 0.97 ", "L2.ssim = 2 "), "L2.ssim = 2", r"recipes\.bf16\.L2\.ssim is 2"),
        (("samples = 100 ", "samples = 5 "), "samples", r"L3\.samples is 5, expected 0 or at least 20"),
        (("samples = 100 ", "samples = 0 "), "samples", r"L3\.samples is 0, and the policy requires L3"),
        (('features = ["L3"]', 'features = ["L2"]'), "required_with_features", r"expected L3"),
        (("[recipes.bf16]", "[recipes.bf61]"), "[recipes.bf61]", r"Did you mean 'bf16'"),
    ],
)
def test_a_wrong_line_is_refused_by_its_number(tmp_path, change, where, says):
    file = written(tmp_path, change)
    with pytest.raises(InvalidInput, match=rf"^mine\.toml, line {line_of(file, where)}: .*{says}"):
        read_policy(file, TODAY)


@pytest.mark.parametrize(
    ("change", "where", "says"),
    [
        (("fid_min = 23.01", "fid_min = 24"), "fid_min", r"window\.fid_min is 24, expected less than fid_max"),
        (("error = 0.01", "error = 0.6"), "error", r"window\.error is 0\.6"),
        (("look_every = 250", "look_ever = 250"), "look_ever", r"window\.look_ever is unknown"),
    ],
)
def test_a_wrong_window_is_refused_by_its_number(tmp_path, change, where, says):
    file = written(tmp_path, change, name="mlperf-sdxl")
    with pytest.raises(InvalidInput, match=rf"^mine\.toml, line {line_of(file, where)}: .*{says}"):
        read_policy(file, TODAY)


def test_the_window_of_mlperf_is_what_it_publishes():
    window = policy("mlperf-sdxl", TODAY).window
    assert (window.fid_min, window.fid_max) == (23.01, 23.95)
    assert (window.clip_min, window.clip_max) == (31.69, 31.81)
    assert window.samples == 5000


def test_text_that_is_no_toml_is_refused_with_its_line(tmp_path):
    file = written(tmp_path, ("psnr_db = 60.0", "psnr_db = = 60.0"))
    with pytest.raises(InvalidInput, match=rf"line {line_of(file, 'psnr_db = =')}"):
        read_policy(file, TODAY)


# ----------------------------------------------------------------------------------------------------- waivers


def test_a_waiver_holds_on_its_last_day_and_for_its_recipe_alone(tmp_path):
    more = WAIVER.format(check="L2.*.ssim", expires=TODAY, reason="a known blur") + 'recipe = "bf16"\n'
    (waiver,) = read_policy(written(tmp_path, more=more), TODAY).waivers
    assert waiver.covers("L2.guided.ssim", "bf16")
    assert not waiver.covers("L2.guided.ssim", "fp32")
    assert not waiver.covers("L2.guided.psnr_db", "bf16")


@pytest.mark.parametrize(
    ("fields", "key", "says"),
    [
        ({"expires": "2030-01-14"}, "expires", "was 2030-01-14, and today is 2030-01-15"),
        ({"expires": '"soon"'}, "expires", "expected a date"),
        ({"expires": "2030-02-01T00:00:00"}, "expires", "expected a date"),
        ({"reason": " "}, "reason", "is empty"),
        ({"check": "L0.values"}, "check", "expected a check of L1 to L4"),
        ({"check": "*"}, "check", "expected a check of L1 to L4"),
    ],
)
def test_a_wrong_waiver_is_refused_by_its_line_also_after_a_good_one(tmp_path, fields, key, says):
    good = {"check": "L2.*", "expires": "2030-02-01", "reason": "known"}
    file = written(tmp_path, more=WAIVER.format(**good) + WAIVER.format(**(good | fields)))
    lines = [k for k, line in enumerate(file.read_text().splitlines(), 1) if line.startswith(f"{key} =")]
    with pytest.raises(InvalidInput, match=rf"line {lines[1]}: waivers\.{key} .*{re.escape(says)}"):
        read_policy(file, TODAY)


def test_a_waiver_without_a_reason_is_refused(tmp_path):
    file = written(tmp_path, more='[[waivers]]\ncheck = "L2.*"\nexpires = 2030-02-01\n')
    with pytest.raises(InvalidInput, match=rf"line {line_of(file, '[[waivers]]')}: waivers lacks reason"):
        read_policy(file, TODAY)
