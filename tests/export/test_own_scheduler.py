"""A pipeline folder's own scheduler: traced at export, stored, used by ``lehr run``, equal to diffusers' own loop."""

from __future__ import annotations

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from lehr import cli  # noqa: E402 - after the skips
from lehr.export.backbones import preset  # noqa: E402
from lehr.export.eager import eager  # noqa: E402
from lehr.export.own_scheduler import own_tables, scheduler_file  # noqa: E402
from lehr.export.package import Options, export  # noqa: E402
from lehr.export.source import resolve  # noqa: E402
from lehr.runtime.bundle import Bundle  # noqa: E402
from lehr.runtime.errors import BundleError, InvalidInput  # noqa: E402
from lehr.runtime.golden import Tier  # noqa: E402
from lehr.runtime.loop import sample  # noqa: E402
from lehr.runtime.noise import START, batch_normal  # noqa: E402
from lehr.runtime.pipeline import Pipeline, Request  # noqa: E402
from lehr.runtime.stored_tables import StoredTables, file_name  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # diffusers deprecates its own options
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SIZE, SEED = 16, 3


def lehr(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run a command line in this process: (exit code, stdout, stderr)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return int(exit_.value.code or 0), out, err


def network() -> Any:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    sizes = {"block_out_channels": (16, 16), "norm_num_groups": 8, "layers_per_block": 1}
    return diffusers.UNet2DModel(sample_size=SIZE, in_channels=1, out_channels=1, **sizes, **blocks).eval()


def pipeline_folder(folder: Path, scheduler: Any) -> Path:
    diffusers.DDPMPipeline(unet=network(), scheduler=scheduler).save_pretrained(folder)
    return folder


def diffusers_loop(scheduler: Any, steps: int, noises: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The scheduler's own loop around the same module; ``noises`` are x_T and then what is injected."""
    drawn = iter(noises[1:])
    module = importlib.import_module(type(scheduler).__module__)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(next(drawn)))
    net = network()
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(noises[0]) * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = net(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(output, t, x).prev_sample
    return x.numpy()


def quiet(_text: str) -> None:
    return None


def noises(count: int) -> list[np.ndarray]:
    streams = [START, *(1 + j for j in range(count))]
    return [batch_normal(SEED, range(2), (1, SIZE, SIZE), stream=stream) for stream in streams]


def relative(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


# --------------------------------------------------------------------------------------- from the folder to samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose scheduler has options that no default has."""
    scheduler = diffusers.DPMSolverMultistepScheduler(solver_order=2, use_karras_sigmas=True)
    return pipeline_folder(tmp_path_factory.mktemp("pipelines") / "tiny", scheduler)


@pytest.fixture(scope="module")
def built(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline exported at 6 and 9 steps, and built."""
    bundle = tmp_path_factory.mktemp("bundles") / "tiny.lehr"
    for arguments in (["export", folder, "-o", bundle, "--steps", "9,6", "--golden", "none"], ["build", bundle]):
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(argument) for argument in arguments])
        assert not exit_.value.code
    return bundle


@pytest.mark.parametrize("options", [["--steps", 6], ["--steps", 9, "--sampler", "scheduler"]])
def test_run_draws_what_the_pipelines_own_scheduler_draws(folder, built, options, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.npz"
    code, text, _ = lehr("run", built, "--num", 2, "--seed", SEED, *options, "-o", out, "--json", capsys=capsys)
    assert code == 0
    assert json.loads(text)["sampler"] == "DPMSolverMultistepScheduler"
    scheduler = diffusers.DPMSolverMultistepScheduler.from_pretrained(folder / "scheduler")
    expected = diffusers_loop(scheduler, options[1], noises(0), monkeypatch)
    assert relative(np.load(out)["samples"], expected) < 2e-5


def test_without_steps_the_stored_table_nearest_to_the_models_number_is_used(built, tmp_path, capsys):
    code, text, _ = lehr("run", built, "-o", tmp_path / "o.npz", "--json", capsys=capsys)
    assert (code, json.loads(text)["evaluations"]) == (0, 9)


def test_a_native_sampler_is_still_there_by_its_name(built, tmp_path, capsys):
    code, text, _ = lehr(
        "run", built, "--sampler", "ddim", "--steps", 4, "-o", tmp_path / "o.npz", "--json", capsys=capsys
    )
    assert (code, json.loads(text)["sampler"], json.loads(text)["evaluations"]) == (0, "ddim", 4)


@pytest.mark.parametrize("options", [["--steps", 7], ["--steps", 0], ["--sampler", "scheduler", "--steps", 20]])
def test_steps_that_are_not_stored_name_those_that_are(built, options, tmp_path, capsys):
    code, _, err = lehr("run", built, *options, "-o", tmp_path / "o.npz", capsys=capsys)
    assert code == 2
    assert "6, 9 steps" in err
    assert "--sampler" in err


def test_eta_of_a_stored_table_is_refused(built, tmp_path, capsys):
    code, _, err = lehr("run", built, "--steps", 6, "--eta", 0.5, "-o", tmp_path / "o.npz", capsys=capsys)
    assert code == 2
    assert "fixed in the table" in err


def test_inspect_lists_the_tables(built, capsys):
    _, text, _ = lehr("inspect", built, "--json", capsys=capsys)
    assert [(t["scheduler"], t["steps"], t["evaluations"]) for t in json.loads(text)["tables"]] == [
        ("DPMSolverMultistepScheduler", 6, 6),
        ("DPMSolverMultistepScheduler", 9, 9),
    ]
    assert "DPMSolverMultistepScheduler" in lehr("inspect", built, capsys=capsys)[1]


def test_img2img_begins_the_stored_table_late(built, tmp_path, capsys):
    np.savez(tmp_path / "init.npz", samples=np.zeros((1, SIZE, SIZE), np.float32))
    options = ["--steps", 6, "--init", tmp_path / "init.npz", "--strength", 0.5]
    code, text, _ = lehr("run", built, *options, "-o", tmp_path / "o.npz", "--json", capsys=capsys)
    assert (code, json.loads(text)["evaluations"]) == (0, 3)


@pytest.mark.parametrize("damage", ["truncated", "of another model"])
def test_a_damaged_table_is_a_bundle_error(built, damage, tmp_path, capsys):
    bundle = Path(shutil.copytree(built, tmp_path / "b.lehr"))
    opened = Bundle.open(bundle)
    if damage == "truncated":
        file = bundle / file_name(6)
        file.write_bytes(file.read_bytes()[:-40])
    else:
        table = StoredTables(opened)[6]
        other = replace(table, sigmas=table.sigmas * 3)
        with opened.edit() as edit:
            edit.add_bytes(file_name(6), other.to_bytes())
    code, _, err = lehr("run", bundle, "--steps", 6, "-o", tmp_path / "o.npz", capsys=capsys)
    assert code == 5
    assert "table" in err or "scheduler-6" in err


def test_a_stochastic_scheduler_with_clipping_equals_its_own_loop_on_the_same_noise(tmp_path, monkeypatch):
    scheduler = diffusers.DDPMScheduler(clip_sample_range=1.3)
    unet = pipeline_folder(tmp_path / "ddpm", scheduler) / "unet"  # a component knows the scheduler beside it
    summary = export(str(unet), tmp_path / "d.lehr", Options(tier=Tier.NONE, steps=(5,)), progress=quiet)
    assert summary.scheduler == {"class": "DDPMScheduler", "steps": [5], "skipped": {}}
    tables = StoredTables(Bundle.open(tmp_path / "d.lehr"))
    found = resolve(str(unet), preset=None, seed=0, structure_only=False)
    pipeline = Pipeline(eager(found.runnable(), found.spec), tables=tables)
    drawn = pipeline(Request(num=2, seed=SEED, num_inference_steps=5))
    assert tables[5].num_noises > 0
    assert relative(drawn, diffusers_loop(scheduler, 5, noises(tables[5].num_noises), monkeypatch)) < 2e-5


def test_the_same_folder_gives_the_same_bytes(folder, built):
    spec = Bundle.open(built).manifest.model
    found = own_tables(str(folder), spec, (6,), progress=quiet)
    assert found is not None
    assert Bundle.open(built).read_bytes(file_name(6), 1 << 20) == found.tables[6].to_bytes()


# ------------------------------------------------------------------------------------------------- what is traced


def beside(folder: Path, scheduler: Any) -> str:
    """A pipeline folder with nothing but a scheduler in it."""
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text('{"_class_name": "AnyPipeline"}')
    return str(folder)


def test_by_default_a_scheduler_is_traced_at_the_models_own_number_of_steps(tmp_path):
    spec = preset("ddpm-cifar10").spec
    found = own_tables(beside(tmp_path, diffusers.DDIMScheduler()), spec, None, progress=quiet)
    assert found is not None
    assert list(found.tables) == [spec.sampling.num_inference_steps]


def test_steps_that_diffusers_itself_breaks_on_are_skipped_with_the_reason(tmp_path):
    source = beside(tmp_path, diffusers.PNDMScheduler())
    found = own_tables(source, preset("ddpm-cifar10").spec, (2, 10), progress=quiet)
    assert found is not None
    assert list(found.tables) == [10]
    assert "PNDM" in found.skipped[2]


def test_a_scheduler_that_is_no_table_does_not_stop_an_export(tmp_path):
    found = own_tables(
        beside(tmp_path, diffusers.ScoreSdeVeScheduler()), preset("ncsnpp-cifar10").spec, None, progress=quiet
    )
    assert found is not None
    assert not found.tables
    assert all("ScoreSdeVeScheduler" in why for why in found.skipped.values())


def test_a_scheduler_of_another_prediction_than_the_models_is_skipped(tmp_path):
    source = beside(tmp_path, diffusers.DDIMScheduler(prediction_type="v_prediction"))
    found = own_tables(source, preset("ddpm-cifar10").spec, (4,), progress=quiet)
    assert found is not None
    assert "v_prediction" in found.skipped[4]


@pytest.mark.parametrize(("name", "dynamic"), [("flux-dev", True), ("flux-schnell", False)])
def test_a_flux_scheduler_is_told_what_its_pipeline_tells_it(tmp_path, name, dynamic):
    spec, steps = preset(name).spec, 5
    shift = 3.0 if dynamic else 1.0
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic)
    found = own_tables(beside(tmp_path, scheduler), spec, (steps,), progress=quiet)
    assert found is not None
    assert not found.skipped
    flux = importlib.import_module("diffusers.pipelines.flux.pipeline_flux")
    mu = flux.calculate_shift(4096)  # FluxPipeline at 1024 x 1024 pixels
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu if dynamic else None)
    table, x = found.tables[steps], torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    assert table.timesteps == pytest.approx(scheduler.timesteps.numpy() / 1000, abs=1e-6)  # the pipeline divides
    drawn = sample(lambda sample, s: np.tanh(sample) * np.float32(s), table, x.numpy())
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x) * (t / 1000), t, x).prev_sample
    assert relative(drawn, x.numpy()) < 2e-6


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("steps", ["", "twenty", "20,", "0", "-3", "1001", "2.5", "20;30", "٣"])
def test_steps_that_are_no_numbers_from_1_to_1000_exit_with_2(folder, steps, tmp_path, capsys):
    code, _, err = lehr("export", folder, "-o", tmp_path / "o.lehr", f"--steps={steps}", capsys=capsys)
    assert code == 2
    assert "1 to 1000" in err
    assert not (tmp_path / "o.lehr").exists()


def test_steps_with_a_source_that_has_no_scheduler_exit_with_2(tmp_path, capsys):
    code, _, err = lehr("export", "digits-dit", "-o", tmp_path / "o.lehr", "--steps", 20, capsys=capsys)
    assert code == 2
    assert "no scheduler of its own" in err


def test_the_scheduler_of_a_bundle_that_holds_none_exits_with_2(dit_bundle, tmp_path, capsys):
    code, _, err = lehr("run", dit_bundle, "--sampler", "scheduler", "-o", tmp_path / "o.npz", capsys=capsys)
    assert code == 2
    assert "no tables of a scheduler" in err


def test_options_refuse_steps_out_of_range(folder, tmp_path):
    with pytest.raises(InvalidInput, match="1 to 1000"):
        export(str(folder), tmp_path / "o.lehr", Options(steps=(0,)), progress=quiet)


def test_only_pipelines_have_a_scheduler(folder, tmp_path):
    assert scheduler_file(str(folder)) == folder / "scheduler" / "scheduler_config.json"
    assert scheduler_file(str(folder / "unet" / "diffusion_pytorch_model.safetensors")) is not None
    assert scheduler_file(str(tmp_path)) is None
    assert scheduler_file("dit-s-2") is None


def test_a_name_that_is_no_number_of_steps_is_no_table(built, tmp_path):
    bundle = Bundle.open(shutil.copytree(built, tmp_path / "b.lehr"))
    with bundle.edit() as edit:
        edit.add_bytes("tables/scheduler-x.npz", b"no table")
        edit.add_bytes("tables/scheduler-12.npz", b"no table")
    tables = StoredTables(bundle)
    assert list(tables) == [6, 9, 12]
    with pytest.raises(BundleError, match="scheduler-12"):
        tables[12]
    with pytest.raises(KeyError):
        tables[7]
