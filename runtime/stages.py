"""A pipeline's stages beside the denoiser, run by their engines: loaded when they are needed, each checked as it is.

Whatever takes stages takes a :class:`StageSet`, so eager PyTorch can stand in for all engines at once, and a test for
one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lehr.runtime import engine as engines
from lehr.runtime.backends.base import Session
from lehr.runtime.bundle import Bundle
from lehr.runtime.engine import EngineRecord
from lehr.runtime.errors import BundleError, InvalidInput, RunFailed
from lehr.runtime.hoisted import Residency
from lehr.runtime.lora import Applied
from lehr.runtime.stage import StageSpec

Array = npt.NDArray[Any]

DENOISER = "denoiser"  # what it is called among recipes by stage


class StageFunction(Protocol):
    """A stage that can be called."""

    @property
    def spec(self) -> StageSpec: ...

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name; raises InvalidInput for feeds that are not the spec's."""


class StageSet(Protocol):
    """Stages by name."""

    def names(self) -> tuple[str, ...]: ...

    def spec(self, name: str) -> StageSpec:
        """What a stage takes and returns; raises UnknownName."""

    def using(self, name: str) -> AbstractContextManager[StageFunction]:
        """The stage, ready for as many calls as the block makes; raises UnknownName."""


class StageRunner:
    """One stage in one engine: checked feeds in, checked outputs out.

    Attributes:
        spec: of the stage.
    """

    def __init__(self, spec: StageSpec, session: Session) -> None:
        self.spec = spec
        self._session: Session | None = session

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Evaluate.

        Raises:
            InvalidInput: feeds that are not the spec's, or the runner was closed.
            RunFailed: the engine failed, or returned another shape than the spec's.
        """
        if self._session is None:
            raise InvalidInput(f"stage {self.spec.name!r} was closed. Open it again.")
        sizes = self.spec.default_sizes(**self.spec.check_feeds(feeds))
        most = self.spec.max_batch
        if most is not None and sizes["batch"] > most:
            parts = [self(self._rows(feeds, slice(k, k + most))) for k in range(0, sizes["batch"], most)]
            return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        outputs = self._session.run(feeds)
        for tensor in self.spec.outputs:
            expected, got = tensor.sizes(sizes), outputs[tensor.name].shape
            if got != expected:
                raise RunFailed(
                    f"stage {self.spec.name!r} returned {tensor.name!r} of shape {got}, expected {expected}."
                )
        return {tensor.name: outputs[tensor.name] for tensor in self.spec.outputs}

    def _rows(self, feeds: Mapping[str, Array], rows: slice) -> dict[str, Array]:
        return {
            tensor.name: feeds[tensor.name][rows] if tensor.batched else feeds[tensor.name]
            for tensor in self.spec.inputs
        }

    def close(self) -> None:
        """Let the engine and its memory go."""
        self._session = None


def stage_engine(bundle: Bundle, name: str, target: str, recipes: str | Mapping[str, str] = "fp32") -> EngineRecord:
    """The engine that a stage runs with.

    Args:
        bundle: opened.
        name: of the stage.
        target: class of machine.
        recipes: by stage, which is then taken as it is; or one for all, the denoiser's among those by stage, which a
            stage need not have been built in: it runs in fp32 then, or in the only recipe that it was built in.

    Raises:
        UnknownName: no such stage.
        BundleError: no engine, or several and none of that recipe.
    """
    bundle.manifest.stage(name)
    if not isinstance(recipes, str) and name in recipes:
        return engines.find(bundle, target, recipes[name], name)
    wanted = (recipes if isinstance(recipes, str) else recipes.get(DENOISER, "fp32"), "fp32")
    built = dict.fromkeys(record.recipe for record in engines.engines(bundle, name) if record.target == target)
    chosen = next((recipe for recipe in wanted if recipe in built), None)
    if chosen is None and len(built) > 1:
        raise BundleError(
            f"stage {name!r} of {bundle.root.name} was built for {target!r} in {', '.join(built)}, not in "
            f"{' or '.join(dict.fromkeys(wanted))}. Say which: --stage-recipe {name}={next(iter(built))}"
        )
    return engines.find(bundle, target, chosen or next(iter(built), wanted[0]), name)


def load_stage(bundle: Bundle, record: EngineRecord, *, loras: Sequence[Applied] = ()) -> StageRunner:
    """A stage, by one of its engines, with LoRAs in its weights.

    Raises:
        IncompatibleEngine, BundleError, MissingExtra: see :func:`lehr.runtime.engine.check`.
    """
    if record.stage is None:
        raise InvalidInput(f"{record.folder} is an engine of the denoiser, not of a stage.")
    return StageRunner(bundle.manifest.stage(record.stage).spec, engines.load(bundle, record, loras=loras))


def open_stage(bundle: Bundle, name: str, *, target: str = "cpu", recipe: str = "fp32") -> StageRunner:
    """A stage by its engine for ``target`` and ``recipe``; raises what :func:`load_stage` does."""
    return load_stage(bundle, engines.find(bundle, target, recipe, bundle.manifest.stage(name).spec.name))


class Stages:
    """The stages of a bundle, by their engines for one target.

    Args:
        bundle: opened.
        target: class of machine.
        recipes: see :func:`stage_engine`.
        residency: with ``PHASES`` an engine is released when its block ends, else it stays for the next.
        loras: merged into the weights of the stages that they change, as these are loaded.

    Raises:
        UnknownName: ``recipes`` names a stage that the bundle has not.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        target: str = "cpu",
        recipes: str | Mapping[str, str] = "fp32",
        residency: Residency = Residency.AUTO,
        loras: Sequence[Applied] = (),
    ) -> None:
        self._bundle, self._target, self._residency = bundle, target, residency
        self._loras = tuple(loras)
        self._recipes = recipes if isinstance(recipes, str) else dict(recipes)
        for name in () if isinstance(recipes, str) else recipes:
            if name != DENOISER:
                bundle.manifest.stage(name)
        self._kept: dict[str, StageRunner] = {}

    def names(self) -> tuple[str, ...]:
        return tuple(self._bundle.manifest.stages)

    def spec(self, name: str) -> StageSpec:
        """What a stage takes and returns; raises UnknownName."""
        return self._bundle.manifest.stage(name).spec

    def engine(self, name: str) -> EngineRecord:
        """The engine that a stage runs with; raises what :func:`stage_engine` does."""
        return stage_engine(self._bundle, name, self._target, self._recipes)

    @contextmanager
    def using(self, name: str) -> Iterator[StageRunner]:
        """The stage, loaded where it is not; raises what :func:`stage_engine` and :func:`load_stage` do."""
        runner = self._kept.get(name) or load_stage(self._bundle, self.engine(name), loras=self._loras)
        if self._residency is not Residency.PHASES:
            self._kept[name] = runner
        try:
            yield runner
        finally:
            if self._residency is Residency.PHASES:
                runner.close()

    def use_loras(self, loras: Sequence[Applied] = ()) -> None:
        """Exchange the LoRAs in the weights, of engines that are loaded from now on; those loaded are let go."""
        self._loras = tuple(loras)
        self.close()

    def close(self) -> None:
        """Let all engines go."""
        for runner in self._kept.values():
            runner.close()
        self._kept.clear()
