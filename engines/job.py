"""What a builder is asked for: one graph, and all that its engine is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt

from lehr.engines.ranges import InputRange
from lehr.engines.settings import DEFAULT, Settings, StoredWeights
from lehr.engines.target import Target
from lehr.runtime.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One graph for one library.

    Attributes:
        name: of the plan, such as "step"; files of the engine are named after it.
        graph: in the recipe's format, its external weights beside it.
        recipe: one whose arithmetic is in the builder's ``FORMATS``.
        target: decides the compute capabilities and the operator set.
        library: that is to build, by its name.
        ranges: sizes of every input that the engine must take; builders for this machine take every size.
        narrow: ranges of a single size each that the engine is tuned for, too.
        feeds: an example of every input, for looking at what the engine executes; sizes may differ later.
        threads: of the engine on processors, where 0 is one a core; else of the build, 0 being the library's choice.
        settings: none beyond the builder's ``HEEDS``.
        stored: the graph's weights in the bundle, which a stripped engine is refitted from.
    """

    name: str
    graph: Path
    recipe: Recipe
    target: Target
    library: str
    ranges: Mapping[str, InputRange] = field(default_factory=dict)
    narrow: tuple[Mapping[str, InputRange], ...] = ()
    feeds: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    threads: int = 0
    settings: Settings = DEFAULT
    stored: StoredWeights | None = None
