"""The documented example of a user's own model, on the real checkpoint where it is at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lehr.engines.build import build
from lehr.engines.target import target
from lehr.export.package import Options, export
from lehr.export.reference import classifier
from lehr.runtime import engine as engines
from lehr.runtime.bundle import Bundle
from lehr.runtime.pipeline import Pipeline, Request
from lehr.runtime.recipe import recipe
from lehr.runtime.verify import verify

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "edm_dit.py"
WEIGHTS = ROOT.parent / "shared" / "models" / "franfee_dit_edm" / "dit_edm.safetensors"


@pytest.mark.skipif(not WEIGHTS.is_file(), reason="the checkpoint is not at hand")
def test_an_edm_checkpoint_becomes_an_engine_that_draws_the_classes_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("EDM_DIT_WEIGHTS", str(WEIGHTS))
    bundle = tmp_path / "edm.lehr"
    export(f"{EXAMPLE}:make", bundle, Options(), progress=lambda text: None)
    record = build(bundle, target("cpu"), recipe("fp32"), library="onnxruntime")
    opened = Bundle.open(bundle)
    assert sum(graph.parameters for graph in opened.manifest.graphs.values()) == 388_672
    verdict = verify(opened, engines.find(opened, "cpu", "fp32"))
    assert verdict.passed
    assert verdict.levels["L2"].measures["psnr_db"] >= 60
    samples = Pipeline.open(bundle)(Request(num=60, seed=0, batch=30))
    predicted, _ = classifier.judge(classifier.load(), np.clip(samples, -1, 1))
    assert np.mean(predicted == np.arange(60) % 10) >= 0.85
    assert record.library == "onnxruntime"
