"""What a caller may decide about a build beside target and recipe; every builder says which of it he heeds.

A setting that a library has no use for is refused, not ignored: an engine is what was asked for.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

from lehr.runtime.errors import InvalidInput

MAX_PROFILES = 16  # narrow ones; each is compiled and tuned for itself
MAX_EFFORT = 5


class Mode(str, Enum):
    """What an engine is made for: one answer soon, or many answers in all."""

    LATENCY = "latency"
    THROUGHPUT = "throughput"


class Compatible(str, Enum):
    """Where else than with the library and on the GPU of the build an engine must load.

    NONE: nowhere else. VERSION: with later releases of the library of the same major version. HARDWARE: on any GPU from
    Ampere on. CAPABILITY: on every GPU of the same compute capability.
    """

    NONE = "none"
    VERSION = "version"
    HARDWARE = "hardware"
    CAPABILITY = "capability"


class Weights(str, Enum):
    """Where an engine's weights are.

    EMBEDDED: in its plan. STRIPPED: in the bundle's weights file, with which the plan is refitted when it is loaded.
    STREAMED: in the plan, but in host memory until a layer needs them.
    """

    EMBEDDED = "embedded"
    STRIPPED = "stripped"
    STREAMED = "streamed"


class Spinning(str, Enum):
    """Whether threads that wait between two operators poll for work, or sleep.

    Polling saves what waking costs, which counts where operators are short, and takes the whole of the cores while a
    step runs. AUTO: as is measured faster, where libraries are measured anyway; else they sleep.
    """

    AUTO = "auto"
    ON = "on"
    OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of one build; what stands here is the default of every library.

    Attributes:
        batches: batch sizes that get a narrow profile each, as the step graph sees them: guidance doubles the batch.
        sizes: of the sample, such as ((64, 64), (96, 96)), likewise; a profile for every pair of both.
        workspace_mb: scratch memory that a kernel may use, in MB; 0 is the library's choice.
        tactic_mb: device memory that trying kernels may use during the build, in MB; 0 is the library's choice.
        effort: of the search for kernels, 0 to 5; None is the library's choice.
        compatible: where else the engine must load.
        weights: where they are.
        mode: what the engine is made for.
        spinning: of ONNX Runtime's threads on the processor; the other libraries' sleep by themselves.
        cached: take an engine made of the same things from the user's cache, and leave this one there.
    """

    batches: tuple[int, ...] = ()
    sizes: tuple[tuple[int, ...], ...] = ()
    workspace_mb: int = 0
    tactic_mb: int = 0
    effort: int | None = None
    compatible: Compatible = Compatible.NONE
    weights: Weights = Weights.EMBEDDED
    mode: Mode = Mode.LATENCY
    spinning: Spinning = Spinning.AUTO
    cached: bool = True

    def __post_init__(self) -> None:
        if min((*self.batches, *(size for row in self.sizes for size in row)), default=1) < 1:
            raise InvalidInput(f"batches {self.batches} and sizes {self.sizes} must be 1 or more.")
        for what, given in (("batches", self.batches), ("sizes", self.sizes)):
            if len(set(given)) != len(given):
                raise InvalidInput(f"{what} are {list(given)}: name each once.")
        if (profiles := max(1, len(self.batches)) * max(1, len(self.sizes))) > MAX_PROFILES:
            raise InvalidInput(
                f"{len(self.batches)} batches times {len(self.sizes)} sizes are {profiles} profiles; an engine has "
                f"{MAX_PROFILES} at most. Name fewer: other sizes run with the wide profile."
            )
        if self.workspace_mb < 0 or self.tactic_mb < 0:
            raise InvalidInput(f"memory limits are {self.workspace_mb} and {self.tactic_mb} MB, expected 0 or more.")
        if self.effort is not None and not 0 <= self.effort <= MAX_EFFORT:
            raise InvalidInput(f"effort is {self.effort}, expected 0 to {MAX_EFFORT}.")

    def chosen(self) -> frozenset[str]:
        """Names of the settings that ask something of a library and are not at their default.

        The cache is every library's, and threads that sleep are what every library has.
        """
        given = frozenset(f.name for f in fields(self) if getattr(self, f.name) != f.default)
        return given - {"cached"} - ({"spinning"} if self.spinning is Spinning.OFF else set[str]())

    def refused(self, heeds: Collection[str]) -> list[str]:
        """Of the chosen settings, those that a builder does not heed, as the command line names them."""
        return [_OPTIONS[name] for name in sorted(self.chosen() - set(heeds))]

    def hold(self, title: str, heeds: Collection[str]) -> None:
        """Raise InvalidInput for a setting that the library called ``title`` has no use for."""
        if refused := self.refused(heeds):
            raise InvalidInput(f"{title} has no use for {', '.join(refused)}. Leave it out.")

    def to_json(self) -> dict[str, Any]:
        """Plain values of what is not at its default, for ``build.json`` and for keys."""
        plain = {name: getattr(self, name) for name in sorted(self.chosen())}
        return {name: value.value if isinstance(value, Enum) else value for name, value in plain.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeights:
    """A graph's weights in its bundle.

    Attributes:
        name: of the file in the bundle.
        path: of the file.
        bytes: of the graph's own weights; the file may hold those of other graphs, too.
    """

    name: str
    path: Path
    bytes: int


_OPTIONS = {
    "batches": "--batch",
    "sizes": "--sizes",
    "workspace_mb": "--workspace",
    "tactic_mb": "--tactic-memory",
    "effort": "--effort",
    "compatible": "--compatible",
    "weights": "--weights",
    "mode": "--mode",
    "spinning": "--spinning",
}
DEFAULT = Settings()
