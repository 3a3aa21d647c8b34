"""Policies: what the gate asks of an engine, as facts in ``policies/*.toml``.

A file states every threshold once, overrides by recipe, the levels that must have been judged, and waivers with a
date. It is read without trust: what is unknown, impossible or expired is refused with its line.
"""

from __future__ import annotations

import datetime as dt
import fnmatch
import hashlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from lehr.runtime.errors import InvalidInput, UnknownName
from lehr.runtime.recipe import MIXED, RECIPES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SCHEMA = 1
LEVELS = ("L0", "L1", "L2", "L3", "L4")
_WAIVABLE = ("L1.", "L2.", "L3.", "L4.")  # an engine whose structure is wrong has nothing to be forgiven
_FOLDER = Path(__file__).parent / "policies"
_HEADER = re.compile(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]")
_T = TypeVar("_T")

# ------------------------------------------------------------------------------------------------------ thresholds


def _within(low: float, high: float) -> Any:
    """A threshold that lies strictly above ``low`` and at most at ``high``."""
    return field(metadata={"range": (low, high)})


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """L1, single evaluations: the score may err ``floor_factor`` times eager's own error in the engine's format.

    Attributes:
        floor_factor: k.
        rel_error: of the score; what may always be erred, so that tiny floors do not fail good engines.
    """

    floor_factor: float = _within(0.999, 1e4)
    rel_error: float = _within(0, 0.999)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopLimits:
    """L2, the final sample of whole loops.

    Attributes:
        floor_factor: k; PSNR and SNR may lie 20 log10(k) dB below eager's own run in the engine's format.
        psnr_db, snr_db: but never more than this is asked for.
        ssim, cosine: at least.
        max_abs: largest difference of one value at most, as a share of the model's value range.
    """

    floor_factor: float = _within(0.999, 1e4)
    psnr_db: float = _within(0, 200)
    snr_db: float = _within(0, 200)
    ssim: float = _within(0, 1)
    cosine: float = _within(0, 1)
    max_abs: float = _within(0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributionLimits:
    """L3, many samples: upper ends of confidence intervals must stay below.

    Attributes:
        samples: drawn by the engine, and as many by the reference; 0 for none.
        frechet_ratio: Fréchet distance to the reference on the same seeds, as a share of that of two reference draws.
        kernel_ratio: kernel distance likewise, as a share of the half-width of such a draw's interval.
        agreement_drop: of the share of samples that are what was asked for, or of the mean text-image similarity.
        confidence: of the intervals.
    """

    samples: float = _within(-1, 1e6)
    frechet_ratio: float = _within(0, 100)
    kernel_ratio: float = _within(0, 100)
    agreement_drop: float = _within(0, 0.999)
    confidence: float = _within(0.5, 0.9999)


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowLimits:
    """Absolute windows for the distance to real pictures and for text-image similarity, as benchmarks publish them.

    Attributes:
        samples: that the windows speak of.
        fid_min, fid_max: Fréchet distance to the statistics of real pictures.
        clip_min, clip_max: 100 times the mean cosine of picture and text.
        look_every: samples between two looks; a clear failure ends the drawing at one of them.
        error: chance that an engine within the windows is stopped, over all looks.
    """

    samples: float = _within(99, 1e6)
    fid_min: float = _within(-1, 1e6)
    fid_max: float = _within(0, 1e6)
    clip_min: float = _within(-100, 100)
    clip_max: float = _within(-100, 100)
    look_every: float = _within(9, 1e6)
    error: float = _within(0, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class CostLimits:
    """L4, against a baseline bundle: ratios new / old must stay below.

    Attributes:
        latency_ratio: of one evaluation.
        size_ratio: of the engine's files.
        confidence: of the interval around the median latency ratio.
        max_seconds: how long to measure before giving up.
    """

    latency_ratio: float = _within(0, 10)
    size_ratio: float = _within(0, 10)
    confidence: float = _within(0.5, 0.9999)
    max_seconds: float = _within(0, 3600)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """All thresholds for one recipe."""

    L1: StepLimits
    L2: LoopLimits
    L3: DistributionLimits
    L4: CostLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiver:
    """A failure that is let through until a date.

    Attributes:
        check: name of a check, such as "L2.guided.ssim"; ``*`` stands for anything.
        expires: the last day on which it holds.
        reason: why, for whoever reads the report.
        recipe: the only recipe it holds for; None for all.
    """

    check: str
    expires: dt.date
    reason: str
    recipe: str | None = None

    def covers(self, check: str, recipe: str) -> bool:
        return self.recipe in (None, recipe) and fnmatch.fnmatchcase(check, self.check)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One policy file.

    Attributes:
        required: levels without which nothing passes.
        required_with_features: further ones, for models whose feature network is known.
        window: absolute windows of L3, if it has any.
        limits: thresholds of recipes that are not named in ``recipes``.
        recipes: thresholds by recipe.
        sha256: of the file.
    """

    name: str
    summary: str
    required: tuple[str, ...]
    limits: Limits
    recipes: Mapping[str, Limits]
    waivers: tuple[Waiver, ...]
    sha256: str
    required_with_features: tuple[str, ...] = ()
    window: WindowLimits | None = None

    def limits_for(self, recipe: str) -> Limits:
        return self.recipes.get(recipe, self.limits)


# --------------------------------------------------------------------------------------------------------- reading


def policies() -> dict[str, Path]:
    """The files of the policies that come with Lehr, by name."""
    return {file.stem: file for file in sorted(_FOLDER.glob("*.toml"))}


def policy(name: str, today: dt.date) -> Policy:
    """The policy called ``name``, or in the file ``name`` if that ends in .toml.

    Raises:
        InvalidInput: no such policy, or one that cannot be used; the message names the line.
    """
    if not name.endswith(".toml"):
        if name not in policies():
            raise UnknownName("policy", name, [*policies(), "FILE.toml"])
        return read_policy(policies()[name], today)
    return read_policy(Path(name), today)


def read_policy(file: Path, today: dt.date) -> Policy:
    """Read one file.

    Args:
        file: of TOML.
        today: the day on which waivers must still hold.

    Raises:
        InvalidInput: a key that is unknown or missing, a threshold that nothing or everything would meet, or a waiver
            that is over; the message names the line.
    """
    try:
        data = file.read_bytes()
        text = data.decode("utf-8")
        whole: dict[str, Any] = tomllib.loads(text)
    except FileNotFoundError as e:
        raise InvalidInput(f"no such policy file: {file}. Shipped policies: {', '.join(policies())}.") from e
    except (OSError, UnicodeDecodeError) as e:
        raise InvalidInput(f"cannot read the policy {file}: {e}.") from e
    except tomllib.TOMLDecodeError as e:
        raise InvalidInput(f"{file.name} is no TOML: {e}.") from e
    return _Reader(file.name, text).policy(whole, today, hashlib.sha256(data).hexdigest())


class _Reader:
    """One file's checks, which know where a key stands."""

    def __init__(self, name: str, text: str) -> None:
        self._name, self._text = name, text

    def policy(self, whole: dict[str, Any], today: dt.date, sha256: str) -> Policy:
        known = ("schema", "name", "summary", "required", "L1", "L2", "L3", "L4")
        self._keys(whole, "", needed=known, optional=("required_with_features", "window", "recipes", "waivers"))
        if type(whole["schema"]) is not int or whole["schema"] != SCHEMA:
            self._refuse("", "schema", f"is {whole['schema']!r}, this Lehr reads {SCHEMA}")
        required = self._typed(whole["required"], list, "", "required")
        if not required or not set(map(str, required)) <= set(LEVELS):
            self._refuse("", "required", f"is {required}, expected some of {', '.join(LEVELS)}")
        limits = Limits(
            L1=self._limits(StepLimits, whole["L1"], "L1"),
            L2=self._limits(LoopLimits, whole["L2"], "L2"),
            L3=self._limits(DistributionLimits, whole["L3"], "L3"),
            L4=self._limits(CostLimits, whole["L4"], "L4"),
        )
        more = self._typed(whole.get("required_with_features", []), list, "", "required_with_features")
        if not set(map(str, more)) <= {"L3"}:
            self._refuse("", "required_with_features", f"is {more}, expected L3, the level that features are for")
        window = self._window(whole["window"]) if "window" in whole else None
        if ({"L3"} & {*required, *more}) and not limits.L3.samples and window is None:
            self._refuse("L3", "samples", "is 0, and the policy requires L3")
        if 0 < limits.L3.samples < 20:
            self._refuse("L3", "samples", f"is {limits.L3.samples:g}, expected 0 or at least 20")
        recipes = self._typed(whole.get("recipes", {}), dict, "", "recipes")
        waivers = self._typed(whole.get("waivers", []), list, "", "waivers")
        return Policy(
            name=self._typed(whole["name"], str, "", "name"),
            summary=self._typed(whole["summary"], str, "", "summary"),
            required=tuple(level for level in LEVELS if level in required),
            limits=limits,
            recipes={name: self._overridden(limits, name, given) for name, given in recipes.items()},
            waivers=tuple(self._waiver(given, k, today) for k, given in enumerate(waivers)),
            sha256=sha256,
            required_with_features=tuple(map(str, more)),
            window=window,
        )

    def _window(self, given: Any) -> WindowLimits:
        window = self._limits(WindowLimits, given, "window")
        for low, high in (("fid_min", "fid_max"), ("clip_min", "clip_max")):
            if getattr(window, low) >= getattr(window, high):
                self._refuse("window", low, f"is {getattr(window, low):g}, expected less than {high}")
        return window

    def _overridden(self, limits: Limits, recipe: str, given: Any) -> Limits:
        section = f"recipes.{recipe}"
        if recipe not in {*RECIPES, MIXED}:
            self._refuse(section, None, str(UnknownName("recipe", recipe, {*RECIPES, MIXED})))
        self._keys(self._typed(given, dict, section, None), section, optional=("L1", "L2", "L3", "L4"))
        changed: dict[str, Any] = {}
        for level, values in given.items():
            before, where = getattr(limits, level), f"{section}.{level}"
            self._keys(self._typed(values, dict, where, None), where, optional=[f.name for f in fields(before)])
            numbers = {key: self._number(type(before), where, key, value) for key, value in values.items()}
            changed[level] = replace(before, **numbers)
        return replace(limits, **changed)

    def _limits(self, kind: type[_T], given: Any, section: str) -> _T:
        names = [f.name for f in fields(kind)]  # type: ignore[arg-type]
        self._keys(self._typed(given, dict, section, None), section, needed=names)
        return kind(**{name: self._number(kind, section, name, given[name]) for name in names})

    def _number(self, kind: type[Any], section: str, key: str, value: Any) -> float:
        low, high = next(f.metadata["range"] for f in fields(kind) if f.name == key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self._refuse(section, key, f"is {value!r}, expected a number")
        if not low < value <= high:
            self._refuse(section, key, f"is {value:g}, expected more than {low:g} and at most {high:g}")
        return float(value)

    def _waiver(self, given: Any, index: int, today: dt.date) -> Waiver:
        refuse = partial(self._refuse, "waivers", index=index)
        values = self._typed(given, dict, "waivers", None)
        self._keys(values, "waivers", needed=("check", "expires", "reason"), optional=("recipe",), index=index)
        check, expires, reason = values["check"], values["expires"], values["reason"]
        if not isinstance(check, str) or not check.startswith(_WAIVABLE):
            refuse("check", f"is {check!r}, expected a check of L1 to L4, such as 'L2.guided.ssim'; L0 has none")
        if type(expires) is not dt.date:
            refuse("expires", f"is {expires!r}, expected a date such as 2030-01-31")
        if expires < today:
            refuse("expires", f"was {expires}, and today is {today}: mend what it excused, or decide anew")
        if not isinstance(reason, str) or not reason.strip():
            refuse("reason", "is empty, expected why this failure may pass")
        recipe = values.get("recipe")
        if recipe is not None and recipe not in {*RECIPES, MIXED}:
            refuse("recipe", f"is {recipe!r}, expected one of {', '.join((*RECIPES, MIXED))}")
        return Waiver(check=check, expires=expires, reason=reason.strip(), recipe=recipe)

    # ------------------------------------------------------------------------------------------------ refusing

    def _typed(self, value: Any, kind: type[_T], section: str, key: str | None) -> _T:
        if not isinstance(value, kind):
            self._refuse(section, key, f"is {value!r}, expected {kind.__name__}")
        return value

    def _keys(
        self,
        given: Mapping[str, Any],
        section: str,
        *,
        needed: Any = (),
        optional: Any = (),
        index: int = 0,
    ) -> None:
        known = (*needed, *optional)
        for key in given:
            if key not in known:
                self._refuse(section, key, f"is unknown; known here: {', '.join(known)}", index=index)
        if missing := [key for key in needed if key not in given]:
            self._refuse(section, None, f"lacks {', '.join(missing)}", index=index)

    def _refuse(self, section: str, key: str | None, why: str, *, index: int = 0) -> NoReturn:
        what = ".".join(part for part in (section, key) if part) or "the policy"
        raise InvalidInput(f"{self._name}, line {_line(self._text, section, key, index)}: {what} {why}.")


def _line(text: str, section: str, key: str | None, index: int) -> int:
    """Where a key stands, else where its table begins, else 1; ``index`` counts the tables of an array."""
    wanted = f"{section}.{key}" if section and key else section or key or ""
    table, seen, best = "", -1, 1
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            table = re.sub(r"[\s\"']", "", header[2])
            array = header[1] == "[["
            seen += array and table == section
            here = not array or seen == index
            if here and (wanted == table or wanted.startswith(table + ".")):
                best = number
            if here and table == wanted:
                return number
        elif match := re.match(r"\s*([\w.\"'-]+)\s*=", line):
            full = ".".join(part for part in (table, match[1].replace('"', "").replace("'", "")) if part)
            if full == wanted and seen in (-1, index):
                return number
    return best
