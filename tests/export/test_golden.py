"""Golden data: recorded from eager, read without it, and able to tell a good engine from a bad one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lehr.export.backbones import flux, preset
from lehr.export.eager import eager
from lehr.export.golden import default_tier, record
from lehr.runtime import engine as engines
from lehr.runtime import golden as goldens
from lehr.runtime import verify as verifying
from lehr.runtime.bundle import Bundle
from lehr.runtime.denoiser import Denoiser
from lehr.runtime.golden import Tier
from lehr.runtime.hoisted import load_denoiser
from lehr.runtime.verify import psnr_limit, rel_error_limit, replay, verify


def silent(text: str) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    chosen = preset("digits-dit")
    module = chosen.build(replace(chosen.params, hidden_size=32, depth=1, num_heads=2)).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # adaLN-zero would hide everything
    return module, chosen.spec


@pytest.mark.parametrize("parameters", [(1_000, Tier.FULL), (10**9, Tier.STEPS), (12 * 10**9, Tier.NONE)])
def test_the_default_tier_follows_the_models_size(parameters):
    assert default_tier(parameters[0]) is parameters[1]


def test_inputs_lie_on_the_eager_trajectory_and_outputs_are_eagers(small):
    module, spec = small
    golden = record(module, spec, Tier.STEPS, progress=silent)
    steps = golden.steps
    assert len(steps.timesteps) >= 8
    assert golden.trajectories == ()
    assert set(golden.floors) == {"fp16", "bf16"}
    k = 4
    with torch.no_grad():
        expected = module(
            torch.from_numpy(steps.inputs[k]),
            torch.full((10,), float(steps.timesteps[k])),
            torch.from_numpy(steps.conditions["class_labels"]),
        )
    assert steps.outputs[k] == pytest.approx(expected.numpy(), abs=1e-6)


def test_floors_grow_as_the_format_narrows(small):
    module, spec = small
    floors = record(module, spec, Tier.FULL, progress=silent).floors
    worst = {name: max(floor.rel_error) for name, floor in floors.items()}
    assert worst["fp64"] < worst["fp16"] < worst["bf16"]
    assert floors["fp64"].psnr_db > floors["fp16"].psnr_db > floors["bf16"].psnr_db


def test_a_format_that_pytorch_cannot_run_says_so():
    class Picky(torch.nn.Module):
        def forward(self, sample, timestep, class_labels):
            if sample.dtype is torch.float16:
                raise RuntimeError("no kernel for Half")
            return sample * timestep[:, None, None, None].to(sample.dtype)

    golden = record(Picky(), preset("digits-dit").spec, Tier.STEPS, progress=silent)
    assert golden.floors["fp16"].unavailable == "no kernel for Half"
    assert golden.floors["bf16"].unavailable is None


def test_a_replayed_loop_reproduces_eager_exactly(small):
    module, spec = small
    golden = record(module, spec, Tier.FULL, progress=silent)
    for trajectory in golden.trajectories:
        final, drift = replay(eager(module, spec), trajectory)
        assert np.array_equal(final, trajectory.final)
        assert max(drift) == 0


def test_golden_data_is_read_back_as_it_was_written(dit_bundle):
    golden = goldens.read(Bundle.open(dit_bundle))
    assert golden.tier is Tier.FULL
    assert {t.name for t in golden.trajectories} == {"unguided", "guided"}
    assert golden.steps.inputs.shape[0] == len(golden.steps.timesteps) == 10
    assert all(len(t.inputs) == len(t.table) for t in golden.trajectories)


def test_fp32_is_held_at_absolute_limits_and_other_formats_at_eagers_own_floor(dit_bundle):
    golden = goldens.read(Bundle.open(dit_bundle))
    assert rel_error_limit(golden, "fp32") == pytest.approx(1e-4)
    assert psnr_limit(golden, "fp32") == 60.0
    assert rel_error_limit(golden, "bf16") == pytest.approx(10 * max(golden.floors["bf16"].rel_error))
    assert psnr_limit(golden, "bf16") == pytest.approx(golden.floors["bf16"].psnr_db - 20)


# ------------------------------------------------------------------------------------------------- sabotage


def sabotaged(monkeypatch, bundle, change):
    """The verdict on an engine whose answers pass through ``change``."""
    opened = Bundle.open(bundle)
    record_ = engines.find(opened, "cpu", "fp32")
    whole = load_denoiser(opened, record_)

    class Engine:
        def run(self, feeds):
            return whole._run(feeds)

    wrapped = Denoiser(whole.spec, lambda feeds: {"output": change(Engine(), dict(feeds))})
    monkeypatch.setattr(verifying, "load_denoiser", lambda *_: wrapped)
    return verify(opened, record_)


def test_an_honest_engine_passes_every_level(monkeypatch, dit_bundle):
    verdict = sabotaged(monkeypatch, dit_bundle, lambda engine, feeds: engine.run(feeds)["output"])
    assert verdict.passed
    assert {name: level.passed for name, level in verdict.levels.items()} == {"L0": True, "L1": True, "L2": True}


@pytest.mark.parametrize(
    ("fault", "level"),
    [
        (lambda e, f: np.full_like(e.run(f)["output"], 0.5), "L0"),
        (lambda e, f: np.full_like(e.run(f)["output"], np.nan), "L0"),
        (lambda e, f: e.run(f)["output"][..., :-1], "L0"),
        (lambda e, f: e.run({**f, "timestep": f["timestep"] - 1})["output"], "L1"),
        (lambda e, f: e.run({**f, "class_labels": f["class_labels"][::-1].copy()})["output"], "L1"),
        (lambda e, f: -e.run(f)["output"], "L1"),
        (lambda e, f: e.run(f)["output"].astype(np.float16).astype(np.float32), "L1"),
    ],
    ids=["constant", "nan", "size", "timestep-by-one", "labels-swapped", "sign", "half-precision"],
)
def test_a_fault_fails_at_the_level_that_sees_it(monkeypatch, dit_bundle, fault, level):
    verdict = sabotaged(monkeypatch, dit_bundle, fault)
    assert not verdict.passed
    assert verdict.levels[level].passed is False


def test_floors_keep_conditions_that_all_samples_share_whole() -> None:
    params = flux.Params(
        in_channels=4,
        vec_in_dim=6,
        context_in_dim=10,
        hidden_size=20,
        num_heads=2,
        depth=1,
        depth_single_blocks=1,
        axes_dim=(2, 4, 4),
        guidance_embed=False,
    )
    spec = flux.spec("tiny-flux", params, text_tokens=5, steps=2)
    dims = tuple(replace(dim, default=4) if dim.name == "image_tokens" else dim for dim in spec.dims)
    golden = record(flux.Flux(params).eval(), replace(spec, dims=dims), Tier.STEPS, device="cpu", progress=silent)
    assert golden.steps.conditions["img_ids"].shape == (4, 3)
    assert all(floor.rel_error for floor in golden.floors.values())
