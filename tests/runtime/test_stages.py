"""Stages run by their engines: which engine, what is checked, what stays in memory, what travels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lehr.runtime import engine as engines
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import BundleError, IncompatibleEngine, InvalidInput, RunFailed, UnknownName
from lehr.runtime.hoisted import Residency
from lehr.runtime.manifest import WITHOUT_STAGES
from lehr.runtime.pack import pack, unpack
from lehr.runtime.parity import relative_error
from lehr.runtime.pipeline_spec import PipelineSpec, TokenizerSpec
from lehr.runtime.recipe import recipe
from lehr.runtime.spec import BATCH, TensorSpec, Varies
from lehr.runtime.stage import PICTURES_AT_ONCE, StageKind, StageSpec
from lehr.runtime.stage_golden import StageGolden, read_stage_golden, write_stage_golden
from lehr.runtime.stages import StageRunner, Stages, load_stage, open_stage, stage_engine
from lehr.runtime.verify import FLOOR_FACTOR, FP32_REL_ERROR
from lehr.runtime.verify_stage import Tolerance, stage_limit, verify_stage, worst_output

DECODER = "vae_decoder"


@pytest.fixture
def bundle(stage_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(stage_bundle, tmp_path / "p.lehr"))


def spec(kind: StageKind) -> StageSpec:
    """A stage that adds up two rows of numbers, the second shared by the batch."""
    return StageSpec(
        name="toy",
        kind=kind,
        family="toy",
        inputs=(
            TensorSpec(name="a", shape=("batch", 2), varies=Varies.SAMPLE),
            TensorSpec(name="b", shape=(2,), varies=Varies.CONSTANT),
        ),
        outputs=(TensorSpec(name="sum", shape=("batch", 2), varies=Varies.SAMPLE),),
        dims=(BATCH,),
    )


class Adds:
    """A session that remembers its batches; with ``cut`` it returns that many rows too few."""

    def __init__(self, cut: int = 0) -> None:
        self.batches: list[int] = []
        self.cut = cut

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.batches.append(len(feeds["a"]))
        return {"sum": (feeds["a"] + feeds["b"])[self.cut :], "unused": feeds["b"]}


def rows(count: int) -> dict[str, np.ndarray]:
    return {"a": np.arange(2.0 * count, dtype=np.float32).reshape(count, 2), "b": np.ones(2, np.float32)}


def also_built_in(root: Path, stage: str, *recipes: str, keep: bool = True) -> Bundle:
    """The bundle with records of further engines of a stage, or of these alone."""
    opened = Bundle.open(root)
    with opened.edit() as edit:
        for record in engines.engines(opened, stage):
            for recipe in recipes:
                made = replace(record, recipe=recipe)
                edit.add_json(f"{made.folder}/build.json", made.to_json())
            if not keep:
                edit.remove(record.folder)
    return Bundle.open(root)


# --------------------------------------------------------------------------------------------------------- one stage


def test_a_stage_computes_what_was_recorded(stage_bundle):
    opened = Bundle.open(stage_bundle)
    for name in opened.manifest.stages:
        golden = read_stage_golden(opened, name)
        outputs = open_stage(opened, name)(golden.inputs)
        assert list(outputs) == [tensor.name for tensor in opened.manifest.stage(name).spec.outputs]
        for output, value in outputs.items():
            assert relative_error(golden.outputs[output], value) < 1e-5


def test_feeds_are_held_against_the_spec(stage_bundle):
    runner = open_stage(Bundle.open(stage_bundle), DECODER)
    with pytest.raises(InvalidInput, match="inputs \\['latents'\\], expected \\['latent_sample'\\]"):
        runner({"latents": np.zeros((1, 4, 8, 8), np.float32)})
    with pytest.raises(InvalidInput, match="float64"):
        runner({"latent_sample": np.zeros((1, 4, 8, 8))})
    with pytest.raises(InvalidInput, match="height is 65"):
        runner({"latent_sample": np.zeros((1, 4, 65, 8), np.float32)})


def test_an_output_of_another_shape_is_no_answer():
    with pytest.raises(RunFailed, match=r"returned 'sum' of shape \(2, 2\), expected \(3, 2\)"):
        StageRunner(spec(StageKind.TEXT_ENCODER), Adds(cut=1))(rows(3))


@pytest.mark.parametrize(
    ("kind", "batches"),
    [(StageKind.LATENT_DECODER, [PICTURES_AT_ONCE, PICTURES_AT_ONCE, 1]), (StageKind.TEXT_ENCODER, [9])],
)
def test_pictures_are_taken_in_turns_and_text_at_once(kind, batches):
    session = Adds()
    outputs = StageRunner(spec(kind), session)(rows(9))
    assert session.batches == batches
    assert np.array_equal(outputs["sum"], rows(9)["a"] + 1)
    assert set(outputs) == {"sum"}


def test_a_closed_stage_says_so():
    runner = StageRunner(spec(StageKind.TEXT_ENCODER), Adds())
    runner.close()
    with pytest.raises(InvalidInput, match="stage 'toy' was closed"):
        runner(rows(1))


# ------------------------------------------------------------------------------------------------------ which engine


def test_a_stage_runs_in_the_recipe_named_for_it_and_in_no_other(stage_bundle):
    opened = Bundle.open(stage_bundle)
    assert stage_engine(opened, DECODER, "cpu", {DECODER: "fp32"}).recipe == "fp32"
    with pytest.raises(BundleError, match=r"--stage vae_decoder --stage-recipe vae_decoder=bf16"):
        stage_engine(opened, DECODER, "cpu", {DECODER: "bf16"})


def test_a_recipe_for_all_falls_back_to_fp32_where_a_stage_was_not_built_in_it(bundle):
    opened = also_built_in(bundle, DECODER, "bf16")
    assert stage_engine(opened, DECODER, "cpu", "bf16").recipe == "bf16"
    assert stage_engine(opened, DECODER, "cpu", {"denoiser": "bf16"}).recipe == "bf16"
    assert stage_engine(opened, DECODER, "cpu", {"denoiser": "int8-sq"}).recipe == "fp32"
    assert stage_engine(opened, "text_encoder", "cpu", "bf16").recipe == "fp32"


def test_the_only_engine_is_taken_and_of_several_one_must_be_named(bundle):
    assert stage_engine(also_built_in(bundle, DECODER, "bf16", keep=False), DECODER, "cpu", "int8").recipe == "bf16"
    opened = also_built_in(bundle, DECODER, "fp16")
    with pytest.raises(BundleError, match=r"built for 'cpu' in bf16, fp16, not in int8 or fp32\. Say which"):
        stage_engine(opened, DECODER, "cpu", "int8")


def test_a_stage_without_an_engine_for_the_target_says_how_to_build_one(stage_bundle):
    with pytest.raises(BundleError, match=r"stage 'vae_decoder' of p\.lehr has no fp16 engine for target 'h100'"):
        stage_engine(Bundle.open(stage_bundle), DECODER, "h100", "fp16")


def test_an_unknown_stage_is_named_with_the_nearest(stage_bundle):
    opened = Bundle.open(stage_bundle)
    with pytest.raises(UnknownName, match="Did you mean 'vae_decoder'"):
        stage_engine(opened, "vae_decode", "cpu")
    with pytest.raises(UnknownName, match="unknown stage 'vae'"):
        Stages(opened, recipes={"denoiser": "fp32", "vae": "fp32"})


def test_an_engine_of_other_weights_is_refused_with_the_command_that_rebuilds_it(bundle):
    opened = Bundle.open(bundle)
    name = "stages/vae_decoder/weights.safetensors"
    data = bytearray(opened.path(name).read_bytes())
    data[-1] ^= 1
    with opened.edit() as edit:
        edit.add_bytes(name, bytes(data))
    with pytest.raises(IncompatibleEngine, match=r"weights\.safetensors has changed.*--stage vae_decoder"):
        open_stage(Bundle.open(bundle), DECODER)


def test_an_engine_of_the_denoiser_is_none_of_a_stage(stage_bundle):
    opened = Bundle.open(stage_bundle)
    record = engines.find(opened, "cpu", "fp32")
    for wrong in (load_stage, verify_stage):
        with pytest.raises(InvalidInput, match="an engine of the denoiser"):
            wrong(opened, record)
    assert "stage" not in record.to_json()


def test_a_record_in_another_stages_folder_is_refused(bundle):
    opened = Bundle.open(bundle)
    record = engines.find(opened, "cpu", "fp32", "text_encoder")
    assert engines.EngineRecord.from_json(record.to_json()) == record
    with opened.edit() as edit:
        edit.add_json(record.folder.replace("text_encoder", DECODER) + "/build.json", record.to_json())
    with pytest.raises(BundleError, match="and is of text_encoder"):
        engines.engines(Bundle.open(bundle), DECODER)


# ------------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("residency", list(Residency))
def test_an_engine_is_let_go_of_only_where_phases_take_turns(stage_bundle, residency):
    stages = Stages(Bundle.open(stage_bundle), residency=residency)
    golden = read_stage_golden(Bundle.open(stage_bundle), DECODER)
    with stages.using(DECODER) as first:
        first(golden.inputs)
    with stages.using(DECODER) as second:
        second(golden.inputs)
    if residency is Residency.PHASES:
        assert first is not second
        with pytest.raises(InvalidInput, match="was closed"):
            first(golden.inputs)
    else:
        assert first is second
        stages.close()
        with pytest.raises(InvalidInput, match="was closed"):
            first(golden.inputs)


# ------------------------------------------------------------------------------------------------------------ parity


def test_a_good_engine_passes_and_its_worst_output_is_named(stage_bundle):
    opened = Bundle.open(stage_bundle)
    for name in opened.manifest.stages:
        verdict = verify_stage(opened, engines.find(opened, "cpu", "fp32", name))
        assert verdict.passed
        assert set(verdict.levels) == {"L0", "L1"}
        assert verdict.levels["L1"].measures["max_rel_error"] < 1e-5


def test_an_engine_that_computes_something_else_fails(bundle):
    opened = Bundle.open(bundle)
    golden = read_stage_golden(opened, "text_encoder")
    outputs = {**golden.outputs, "text_embeds": golden.outputs["text_embeds"] * np.float32(1.001)}
    with opened.edit() as edit:
        write_stage_golden(edit, opened.manifest.stage("text_encoder").spec, replace(golden, outputs=outputs))
    opened = Bundle.open(bundle)
    verdict = verify_stage(opened, engines.find(opened, "cpu", "fp32", "text_encoder"))
    assert not verdict.passed
    assert verdict.levels["L0"].passed
    assert verdict.levels["L1"].reason.startswith("text_embeds 9.99e-04, limit 1.00e-04")


def test_an_engine_that_returns_infinity_fails_before_it_is_compared(bundle, monkeypatch):
    from lehr.runtime import verify_stage as verifying

    opened = Bundle.open(bundle)
    monkeypatch.setattr(
        verifying, "load_stage", lambda *_: lambda feeds: {"sample": np.full((2, 3, 16, 16), np.inf, np.float32)}
    )
    verdict = verify_stage(opened, engines.find(opened, "cpu", "fp32", DECODER))
    assert (verdict.passed, verdict.levels["L1"].passed) == (False, None)
    assert "not finite in 'sample'" in verdict.levels["L0"].reason


@given(st.floats(1e-9, 1.0), st.floats(1e-9, 1.0), st.floats(1.0, 100.0))
def test_limits_follow_from_eagers_own_error(half, brain, factor):
    """fp16 where eager overflows may err as eager does in bf16; fp32 has an absolute limit; stated losses hold."""
    both = StageGolden(inputs={}, outputs={}, floors={"fp16": {"a": half}, "bf16": {"a": brain}})
    tolerance = Tolerance(factor=factor)
    assert stage_limit(both, recipe("fp16"), "a", tolerance) == max(factor * half, FP32_REL_ERROR)
    assert stage_limit(both, recipe("bf16"), "a") == max(FLOOR_FACTOR * brain, FP32_REL_ERROR)
    assert stage_limit(both, recipe("fp32"), "a") == FP32_REL_ERROR
    assert stage_limit(both, recipe("int8-weight"), "a") == 0.03
    overflows = StageGolden(inputs={}, outputs={}, floors={"bf16": {"a": brain}})
    assert stage_limit(overflows, recipe("fp16"), "a", tolerance) == max(brain, FP32_REL_ERROR)
    assert stage_limit(StageGolden(inputs={}, outputs={}), recipe("fp16"), "a") == FP32_REL_ERROR


def test_the_worst_output_is_the_one_nearest_to_its_own_limit():
    golden = StageGolden(inputs={}, outputs={}, floors={"bf16": {"coarse": 0.1, "fine": 1e-4}})
    assert worst_output({"coarse": 0.5, "fine": 9e-4}, golden, recipe("bf16")) == ("fine", pytest.approx(1e-3))


@pytest.mark.parametrize("gone", ["input.latent_sample", "output.sample", "floor.bf16.sample"])
def test_damaged_golden_data_is_refused(bundle, gone):
    opened = Bundle.open(bundle)
    arrays = opened.read_arrays("stages/vae_decoder/golden.npz")
    arrays[gone.replace("sample", "simple")] = arrays.pop(gone)
    with opened.edit() as edit:
        edit.add_arrays("stages/vae_decoder/golden.npz", arrays)
    with pytest.raises(BundleError, match=r"golden data of stage 'vae_decoder'.*damaged"):
        read_stage_golden(Bundle.open(bundle), DECODER)


# ------------------------------------------------------------------------------------------------------------- travel


def test_an_archive_takes_stages_tokenizers_and_pipeline_along(bundle, tmp_path):
    opened = Bundle.open(bundle)
    file = "stages/text_encoder/tokenizer.json"
    pipeline = PipelineSpec(
        family="toy", class_name="Toy", tokenizers={"text_encoder": TokenizerSpec(file=file, max_length=9, pad_id=0)}
    )
    with opened.edit() as edit:
        edit.add_bytes(file, b"{}")
        edit.set_manifest(pipeline=pipeline)
    opened = Bundle.open(bundle)
    stages = [stage_engine(opened, name, "cpu") for name in opened.manifest.stages]
    record = engines.find(opened, "cpu", "fp32")
    archive = pack(opened, record, tmp_path / "p.zip", golden=True, stages=stages).path
    there = unpack(archive, tmp_path / "there.lehr")
    assert there.manifest.stages == opened.manifest.stages
    assert there.manifest.pipeline == pipeline
    assert file in there.manifest.files
    assert "stages/text_encoder/weights.safetensors" in there.manifest.left_out
    for stage in stages:
        assert verify_stage(there, engines.find(there, "cpu", "fp32", stage.stage)).passed


def test_an_archive_without_golden_data_says_what_is_missing_there(bundle, tmp_path):
    opened = Bundle.open(bundle)
    decoder = stage_engine(opened, DECODER, "cpu")
    archive = pack(opened, engines.find(opened, "cpu", "fp32"), tmp_path / "p.zip", golden=False, stages=[decoder])
    there = unpack(archive.path, tmp_path / "there.lehr")
    assert open_stage(there, DECODER).spec.name == DECODER
    with pytest.raises(BundleError, match="no golden data of stage 'vae_decoder'"):
        verify_stage(there, decoder)
    with pytest.raises(BundleError, match="has no fp32 engine"):
        stage_engine(there, "text_encoder", "cpu")


def test_a_bundle_of_a_denoiser_alone_stays_readable_by_older_releases(dit_bundle):
    assert json.loads((dit_bundle / "manifest.json").read_text())["schema_version"] == WITHOUT_STAGES
