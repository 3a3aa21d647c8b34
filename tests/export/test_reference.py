"""The shipped reference models: small, loadable, and as good as their records say."""

from __future__ import annotations

import json
from importlib.resources import files

import numpy as np
import pytest

from lehr.export.reference import classifier
from lehr.export.source import shipped_weights
from lehr.runtime.pipeline import Pipeline, Request

WEIGHTS = files("lehr.export.reference").joinpath("weights")
NAMED_AT_LEAST = {"digits-dit": 0.97, "digits-adm": 0.95}  # share of guided samples the classifier names as asked


@pytest.mark.parametrize("name", [*NAMED_AT_LEAST, classifier.NAME])
def test_weights_are_small_and_come_with_their_record(name):
    path = shipped_weights(name)
    assert path is not None
    assert path.stat().st_size <= 8e6
    record = json.loads(WEIGHTS.joinpath(f"{name}.json").read_text())
    assert set(record["data"]["sha256"]) == set(classifier.mnist.SHA256)


@pytest.mark.parametrize("name", list(NAMED_AT_LEAST))
def test_the_recorded_quality_meets_its_bar(name):
    quality = json.loads(WEIGHTS.joinpath(f"{name}.json").read_text())["quality"]
    assert quality["samples"] >= 2_000
    assert quality["accuracy"] >= NAMED_AT_LEAST[name]
    assert quality["frechet_distance"] > 0


def test_the_classifier_knows_real_digits_by_its_record():
    assert json.loads(WEIGHTS.joinpath(f"{classifier.NAME}.json").read_text())["test_accuracy"] >= 0.99


def test_the_shipped_transformer_draws_digits_the_classifier_names(dit_bundle):
    samples = Pipeline.open(dit_bundle)(Request(num=60, seed=123, batch=30))
    predicted, _ = classifier.judge(classifier.load(), np.clip(samples, -1, 1))
    assert np.mean(predicted == np.arange(60) % 10) >= 0.9  # 0.97 on thousands; 60 samples scatter by some per cent
