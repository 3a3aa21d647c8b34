"""Samples from a whole-loop engine: one call draws a batch (:mod:`lehr.engines.graph.unroll` writes the graph)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime import engine as engines
from lehr.runtime.backends.base import Session
from lehr.runtime.bundle import Bundle, Edit
from lehr.runtime.denoiser import null_conditions
from lehr.runtime.errors import BundleError, InvalidInput, RunFailed
from lehr.runtime.noise import START, batch_normal, standard_normal
from lehr.runtime.request import Request
from lehr.runtime.spec import ModelSpec

Array = npt.NDArray[Any]

LOOP = "loop"  # the graph's name in the manifest and in engines
NOISE, SAMPLES, WITHOUT = "noise", "samples", ".without"
SETTINGS = "tables/loop.json"
MAX_EVALUATIONS = 16


def noise_name(number: int) -> str:
    """The input for injected noise ``number``."""
    return f"{NOISE}.{number + 1}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """What is fixed in a whole-loop graph."""

    sampler: str
    num_inference_steps: int
    evaluations: int
    noises: int
    guidance_scale: float

    def write(self, edit: Edit) -> None:
        """Add the settings to a bundle."""
        edit.add_json(SETTINGS, asdict(self))

    @classmethod
    def read(cls, bundle: Bundle) -> LoopSettings:
        """A bundle's settings; raises BundleError where it has no whole-loop graph, or a damaged file."""
        if LOOP not in bundle.manifest.graphs:
            raise BundleError(
                f"{bundle.root.name} has no whole-loop graph. Export the model again with --unroll STEPS."
            )
        data = bundle.read_json(SETTINGS)
        try:
            return cls(
                sampler=str(data["sampler"]),
                num_inference_steps=int(data["num_inference_steps"]),
                evaluations=int(data["evaluations"]),
                noises=int(data["noises"]),
                guidance_scale=float(data["guidance_scale"]),
            )
        except (KeyError, TypeError, ValueError) as e:
            raise BundleError(f"{bundle.root.name}: {SETTINGS} is damaged ({e}). Export the model again.") from e


class WholeLoop:
    """A whole-loop engine ready to draw: ``WholeLoop.open("m.lehr")(Request(num=8))``."""

    def __init__(self, spec: ModelSpec, session: Session, settings: LoopSettings) -> None:
        self.spec, self.settings, self._session = spec, settings, session

    @classmethod
    def open(cls, path: str | Path, *, target: str = "cpu", recipe: str = "fp32") -> WholeLoop:
        """Load the engine of ``target`` and ``recipe``.

        Raises:
            BundleError, IncompatibleEngine, MissingExtra: see :func:`lehr.runtime.engine.check`.
        """
        bundle = Bundle.open(path)
        settings = LoopSettings.read(bundle)
        session = engines.load(bundle, engines.find(bundle, target, recipe), LOOP)
        return cls(bundle.manifest.model, session, settings)

    def __call__(self, request: Request) -> Array:
        """Draw samples; returns what :class:`lehr.runtime.pipeline.Pipeline` would with the loop's settings.

        Raises:
            InvalidInput: a request for anything else than the graph was made for.
            RunFailed: the engine failed, or drew values that are not finite.
        """
        self._check(request)
        num, shape = request.count, self.spec.sample_shape(1, **request.sizes)[1:]
        conditions = self._conditions(request, num)
        drawn = []
        for first in range(0, num, request.batch):
            numbers = range(first, min(first + request.batch, num))
            feeds = {NOISE: self._noise(request, numbers, shape, START)}
            feeds |= {noise_name(k): self._noise(request, numbers, shape, 1 + k) for k in range(self.settings.noises)}
            for name, value in conditions.items():
                shared = value.shape[:1] != (num,) or name in self._shared
                feeds[name] = value if shared else value[numbers.start : numbers.stop]
            drawn.append(self._session.run(feeds)[SAMPLES])
        samples: Array = np.concatenate(drawn)
        if not np.isfinite(samples).all():
            raise RunFailed("the whole-loop engine drew values that are not finite; use recipe fp32.")
        return samples

    @property
    def _shared(self) -> set[str]:
        return {tensor.name for tensor in self.spec.conditions if not tensor.batched}

    def _check(self, request: Request) -> None:
        fixed = self.settings
        asked: Mapping[str, tuple[Any, Any]] = {
            "sampler": (request.sampler, fixed.sampler),
            "number of steps": (request.num_inference_steps, fixed.num_inference_steps),
            "guidance scale": (request.guidance_scale, fixed.guidance_scale),
        }
        for what, (wanted, there) in asked.items():
            if wanted is not None and wanted != there:
                raise InvalidInput(
                    f"the whole-loop graph of {self.spec.name} has {what} {there}, asked for {wanted}. Run it step by "
                    "step, or export it again with other settings."
                )
        if request.init is not None or request.table is not None or request.eta is not None:
            raise InvalidInput("a whole-loop graph starts from noise with its own table; run this step by step.")
        guidance = request.guidance
        if guidance.acts_on_denoised or guidance.schedule or guidance.interval:
            raise InvalidInput("a whole-loop graph knows plain guidance only; run this step by step.")

    def _conditions(self, request: Request, num: int) -> dict[str, Array]:
        spec = self.spec
        if request.conditions or spec.num_classes is None:
            given = {**request.conditions}
        else:
            labels = list(request.class_labels) or list(range(spec.num_classes))
            given = {"class_labels": np.array([labels[k % len(labels)] for k in range(num)], dtype=np.int64)}
        missing = [tensor.name for tensor in spec.conditions if tensor.name not in given]
        if missing:
            raise InvalidInput(f"{spec.name} needs conditions {missing}; give them in the request.")
        if self.settings.guidance_scale == 1.0:
            return given
        without = dict(request.unconditional) or null_conditions(spec, num)
        batched = [tensor.name for tensor in spec.conditions if tensor.batched]
        return {**given, **{name + WITHOUT: without.get(name, given[name]) for name in batched}}

    @staticmethod
    def _noise(request: Request, numbers: range, shape: tuple[int, ...], stream: int) -> Array:
        if request.seeds:
            return np.stack([standard_normal(request.seeds[k], 0, shape, stream=stream) for k in numbers])
        return np.asarray(batch_normal(request.seed, numbers, shape, stream=stream))
