"""What every engine library offers the runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class Session(Protocol):
    """A loaded engine."""

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Host arrays in, host arrays out, by name; raises RunFailed with the library's reason."""


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
