"""What every engine library offers the runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from lehr.runtime.device import DeviceArray, Stream
from lehr.runtime.spec import GraphSpec


class Session(Protocol):
    """A loaded engine."""

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Host arrays in, host arrays out, by name; raises RunFailed with the library's reason."""


class Bindings(Protocol):
    """An engine with fixed shapes, whose inputs and outputs stay where they are; it can be captured into a graph.

    Attributes:
        inputs, outputs: arrays by name, owned by the bindings.
    """

    inputs: Mapping[str, DeviceArray]
    outputs: Mapping[str, DeviceArray]

    def enqueue(self) -> None:
        """Queue one evaluation, without waiting; raises RunFailed, or CaptureImpossible in a capture."""


@runtime_checkable
class DeviceSession(Session, Protocol):
    """A loaded engine on a GPU; feeds may be in device memory, and results may stay there."""

    @property
    def stream(self) -> Stream:
        """Where all its work is queued."""

    def check_signature(self, graph: GraphSpec) -> None:
        """Raise BundleError where inputs or outputs of the engine are not the graph's."""

    def run_resident(self, feeds: Mapping[str, npt.NDArray[Any] | DeviceArray]) -> dict[str, DeviceArray]:
        """The same as :meth:`run` without a copy to the host, and without waiting."""

    def bind(self, shapes: Mapping[str, tuple[int, ...]], values: Mapping[str, npt.NDArray[Any]]) -> Bindings:
        """Fix the shapes of all inputs, and the values of those that decide shapes.

        Raises:
            RunFailed: shapes that the engine was not built for, or outputs whose shape is known only afterwards.
        """


class Backend(Protocol):
    """One engine library; ``name`` is what engine folders and ``--library`` say."""

    name: str

    def version(self) -> str:
        """The installed library's version; raises MissingExtra if there is none."""

    def load(self, plan: Path, options: Mapping[str, Any]) -> Session:
        """Load a plan with the options recorded at build.

        Raises:
            MissingExtra: the library is not installed.
            BundleError: the plan is damaged.
        """


Floats = npt.NDArray[np.floating[Any]]
