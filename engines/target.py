"""Targets: classes of machine, as facts in ``targets/*.toml``."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from lehr.runtime.errors import InvalidInput, UnknownName
from lehr.runtime.recipe import Format, Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FOLDER = Path(__file__).parent / "targets"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One class of machine.

    Attributes:
        os, arch: where its engines run.
        libraries: engine libraries that serve it, best first.
        formats: number formats that a recipe may ask for.
        opset: newest ONNX opset its libraries read.
        hardware: format -> processor flags, one of which a machine must have to run it natively.
    """

    name: str
    summary: str
    os: tuple[str, ...]
    arch: tuple[str, ...]
    libraries: tuple[str, ...]
    formats: tuple[Format, ...]
    opset: int
    hardware: Mapping[Format, tuple[str, ...]] = field(default_factory=dict)

    def check(self, recipe: Recipe) -> None:
        """Raise InvalidInput for a recipe whose formats the target has not."""
        missing = {recipe.weights, recipe.arithmetic} - set(self.formats)
        if missing:
            have = ", ".join(form.value for form in self.formats)
            names = ", ".join(sorted(form.value for form in missing))
            raise InvalidInput(f"target {self.name!r} cannot run recipe {recipe.name!r}: no {names}; it has {have}.")

    def check_machine(self, recipe: Recipe, flags: Collection[str]) -> None:
        """Raise InvalidInput for a recipe that a machine with these processor flags could only emulate."""
        wanted = self.hardware.get(recipe.arithmetic)
        if wanted and not set(wanted) & set(flags):
            raise InvalidInput(
                f"this processor has no {recipe.arithmetic.value} arithmetic (none of {', '.join(wanted)}) and would "
                f"emulate it, slower than fp32. Build another recipe, such as --recipe fp32."
            )


@cache
def targets() -> dict[str, Target]:
    """Every target by name."""
    found = {}
    for file in sorted(_FOLDER.glob("*.toml")):
        facts = tomllib.loads(file.read_text(encoding="utf-8"))
        facts |= {key: tuple(facts[key]) for key in ("os", "arch", "libraries")}
        facts["formats"] = tuple(Format(name) for name in facts["formats"])
        facts["hardware"] = {Format(name): tuple(flags) for name, flags in facts.get("hardware", {}).items()}
        found[file.stem] = Target(**facts)
    return found


def target(name: str) -> Target:
    """The target called ``name``; raises UnknownName with the closest match."""
    if name not in targets():
        raise UnknownName("target", name, targets())
    return targets()[name]
