"""Loops that start from a sample: img2img, inpainting, base and refiner, and seeds of single samples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lehr.runtime import ensemble, picture
from lehr.runtime.denoiser import Denoiser
from lehr.runtime.errors import InvalidInput
from lehr.runtime.loop import sample
from lehr.runtime.noise import batch_normal
from lehr.runtime.paths import EDM, VP, BetaSchedule, LinearFlow
from lehr.runtime.pipeline import Pipeline, Request
from lehr.runtime.prediction import EPSILON, FLOW_PREDICTION, V_PREDICTION, Prediction, PredictionKind
from lehr.runtime.solvers import solver_table
from lehr.runtime.spec import BATCH, ModelSpec, TensorSpec, Varies
from lehr.runtime.start import begun_late, start_step
from lehr.runtime.table_cut import head, row_below, split, tail

EDM_PREDICTION = Prediction(kind=PredictionKind.EDM)
SHAPE = (1, 4, 4)
RNG = np.random.default_rng(0)
INIT = RNG.uniform(-1, 1, SHAPE).astype(np.float32)
MASK = np.zeros((4, 4), np.float32)
MASK[:, 2:] = 1


def spec(path=VP(), prediction=EPSILON) -> ModelSpec:  # noqa: B008
    return ModelSpec(
        name="toy",
        inputs=(
            TensorSpec(name="sample", shape=("batch", *SHAPE), varies=Varies.SAMPLE),
            TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
        ),
        outputs=(TensorSpec(name="output", shape=("batch", *SHAPE), varies=Varies.SAMPLE),),
        dims=(BATCH,),
        path=path,
        prediction=prediction,
    )


def toy(feeds):
    x = feeds["sample"]
    mean = x.mean(axis=(1, 2, 3), keepdims=True)  # every pixel depends on all others
    return {"output": (np.tanh(1.3 * x + mean) + feeds["timestep"][:, None, None, None] / 5e3).astype(np.float32)}


def pipeline(path=VP(), prediction=EPSILON) -> Pipeline:  # noqa: B008
    return Pipeline(Denoiser(spec(path, prediction), toy))


def network(x, timestep):
    return np.tanh(1.3 * x + x.mean(axis=-1, keepdims=True)) + timestep / 5e3


# --------------------------------------------------------------------------------------------------- cutting tables


@pytest.mark.parametrize(
    ("sampler", "path", "prediction", "row"),
    [
        ("ddim", VP(), EPSILON, 4),
        ("ddpm", VP(), V_PREDICTION, 7),
        ("euler", EDM(), EDM_PREDICTION, 1),
        ("euler_ancestral", VP(), EPSILON, 3),
        ("heun", EDM(), EDM_PREDICTION, 6),
        ("flow_euler", LinearFlow(), FLOW_PREDICTION, 5),
        ("lcm", VP(), EPSILON, 2),
    ],
)
def test_head_and_tail_of_a_one_step_method_are_the_whole_loop(sampler, path, prediction, row):
    table = solver_table(sampler, path, prediction, 9)
    x_T = RNG.standard_normal((2, 5)) * table.init_noise_sigma
    noises = [RNG.standard_normal((2, 5)) for _ in range(table.num_noises)]
    first, second = split(table, row)
    middle = sample(network, first, x_T, injected=noises[: first.num_noises])
    got = sample(network, second, middle, injected=noises[first.num_noises :])
    assert got == pytest.approx(sample(network, table, x_T, injected=noises), rel=1e-11, abs=1e-11)
    assert len(first) + len(second) == len(table)
    assert second.options["history"] == "not needed"


@given(
    sampler=st.sampled_from(["dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "unipc", "lms", "deis", "ddim", "ddpm"]),
    row=st.integers(1, 8),
    value=st.floats(-2, 2),
)
def test_the_tail_of_any_method_brings_a_constant_estimate_to_itself(sampler, row, value):
    """Consistency: if the network says x_0 = value whatever it sees, a loop from x_t ends there but for its noise."""
    table = tail(solver_table(sampler, VP(), EPSILON, 9), row)
    alphas, sigmas = table.alphas, table.sigmas
    numbers = iter(range(len(table)))

    def constant(x, timestep):
        i = next(numbers)
        return (x - alphas[i] * value) / sigmas[i]

    quiet = [np.zeros((1, 2))] * table.num_noises
    x_t = alphas[0] * value + sigmas[0] * RNG.standard_normal((1, 2))
    assert sample(constant, table, x_t, injected=quiet) == pytest.approx(np.full((1, 2), value), abs=2e-2)


def test_the_restarted_tail_of_a_multistep_method_is_its_own_first_step():
    table = solver_table("dpmpp_2m", VP(), EPSILON, 10)
    cut, native = tail(table, 4), solver_table("dpmpp_2m", VP(), EPSILON, 10, begin_at=4)
    assert cut.options["history"] == "restarted"
    assert cut.outputs == pytest.approx(native.outputs, abs=1e-11)
    assert cut.start == pytest.approx(native.start, abs=1e-11)


def test_a_cut_inside_a_step_is_refused():
    with pytest.raises(InvalidInput, match="Cut between two whole steps"):
        tail(solver_table("dpmpp_sde", VP(), EPSILON, 6), 3)


@pytest.mark.parametrize("row", [0, 6, -1])
def test_a_cut_that_leaves_one_side_empty_is_refused(row):
    with pytest.raises(InvalidInput, match="cannot be cut"):
        head(solver_table("ddim", VP(), EPSILON, 6), row)


def test_the_row_below_a_timestep_is_the_first_one_less_noisy():
    table = solver_table("ddim", VP(), EPSILON, 10)
    assert row_below(table, float(table.timesteps[3])) == 4
    assert row_below(table, float(table.timesteps[3]) + 1) == 3
    assert row_below(table, -1.0) == 10


# ----------------------------------------------------------------------------------------------------- img2img


@pytest.mark.parametrize(("steps", "strength"), [(20, 0.35), (20, 1.0), (7, 0.5), (50, 0.29), (10, 0.1)])
def test_the_first_step_is_counted_as_diffusers_counts(steps, strength):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(steps)
    owner = type("Owner", (), {"scheduler": scheduler})()
    kept, _ = diffusers.StableDiffusionImg2ImgPipeline.get_timesteps(owner, steps, strength, "cpu")
    assert steps - start_step(steps, strength) == len(kept)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers under numpy 2
@pytest.mark.parametrize(
    ("name", "options", "sampler"),
    [
        ("DDIMScheduler", {"clip_sample": False}, "ddim"),
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "zero"}, "dpmpp_2m"),
    ],
)
def test_img2img_is_diffusers_loop_from_a_noised_sample(name, options, sampler):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing", **options)
    scheduler.set_timesteps(10)
    begin = start_step(10, 0.6)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    noise = torch.from_numpy(batch_normal(3, range(2), SHAPE))
    timesteps = scheduler.timesteps[begin:]
    x = scheduler.add_noise(torch.from_numpy(np.stack([INIT, INIT])), noise, timesteps[:1].repeat(2))
    for t in timesteps:
        feeds = {"sample": x.numpy(), "timestep": np.full(2, float(t), np.float32)}
        x = scheduler.step(torch.from_numpy(toy(feeds)["output"]), t, x).prev_sample
    request = Request(num=2, seed=3, sampler=sampler, num_inference_steps=10, init=INIT, strength=0.6)
    assert pipeline()(request) == pytest.approx(x.numpy(), rel=2e-4, abs=2e-4)


@pytest.mark.parametrize(
    ("path", "prediction"), [(VP(), EPSILON), (EDM(), EDM_PREDICTION), (LinearFlow(), FLOW_PREDICTION)]
)
def test_a_given_table_and_a_named_sampler_start_alike(path, prediction):
    name = "flow_euler" if isinstance(path, LinearFlow) else "euler"
    table = solver_table(name, path, prediction, 10)
    draw = pipeline(path, prediction)
    both = [
        draw(Request(num=2, init=INIT, strength=0.4, **how))
        for how in ({"table": table}, {"sampler": name, "num_inference_steps": 10})
    ]
    assert both[0] == pytest.approx(both[1], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("sampler", "first"), [("ddim", 5), ("heun", 10), ("pndm", 5), ("dpmpp_2m", 5)])
def test_a_given_table_begins_at_a_whole_step_as_diffusers_counts_them(sampler, first):
    table = solver_table(sampler, VP(), EPSILON, 10)
    late = begun_late(table, 0.5)
    assert late.timesteps.tolist() == table.timesteps[first:].tolist()
    assert len(begun_late(late, 0.5)) == len(late) // 2  # a table that was cut counts its evaluations


def test_little_strength_stays_near_the_sample_and_more_moves_it():
    draw = pipeline()
    moved = [
        float(np.abs(draw(Request(init=INIT, strength=s, num_inference_steps=20)) - INIT).mean()) for s in (0.05, 0.5)
    ]
    assert moved[0] < 0.25 * moved[1]


# -------------------------------------------------------------------------------------------------- inpainting


def test_ddim_inpainting_equals_blending_the_latent_after_each_step():
    table = solver_table("ddim", VP(), EPSILON, 8)
    noise = batch_normal(5, range(2), SHAPE)
    x = (table.alphas[0] * INIT + table.sigmas[0] * noise).astype(np.float32)
    for i, t in enumerate(table.timesteps):
        output = toy({"sample": x, "timestep": np.full(2, t, np.float32)})["output"]
        x_0 = table.denoised_from_input[i] * x + table.denoised_from_output[i] * output
        alpha, sigma = (table.alphas[i + 1], table.sigmas[i + 1]) if i + 1 < len(table) else (1.0, 0.0)
        x = alpha * x_0 + sigma * output
        x = (MASK * x + (1 - MASK) * (alpha * INIT + sigma * noise)).astype(np.float32)
    got = pipeline()(Request(num=2, seed=5, table=table, init=INIT, mask=MASK))
    assert got == pytest.approx(x, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "euler_ancestral", "dpmpp_2m_sde", "heun", "unipc", "ddpm"])
def test_every_sampler_keeps_the_known_region_at_each_evaluations_noise_level(sampler):
    known, levels = [], []

    def on_step(first, step):
        known.append(step.sample[:, :, :, :2])
        levels.append(step.denoised[:, :, :, :2])

    draw, request = pipeline(), Request(num=64, sampler=sampler, num_inference_steps=8, init=INIT, mask=MASK, batch=64)
    table, got = draw.table(request), draw(request, on_step=on_step)
    assert np.array_equal(got[:, :, :, :2], np.broadcast_to(INIT, got.shape)[:, :, :, :2])
    assert np.abs(got[:, :, :, 2:] - INIT[:, :, 2:]).max() > 0.01
    for i, (x, d) in enumerate(zip(known, levels, strict=True)):
        assert d == pytest.approx(np.broadcast_to(INIT[:, :, :2], d.shape), abs=1e-3)
        noise = x - table.alphas[i] * INIT[:, :, :2]
        assert float(noise.std()) == pytest.approx(float(table.sigmas[i]), rel=0.12)


def test_a_soft_mask_blends():
    draw = pipeline()
    ends = [draw(Request(init=INIT, mask=np.full((4, 4), m), num_inference_steps=1))[0] for m in (0.0, 0.5, 1.0)]
    assert ends[0] == pytest.approx(INIT)
    assert ends[1] == pytest.approx((INIT + ends[2]) / 2, abs=1e-3)


# ------------------------------------------------------------------------------------------------ base and refiner


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_refiner_that_is_the_base_again_draws_what_one_loop_draws(sampler):
    draw, seen = pipeline(), []
    request = Request(num=3, seed=2, sampler=sampler, num_inference_steps=10, batch=2)
    got = ensemble.draw(
        draw, draw, request, high_noise_fraction=0.7, on_step=lambda first, step: seen.append(step.timestep)
    )
    assert got == pytest.approx(draw(request), rel=1e-4, abs=1e-4)
    assert len(seen) == 20


def test_the_refiner_sees_only_what_is_less_noisy_than_the_fraction():
    timesteps = []

    def refiner(feeds):
        timesteps.append(float(feeds["timestep"][0]))
        return toy(feeds)

    request = Request(sampler="ddim", num_inference_steps=10)
    ensemble.draw(pipeline(), Pipeline(Denoiser(spec(), refiner)), request, high_noise_fraction=0.75)
    assert timesteps == [t for t in pipeline().table(request).timesteps.tolist() if t < 999 * 0.25]


@pytest.mark.parametrize("fraction", [0.0, 1.0, 0.999])
def test_a_fraction_that_leaves_one_network_idle_is_refused(fraction):
    with pytest.raises(InvalidInput):
        ensemble.draw(pipeline(), pipeline(), Request(num_inference_steps=4), high_noise_fraction=fraction)


# ------------------------------------------------------------------------------------------- seeds, batches, input


def test_each_sample_may_have_a_seed_of_its_own():
    draw = pipeline()
    together = draw(Request(seeds=[7, 3, 7], sampler="ddpm", num_inference_steps=5, batch=2))
    for k, seed in enumerate((7, 3, 7)):
        alone = draw(Request(seed=seed, sampler="ddpm", num_inference_steps=5))
        assert together[k] == pytest.approx(alone[0], abs=1e-6)


@pytest.mark.parametrize("more", [{"strength": 0.5}, {"mask": MASK}])
def test_starting_from_a_sample_does_not_depend_on_the_batch(more):
    inits = RNG.uniform(-1, 1, (6, *SHAPE)).astype(np.float32)
    drawn = [pipeline()(Request(num=6, sampler="ddpm", init=inits, batch=b, **more)) for b in (1, 4, 6)]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1e-5
    assert np.abs(drawn[0] - drawn[2]).max() <= 1e-5


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"init": INIT, "strength": 0.0}, "strength"),
        ({"init": INIT, "strength": 1.1}, "strength"),
        ({"init": INIT, "strength": -0.5}, "strength"),
        ({"init": INIT, "strength": float("nan")}, "strength"),
        ({"strength": 0.5}, "--init"),
        ({"mask": MASK}, "--init"),
        ({"noisy": INIT}, "table"),
        ({"seeds": [1, 2], "num": 3}, "2 seeds"),
    ],
)
def test_an_impossible_start_is_refused_at_once(bad, says):
    with pytest.raises(InvalidInput, match=says):
        Request(**bad)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"init": INIT, "strength": 0.01}, "none of 20 steps"),
        ({"init": np.zeros((1, 5, 4))}, "Resize"),
        ({"init": np.zeros((3, *SHAPE)), "num": 2}, "Resize"),
        ({"init": np.full(SHAPE, np.nan)}, "not finite"),
        ({"init": INIT, "mask": np.zeros((5, 5))}, "mask has shape"),
        ({"init": INIT, "mask": np.zeros((2, 4, 4))}, "mask has shape"),
        ({"init": INIT, "mask": np.full((4, 4), 255)}, "outside"),
        ({"table": solver_table("ddim", VP(), V_PREDICTION, 3)}, "v_prediction"),
        ({"table": solver_table("ddim", VP(beta_end=0.012), EPSILON, 3)}, "another path"),
        ({"table": solver_table("ddim", VP(schedule=BetaSchedule.COSINE), EPSILON, 1)}, "another path"),
        ({"table": solver_table("euler", EDM(), EPSILON, 3)}, "another path"),
    ],
)
def test_a_start_that_does_not_fit_the_model_is_refused(bad, says):
    with pytest.raises(InvalidInput, match=says):
        pipeline()(Request(**bad))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers under numpy 2
@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"]
)
def test_a_table_traced_from_diffusers_fits_the_model_of_its_betas(name):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from lehr.export.schedulers import trace_scheduler

    options = {"clip_sample": False} if name == "DDIMScheduler" else {}
    scheduler = getattr(diffusers, name)(beta_start=1e-4, beta_end=0.02, **options)
    draw = pipeline()
    whole = draw(Request(table=trace_scheduler(scheduler, num_inference_steps=8)))
    started = draw(Request(table=trace_scheduler(scheduler, num_inference_steps=8), init=INIT, strength=0.5))
    assert whole.shape == started.shape == (1, *SHAPE)


# -------------------------------------------------------------------------------------------------------- files


def test_a_picture_is_read_back_as_the_sample_it_was(tmp_path):
    low, high = -1.0, 1.0
    for channels in (1, 3):
        one = RNG.uniform(low, high, (1, channels, 6, 5)).astype(np.float32)
        picture.save_png(tmp_path / "a.png", picture.to_bytes(one, (low, high))[0])
        assert picture.load(tmp_path / "a.png", channels, (low, high)) == pytest.approx(one[0], abs=1.01 / 255)
    picture.save_npz(tmp_path / "a.npz", one)
    assert np.array_equal(picture.load(tmp_path / "a.npz", 4, (low, high)), one)


def test_files_that_hold_no_sample_are_refused(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "broken.npz").write_bytes(b"no archive")
    np.savez(tmp_path / "two.npz", a=np.zeros(3), b=np.zeros(3))
    for name, channels in (("broken.png", 1), ("broken.npz", 1), ("absent.png", 1), ("two.npz", 1), ("broken.png", 4)):
        with pytest.raises(InvalidInput):
            picture.load(tmp_path / name, channels, (-1.0, 1.0))


def test_a_loop_goes_on_from_a_noisy_sample():
    draw, request = pipeline(), Request(num=2, sampler="ddpm", num_inference_steps=6)
    first, second = split(draw.table(request), 2)
    noisy = draw(replace(request, table=first))
    got = draw(replace(request, table=second, noisy=noisy, first_noise=first.num_noises))
    assert got == pytest.approx(draw(request), rel=1e-4, abs=1e-4)
