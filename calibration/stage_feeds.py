"""What a stage beside the denoiser is fed, for its calibration: recorded where the pipeline itself feeds it.

A text encoder is given prompts as the pipeline's family gives them (tokens, masks, several encoders in turn); a decoder
the latents that the pipeline draws, an encoder the pictures that become of them. The stage in question is replaced by
one that writes down its inputs, and whatever runs before it computes in the portable float32 graphs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from lehr.calibration.collected import cache_folder, content
from lehr.calibration.stage_prompts import PROMPTS, read_prompts
from lehr.calibration.stage_recorded import recorded_feeds
from lehr.calibration.trajectories import CALIBRATION_SEEDS, OnStep
from lehr.engines.portable import portable_denoiser, portable_session
from lehr.runtime.arrays import read_arrays, write_arrays
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import BundleError, InvalidInput
from lehr.runtime.files import storage_errors
from lehr.runtime.latents import Coder
from lehr.runtime.picture_golden import read_pictures
from lehr.runtime.picture_request import PictureRequest
from lehr.runtime.pipeline_spec import PipelineSpec
from lehr.runtime.pipelines import family_of
from lehr.runtime.pipelines.family import Drawing
from lehr.runtime.pipelines.text import TextEncoders
from lehr.runtime.stage import StageKind, StageSpec
from lehr.runtime.stage_golden import read_stage_golden
from lehr.runtime.stages import StageFunction, StageRunner
from lehr.runtime.stored_tables import StoredTables
from lehr.runtime.text_to_image import TextToImage
from lehr.runtime.tokenizer import MAX_BYTES

Array = npt.NDArray[Any]
Feeds = dict[str, Array]

VERSION = 1  # of the files and of what is collected
LATENTS = 8  # pictures drawn for a decoder or an encoder by default
DRAWN = 4  # at once, in one file
ROWS = 8  # of texts in one evaluation
_DRAWS = frozenset({StageKind.LATENT_DECODER, StageKind.LATENT_ENCODER})


@dataclass(frozen=True, slots=True, kw_only=True)
class StageData:
    """Where a stage's calibration data comes from; None stands for the default.

    Attributes:
        path: recorded inputs, an ``.npz`` or a folder of them, for encoders of pictures also pictures.
        prompts: a text file with a prompt a line, in place of the built-in list.
        num, steps, seed: of the pictures that are drawn for a decoder or an encoder.
        folder: where drawn data is kept between runs; by default the user's cache.
        threads: of ONNX Runtime; 0 is one a core.
    """

    path: Path | None = None
    prompts: Path | None = None
    num: int | None = None
    steps: int | None = None
    seed: int | None = None
    folder: Path | None = None
    threads: int = 0

    @property
    def drawing(self) -> bool:
        """Whether something is said about pictures to be drawn."""
        return any(value is not None for value in (self.num, self.steps, self.seed))


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFeeds:
    """Inputs of a stage.

    Attributes:
        batches: by name, in evaluations.
        source: "prompts", "loops", "recorded" or "golden".
        conditions: whose prompts they were made of, for people.
        digest: SHA-256 of their content.
    """

    batches: tuple[Feeds, ...]
    source: str
    conditions: str

    @property
    def rows(self) -> int:
        return sum(len(next(iter(batch.values()))) for batch in self.batches)

    @property
    def digest(self) -> str:
        about = [{name: content(value) for name, value in sorted(batch.items())} for batch in self.batches]
        return hashlib.sha256(json.dumps([VERSION, about]).encode()).hexdigest()


def gather_feeds(bundle: Bundle, stage: str, data: StageData, on_step: OnStep | None = None) -> StageFeeds:
    """What a stage is calibrated with.

    Raises:
        UnknownName: no such stage.
        InvalidInput: prompts or recorded inputs that cannot be used, an option that does not fit the stage, or a stage
            of which nobody knows what it is fed.
        BundleError: structure only, or damaged files.
        RunFailed: a graph fails, or is not finite.
    """
    spec = bundle.manifest.stage(stage).spec
    pipeline = bundle.manifest.pipeline
    if data.path is not None:
        if data.prompts is not None or data.drawing:
            raise InvalidInput(f"recorded inputs of stage {stage!r} were given (--data), so nothing is drawn or read.")
        return StageFeeds(batches=recorded_feeds(spec, data.path), source="recorded", conditions="recorded")
    worded = pipeline is not None and stage in pipeline.tokenizers and spec.kind is StageKind.TEXT_ENCODER
    if worded and data.drawing:
        raise InvalidInput(
            f"stage {stage!r} reads prompts, so no pictures are drawn: leave out --num, --steps, --seed."
        )
    if pipeline is not None and worded:
        return _worded(bundle, pipeline, stage, data)
    if pipeline is not None and spec.kind in _DRAWS:
        return _drawn(bundle, pipeline, stage, data, on_step)
    if data.prompts is not None or data.drawing:
        raise InvalidInput(
            f"stage {stage!r} is no part of a pipeline here that makes its inputs of prompts, so --prompts, --num, "
            "--steps and --seed do not apply. Record its inputs and give them with --data."
        )
    if bundle.manifest.stage(stage).golden not in bundle.manifest.files:
        raise InvalidInput(
            f"nobody knows what stage {stage!r} of {bundle.root.name} is fed: it has no golden data, and the pipeline "
            "does not say. Record inputs and give them with --data FILE.npz, an array for each of "
            f"{', '.join(tensor.name for tensor in spec.inputs)}."
        )
    return StageFeeds(batches=(dict(read_stage_golden(bundle, stage).inputs),), source="golden", conditions="golden")


# ------------------------------------------------------------------------------------------------------- prompts


def prompts_for(bundle: Bundle, file: Path | None) -> tuple[tuple[str, ...], str]:
    """Prompts to calibrate with, and where they come from: the golden ones, and a user's or the built-in ones."""
    golden = read_pictures(bundle)
    recorded = () if golden is None else golden.prompts
    given = PROMPTS if file is None else read_prompts(file)
    words = "built-in prompts" if file is None else "a file of prompts"
    return tuple(dict.fromkeys((*recorded, *given))), f"golden prompts and {words}" if recorded else words


def _worded(bundle: Bundle, pipeline: PipelineSpec, stage: str, data: StageData) -> StageFeeds:
    """Tokens of the prompts, and of the empty one that guidance subtracts."""
    prompts, told = prompts_for(bundle, data.prompts)
    recorder = _Recorder(bundle.manifest.stage(stage).spec)
    # What other encoders return is not looked at, so none of them runs.
    stages = _Stages(bundle, recorder, data.threads, silent=True)
    family = family_of(pipeline, bundle.manifest.model)
    height, width = family.default_size()
    encoders = TextEncoders(pipeline, stages, _reader(bundle), _unheard)
    for prompt in dict.fromkeys((*prompts, "")):
        drawing = Drawing(
            prompts=(prompt,),
            negative=None,
            labels=(),
            guided=False,
            height=height,
            width=width,
            scale=family.default_guidance_scale(),
        )
        family.conditions(drawing, encoders)
    return StageFeeds(batches=_joined(recorder.taken, ROWS), source="prompts", conditions=told)


def _joined(feeds: Sequence[Feeds], rows: int) -> tuple[Feeds, ...]:
    """Single evaluations of equal sizes that follow each other as one of up to ``rows`` rows."""
    groups: list[list[Feeds]] = []
    for one in feeds:
        shapes = {name: value.shape[1:] for name, value in one.items()}
        last = groups[-1] if groups else []
        if last and len(last) < rows and {name: value.shape[1:] for name, value in last[0].items()} == shapes:
            last.append(one)
        else:
            groups.append([one])
    return tuple({name: np.concatenate([one[name] for one in group]) for name in group[0]} for group in groups)


# ------------------------------------------------------------------------------------------------------ pictures


def _drawn(bundle: Bundle, pipeline: PipelineSpec, stage: str, data: StageData, on_step: OnStep | None) -> StageFeeds:
    """What a decoder or an encoder is fed when the pipeline draws; files of an earlier run are used as they are."""
    num, seed = LATENTS if data.num is None else data.num, data.seed or 0
    if not 0 <= seed < CALIBRATION_SEEDS >> 1:
        raise InvalidInput(f"the calibration seed must lie in 0 … 2^31 - 1, got {seed}.")
    prompted = family_of(pipeline, bundle.manifest.model).prompted
    if data.prompts is not None and not prompted:
        raise InvalidInput(f"{bundle.manifest.model.name} draws classes, not prompts; leave out --prompts.")
    prompts, told = prompts_for(bundle, data.prompts) if prompted else ((), "class labels")
    about = {
        "version": VERSION,
        "stage": stage,
        "sources": _sources(bundle),
        "prompts": prompts,
        "steps": data.steps,
        "seed": seed,
        "onnxruntime": str(ort.__version__),
        "batch": DRAWN,
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    place = (data.folder or cache_folder()) / digest[:32]
    with storage_errors(f"making {place}"):
        place.mkdir(parents=True, exist_ok=True)
    drawer: _Drawer | None = None
    batches: list[Feeds] = []
    for first in range(0, num, DRAWN):
        numbers = range(first, min(first + DRAWN, num))
        part = place / f"part-{first:05d}-{len(numbers)}.npz"
        kept = _kept(part, bundle.manifest.stage(stage).spec)
        if kept is None:
            drawer = drawer or _Drawer(bundle, pipeline, stage, data.threads)
            kept = drawer.draw(prompts, numbers, CALIBRATION_SEEDS + seed, data.steps)
            _write(part, kept)
        # One at a time: activations of a large picture take gigabytes.
        batches += [{name: value[k : k + 1] for name, value in kept.items()} for k in range(len(numbers))]
        if on_step is not None:
            on_step(numbers.stop, num)
    return StageFeeds(batches=tuple(batches), source="loops", conditions=told)


def _sources(bundle: Bundle) -> dict[str, str]:
    """SHA-256 of all that decides what the pipeline draws."""
    prefixes = ("model/", "tables/", "stages/")
    files = (name for prefix in prefixes for name in bundle.names(prefix))
    made = ("/engines/", "/kits/", "/calibration/", "golden.npz", "ranges.json")
    return {name: bundle.manifest.files[name].sha256 for name in files if not any(part in name for part in made)}


class _Drawer:
    """Draws pictures with the portable graphs and keeps what one stage is fed meanwhile."""

    def __init__(self, bundle: Bundle, pipeline: PipelineSpec, stage: str, threads: int) -> None:
        model = bundle.manifest.model
        self._recorder = _Recorder(bundle.manifest.stage(stage).spec)
        self._stages = _Stages(bundle, self._recorder, threads)
        self._family = family_of(pipeline, model)
        self._classes = range(model.num_classes or 1)
        self._draw = TextToImage(
            model,
            pipeline,
            self._stages,
            open_denoiser=lambda: portable_denoiser(bundle, threads=threads),
            tables=StoredTables(bundle),
            read=_reader(bundle),
            warn=_unheard,
        )
        self._coder = Coder(pipeline, model, self._stages, self._family)

    def draw(self, prompts: Sequence[str], numbers: range, seed: int, steps: int | None) -> Feeds:
        """The stage's inputs for the pictures ``numbers``, each of a seed of its own."""
        prompted = self._family.prompted
        request = PictureRequest(
            prompts=[prompts[k % len(prompts)] for k in numbers] if prompted else (),
            class_labels=() if prompted else [self._classes[k % len(self._classes)] for k in numbers],
            seeds=[seed + k for k in numbers],
            num_inference_steps=steps,
            tile=0,
        )
        pictures = self._draw.decode(self._draw.latents(request), tile=0)
        if self._recorder.spec.kind is StageKind.LATENT_ENCODER:
            self._coder.encode(request, pictures, *pictures.shape[-2:])
        taken, self._recorder.taken = self._recorder.taken, []
        return _joined(taken, len(numbers))[0]


def _write(part: Path, feeds: Feeds) -> None:
    """Write one file, renamed when it is whole."""
    partial = part.with_name(f".{part.name}.{os.getpid()}.partial")
    try:
        with storage_errors(f"writing {part}"):
            write_arrays(partial, feeds)
            partial.replace(part)
    finally:
        partial.unlink(missing_ok=True)


def _kept(part: Path, spec: StageSpec) -> Feeds | None:
    """What an earlier run left; None where that is nothing, or damaged."""
    if not part.is_file():
        return None
    try:
        feeds = read_arrays(part)
        spec.check_feeds(feeds)
    except (BundleError, InvalidInput):
        return None
    return feeds


# -------------------------------------------------------------------------------------------------------- stages


class _Recorder:
    """Stands in for a stage: writes down what it is fed and returns zeros."""

    def __init__(self, spec: StageSpec) -> None:
        self.spec = spec
        self.taken: list[Feeds] = []

    def __call__(self, feeds: Mapping[str, Array]) -> Feeds:
        self.taken.append({name: np.array(value) for name, value in feeds.items()})
        return _zeros(self.spec, feeds)


@dataclass(frozen=True, slots=True)
class _Zeros:
    """Stands in for a stage whose results nobody looks at."""

    spec: StageSpec

    def __call__(self, feeds: Mapping[str, Array]) -> Feeds:
        return _zeros(self.spec, feeds)


def _zeros(spec: StageSpec, feeds: Mapping[str, Array]) -> Feeds:
    sizes = spec.default_sizes(**spec.check_feeds(feeds))
    return {tensor.name: np.zeros(tensor.sizes(sizes), tensor.dtype.numpy) for tensor in spec.outputs}


class _Stages:
    """The stages of a bundle by their portable graphs, but for the one that is recorded."""

    def __init__(self, bundle: Bundle, recorder: _Recorder, threads: int, *, silent: bool = False) -> None:
        self._bundle, self._recorder, self._threads, self._silent = bundle, recorder, threads, silent
        self._kept: dict[str, StageRunner] = {}

    def names(self) -> tuple[str, ...]:
        return tuple(self._bundle.manifest.stages)

    def spec(self, name: str) -> StageSpec:
        return self._bundle.manifest.stage(name).spec

    @contextmanager
    def using(self, name: str) -> Iterator[StageFunction]:
        if name == self._recorder.spec.name:
            yield self._recorder
            return
        if self._silent:
            yield _Zeros(self.spec(name))
            return
        if name not in self._kept:
            self._kept[name] = _portable(self._bundle, name, self._threads)
        yield self._kept[name]


def _portable(bundle: Bundle, name: str, threads: int) -> StageRunner:
    entry = bundle.manifest.stage(name)
    if entry.graph.weights is None:
        raise BundleError(f"{bundle.root.name} holds structure only, no weights. Export it without --structure-only.")
    bundle.path(entry.graph.weights)
    path = bundle.path(entry.graph.file)
    return StageRunner(entry.spec, portable_session(path, threads=threads))


def _reader(bundle: Bundle) -> Callable[[str], bytes]:
    return lambda name: bundle.read_bytes(name, MAX_BYTES)


def _unheard(_: str) -> None:
    """What does not fit a text encoder is cut in the pipeline, too."""
