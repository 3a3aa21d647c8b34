"""Record golden pictures: a whole pipeline in eager PyTorch, in float32 and in the formats that engines have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from lehr.export.eager_pipeline import eager_text_to_image
from lehr.export.golden import SEED
from lehr.export.pipelines.source import PipelineSource
from lehr.export.stages import FORMATS
from lehr.runtime.errors import InvalidInput, MissingExtra, RunFailed
from lehr.runtime.parity import compare
from lehr.runtime.picture_golden import RANGE, PictureGolden
from lehr.runtime.solver_table import SolverTable

PROMPTS = ("a red house by the sea at night", "")
NUM_STEPS = 10  # where the pipeline brings no schedule of its own


def record_pictures(
    found: PipelineSource, tables: Mapping[int, SolverTable], *, device: str, progress: Callable[[str], None]
) -> PictureGolden | None:
    """Draw two pictures, of a prompt and of none or of two classes, at the pipeline's own size.

    None for a pipeline that draws no picture from that alone, such as one for inpainting.

    Args:
        found: a pipeline about to be exported, with weights.
        tables: of its own scheduler, by number of steps; the fewest are drawn.
        device: that eager runs on.
        progress: takes a line of text now and then.
    """
    pipeline = eager_text_to_image(found, tables, device=device)
    last = max(0, min(1, (found.denoiser.spec.num_classes or 1) - 1))
    golden = PictureGolden(
        prompts=PROMPTS if pipeline.prompted else (),
        class_labels=() if pipeline.prompted else (0, last),
        seed=SEED,
        num_inference_steps=min(tables, default=NUM_STEPS),
        pictures=np.zeros((2, 3, *pipeline.default_size()), np.float32),
    )
    progress("golden: pictures")
    try:
        golden = replace(golden, pictures=pipeline(golden.request))
    except (InvalidInput, MissingExtra) as e:
        progress(f"golden: no pictures: {e}")
        return None
    del pipeline
    floors = {}
    for form, dtype in FORMATS.items():
        progress(f"golden: pictures in {form}")
        try:
            other = eager_text_to_image(found, tables, dtype=dtype, device=device)(golden.request)
        except (RuntimeError, RunFailed):  # an operator without a kernel in the format, or numbers beyond it
            continue
        if np.isfinite(other).all():
            floors[form] = compare(golden.pictures, other, RANGE).psnr_db
    return replace(golden, floors=floors)
