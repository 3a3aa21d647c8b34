"""The gate and the stages beside the denoiser: none of them passes by default."""

from __future__ import annotations

import datetime as dt
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lehr.ci import gate as gates
from lehr.ci.checks import Outcome
from lehr.ci.policy import policy
from lehr.ci.reports import of_an_engine
from lehr.ci.stages import judge_stages
from lehr.runtime import engine as engines
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import IncompatibleEngine, UnknownName
from lehr.runtime.stage_golden import read_stage_golden, write_stage_golden

DECODER = "vae_decoder"
SMOKE = policy("smoke", dt.date(2030, 1, 1))


@pytest.fixture
def bundle(stage_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(stage_bundle, tmp_path / "p.lehr"))


def outcomes(root, **recipes):
    """What is said of the stages: check -> (outcome, reason)."""
    opened = Bundle.open(root)
    checks, _ = judge_stages(opened, engines.find(opened, "cpu", "fp32"), SMOKE, recipes)
    return {check.name: (check.outcome, check.reason) for check in checks}


def gated(root):
    opened = Bundle.open(root)
    return gates.gate(opened, engines.find(opened, "cpu", "fp32"), SMOKE)


def test_good_stages_pass_and_are_bound_by_their_hashes(stage_bundle):
    made = gated(stage_bundle)
    of_stages = {check.name: check.outcome for check in made.checks if check.name.partition(".")[2].startswith(STAGES)}
    assert of_stages == {
        "L0.text_encoder": Outcome.PASSED,
        "L1.text_encoder.rel_error": Outcome.PASSED,
        "L0.vae_decoder": Outcome.PASSED,
        "L1.vae_decoder.rel_error": Outcome.PASSED,
    }
    assert made.passed
    assert {f"stages/{DECODER}/model.onnx", f"stages/{DECODER}/golden.npz"} <= set(made.hashes)
    plans = [name for name in made.hashes if name.startswith("stages/") and name.endswith("build.json")]
    assert len(plans) == 2
    assert all(map(of_an_engine, plans))
    assert not of_an_engine("stages/engines.json")


STAGES = ("text_encoder", DECODER)


def test_a_stage_that_computes_something_else_stops_the_release(bundle):
    opened = Bundle.open(bundle)
    golden = read_stage_golden(opened, DECODER)
    wrong = replace(golden, outputs={"sample": golden.outputs["sample"] * 1.01})
    with opened.edit() as edit:
        write_stage_golden(edit, opened.manifest.stage(DECODER).spec, wrong)
    made = gated(bundle)
    assert [check.name for check in made.checks if check.outcome is Outcome.FAILED] == ["L1.vae_decoder.rel_error"]
    assert not made.passed


def test_a_stage_without_an_engine_fails(bundle):
    with Bundle.open(bundle).edit() as edit:
        edit.remove(f"stages/{DECODER}/engines")
    outcome, reason = outcomes(bundle)["L0.vae_decoder"]
    assert outcome is Outcome.FAILED
    assert "has no fp32 engine" in reason


def test_a_stage_without_golden_data_fails(bundle):
    opened = Bundle.open(bundle)
    with opened.edit() as edit:
        edit.remove(f"stages/{DECODER}/golden.npz")
        entry = replace(opened.manifest.stage(DECODER), golden=None)
        edit.set_manifest(stages={**opened.manifest.stages, DECODER: entry})
    outcome, reason = outcomes(bundle)["L1.vae_decoder"]
    assert outcome is Outcome.FAILED
    assert "without golden data" in reason


def test_the_stage_is_judged_in_the_recipe_that_was_named(stage_bundle):
    outcome, reason = outcomes(stage_bundle, vae_decoder="fp16")["L0.vae_decoder"]
    assert outcome is Outcome.FAILED
    assert "has no fp16 engine" in reason
    with pytest.raises(UnknownName, match="unknown stage 'vae'"):
        outcomes(stage_bundle, vae="fp16")


def test_the_policy_decides_how_near_is_near(stage_bundle):
    opened = Bundle.open(stage_bundle)
    record = engines.find(opened, "cpu", "fp32")
    limits = replace(SMOKE.limits, L1=replace(SMOKE.limits.L1, rel_error=1e-12))
    checks, _ = judge_stages(opened, record, replace(SMOKE, limits=limits), {})
    assert {check.outcome for check in checks if check.level == "L1"} == {Outcome.FAILED}


def test_an_engine_of_another_machine_is_no_verdict(bundle):
    opened = Bundle.open(bundle)
    (record,) = engines.engines(opened, DECODER)
    with opened.edit() as edit:
        edit.add_json(f"{record.folder}/build.json", replace(record, host={"arch": "riscv"}).to_json())
    with pytest.raises(IncompatibleEngine, match="arch is"):
        outcomes(bundle)
