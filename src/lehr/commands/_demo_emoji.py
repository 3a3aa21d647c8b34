"""The part of ``lehr demo`` that draws from words: engines beside eager PyTorch, on the same noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lehr.commands._output import Progress

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MODEL = "emoji"
PROMPTS = ("a red heart", "a cat with heart eyes", "a slice of pizza", "a sailing boat", "the sun", "flag of Japan")
ZOOM, SEED = 2, 7  # pixels a pixel, noise of the pictures
PARITY_DB = 45.0  # fp32 engines against eager PyTorch, the worst of all pictures


@dataclass(frozen=True, slots=True, kw_only=True)
class Emoji:
    """What was drawn: the left half of ``image`` by the engines, the right half by PyTorch; a row a prompt."""

    bundle: Path
    image: Path
    prompts: tuple[str, ...]
    psnr_db: float
    seconds: float  # of the engines, all pictures

    @property
    def passed(self) -> bool:
        return self.psnr_db >= PARITY_DB

    @property
    def prose(self) -> str:
        rows = "; ".join(repr(prompt) for prompt in self.prompts)
        verdict = "pass" if self.passed else f"FAIL, expected {PARITY_DB:.0f} dB"
        return (
            f"{self.image}: {rows}, a row each; left the engines, right eager PyTorch on the same noise.\n"
            f"{MODEL}: PSNR {self.psnr_db:.1f} dB at least ({verdict}), {self.seconds:.2f} s for the engines"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "bundle": str(self.bundle),
            "image": str(self.image),
            "prompts": list(self.prompts),
            "psnr_db": self.psnr_db,
            "seconds": self.seconds,
        }


def draw(
    output: Path,
    prompts: Sequence[str],
    each: int,
    *,
    lehr: Callable[..., Mapping[str, Any]],
    progress: Progress,
) -> Emoji:
    """Export and build the shipped text-to-image model, and draw ``each`` pictures of every prompt with both.

    Args:
        output: folder of bundle and picture.
        prompts: at least one.
        each: pictures a prompt.
        lehr: runs another verb in a process of its own and returns its JSON.
        progress: on stderr.
    """
    import numpy as np

    from lehr.export.eager_pipeline import eager_text_to_image
    from lehr.export.package import Options, export
    from lehr.export.pipelines.read import read_pipeline
    from lehr.export.source import resolve
    from lehr.runtime import picture
    from lehr.runtime.arrays import read_arrays
    from lehr.runtime.errors import ExportFailed
    from lehr.runtime.golden import Tier
    from lehr.runtime.parity import compare
    from lehr.runtime.text_to_image import PictureRequest

    bundle, drawn, num = output / f"{MODEL}.lehr", output / f"{MODEL}.npz", each * len(prompts)
    progress(f"$ lehr export {MODEL} -o {bundle} --golden none")
    command = ("lehr", "export", MODEL, "--golden", "none")
    export(MODEL, bundle, Options(overwrite=True, tier=Tier.NONE, command=command), progress=progress)
    lehr("build", str(bundle), "--target", "cpu", "--library", "onnxruntime")
    words = [part for prompt in prompts for part in ("--prompt", prompt)]
    ran = lehr("run", str(bundle), *words, "--num", str(num), "--seed", str(SEED), "-o", str(drawn))
    progress("the same in eager PyTorch")
    found = read_pipeline(MODEL, resolve(MODEL, preset=None, seed=0, structure_only=False))
    if found is None:
        raise ExportFailed(f"{MODEL} is no whole pipeline here.")
    expected = eager_text_to_image(found)(PictureRequest(prompts=tuple(prompts), num=num, seed=SEED))
    got = read_arrays(drawn)["samples"]
    image = output / f"{MODEL}.png"
    sheets = [_rows(picture.to_bytes(side, (0.0, 1.0)), each) for side in (got, expected)]
    gap = np.full((len(sheets[0]), 8 * ZOOM, 3), 255, dtype=np.uint8)
    picture.save_png(image, np.concatenate([sheets[0], gap, sheets[1]], axis=1))
    return Emoji(
        bundle=bundle,
        image=image,
        prompts=tuple(prompts),
        psnr_db=round(compare(expected, got, (0.0, 1.0)).psnr_db, 1),
        seconds=float(ran["seconds"]),
    )


def _rows(pictures: npt.NDArray[np.uint8], each: int) -> npt.NDArray[np.uint8]:
    """Prompts were used in turn; a row a prompt."""
    from lehr.runtime import picture

    by_prompt = pictures.reshape(each, -1, *pictures.shape[1:]).swapaxes(0, 1)
    return picture.grid(by_prompt.reshape(pictures.shape), columns=each, zoom=ZOOM)
