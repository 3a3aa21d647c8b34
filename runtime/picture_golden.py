"""Golden pictures: what eager PyTorch draws with all stages of a pipeline, and how far an engine's pictures are off.

They are made at export by the pipeline code that runs here, over eager stages: prompt, tokens, noise, loop and decoder
are held against eager at once, which no stage's own golden data does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.bundle import Bundle, Edit
from lehr.runtime.calibrated import recipe_of
from lehr.runtime.engine import engines
from lehr.runtime.errors import BundleError, MissingExtra
from lehr.runtime.parity import compare
from lehr.runtime.picture_request import PictureRequest
from lehr.runtime.stages import DENOISER, stage_engine
from lehr.runtime.text_to_image import TextToImage
from lehr.runtime.verify import FLOOR_FACTOR, FP32_PSNR_DB, Level

Array = npt.NDArray[Any]

PICTURES, INDEX = "golden/picture.npz", "golden/picture.json"
RANGE = (0.0, 1.0)  # of a picture


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureGolden:
    """Pictures and what was asked for.

    Attributes:
        prompts, class_labels: one of the two is empty.
        seed, num_inference_steps: of all of them.
        pictures: (N, 3, H, W) float32 in [0, 1].
        floors: format ("fp16", "bf16") -> PSNR of eager's pictures in that format, in dB; without one that eager cannot
            run in, or that draws nothing finite.
    """

    prompts: tuple[str, ...]
    class_labels: tuple[int, ...]
    seed: int
    num_inference_steps: int
    pictures: Array
    floors: Mapping[str, float] = field(default_factory=dict)

    @property
    def request(self) -> PictureRequest:
        """What draws them again."""
        height, width = self.pictures.shape[-2:]
        return PictureRequest(
            prompts=self.prompts,
            class_labels=self.class_labels,
            num=len(self.pictures),
            seed=self.seed,
            num_inference_steps=self.num_inference_steps,
            height=height,
            width=width,
        )


def write_pictures(edit: Edit, golden: PictureGolden) -> None:
    """Add golden pictures to a bundle."""
    edit.add_arrays(PICTURES, {"pictures": golden.pictures})
    edit.add_json(
        INDEX,
        {
            "prompts": list(golden.prompts),
            "class_labels": list(golden.class_labels),
            "seed": golden.seed,
            "num_inference_steps": golden.num_inference_steps,
            "floors": dict(golden.floors),
        },
    )


def read_pictures(bundle: Bundle) -> PictureGolden | None:
    """The golden pictures of a bundle; None without any.

    Raises:
        BundleError: they are damaged.
    """
    if INDEX not in bundle.manifest.files:
        return None
    index, pictures = bundle.read_json(INDEX), bundle.read_arrays(PICTURES).get("pictures")
    try:
        if pictures is None or pictures.ndim != 4 or pictures.dtype != np.float32 or not len(pictures):
            raise ValueError("they are no pictures")
        return PictureGolden(
            prompts=tuple(str(text) for text in index["prompts"]),
            class_labels=tuple(int(label) for label in index["class_labels"]),
            seed=int(index["seed"]),
            num_inference_steps=int(index["num_inference_steps"]),
            pictures=pictures,
            floors={str(form): float(floor) for form, floor in index["floors"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise BundleError(
            f"the golden pictures of {bundle.root.name} are damaged ({e!r}). Export the model again."
        ) from e


def verify_pictures(
    bundle: Bundle, target: str, recipe: str, stage_recipes: Mapping[str, str] | None = None
) -> Level | None:
    """Draw the golden pictures with the engines for ``target`` and compare; None where the bundle has none.

    Where a stage was not built for the target, or tokenizers cannot be read here, nothing is judged.

    Raises:
        BundleError: damaged files, or an engine of another machine.
        RunFailed: an engine failed.
    """
    golden = read_pictures(bundle)
    if golden is None:
        return None
    for name in bundle.manifest.stages:
        if not any(record.target == target for record in engines(bundle, name)):
            return Level(passed=None, reason=f"stage {name!r} has no engine for target {target!r}")
    try:
        pipeline = TextToImage.open(bundle.root, target=target, recipe=recipe, stage_recipes=stage_recipes)
        drawn = pipeline(golden.request)
    except MissingExtra as e:
        return Level(passed=None, reason=str(e))
    if drawn.shape != golden.pictures.shape:
        return Level(passed=False, reason=f"pictures of shape {drawn.shape}, expected {golden.pictures.shape}")
    recipes = {DENOISER: recipe, **(stage_recipes or {})}
    ran = {name: stage_engine(bundle, name, target, recipes).recipe for name in bundle.manifest.stages}
    limit = picture_limit(bundle, golden, recipe, ran)
    parity = compare(golden.pictures, drawn, RANGE)
    return Level(
        passed=bool(parity.psnr_db >= limit),
        reason=f"pictures {parity.psnr_db:.1f} dB, limit {limit:.1f} dB",
        measures={**asdict(parity), "limit_psnr_db": limit},
    )


def picture_limit(bundle: Bundle, golden: PictureGolden, recipe: str, stages: Mapping[str, str] | None = None) -> float:
    """The least PSNR of a picture with a denoiser in ``recipe`` and stages in theirs, in dB: the least of all these.

    As for single stages, fp16 where eager overflows may err as eager does in bf16.
    """
    parts = [(None, recipe), *(stages or {}).items()]
    return min(_limit(bundle, golden, chosen, stage) for stage, chosen in parts)


def _limit(bundle: Bundle, golden: PictureGolden, recipe: str, stage: str | None) -> float:
    stated = recipe_of(bundle, recipe, stage).psnr_db
    if stated is not None:
        return min(FP32_PSNR_DB, stated)
    factor = 20 * float(np.log10(FLOOR_FACTOR))
    if recipe in golden.floors:
        return min(FP32_PSNR_DB, golden.floors[recipe] - factor)
    if recipe == "fp16" and "bf16" in golden.floors:
        return min(FP32_PSNR_DB, golden.floors["bf16"])
    return FP32_PSNR_DB
