"""Pictures from words: what is asked, in which order stages run, and what is refused."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
from picture_toy import ALL, CHANNELS, FACTOR, MODEL, ToyStages, evaluate, toy

from lehr.runtime.errors import BundleError, InvalidInput, RunFailed, UnknownName
from lehr.runtime.guidance import Guidance
from lehr.runtime.hoisted import Residency
from lehr.runtime.latents import ENCODED
from lehr.runtime.noise import batch_normal
from lehr.runtime.paths import VP, LinearFlow
from lehr.runtime.pipelines import families
from lehr.runtime.pipelines.flow_schedule import flow_options
from lehr.runtime.prediction import FLOW_PREDICTION
from lehr.runtime.solvers import solver_table
from lehr.runtime.spec import DType, TensorSpec, Varies
from lehr.runtime.start import begun_late
from lehr.runtime.text_to_image import PictureRequest

pytest.importorskip("tokenizers")

FOXES = {"prompts": ["a red fox"], "seed": 3}
rng = np.random.default_rng(1)
INIT = rng.uniform(size=(3, 32, 32)).astype(np.float32)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(1 / max(np.mean((a - b) ** 2), 1e-20)))


# ---------------------------------------------------------------------------------------- prompts, seeds, batches


def test_pictures_are_rgb_in_the_unit_interval():
    pictures = toy()(PictureRequest(**FOXES, num=2))
    assert pictures.shape == (2, 3, 32, 32)
    assert pictures.dtype == np.float32
    assert 0 <= pictures.min() < pictures.max() <= 1


def test_the_same_seed_draws_the_same_picture_at_any_batch_size():
    whole = toy()(PictureRequest(**FOXES, num=5, batch=5))
    for batch in (1, 2, 3):
        assert np.array_equal(toy()(PictureRequest(**FOXES, num=5, batch=batch)), whole)
    assert not np.array_equal(whole[0], whole[1])


def test_a_seed_a_picture_draws_what_that_seed_draws_alone():
    together = toy()(PictureRequest(prompts=["a fox"], seeds=[9, 4], init=INIT, strength=0.7))
    for k, seed in enumerate((9, 4)):
        alone = toy()(PictureRequest(prompts=["a fox"], seed=seed, init=INIT, strength=0.7))
        assert np.array_equal(together[k], alone[0])


def test_several_prompts_are_used_in_turn():
    pictures = toy()(PictureRequest(prompts=["a fox", "blue sea"], num=3))
    for k, prompt in enumerate(("a fox", "blue sea", "a fox")):
        alone = toy()(PictureRequest(prompts=[prompt] * 3))
        assert np.array_equal(pictures[k], alone[k])


def test_each_different_text_is_encoded_once():
    stages = ToyStages()
    toy(stages=stages)(PictureRequest(prompts=["a fox", "a fox", "sea"], negative_prompts=["a fox"]))
    encoded = [feeds for feeds in stages.feeds if "input_ids" in feeds]
    assert len(encoded) == 2
    assert all(len(feeds["input_ids"]) == 1 for feeds in encoded)


def test_a_negative_prompt_pushes_away_from_what_it_says():
    plain, pushed = (
        toy().latents(PictureRequest(**FOXES, negative_prompts=negative)) for negative in (None, ["blue sea"])
    )
    assert not np.array_equal(plain, pushed)
    assert np.array_equal(plain, toy().latents(PictureRequest(**FOXES, negative_prompts=[""])))


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_guidance_scale_of_one_and_below_evaluates_the_network_without_a_second_half(scale):
    rows = []

    def network(feeds):
        rows.append(len(feeds["sample"]))
        return evaluate(feeds)

    toy(network=network)(PictureRequest(**FOXES, num=2, guidance_scale=scale))
    assert set(rows) == {2}
    toy(network=network)(PictureRequest(**FOXES, num=2, guidance_scale=2.0))
    assert set(rows) == {2, 4}


def test_the_scale_of_a_guidance_setting_and_of_the_request_mean_the_same():
    ours = toy().latents(PictureRequest(**FOXES, guidance=Guidance(scale=3.0)))
    assert np.array_equal(ours, toy().latents(PictureRequest(**FOXES, guidance_scale=3.0)))
    assert np.array_equal(ours, toy(options={"guidance_scale": 3.0}).latents(PictureRequest(**FOXES)))
    assert np.allclose(ours, toy().latents(PictureRequest(**FOXES, guidance=Guidance(schedule=(3.0,) * 3))), atol=1e-5)


def test_an_empty_prompt_is_a_prompt_and_no_prompt_is_refused():
    assert toy()(PictureRequest(prompts=[""])).shape == (1, 3, 32, 32)
    with pytest.raises(InvalidInput, match="needs a prompt"):
        toy()(PictureRequest())


def test_what_of_a_prompt_is_cut_off_is_told_once_a_text():
    told = []
    long = "a red fox a blue sea and more words"
    toy(warn=told.append)(PictureRequest(prompts=[long, long]))
    assert told == [
        "the prompt is longer than 8 tokens, all that text_encoder takes; this was cut off: 'and more words'"
    ]
    with pytest.warns(UserWarning, match="cut off"):
        toy()(PictureRequest(prompts=[long]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy()(PictureRequest(prompts=["a red fox a blue sea"]))


def test_classes_are_refused_where_words_are_asked_for():
    with pytest.raises(InvalidInput, match="in words"):
        toy()(PictureRequest(prompts=["a"], class_labels=[1]))


# ------------------------------------------------------------------------------------------------------ sizes


def test_a_size_is_drawn_in_both_directions():
    pictures = toy()(PictureRequest(**FOXES, height=24, width=64))
    assert pictures.shape == (1, 3, 24, 64)


@pytest.mark.parametrize(
    ("height", "nearest"), [(30, "nearest: 24 or 32"), (4, "nearest: 8"), (300, "nearest: 128"), (36, "32 or 40")]
)
def test_a_size_that_cannot_be_drawn_is_refused_with_the_nearest_ones(height, nearest):
    with pytest.raises(InvalidInput, match=f"multiple of 8 from 8 to 128.*{nearest}"):
        toy()(PictureRequest(**FOXES, height=height))


def test_the_default_size_is_the_denoisers_or_the_pipelines():
    assert toy().default_size() == (32, 32)
    assert toy(options={"default_height": 64, "default_width": 16}).default_size() == (64, 16)


# --------------------------------------------------------------------------------------- img2img and inpainting


def test_img2img_runs_the_last_steps_from_the_encoded_picture():
    stages = ToyStages()
    pipeline = toy(stages=stages, network=lambda feeds: {"output": np.zeros_like(feeds["sample"])})
    request = PictureRequest(**FOXES, init=INIT, strength=0.5, num_inference_steps=4, guidance_scale=1.0)
    latents = pipeline.latents(request)
    assert stages.diary.count("denoise") == 2 == pipeline.evaluations(request)
    # A network that sees no noise leaves alpha x_0 + sigma eps, over alpha.
    mean = ALL["vae_encoder"][1]({"sample": INIT[None] * 2 - 1})["mean"]
    x_0 = (mean + 0.125 * batch_normal(3, range(1), mean.shape[1:], stream=ENCODED) - 0.1) * 0.5
    table = begun_late(solver_table("dpmpp_2m", VP(), MODEL.prediction, 4), 0.5)
    expected = x_0 + table.sigmas[0] / table.alphas[0] * batch_normal(3, range(1), x_0.shape[1:])
    assert np.allclose(latents, expected, atol=1e-4)


def test_the_smallest_strength_says_what_would_be_enough():
    with pytest.raises(InvalidInput, match="leaves none of 4 steps"):
        toy()(PictureRequest(**FOXES, init=INIT, strength=0.1, num_inference_steps=4))


def test_inpainting_shows_the_network_the_known_region_at_its_noise_level():
    seen = []

    def network(feeds):
        seen.append((feeds["sample"].copy(), float(feeds["timestep"][0])))
        return evaluate(feeds)

    mask = np.zeros((32, 32), dtype=np.float32)
    mask[:, 16:] = 1
    request = PictureRequest(**FOXES, init=INIT, mask=mask, guidance_scale=1.0)
    latents = toy(network=network).latents(request)
    x_0 = toy()._coder.encode(request, INIT, 32, 32)
    noise = batch_normal(3, range(1), x_0.shape[1:])
    assert np.array_equal(seen[0][0], noise)  # at full strength the loop starts from noise alone
    for sample, timestep in seen[1:]:
        alpha, sigma = VP().alpha_sigma(timestep)
        assert np.allclose(sample[..., :4], (alpha * x_0 + sigma * noise)[..., :4], atol=1e-5)
    assert np.array_equal(latents[..., :4], x_0[..., :4])
    assert not np.allclose(latents[..., 4:], x_0[..., 4:], atol=0.1)


def test_the_redrawn_region_is_what_a_loop_without_a_mask_draws_where_no_pixel_sees_another():
    mask = np.zeros((32, 32), dtype=np.float32)
    mask[:16] = 1
    held = toy().latents(PictureRequest(**FOXES, init=INIT, mask=mask))
    free = toy().latents(PictureRequest(**FOXES))
    assert np.allclose(held[:, :, :4], free[:, :, :4], atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("mask", np.zeros((16, 16)), "mask has shape"),
        ("mask", np.full((32, 32), 2.0), r"outside \[0, 1\]"),
        ("init", np.zeros((1, 32, 32)), "has shape"),
        ("init", np.full((3, 32, 32), -1.0), r"outside \[0, 1\]"),
    ],
)
def test_pictures_and_masks_of_another_kind_are_refused(field, value, what):
    request = replace(PictureRequest(**FOXES, init=INIT, mask=np.ones((32, 32))), **{field: value})
    with pytest.raises(InvalidInput, match=what):
        toy()(request)


def test_a_strength_or_a_mask_needs_a_picture():
    with pytest.raises(InvalidInput, match="give init"):
        PictureRequest(prompts=["a"], mask=np.ones((32, 32)))
    with pytest.raises(InvalidInput, match="give init"):
        PictureRequest(prompts=["a"], strength=0.5)


@pytest.mark.parametrize("more", [{"prompts": ["a"] * 3}, {"negative_prompts": ["a"] * 3}, {"class_labels": [1] * 3}])
def test_more_texts_or_labels_than_pictures_are_refused(more):
    with pytest.raises(InvalidInput, match=r"3 .* were given for 2 pictures"):
        PictureRequest(**{"prompts": ["a"], **more}, num=2)
    with pytest.raises(InvalidInput, match="at least 1"):
        PictureRequest(prompts=["a"], num=0)


def test_one_text_in_place_of_several_is_refused():
    with pytest.raises(InvalidInput, match="expected a sequence"):
        PictureRequest(prompts="a fox")


INPAINTER = replace(
    MODEL,
    inputs=(
        *MODEL.inputs,
        TensorSpec(name="sample_cond", shape=("batch", 1 + CHANNELS, "height", "width"), varies=Varies.PROMPT),
    ),
)


def test_a_network_made_for_inpainting_is_fed_the_mask_and_the_kept_part():
    seen = []

    def network(feeds):
        seen.append({name: value.copy() for name, value in feeds.items()})
        return evaluate(feeds)

    mask = np.zeros((32, 32), dtype=np.float32)
    mask[:16] = 1
    request = PictureRequest(**FOXES, init=INIT, mask=mask)
    toy(model=INPAINTER, network=network)(request)
    joined = seen[0]["sample_cond"]
    assert joined.shape == (2, 5, 8, 8)  # the same in both halves of guidance
    assert np.array_equal(joined[0], joined[1])
    assert np.array_equal(joined[0, 0], mask[::FACTOR, ::FACTOR])
    grey = (0.125 * batch_normal(3, range(1), (4, 8, 8), stream=ENCODED + 1) - 0.1) * 0.5
    assert np.allclose(joined[0, 1:, :4], grey[0][:, :4], atol=1e-6)
    assert np.array_equal(seen[0]["sample"][0], batch_normal(3, range(1), (4, 8, 8))[0])
    for missing in ({}, {"init": INIT}):
        with pytest.raises(InvalidInput, match="made for inpainting"):
            toy(model=INPAINTER)(PictureRequest(**FOXES, **missing))


# ------------------------------------------------------------------------------------------------------ memory


def test_with_little_memory_no_stage_is_open_beside_another():
    stages = ToyStages()
    toy(stages=stages, residency=Residency.PHASES)(PictureRequest(**FOXES, init=INIT, strength=1.0))
    order = [entry for k, entry in enumerate(stages.diary) if k == 0 or stages.diary[k - 1] != entry]
    assert order == [
        "open text_encoder",
        "close text_encoder",
        "open vae_encoder",
        "close vae_encoder",
        "open denoiser",
        "denoise",
        "open vae_decoder",
        "close vae_decoder",
    ]


def test_the_denoiser_stays_for_the_next_call_unless_memory_is_little():
    for residency, opened in ((Residency.AUTO, 1), (Residency.PHASES, 2)):
        stages = ToyStages()
        pipeline = toy(stages=stages, residency=residency)
        for _ in range(2):
            pipeline(PictureRequest(**FOXES))
        assert stages.diary.count("open denoiser") == opened


def test_a_large_latent_is_decoded_in_tiles():
    request = PictureRequest(**FOXES, height=96, width=128)
    whole = toy()(request)
    stages = ToyStages()
    tiled = toy(stages=stages)(replace(request, tile=8))
    assert max(max(feeds["latent_sample"].shape) for feeds in stages.feeds if "latent_sample" in feeds) == 8
    assert psnr(whole, tiled) > 100
    with pytest.raises(InvalidInput, match="at least 8"):
        toy()(replace(request, tile=4))


# ----------------------------------------------------------------------------------------------- missing, broken


@pytest.mark.parametrize(
    ("stage", "request_"),
    [("text_encoder", {}), ("vae_decoder", {}), ("vae_encoder", {"init": INIT})],
)
def test_a_missing_stage_is_named(stage, request_):
    stages = ToyStages()
    del stages.functions[stage]
    with pytest.raises(BundleError, match=stage):
        toy(stages=stages)(PictureRequest(**FOXES, **request_))


def test_a_decoder_that_overflows_is_told_from_a_picture():
    stages = ToyStages()
    spec, function = stages.functions["vae_decoder"]
    stages.functions["vae_decoder"] = spec, lambda feeds: {"sample": function(feeds)["sample"] * np.float32(np.inf)}
    with pytest.raises(RunFailed, match="--stage-recipe vae_decoder=fp32"):
        toy(stages=stages)(PictureRequest(**FOXES))


def test_an_unknown_family_lists_the_known_ones():
    assert "stable_diffusion_xl" in families()
    with pytest.raises(UnknownName, match=r"stable_diffusion.*Did you mean 'flux'"):
        toy(family="fluxx")


def test_a_second_guidance_scale_is_refused_where_the_first_is_not_an_input():
    with pytest.raises(InvalidInput, match="not told its guidance scale"):
        toy()(PictureRequest(**FOXES, true_guidance_scale=2.0, negative_prompts=["sea"]))


# -------------------------------------------------------------------------------------------------- other kinds


CLASSES = replace(
    MODEL,
    inputs=(
        *MODEL.inputs[:2],
        TensorSpec(name="class_labels", dtype=DType.INT64, shape=("batch",), varies=Varies.PROMPT),
    ),
    num_classes=5,
    null_class=5,
)
LABELS = {"id2label": '{"0": "tench, Tinca tinca", "1": "goldfish", "2": "crane", "3": "crane", "4": "Hen"}'}


def class_toy():
    def network(feeds):
        shift = feeds["class_labels"].astype(np.float32)[:, None, None, None]
        return {"output": 0.9 * feeds["sample"] + 0.1 * shift}

    return toy(model=CLASSES, family="dit", options=LABELS, network=network)


def test_classes_are_named_by_number_or_by_any_of_their_names():
    numbered = class_toy()(PictureRequest(class_labels=[0, 0, 4]))
    named = class_toy()(PictureRequest(class_labels=["tench", "TINCA TINCA", "4"]))
    assert np.array_equal(numbered, named)
    assert not np.array_equal(numbered, class_toy()(PictureRequest(class_labels=[1, 1, 1])))


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        (["goldfisch"], "Did you mean 'goldfish'"),
        (["crane"], "several classes.*2, 3"),
        ([7], "out of range"),
    ],
)
def test_a_class_that_is_not_known_is_refused(labels, what):
    with pytest.raises(InvalidInput, match=what):
        class_toy()(PictureRequest(class_labels=labels))


def test_a_pipeline_of_classes_takes_no_words():
    with pytest.raises(InvalidInput, match="draws classes"):
        class_toy()(PictureRequest(prompts=["goldfish"]))


def test_a_denoiser_of_pixels_needs_no_decoder():
    pixels = replace(MODEL, value_range=(0.0, 1.0))
    stages = ToyStages()
    del stages.functions["vae_decoder"]
    latents = toy(model=pixels, stages=stages, latent=None).latents(PictureRequest(**FOXES))
    drawn = toy(model=pixels, stages=stages, latent=None)(PictureRequest(**FOXES))
    assert np.array_equal(drawn, np.clip(latents, 0, 1))


def test_further_inputs_are_made_at_every_evaluation_and_told_whose_row_is_whose():
    controlled = replace(
        MODEL,
        inputs=(
            *MODEL.inputs,
            TensorSpec(name="residual", shape=("batch", CHANNELS, "height", "width"), varies=Varies.SAMPLE),
        ),
    )
    calls = []

    def network(feeds):
        return {"output": evaluate(feeds)["output"] + feeds["residual"]}

    def hook(sample, timestep, conditions, numbers):
        calls.append((len(sample), timestep, sorted(conditions), numbers))
        return {"residual": 0.1 * sample * (1 + np.array(numbers, dtype=np.float32))[:, None, None, None]}

    pipeline = toy(model=controlled, network=network)
    request = PictureRequest(prompts=["a fox"], num=3, batch=2, num_inference_steps=2)
    drawn = pipeline(request, per_evaluation=hook)
    assert [call[0] for call in calls] == [4, 4, 2, 2]
    assert [call[3] for call in calls] == [(0, 1, 0, 1)] * 2 + [(2, 2)] * 2
    assert calls[0][2] == ["encoder_hidden_states"]
    assert not np.array_equal(drawn, toy()(request))


# ---------------------------------------------------------------------------------------------------- schedules


FLOW = replace(MODEL, path=LinearFlow(), prediction=FLOW_PREDICTION)
DYNAMIC = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}


def test_a_schedule_that_depends_on_the_size_is_computed_for_the_size():
    pipeline = toy(model=FLOW, options=flow_options(DYNAMIC, family="stable_diffusion_3"))
    small, large = (pipeline.table(PictureRequest(prompts=["a"], height=size, width=size)) for size in (16, 128))
    assert np.all(small.timesteps[1:] < large.timesteps[1:])


def test_a_schedule_that_is_known_for_one_size_refuses_others():
    noted = replace(FLOW, notes={"flow_shift": "dynamic"})
    pipeline = toy(model=noted)
    pipeline.table(PictureRequest(prompts=["a"]))
    with pytest.raises(InvalidInput, match="depends on the picture's size"):
        pipeline.table(PictureRequest(prompts=["a"], height=64))
    assert pipeline.table(PictureRequest(prompts=["a"], height=64, sampler="flow_heun")).sampler == "flow_heun"


@pytest.mark.parametrize("change", [{"use_karras_sigmas": True}, {"shift_terminal": 0.1}, {"_class_name": "Other"}])
def test_a_scheduler_that_is_more_than_a_shift_has_no_formula(change):
    assert flow_options({**DYNAMIC, **change}, family="flux") == {}
