"""What families compute beside the network: captions and schedules, against diffusers."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from picture_toy import MODEL

from lehr.runtime.paths import LinearFlow
from lehr.runtime.pipelines.caption import clean
from lehr.runtime.pipelines.flow_schedule import flow_options, own_table
from lehr.runtime.prediction import FLOW_PREDICTION

PARTS = (
    "A Photo of a CAT",
    "see https://example.com/cat.png now",
    "<b>bold</b> &amp; bright &lt;x&gt;",
    "@user says “hello” \u2018world\u2019",
    "IMG_1234.jpg of jc6640vc",
    "a-b-c-d-e-f",
    "100x200 poster page 12 free shipping",
    "#12 #12345 1234567 192.168.0.1",
    "漢字 and ㈱ text – em—dash",
    "'quoted text'",
    "ﬁne \uff46\uff55\uff4c\uff4c width",
    "a\nb\r\nc\\n d",
    "...dots... , and:: stuff :",
    "an astronaut, 4k, high-detail (best quality:1.2)",
    "<script>x=1</script>hi",
    "a%20b+c cafe\u0301",
    "<person> at 5:30 ",
    "AT&T",
    "tom & jerry; &quot",
    "& hello &copy 2020",
    "x < y > z",
    "<unclosed tag",
)
SIGNS = " abc,.:;-_'\"#@&<>/()[]{}|*0123456789%+=éñ–“”’xX×\n"


def captions() -> list[str]:
    found = random.Random(0)
    joined = [" ".join(found.choice(PARTS) for _ in range(found.randint(1, 3))) for _ in range(300)]
    noise = ["".join(found.choice(SIGNS) for _ in range(found.randint(0, 40))) for _ in range(700)]
    return ["", *PARTS, *joined, *noise]


# A caption that is only a file's name makes the parser of markup ask whether it was meant to be opened.
@pytest.mark.filterwarnings("ignore:.*looks more like:Warning")
def test_captions_are_cleaned_as_diffusers_cleans_them():
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("bs4")
    pytest.importorskip("ftfy")
    pipeline = diffusers.PixArtAlphaPipeline

    class Cleaner:
        bad_punct_regex = pipeline.bad_punct_regex
        _clean_caption = pipeline._clean_caption
        _text_preprocessing = pipeline._text_preprocessing

    expected = Cleaner()._text_preprocessing(captions(), clean_caption=True)
    assert [clean(caption) for caption in captions()] == expected


CONFIGS = {
    "flux dev": ("flux", {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}),
    "flux schnell": ("flux", {"shift": 1.0}),
    "sd3": ("stable_diffusion_3", {"shift": 3.0}),
    "sd3.5": ("stable_diffusion_3", {"use_dynamic_shifting": True, "base_shift": 0.4, "max_shift": 1.2}),
}


@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize("tokens", [16, 4096])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_flows_own_schedule_is_the_schedulers_at_any_size_and_number_of_steps(name, tokens, steps):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    family, settings = CONFIGS[name]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    config = dict(scheduler.config)
    mu = calculate_shift(
        tokens,
        config["base_image_seq_len"],
        config["max_image_seq_len"],
        config["base_shift"],
        config["max_shift"],
    )
    sigmas = {"sigmas": np.linspace(1, 1 / steps, steps)} if family == "flux" else {"num_inference_steps": steps}
    scheduler.set_timesteps(**sigmas, **({"mu": mu} if settings.get("use_dynamic_shifting") else {}))
    options = flow_options({**config, "_class_name": "FlowMatchEulerDiscreteScheduler"}, family=family)
    model = replace(MODEL, path=LinearFlow(), prediction=FLOW_PREDICTION)
    table = own_table(model, options, tokens, steps)
    assert table is not None
    assert np.allclose(table.timesteps, scheduler.timesteps.numpy(), rtol=1e-5)
    # Euler's method from one time to the next, the last being 0.
    sample, output = np.float64(0.7), np.full(steps, 0.3)
    expected = sample + float(np.diff(scheduler.sigmas.numpy().astype(np.float64)) @ output)
    assert np.isclose(table.start[-1] * sample + table.outputs[-1] @ output, expected, rtol=1e-5)
