"""Stages of the emoji model in quantised recipes: how small they are, and what pictures and features lose.

    python benchmarks/stage_quantisation.py [--bundle NAME.lehr]

Writes benchmarks/results/stage_quantisation.json and, between its marks, docs/text-to-image.md. Without --bundle the
model is exported first; a bundle that is given is copied, and must hold the same pipeline.

Sixteen of the 100 prompts that training never saw are drawn once each (seed 0, 20 steps, the model's guidance) with one
stage quantised and everything else in fp32, and compared with the pictures of fp32 alone. Cosines are between vectors
that a stage returns in both: a text encoder's for every token, an encoder's for every cell of the latent. Calibration
uses the built-in prompts and knows none of the sixteen. Sizes are those of engines, weights and graph.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from environment import write

from lehr.calibration.stage_calibrate import calibrate_stage
from lehr.calibration.stage_feeds import StageData
from lehr.engines.build import build
from lehr.engines.stages import build_stage
from lehr.engines.target import target
from lehr.runtime.bundle import Bundle
from lehr.runtime.engine import EngineRecord, find
from lehr.runtime.parity import compare
from lehr.runtime.recipe import recipe
from lehr.runtime.stage import StageKind
from lehr.runtime.stages import load_stage
from lehr.runtime.text_to_image import PictureRequest, TextToImage
from lehr.runtime.tokenizer import MAX_BYTES, Tokenizer
from lehr.runtime.verify_stage import verify_stage

MODEL, PROMPTS, STEPS, SEED = "emoji", 16, 20, 0
ORT, OPENVINO = "onnxruntime", "openvino"
# Which recipes of each stage, and the library that has kernels for them: no choice hangs on a timing.
STAGES = {
    "text_encoder": {"fp16": ORT, "int8-weight": ORT, "int4-weight": ORT, "int8-sq": ORT, "int8": ORT},
    "vae_decoder": {"int8-weight": ORT, "int4-weight": ORT, "int8-sq": OPENVINO, "int8": OPENVINO},
    "vae_encoder": {"int8-weight": ORT, "int8-sq": OPENVINO},
}
DOCS = Path(__file__).parents[1] / "docs" / "text-to-image.md"
BEGIN, END = "<!-- stages:begin -->", "<!-- stages:end -->"

Array = npt.NDArray[Any]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="of the emoji model; by default it is exported")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "e.lehr"
        if given.bundle is None:
            from lehr.export.package import Options, export

            export(MODEL, root, Options(), progress=print)
        else:
            shutil.copytree(given.bundle, root)
        rows = measure(root, Path(scratch) / "data")
    results = {"prompts": PROMPTS, "steps": STEPS, "seed": SEED, "stages": rows}
    print(write("stage_quantisation", results))
    text = DOCS.read_text(encoding="utf-8")
    fresh = f"{BEGIN}\n{table(rows)}\n{END}"
    DOCS.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: fresh, text, flags=re.DOTALL), encoding="utf-8")


def measure(root: Path, data: Path) -> list[dict[str, Any]]:
    """A row a stage and recipe; fp32 first."""
    here = target("cpu")
    build(root, here, recipe("fp32"), library=ORT, threads=1)
    for stage in STAGES:
        build_stage(root, stage, here, recipe("fp32"), library=ORT, threads=1)
    prompts = held_out()
    whole = draw(root, prompts, {})
    rows = []
    for stage, libraries in STAGES.items():
        fp32 = find(Bundle.open(root), "cpu", "fp32", stage)
        feeds = inputs(Bundle.open(root), stage, prompts, whole)
        expected = outputs(root, fp32, feeds)
        rows.append({"stage": stage, "recipe": "fp32", "library": ORT, "bytes": size(root, fp32)})
        for name, library in libraries.items():
            if recipe(name).calibrated:
                calibrate_stage(Bundle.open(root), stage, name, data=StageData(folder=data, threads=1))
            record = build_stage(root, stage, here, recipe(name), library=library, threads=1)
            row: dict[str, Any] = {"stage": stage, "recipe": name, "library": library, "bytes": size(root, record)}
            row["rel_error"] = verify_stage(Bundle.open(root), record).levels["L1"].measures["max_rel_error"]
            if expected:
                row |= cosines(expected, outputs(root, record, feeds))
            if stage != "vae_encoder":
                row |= losses(whole, draw(root, prompts, {stage: name}))
            print(row, flush=True)
            rows.append(row)
    return rows


def held_out() -> list[str]:
    """Evenly chosen prompts that training never saw."""
    path = files("lehr.export.reference") / "emoji" / "held_out.json"
    texts = [str(one["prompt"]) for one in json.loads(path.read_text(encoding="utf-8"))]
    return [texts[k] for k in np.linspace(0, len(texts) - 1, PROMPTS).astype(int)]


def draw(root: Path, prompts: list[str], recipes: dict[str, str]) -> Array:
    """A picture a prompt, with stages in these recipes and the rest in fp32."""
    request = PictureRequest(prompts=prompts, seed=SEED, num_inference_steps=STEPS)
    return TextToImage.open(root, stage_recipes=recipes)(request)


def inputs(bundle: Bundle, stage: str, prompts: list[str], pictures: Array) -> list[dict[str, Array]]:
    """What a stage is fed for the prompts, or for the pictures that were drawn of them; nothing for a decoder."""
    spec = bundle.manifest.stage(stage).spec
    if spec.kind is StageKind.LATENT_ENCODER:
        return [{spec.inputs[0].name: one[None] * 2 - np.float32(1)} for one in pictures]
    pipeline = bundle.manifest.pipeline
    if pipeline is None or stage not in pipeline.tokenizers:
        return []
    words = pipeline.tokenizers[stage]
    tokens = Tokenizer(words, bundle.read_bytes(words.file, MAX_BYTES))(prompts)
    known = {"input_ids": tokens.ids, "attention_mask": tokens.mask}
    return [{t.name: known[t.name][k : k + 1] for t in spec.inputs} for k in range(len(prompts))]


def outputs(root: Path, record: EngineRecord, feeds: list[dict[str, Array]]) -> list[Array]:
    """Vectors of the first output: of tokens that are text, or of cells."""
    runner = load_stage(Bundle.open(root), record)
    found = []
    for one in feeds:
        made = next(iter(runner(one).values()))
        rows = (
            made.reshape(-1, made.shape[-1]) if made.ndim == 3 else np.moveaxis(made, 1, -1).reshape(-1, made.shape[1])
        )
        mask = one.get("attention_mask")
        found.append(rows if mask is None else rows[mask.reshape(-1) > 0])
    return found


def cosines(expected: list[Array], got: list[Array]) -> dict[str, float]:
    """Mean and least cosine between vectors."""
    a, b = np.concatenate(expected).astype(np.float64), np.concatenate(got).astype(np.float64)
    found = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return {"cosine": float(found.mean()), "worst_cosine": float(found.min())}


def losses(whole: Array, pictures: Array) -> dict[str, float]:
    """Mean and least PSNR of single pictures."""
    found = [compare(a[None], b[None], (0.0, 1.0)).psnr_db for a, b in zip(whole, pictures, strict=True)]
    return {"psnr_db": float(np.mean(found)), "worst_psnr_db": float(np.min(found))}


def size(root: Path, record: EngineRecord) -> int:
    """Bytes of an engine without its record."""
    bundle = Bundle.open(root)
    names = [name for name in bundle.names(f"{record.folder}/") if not name.endswith("build.json")]
    return sum(bundle.manifest.files[name].bytes for name in names)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| stage | recipe | library | engine | of fp32 | `verify` | cosine, mean, worst | pictures, mean, worst |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    whole = {row["stage"]: row["bytes"] for row in rows if row["recipe"] == "fp32"}
    for row in rows:
        cosine = f"{row['cosine']:.5f}, {row['worst_cosine']:.5f}" if "cosine" in row else ""
        pictures = f"{row['psnr_db']:.1f}, {row['worst_psnr_db']:.1f} dB" if "psnr_db" in row else ""
        share = f"{row['bytes'] / whole[row['stage']]:.2f}"
        mb = f"{row['bytes'] / 1e6:.2f} MB"
        verdict = ""
        if "rel_error" in row:
            limit = recipe(row["recipe"]).rel_error
            verdict = f"{row['rel_error']:.4f}" + (
                " **fails**" if limit is not None and row["rel_error"] > limit else ""
            )
        title = {ORT: "ONNX Runtime", OPENVINO: "OpenVINO"}[row["library"]]
        lines.append(
            f"| `{row['stage']}` | `{row['recipe']}` | {title} | {mb} | {share} | {verdict} | {cosine} | {pictures} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
