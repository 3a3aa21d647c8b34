"""Targets: classes of machine, as facts in ``targets/*.toml``."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from lehr.runtime.errors import InvalidInput, UnknownName
from lehr.runtime.recipe import RECIPES, Format, Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FOLDER = Path(__file__).parent / "targets"

SYSTEMS = frozenset({"linux", "win32"})  # sys.platform
MACHINES = frozenset({"x86_64", "aarch64"})  # platform.machine()
# Arithmetic that hardware may have; a superset of the formats that recipes exist for.
HARDWARE_FORMATS = frozenset({"fp64", "fp32", "tf32", "fp16", "bf16", "fp8", "fp4", "int8", "int4"})
MIN_OPSET, MAX_OPSET = 17, 26
_TUPLES = ("os", "arch", "libraries", "on_request", "sm", "native")

_BOUND = re.compile(r"(>=|<=|==|<|>)(\d+(?:\.\d+)*)")

# --------------------------------------------------------------------------------------------------------- facts


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One class of machine. What is not known for certain is left out.

    Attributes:
        os, arch: where its engines are built, as ``sys.platform`` and ``platform.machine()`` say it.
        libraries: engine libraries that serve it, best first; empty if Lehr has a builder for none.
        on_request: further ones, which are used where they are named and never tried by themselves.
        devices: library -> what it calls the device that serves the target; a library that is not named takes the
            processor, or what it was made for.
        formats: number formats that a recipe may ask for.
        opset: newest ONNX opset its libraries read.
        hardware: format -> processor flags, one of which a machine must have to run it natively.
        sm: CUDA compute capabilities, such as ("8.9",); an engine for several runs on each of them.
        native: number formats that the hardware has arithmetic for, those without a recipe included.
        memory_gb, bandwidth_gb_s: smallest and largest of the class, in 10^9 bytes (a second) as vendors count.
        tflops: format -> 10^12 operations a second at most, without sparsity; the largest of the class.
        dla: deep-learning accelerator cores, fewest and most.
        versions: library -> range of versions, such as ">=10.3,<12".
    """

    name: str
    summary: str
    os: tuple[str, ...]
    arch: tuple[str, ...]
    libraries: tuple[str, ...]
    formats: tuple[Format, ...]
    opset: int
    on_request: tuple[str, ...] = ()
    devices: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[Format, tuple[str, ...]] = field(default_factory=dict)
    sm: tuple[str, ...] = ()
    native: tuple[str, ...] = ()
    memory_gb: tuple[float, float] | None = None
    bandwidth_gb_s: tuple[float, float] | None = None
    tflops: Mapping[Format, float] = field(default_factory=dict)
    dla: tuple[int, int] = (0, 0)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def hold(good: bool, what: str) -> None:
            if not good:
                raise InvalidInput(f"target {self.name!r}: {what}")

        hold(bool(self.os) and set(self.os) <= SYSTEMS, f"os is {list(self.os)}, expected some of {sorted(SYSTEMS)}")
        hold(
            bool(self.arch) and set(self.arch) <= MACHINES,
            f"arch is {list(self.arch)}, expected some of {sorted(MACHINES)}",
        )
        hold(bool(self.formats), "formats must name at least one")
        hold(MIN_OPSET <= self.opset <= MAX_OPSET, f"opset is {self.opset}, expected {MIN_OPSET} to {MAX_OPSET}")
        hold(
            all(re.fullmatch(r"\d{1,2}\.\d", sm) for sm in self.sm),
            f"sm is {list(self.sm)}, expected compute capabilities such as '8.9'",
        )
        foreign = sorted(set(self.native) - HARDWARE_FORMATS)
        hold(not foreign, f"native names {foreign}, expected some of {sorted(HARDWARE_FORMATS)}")
        for key in ("memory_gb", "bandwidth_gb_s", "dla"):
            pair = getattr(self, key)
            hold(pair is None or 0 <= pair[0] <= pair[1], f"{key} is {pair}, expected the smallest and the largest")
        hold(all(peak > 0 for peak in self.tflops.values()), f"tflops is {dict(self.tflops)}, expected figures above 0")
        served = {*self.libraries, *self.on_request}
        for key in ("versions", "devices"):
            unknown = sorted(set(getattr(self, key)) - served)
            hold(not unknown, f"{key} names {unknown}, which are not among its libraries")
        for library, wanted in self.versions.items():
            hold(bool(_bounds(wanted)), f"version range of {library} is {wanted!r}, expected such as '>=10.3,<12'")

    @property
    def where(self) -> str:
        """The target and its compute capabilities, for messages."""
        return self.name + (f" (SM {', '.join(self.sm)})" if self.sm else "")

    # ------------------------------------------------------------------------------------------------ refusals

    def check(self, recipe: Recipe) -> None:
        """Raise InvalidInput for a recipe whose formats the target has not, with the nearest one that it runs."""
        missing = self.missing(recipe)
        if missing:
            have = ", ".join(form.value for form in self.formats)
            names = ", ".join(sorted(form.value for form in missing))
            near = self.nearest(recipe)
            way = f" The nearest recipe that it runs: --recipe {near.name}." if near else ""
            raise InvalidInput(
                f"target {self.name!r} cannot run recipe {recipe.name!r}: no {names}; it has {have}.{way}"
            )

    def nearest(self, recipe: Recipe) -> Recipe | None:
        """Of the recipes that the target runs, the one whose arithmetic is the same, or closest in bits."""
        able = [other for other in RECIPES.values() if not self.missing(other)]
        bits = _bits(recipe.arithmetic.value)
        return min(
            able,
            key=lambda r: (
                r is not recipe,
                r.arithmetic is not recipe.arithmetic,
                abs(_bits(r.arithmetic.value) - bits),
                abs(_bits(r.weights.value) - _bits(recipe.weights.value)),
            ),
            default=None,
        )

    def missing(self, recipe: Recipe) -> frozenset[Format]:
        """Formats of a recipe that the target has not; what only rests in fp32 beside products in another is none."""
        return recipe.formats - set(self.formats) - ({Format.FP32} - {recipe.arithmetic})

    def check_machine(self, recipe: Recipe, flags: Collection[str]) -> None:
        """Raise InvalidInput for a recipe that a machine with these processor flags could only emulate."""
        for form in sorted(recipe.computes):
            self._check_flags(form, flags)

    def _check_flags(self, form: Format, flags: Collection[str]) -> None:
        wanted = self.hardware.get(form)
        if wanted and not set(wanted) & set(flags):
            raise InvalidInput(
                f"this processor has no {form.value} arithmetic (none of {', '.join(wanted)}) and would "
                f"emulate it, slower than fp32. Build another recipe, such as --recipe fp32."
            )

    def check_version(self, library: str, version: str) -> None:
        """Raise InvalidInput for a version of an engine library outside the target's range."""
        wanted = self.versions.get(library)
        if wanted and not _within(version, wanted):
            raise InvalidInput(
                f"target {self.name!r} needs {library} {wanted}, and {version} is installed. Install one in that range."
            )


def _bits(name: str) -> int:
    """Width of a format, which is the digits of its name."""
    return int(re.sub(r"\D", "", name) or 0)


def _bounds(wanted: str) -> list[tuple[str, tuple[int, ...]]]:
    """The comparisons of a version range; empty if it cannot be read."""
    parts = [_BOUND.fullmatch(part.strip()) for part in wanted.split(",")]
    found = [(part[1], _numbers(part[2])) for part in parts if part is not None]
    return found if len(found) == len(parts) else []


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


def _within(version: str, wanted: str) -> bool:
    given = _numbers(version)
    for sign, bound in _bounds(wanted):
        short = given[: len(bound)]  # 11.4 is not above 11, and 10.3.0 equals 10.3
        good = {
            ">=": short >= bound,
            "<=": short <= bound,
            "==": short == bound,
            "<": short < bound,
            ">": short > bound,
        }[sign]
        if not good:
            return False
    return True


# ------------------------------------------------------------------------------------------------------- reading


@cache
def targets() -> dict[str, Target]:
    """Every target by name."""
    return {file.stem: read_target(file) for file in sorted(_FOLDER.glob("*.toml"))}


def read_target(file: Path) -> Target:
    """One target's file.

    Raises:
        InvalidInput: a key that is unknown or missing, or a value that is no such fact; the message names it.
    """
    try:
        facts: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as e:
        raise InvalidInput(f"{file.name} is no TOML: {e}") from e
    known = {f.name: f for f in fields(Target)}
    if unknown := sorted(set(facts) - set(known)):
        raise InvalidInput(f"{file.name} has the unknown key {unknown[0]!r}; known: {', '.join(known)}.")
    needed = {"name", "summary", "os", "arch", "libraries", "formats", "opset"}
    if missing := sorted(needed - set(facts)):
        raise InvalidInput(f"{file.name} lacks {', '.join(missing)}.")
    if facts["name"] != file.stem:
        raise InvalidInput(f"{file.name} says that its name is {facts['name']!r}, expected {file.stem!r}.")
    try:
        facts |= {key: tuple(facts[key]) for key in _TUPLES if key in facts}
        facts["formats"] = tuple(Format(name) for name in facts["formats"])
        facts["hardware"] = {Format(name): tuple(flags) for name, flags in facts.get("hardware", {}).items()}
        facts |= {key: _pair(facts[key]) for key in ("memory_gb", "bandwidth_gb_s", "dla") if key in facts}
        facts["tflops"] = {Format(name): float(peak) for name, peak in facts.get("tflops", {}).items()}
        return Target(**facts)
    except (TypeError, ValueError) as e:
        raise InvalidInput(f"{file.name} holds a value of another kind than expected: {e}.") from e


def _pair(value: Any) -> tuple[float, float]:
    low, high = value if isinstance(value, list) else (value, value)
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (low, high)):
        raise TypeError(f"{value!r} is neither a number nor a pair of numbers")
    return low, high


def target(name: str) -> Target:
    """The target called ``name``; raises UnknownName with the closest match."""
    if name not in targets():
        raise UnknownName("target", name, targets())
    return targets()[name]
