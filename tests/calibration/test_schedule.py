"""Precision schedules from the command line to engines: two recipes that are one, a wrong end, and every other verb."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from lehr.calibration.ends import own_steps
from lehr.commands.build import command as build_command
from lehr.commands.calibrate import command as calibrate_command
from lehr.commands.gate import command as gate_command
from lehr.commands.inspect import command as inspect_command
from lehr.commands.verify import command as verify_command
from lehr.engines.build import build
from lehr.engines.target import target
from lehr.runtime import engine as engines
from lehr.runtime.backends import Session
from lehr.runtime.bundle import Bundle
from lehr.runtime.calibrated import recipe_of
from lehr.runtime.engine import EngineRecord, check, find
from lehr.runtime.errors import BundleError, IncompatibleEngine, InvalidInput, LehrError
from lehr.runtime.golden import read
from lehr.runtime.pack import pack, unpack
from lehr.runtime.pipeline import Pipeline, Request
from lehr.runtime.recipe import RECIPES, recipe
from lehr.runtime.verify import psnr_limit, rel_error_limit, verify

REQUEST = Request(num=2, num_inference_steps=6, class_labels=[3, 7])


def invoke(verb: object, *arguments: object) -> Result:
    return CliRunner().invoke(verb, [str(argument) for argument in arguments])  # type: ignore[arg-type]


def done(verb: object, *arguments: object) -> dict[str, Any]:
    result = invoke(verb, *arguments, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    told = json.loads(result.stdout)
    assert isinstance(told, dict)
    return told


def refused(result: Result, code: int, *words: str) -> None:
    found = result.exception.exit_code if isinstance(result.exception, LehrError) else result.exit_code
    text = f"{result.output} {result.exception}"
    assert found == code, text
    assert all(word in text for word in words), text


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trajectories")


@pytest.fixture(scope="module")
def scheduled(dit_bundle: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """int8 by itself, all of whose loop is int8 again ("same"), and whose last two of six steps are fp32 ("late")."""
    bundle = tmp_path_factory.mktemp("scheduled") / "d.lehr"
    shutil.copytree(dit_bundle, bundle)
    few = ["--num", 8, "--steps", 4, "--threads", 1, "--trajectories", data, "--recipe", "int8"]
    done(calibrate_command, bundle, *few)
    done(calibrate_command, bundle, *few, "--first", "2:int8", "--last", "3:int8", "--name", "same")
    told = done(calibrate_command, bundle, *few, "--last", "2:fp32", "--name", "late")
    assert told["schedule"] == {"last": {"steps": 2, "recipe": "fp32"}}
    for name in ("int8", "same", "late"):
        done(build_command, bundle, "--recipe", name, "--library", "onnxruntime", "--threads", 1)
    return bundle


def drawn(bundle: Path, name: str) -> np.ndarray[Any, Any]:
    return Pipeline.open(bundle, recipe=name)(REQUEST)


def test_a_schedule_whose_parts_are_one_recipe_gives_its_samples_bit_by_bit(scheduled: Path) -> None:
    np.testing.assert_array_equal(drawn(scheduled, "same"), drawn(scheduled, "int8"))


def test_only_the_asked_steps_are_those_of_the_other_recipe(scheduled: Path) -> None:
    seen: dict[str, list[np.ndarray[Any, Any]]] = {}
    for name in ("int8", "late", "fp32"):
        kept = seen.setdefault(name, [])
        Pipeline.open(scheduled, recipe=name)(REQUEST, on_step=lambda _, step, kept=kept: kept.append(step.output))
    for i in range(4):
        np.testing.assert_array_equal(seen["late"][i], seen["int8"][i])
    late = Pipeline.open(scheduled, recipe="late").denoiser
    exact = Pipeline.open(scheduled, recipe="fp32").denoiser
    sample = np.random.default_rng(0).standard_normal((2, 1, 28, 28)).astype(np.float32)
    conditions = {"class_labels": np.array([1, 2])}
    own = own_steps(Bundle.open(scheduled))
    for t, equal in ((own[-1], True), (own[-2], True), (own[-3], False), (own[0], False)):
        same = np.array_equal(late(sample, t, conditions), exact(sample, t, conditions))
        assert same == equal, t  # outside of a loop its place is that in the model's own
    with late.loop([own[0], own[1], own[2]]):
        assert np.array_equal(late(sample, own[1], conditions), exact(sample, own[1], conditions))


def test_the_wrong_recipe_at_an_end_is_noticed(scheduled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(scheduled)
    record = find(bundle, "cpu", "late")
    assert verify(bundle, record).passed
    load = engines.load

    class Off:
        def __init__(self, inner: Session) -> None:
            self.inner = inner

        def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value * np.float32(30.0) for name, value in self.inner.run(feeds).items()}

    def mixed_up(bundle: Bundle, record: EngineRecord, graph: str = "step", **more: Any) -> Session:
        session = load(bundle, record, graph, **more)
        return Off(session) if graph == "step.last" else session

    monkeypatch.setattr(engines, "load", mixed_up)
    levels = verify(bundle, record).levels
    assert levels["L1"].passed is False
    assert levels["L2"].passed is False


def test_the_wrong_half_draws_another_sample(scheduled: Path, tmp_path: Path) -> None:
    root = tmp_path / "d.lehr"
    shutil.copytree(scheduled, root)
    bundle = Bundle.open(root)
    good = find(bundle, "cpu", "late").to_json()
    with bundle.edit() as edit:
        edit.add_json(
            f"{find(bundle, 'cpu', 'late').folder}/build.json",
            {
                **good,
                "ends": {**good["ends"], "last": 0, "first": 2},
                "end_recipes": {"first": "fp32"},
                "plans": {**good["plans"], "step.first": good["plans"]["step.last"]},
            },
        )
    assert not np.array_equal(drawn(root, "late"), drawn(scheduled, "late"))
    (root / find(bundle, "cpu", "late").folder / "step.last.onnx").write_bytes(b"another")
    with pytest.raises(BundleError):
        drawn(root, "late")  # nor is a plan taken whose bytes are not those that were built


def test_the_loss_that_is_stated_is_that_of_the_lossiest_part(scheduled: Path) -> None:
    bundle = Bundle.open(scheduled)
    golden = read(bundle)
    assert rel_error_limit(golden, "late") == RECIPES["int8"].rel_error
    assert psnr_limit(golden, "late") == RECIPES["int8"].psnr_db
    assert recipe_of(bundle, "late").schedule is not None


def test_verify_gate_and_inspect_speak_of_the_ends(scheduled: Path) -> None:
    levels = done(verify_command, scheduled, "--recipe", "late")["levels"]
    assert set(levels["L0"]["ends"]["step.last"]) == {"float"}
    assert levels["L2"]["psnr_db"] > levels["L2"]["limit_psnr_db"]
    engines = {row["recipe"]: row for row in done(inspect_command, scheduled)["engines"]}
    last = engines["late"]["ends"]["last"]
    assert (last["steps"], last["recipe"]) == (2, "fp32")
    assert "last 2 in fp32" in invoke(inspect_command, scheduled).output
    result = invoke(gate_command, scheduled, "--policy", "smoke", "--recipe", "late", "--json")
    checks = {row["name"]: row for row in json.loads(result.stdout)["checks"]}
    assert "of step.last" in checks["L0.precision"]["reason"]


def test_a_packed_schedule_runs_where_it_is_unpacked(scheduled: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(scheduled)
    packed = pack(bundle, find(bundle, "cpu", "same"), tmp_path / "p.zip", golden=True)
    assert {"calibration/same/recipe.json", "calibration/int8/recipe.json"} <= set(packed.files)
    there = unpack(tmp_path / "p.zip", tmp_path / "there.lehr")
    np.testing.assert_array_equal(drawn(there.root, "same"), drawn(scheduled, "same"))
    assert verify(there, find(there, "cpu", "same")).passed


def test_a_recipe_without_scales_may_have_a_schedule_under_a_name_of_its_own(scheduled: Path, tmp_path: Path) -> None:
    root = tmp_path / "d.lehr"
    shutil.copytree(scheduled, root)
    refused(invoke(calibrate_command, root, "--recipe", "fp32", "--first", "2:int8"), 2, "name of its own")
    told = done(calibrate_command, root, "--recipe", "fp32", "--first", "2:int8", "--name", "early")
    assert told["schedule"] == {"first": {"steps": 2, "recipe": "int8"}}
    done(build_command, root, "--recipe", "early", "--library", "onnxruntime", "--threads", 1)
    bundle = Bundle.open(root)
    record = find(bundle, "cpu", "early")
    assert record.end_recipes == {"first": "int8"}
    assert {"calibration/early/recipe.json", "calibration/int8/step.onnx"} <= set(record.sources)
    assert rel_error_limit(read(bundle), "early") == RECIPES["int8"].rel_error
    assert verify(bundle, record).passed
    plain = done(calibrate_command, root, "--recipe", "fp32", "--last", "1:bf16", "--name", "rough")
    assert plain["quantised"] == 0
    golden = read(Bundle.open(root))
    assert rel_error_limit(golden, "rough") == rel_error_limit(golden, "bf16") > rel_error_limit(golden, "fp32")


def test_a_schedule_is_refused_where_it_cannot_be(scheduled: Path, data: Path, tmp_path: Path) -> None:
    few = ["--num", 8, "--steps", 4, "--threads", 1, "--trajectories", data, "--recipe", "int8"]
    refused(invoke(calibrate_command, scheduled, *few, "--last", "fp32"), 2, "3:fp32")
    refused(invoke(calibrate_command, scheduled, *few, "--last", "0:fp32"), 2, "3:fp32")
    refused(invoke(calibrate_command, scheduled, *few, "--last", "3:fp31"), 2, "unknown recipe")
    refused(invoke(calibrate_command, scheduled, *few, "--last", "20:fp32"), 2, "leave nothing")
    refused(invoke(calibrate_command, scheduled, *few, "--last", "2:int8"), 2, "--name")
    refused(invoke(calibrate_command, scheduled, *few, "--last", "2:late", "--name", "later"), 2, "of its own")
    refused(invoke(calibrate_command, scheduled, "--budget", "psnr>=40", "--last", "2:fp32"), 2, "--recipe")


def test_an_end_that_was_calibrated_anew_makes_the_schedule_stale(scheduled: Path, tmp_path: Path, data: Path) -> None:
    root = tmp_path / "d.lehr"
    shutil.copytree(scheduled, root)
    again = ["--num", 8, "--steps", 5, "--threads", 1, "--trajectories", data, "--recipe", "int8"]
    done(calibrate_command, root, *again)
    bundle = Bundle.open(root)
    with pytest.raises(IncompatibleEngine, match="has changed since"):
        check(bundle, find(bundle, "cpu", "same"))
    with pytest.raises(InvalidInput, match="has changed since"):
        build(root, target("cpu"), recipe_of(bundle, "same"), library="onnxruntime", threads=1)


@pytest.mark.parametrize(
    "change",
    [
        {"ends": None},
        {"ends": {"first": 0, "last": 2}},
        {"ends": {"first": 2, "last": 2, "timesteps": [3.0, 2.0, 1.0, 0.5, 0.2]}},
        {"end_recipes": {"last": 3}},
        {"end_recipes": {"middle": "fp32"}},
        {"plans": {}},
    ],
)
def test_a_damaged_record_of_a_schedule_is_refused(scheduled: Path, change: dict[str, Any]) -> None:
    good = find(Bundle.open(scheduled), "cpu", "late").to_json()
    assert EngineRecord.from_json(good).to_json() == good
    plans = {name: plan for name, plan in good["plans"].items() if name != "step.last"}
    with pytest.raises(BundleError, match="damaged"):
        EngineRecord.from_json({**good, **change, **({"plans": plans} if "plans" in change else {})})


def test_shipped_recipes_have_no_schedule() -> None:
    assert recipe("int8").parts == {}
