"""The emoji model: what held-out prompts give, how near the engines are to eager PyTorch, and how long pictures take.

    npm pack emoji-datasource-twitter@16.0.0 emojibase-data@17.0.0
    python benchmarks/emoji.py --data FOLDER [--sheets]

Writes benchmarks/results/emoji.json and, between its marks, docs/emoji.md; with --sheets its pictures, too.

Retrieval draws each of the 100 prompts that training never saw once (seed 0, 20 steps, the model's guidance). A small
feature network, trained without captions, then ranks all 3,786 emoji by likeness to it: top-1 is the share of prompts
whose own emoji is first. Parity draws some of them with engines and with eager PyTorch (fp32) on the same noise; the
figure is the worst picture's PSNR. Times are medians: four pictures in a process that has drawn before, and a whole
``lehr run`` that draws one, from its start to its end.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from environment import write
from safetensors.torch import load_file

from lehr.export.eager_pipeline import eager_text_to_image
from lehr.export.pipelines.read import read_pipeline
from lehr.export.reference.emoji import captions, data, features
from lehr.export.reference.emoji.ship import FEATURES, RECORD
from lehr.export.reference.emoji.vae import to_unit_range
from lehr.export.source import resolve
from lehr.runtime.parity import compare
from lehr.runtime.text_to_image import PictureRequest, TextToImage

MODEL, SEED, STEPS = "emoji", 0, 20
COMPARED, REPEATS = 16, 7  # prompts whose pictures are held against eager's; repetitions of what is timed
HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
BEGIN, END = "<!-- emoji:begin -->", "<!-- emoji:end -->"

Array = npt.NDArray[Any]

# A whole ``lehr run`` in a process of its own, which must not have met PyTorch.
RUN = """
import sys
from lehr import cli
code = 0
try:
    cli.main(sys.argv[1:])
except SystemExit as e:
    code = e.code or 0
sys.exit(code or int(bool({"torch", "onnx", "diffusers", "transformers"} & set(sys.modules))))
"""


def lehr(*words: str) -> str:
    """What a verb says; fails if it does."""
    return subprocess.run([sys.executable, "-m", "lehr", *words], check=True, capture_output=True, text=True).stdout


def request(prompts: list[str]) -> PictureRequest:
    """One picture a prompt."""
    return PictureRequest(prompts=prompts, seed=SEED, num_inference_steps=STEPS)


# -------------------------------------------------------------------------------------------------- measuring


def retrieval(pictures: Array, judge: features.Features, dataset: data.Dataset) -> dict[str, Any]:
    """Shares of the held-out prompts whose emoji is first, and one of the first five; (N, 3, 64, 64) in [0, 1]."""
    place = dataset.index()
    wanted = torch.tensor([place[hexcode] for hexcode, _ in captions.held_out()])
    images = torch.from_numpy(dataset.images).permute(0, 3, 1, 2).contiguous()
    found = features.ranks(judge, torch.from_numpy(2 * pictures - 1), images, wanted)
    return {
        "prompts": len(found),
        "top_1": features.share(found, 1),
        "top_5": features.share(found, 5),
        "missed": [prompt for (_, prompt), rank in zip(captions.held_out(), found.tolist(), strict=True) if rank >= 5],
    }


def nearest(pictures: Array, judge: features.Features, dataset: data.Dataset) -> list[str]:
    """The name of the emoji that each picture is most like."""
    images = torch.from_numpy(dataset.images).permute(0, 3, 1, 2).contiguous()
    made = features.embed(judge, torch.from_numpy(2 * pictures - 1))
    order = (made @ features.embed(judge, to_unit_range(images)).T).argmax(dim=1)
    return [dataset.emoji[i].label for i in order.tolist()]


def parity(expected: Array, got: Array) -> dict[str, float]:
    """PSNR of the worst picture and of the middle one."""
    each = [compare(a[None], b[None], (0.0, 1.0)).psnr_db for a, b in zip(expected, got, strict=True)]
    return {"worst_psnr_db": round(min(each), 1), "median_psnr_db": round(statistics.median(each), 1)}


def four_pictures(pipeline: TextToImage) -> float:
    """Median seconds for four pictures of one prompt."""
    asked = PictureRequest(prompts=["a red heart"], num=4, num_inference_steps=STEPS)
    pipeline(asked)
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        pipeline(asked)
        taken.append(time.perf_counter() - started)
    return round(statistics.median(taken), 3)


def first_picture(bundle: Path, recipe: str) -> float:
    """Median seconds of a process that draws one picture; fails if the process imports PyTorch."""
    taken = []
    for k in range(REPEATS):
        output = bundle.parent / f"first-{k}.png"
        words = ("run", str(bundle), "--prompt", "a red heart", "--recipe", recipe, "-o", str(output))
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", RUN, *words], check=True, capture_output=True)
        taken.append(time.perf_counter() - started)
    return round(statistics.median(taken), 3)


def measure(bundle: Path, judge: features.Features, dataset: data.Dataset) -> tuple[dict[str, Any], Array]:
    """Every figure, and the pictures of the held-out prompts."""
    prompts = [prompt for _, prompt in captions.held_out()]
    native = {entry["name"]: entry["native"] for entry in json.loads(lehr("doctor", "--json"))["recipes"]}
    recipes = [recipe for recipe in ("fp32", "bf16") if native[recipe]]
    found = read_pipeline(MODEL, resolve(MODEL, preset=None, seed=0, structure_only=False))
    if found is None:
        raise SystemExit(f"{MODEL} is no whole pipeline here")
    eager = eager_text_to_image(found)
    expected = eager(request(prompts[:COMPARED]))
    results: dict[str, Any] = {"eager_four_pictures_s": four_pictures(eager), "recipes": {}}
    held_out = np.empty(0)
    for recipe in recipes:
        library = ("--library", "onnxruntime") if recipe == "fp32" else ()
        lehr("build", str(bundle), "--target", "cpu", "--recipe", recipe, *library)
        pipeline = TextToImage.open(bundle, recipe=recipe)
        drawn = pipeline(request(prompts))
        held_out = drawn if recipe == "fp32" else held_out
        results["recipes"][recipe] = {
            "retrieval": retrieval(drawn, judge, dataset),
            "parity": parity(expected, drawn[:COMPARED]),
            "four_pictures_s": four_pictures(pipeline),
            "first_picture_s": first_picture(bundle, recipe),
        }
    return results, held_out


# ---------------------------------------------------------------------------------------------------- the document


def figures(results: dict[str, Any], training: dict[str, Any]) -> str:
    """What stands between the marks of docs/emoji.md."""
    stages = training["stages"]
    hours = stages["denoiser"]["seconds"] / 3600
    steps = stages["denoiser"]["held_out_percent"][-1][0]
    batch = training["schedule"]["batch"]
    text, vae = (stages[name]["seconds"] / 60 for name in ("text", "vae"))
    lines = [
        f"The shipped weights had {steps:,} steps of {batch} captions in {hours:.1f} hours, on one core of a machine",
        f"with other work, after {text:.0f} minutes of both for the text encoder and {vae:.0f} minutes of one for the",
        "autoencoder.",
        "",
        f"| | {' | '.join(results['recipes'])} |",
        f"| --- |{' --- |' * len(results['recipes'])}",
    ]
    of = list(results["recipes"].values())
    rows = {
        f"the prompt's own emoji is most like the picture, {of[0]['retrieval']['prompts']} prompts": [
            f"{one['retrieval']['top_1']:.0%}" for one in of
        ],
        "it is among the five most like it": [f"{one['retrieval']['top_5']:.0%}" for one in of],
        f"PSNR to eager PyTorch in fp32, the worst of {COMPARED} pictures": [
            f"{one['parity']['worst_psnr_db']:.1f} dB" for one in of
        ],
        f"four pictures, {STEPS} steps": [f"{one['four_pictures_s']:.2f} s" for one in of],
        "`lehr run` from its start to one picture": [f"{one['first_picture_s']:.2f} s" for one in of],
    }
    lines += [f"| {name} | {' | '.join(values)} |" for name, values in rows.items()]
    told, missed = results["environment"], "; ".join(of[0]["retrieval"]["missed"])
    lines += [
        "",
        f"Eager PyTorch takes {results['eager_four_pictures_s']:.2f} s for the four pictures. Measured by",
        f"`python benchmarks/emoji.py --data FOLDER` on {told['cores']} cores of an {told['cpu']}.",
        "",
        f"Not among the first five: {missed or 'none'}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the two archives")
    parser.add_argument("--sheets", action="store_true", help="draw the pictures of docs/emoji.md, too")
    given = parser.parse_args()
    dataset = data.load(given.data)
    judge = features.Features().eval()
    judge.load_state_dict({key: value.float() for key, value in load_file(HERE / "data" / FEATURES).items()})
    training = json.loads(files("lehr.export.reference").joinpath("weights", RECORD).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / f"{MODEL}.lehr"
        lehr("export", MODEL, "-o", str(bundle), "--golden", "none")
        results, held_out = measure(bundle, judge, dataset)
        results["weights_sha256"] = training["weights_sha256"]
        path = write(MODEL, results)
        if given.sheets:
            import emoji_sheets

            composed = TextToImage.open(bundle)(request(captions.compositions()))
            emoji_sheets.held_out(held_out, [prompt for _, prompt in captions.held_out()])
            emoji_sheets.compositions(composed, captions.compositions(), nearest(composed, judge, dataset))
            emoji_sheets.training(training)
    document = DOCS / "emoji.md"
    made = f"{BEGIN}\n{figures(json.loads(path.read_text()), training)}\n{END}"
    content = document.read_text(encoding="utf-8")
    document.write_text(
        re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: made, content, flags=re.DOTALL), encoding="utf-8"
    )
    print(path.read_text())


if __name__ == "__main__":
    main()
