"""Golden pictures: recorded at export by the pipeline itself over eager stages, drawn again by engines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lehr import cli
from lehr.ci.checks import Outcome
from lehr.ci.stages import judge_pictures
from lehr.runtime import picture_golden as golden_pictures
from lehr.runtime.bundle import Bundle
from lehr.runtime.engine import find
from lehr.runtime.errors import BundleError, MissingExtra
from lehr.runtime.picture_golden import (
    INDEX,
    PICTURES,
    PictureGolden,
    picture_limit,
    read_pictures,
    verify_pictures,
    write_pictures,
)
from lehr.runtime.verify import FP32_PSNR_DB


def lehr(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0), capsys.readouterr().out


@pytest.fixture(scope="module")
def made(tiny_pipeline: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that draws classes, exported in the full tier and built; read-only for tests."""
    root = tmp_path_factory.mktemp("pictures") / "d.lehr"
    for words in (
        ("export", tiny_pipeline("DiTPipeline"), "-o", root, "--steps", "3", "--golden", "full"),
        ("build", root, "--library", "onnxruntime", "--threads", 1),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main([str(word) for word in words])
        assert not ended.value.code
    return root


@pytest.fixture
def bundle(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "d.lehr"))


def test_engines_draw_the_pictures_that_eager_drew(made, capsys):
    golden = read_pictures(Bundle.open(made))
    assert golden is not None
    assert (golden.prompts, golden.class_labels, golden.num_inference_steps) == ((), (0, 1), 3)
    assert golden.pictures.shape == (2, 3, 32, 32)
    assert 0 <= golden.pictures.min() < golden.pictures.max() <= 1
    assert golden.floors["bf16"] < golden.floors["fp16"] < 100
    code, out = lehr("verify", made, "--json", capsys=capsys)
    picture = json.loads(out)["picture"]
    assert (code, picture["passed"]) == (0, True)
    assert picture["psnr_db"] > 90


def test_other_pictures_fail_verification_and_the_gate(bundle, capsys):
    opened = Bundle.open(bundle)
    golden = read_pictures(opened)
    assert golden is not None
    with opened.edit() as edit:
        write_pictures(edit, replace(golden, pictures=np.ascontiguousarray(golden.pictures[::-1])))
    code, out = lehr("verify", bundle, "--json", capsys=capsys)
    data = json.loads(out)
    assert (code, data["passed"], data["picture"]["passed"]) == (1, False, False)
    assert data["levels"]["L2"]["passed"]
    assert "FAIL" in lehr("verify", bundle, capsys=capsys)[1]
    opened = Bundle.open(bundle)
    (check,) = judge_pictures(opened, find(opened, "cpu", "fp32"), {})
    assert (check.name, check.outcome, check.limit) == ("L2.picture.psnr_db", Outcome.FAILED, FP32_PSNR_DB)


def test_without_a_decoders_engine_nothing_is_judged(bundle):
    with Bundle.open(bundle).edit() as edit:
        edit.remove("stages/vae_decoder/engines")
    opened = Bundle.open(bundle)
    (check,) = judge_pictures(opened, find(opened, "cpu", "fp32"), {})
    assert check.outcome is Outcome.NOT_RUN
    assert "stage 'vae_decoder' has no engine for target 'cpu'" in check.reason


def test_where_tokenizers_cannot_be_read_nothing_is_judged(made, monkeypatch):
    def refuse(*_, **__):
        raise MissingExtra("tokenizers", "text")

    monkeypatch.setattr(golden_pictures.TextToImage, "open", refuse)
    level = verify_pictures(Bundle.open(made), "cpu", "fp32")
    assert level is not None
    assert level.passed is None
    assert "lehr[text]" in level.reason


def test_pictures_of_another_size_are_no_answer(made, monkeypatch):
    monkeypatch.setattr(
        golden_pictures.TextToImage, "open", lambda *_, **__: lambda request: np.zeros((2, 3, 16, 16), np.float32)
    )
    level = verify_pictures(Bundle.open(made), "cpu", "fp32")
    assert level is not None
    assert level.passed is False


def test_a_bundle_without_pictures_has_nothing_to_say(stage_bundle):
    assert verify_pictures(Bundle.open(stage_bundle), "cpu", "fp32") is None


@pytest.mark.parametrize("damage", [{"floors": 3}, {"class_labels": None}, {"seed": "x"}, {"pictures": (2, 3)}])
def test_damaged_pictures_are_refused(bundle, damage):
    opened = Bundle.open(bundle)
    with opened.edit() as edit:
        if "pictures" in damage:
            edit.add_arrays(PICTURES, {"pictures": np.zeros(damage["pictures"], np.float32)})
        else:
            edit.add_json(INDEX, {**opened.read_json(INDEX), **damage})
    with pytest.raises(BundleError, match=r"golden pictures of .* are damaged"):
        read_pictures(Bundle.open(bundle))


@given(st.floats(5, 150), st.floats(5, 150))
def test_the_limit_follows_from_eagers_own_pictures(dit_bundle, half, brain):
    opened = Bundle.open(dit_bundle)
    golden = PictureGolden(
        prompts=(),
        class_labels=(0,),
        seed=0,
        num_inference_steps=1,
        pictures=np.zeros((1, 3, 2, 2), np.float32),
        floors={"fp16": half, "bf16": brain},
    )
    assert picture_limit(opened, golden, "fp32") == FP32_PSNR_DB
    assert picture_limit(opened, golden, "fp16") == min(FP32_PSNR_DB, half - 20)
    assert picture_limit(opened, golden, "int8-sq") == 26.0
    assert picture_limit(opened, golden, "fp32", {"text_encoder": "int8-weight", "vae_decoder": "fp32"}) == 38.0
    assert picture_limit(opened, golden, "int8-sq", {"vae_decoder": "bf16"}) == min(26.0, brain - 20)
    overflows = replace(golden, floors={"bf16": brain})
    assert picture_limit(opened, overflows, "fp16") == min(FP32_PSNR_DB, brain)
    assert picture_limit(opened, overflows, "bf16") == min(FP32_PSNR_DB, brain - 20)
