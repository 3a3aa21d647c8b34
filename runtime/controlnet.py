"""ControlNets in the loop (Zhang et al. 2023, arXiv:2302.05543): at every evaluation, residuals for the step graph.

The ControlNet is a stage of its own whose outputs are inputs of the denoiser, by the same names. Several ControlNets
add up. Where none acts, the residuals are zeros and no ControlNet is evaluated.

Shape legend: N pictures, B rows of one evaluation, H W height and width in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import InvalidInput
from lehr.runtime.guidance.evaluations import Evaluations
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.spec import ModelSpec, TensorSpec, Varies
from lehr.runtime.stage import StageKind, StageSpec
from lehr.runtime.stages import StageFunction, StageSet

Array = npt.NDArray[Any]
Prepare = Callable[[int, StageSpec, Array], Array]

PICTURE = "controlnet_cond"  # the input that holds what steers


@dataclass(frozen=True, slots=True, kw_only=True)
class Steering:
    """What one ControlNet is given.

    Attributes:
        picture: (C, H, W) or (N, C, H, W) in [0, 1]: edges, a pose, depth, as the ControlNet was trained on.
        scale: of its residuals; 0 is none.
        start, end: the share of the steps, from 0 to 1, between which it acts, as diffusers' ``control_guidance_start``
            and ``control_guidance_end``: step i of n acts where start <= i / n and (i + 1) / n <= end.
    """

    picture: Array
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if self.picture.ndim not in (3, 4):
            raise InvalidInput(f"a ControlNet's picture is (C, H, W) or (N, C, H, W), got {self.picture.shape}.")
        if not math.isfinite(self.scale):
            raise InvalidInput(f"a ControlNet's scale must be finite, got {self.scale}.")
        if not 0 <= self.start < self.end <= 1:
            raise InvalidInput(f"a ControlNet acts between 0 <= start < end <= 1, got {self.start} and {self.end}.")

    def acts(self, i: int, steps: int) -> bool:
        """Whether it acts at step ``i`` of ``steps``."""
        return self.scale != 0 and not (i / steps < self.start or (i + 1) / steps > self.end)


def residuals(model: ModelSpec) -> tuple[TensorSpec, ...]:
    """The inputs of a denoiser that ControlNets make."""
    return tuple(tensor for tensor in model.conditions if tensor.varies is Varies.SAMPLE)


def control_stages(stages: StageSet) -> tuple[str, ...]:
    """The ControlNets among stages, in their order."""
    return tuple(name for name in stages.names() if stages.spec(name).kind is StageKind.CONTROL)


class Controls:
    """ControlNets over one drawing; call it as :data:`lehr.runtime.guidance.PerEvaluation`.

    Args:
        model: of the denoiser.
        stages: the ControlNets, ready to be called.
        steering: what each of them is given.
        table: the solver table that the loop runs.
        num: how many pictures are drawn.
        prepare: what a ControlNet takes, of its number and its pictures, (N, C, H, W); by default the pictures.

    Raises:
        InvalidInput: another number of pictures than ControlNets or samples, or a ControlNet that does not make the
            denoiser's residuals.
    """

    def __init__(
        self,
        model: ModelSpec,
        stages: Sequence[StageFunction],
        steering: Sequence[Steering],
        table: SolverTable,
        num: int,
        prepare: Prepare | None = None,
    ) -> None:
        if len(stages) != len(steering):
            raise InvalidInput(
                f"{model.name} has {len(stages)} ControlNets and was given {len(steering)} pictures to steer by; "
                "give one for each (a scale of 0 switches one off)."
            )
        self._residuals = residuals(model)
        expected = {tensor.name for tensor in self._residuals}
        for stage in stages:
            if {tensor.name for tensor in stage.spec.outputs} != expected:
                raise InvalidInput(f"ControlNet {stage.spec.name!r} does not make the residuals of {model.name}.")
        pictures = [_pictures(given.picture, num) for given in steering]
        if prepare is not None:
            pictures = [prepare(k, stage.spec, pictures[k]) for k, stage in enumerate(stages)]
        self._stages = tuple(zip(stages, steering, pictures, strict=True))
        self._model, self._steps, self._evaluations = model, len(table), Evaluations(table)

    def __call__(
        self, sample: Array, timestep: float, conditions: Mapping[str, Array], numbers: Sequence[int]
    ) -> dict[str, Array]:
        """The denoiser's residuals for one evaluation."""
        i = self._evaluations.advance(timestep)
        total: dict[str, Array] = {}
        for stage, given, pictures in self._stages:
            if not given.acts(i, self._steps):
                continue
            feeds = self._feeds(stage, sample, timestep, conditions)
            found = stage({**feeds, PICTURE: pictures[list(numbers)]})
            for name, residual in found.items():
                scaled = residual * np.float32(given.scale)
                total[name] = total[name] + scaled if name in total else scaled
        return total or self._none(sample)

    def _feeds(
        self, stage: StageFunction, sample: Array, timestep: float, conditions: Mapping[str, Array]
    ) -> dict[str, Array]:
        model = self._model
        steps = np.full(len(sample), timestep, dtype=model.timestep.dtype.numpy)
        known = {**conditions, model.sample.name: sample, model.timestep.name: steps}
        return {tensor.name: known[tensor.name] for tensor in stage.spec.inputs if tensor.name != PICTURE}

    def _none(self, sample: Array) -> dict[str, Array]:
        bound = dict(zip(self._model.sample.shape, sample.shape, strict=True))
        sizes = {name: size for name, size in bound.items() if isinstance(name, str)}
        return {
            tensor.name: np.zeros(tensor.sizes(self._model.default_sizes(**sizes)), tensor.dtype.numpy)
            for tensor in self._residuals
        }


@contextmanager
def controlled(
    model: ModelSpec,
    stages: StageSet,
    steering: Sequence[Steering],
    table: SolverTable,
    num: int,
    prepare: Prepare | None = None,
) -> Iterator[Controls | None]:
    """The ControlNets of one drawing, loaded until the block ends; None for a denoiser that takes no residuals.

    Without ``steering`` none acts. Arguments as those of :class:`Controls`.

    Raises:
        InvalidInput: pictures for a denoiser without ControlNets, or what :class:`Controls` refuses.
    """
    if not residuals(model):
        if steering:
            raise InvalidInput(
                f"{model.name} was exported without a ControlNet, so no picture can steer it. Export it with one: "
                "lehr export SOURCE --controlnet FOLDER -o NAME.lehr"
            )
        yield None
        return
    with ExitStack() as stack:
        names = control_stages(stages) if steering else ()
        opened = [stack.enter_context(stages.using(name)) for name in names]
        yield Controls(model, opened, steering, table, num, prepare)


def _pictures(picture: Array, num: int) -> Array:
    whole = picture[None] if picture.ndim == 3 else picture
    if len(whole) not in (1, num):
        raise InvalidInput(f"{len(whole)} pictures were given to a ControlNet for {num} samples; give one, or {num}.")
    return np.ascontiguousarray(np.broadcast_to(whole, (num, *whole.shape[1:])), dtype=np.float32)
