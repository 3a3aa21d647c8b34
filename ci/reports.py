"""Reports of the gate read back from JSON, on another machine than the one that wrote them: without trust.

A report is what ``lehr gate --json`` prints, or what ``lehr evidence`` writes with that inside. Sizes are bounded
before anything is parsed, every field that a verdict needs has its type and its bounds, and what contradicts itself is
refused. Who wrote a report cannot be told from it: keep it where only those write whom you believe.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from lehr.ci.checks import REPORT_SCHEMA, Check, Outcome
from lehr.ci.policy import LEVELS
from lehr.runtime.errors import InvalidInput
from lehr.runtime.golden import INDEX_FILE
from lehr.runtime.jsonlike import decode_json
from lehr.runtime.stage import STAGES

MAX_BYTES = 16 << 20  # the curves of a thousand-step loop take 0.1 MB
MAX_CHECKS, MAX_ENTRIES = 10_000, 1_000  # entries: of environment and hashes
MAX_TEXT = 4_000  # characters of a reason; other texts are names

ENGINES = "engines/"  # hashes under it are of the engine, all others of what every engine of the model shares
_NAME = 300
_T = TypeVar("_T")


def of_an_engine(name: str) -> bool:
    """Whether a file belongs to an engine, the denoiser's or a stage's."""
    return name.startswith(ENGINES) or (name.startswith(f"{STAGES}/") and f"/{ENGINES}" in name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """What one report says of one engine.

    Attributes:
        file: the report's name, for messages.
        bundle, model, engine, target, recipe: what was judged.
        policy, policy_sha256: by which policy.
        required: levels that the policy asks for with this model; more than its own list where features are known.
        checks: as they were judged there.
        environment, hashes: where, and of what; by name.
        measured: figures of the machine that ``lehr evidence`` adds; empty in the gate's own reports.
    """

    file: str
    bundle: str
    model: str
    engine: str
    target: str
    recipe: str
    policy: str
    policy_sha256: str
    required: tuple[str, ...]
    checks: tuple[Check, ...]
    environment: Mapping[str, str]
    hashes: Mapping[str, str]
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shared(self) -> dict[str, str]:
        """Hashes of what all engines of the model share: its graphs, weights, description and golden data."""
        return {name: digest for name, digest in self.hashes.items() if not of_an_engine(name)}

    @property
    def of_engine(self) -> tuple[tuple[str, str], ...]:
        """Hashes of the engine's own files, which tell it from all others."""
        return tuple(sorted((n, digest) for n, digest in self.hashes.items() if of_an_engine(n)))


def read_report(path: Path) -> Reported:
    """Read one report.

    Raises:
        InvalidInput: no such file, one that is too large, no report, one of another schema, one that is itself merged,
            or one that contradicts itself; the message names the field.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as e:
        raise InvalidInput(f"cannot read the report {path}: {e.strerror}. Give files that lehr gate wrote.") from e
    if len(data) > MAX_BYTES:
        raise InvalidInput(f"{path.name} has more than {MAX_BYTES >> 20} MiB and is no report of lehr gate.")
    try:
        whole = decode_json(data)
    except ValueError as e:
        raise InvalidInput(f"{path.name} is no report of lehr gate: {e}.") from e
    return _Reader(path.name).report(whole)


class _Reader:
    """One file's checks, which know its name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def report(self, data: Any) -> Reported:
        whole = self._typed(data, dict, "the report")
        if "error" in whole and "exit_code" in whole:
            self._refuse("error", f"is {reprlib.repr(whole['error'])}: the gate could not judge there")
        measured: dict[str, Any] = {}
        if "gate" in whole:
            self._schema(whole)
            measured = self._typed(self._given(whole, "measured"), dict, "measured")
            whole = self._typed(whole["gate"], dict, "gate")
        self._schema(whole)
        if "reports" in whole:
            self._refuse("reports", "says that it is a merged verdict: merge the reports that it was made of")
        policy = self._typed(self._given(whole, "policy"), dict, "policy")
        checks = self._typed(self._given(whole, "checks"), list, "checks")
        if not 0 < len(checks) <= MAX_CHECKS:
            self._refuse("checks", f"has {len(checks)} entries, expected 1 to {MAX_CHECKS}")
        found = tuple(self._check(check, f"checks[{k}]") for k, check in enumerate(checks))
        names = [check.name for check in found]
        if len(set(names)) != len(names):
            self._refuse("checks", "names one check twice")
        hashes = self._texts(self._given(whole, "hashes"), "hashes")
        for name, digest in hashes.items():
            if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
                self._refuse(f"hashes.{name[:_NAME]}", f"is {reprlib.repr(digest)}, expected a SHA-256")
        engine = self._text(whole, "engine")
        if f"{engine}/build.json" not in hashes or INDEX_FILE not in hashes:
            self._refuse("hashes", "names no engine or no golden data: what was judged cannot be known")
        required = self._typed(self._given(policy, "required"), list, "policy.required")
        if not set(map(str, required)) <= set(LEVELS):
            self._refuse("policy.required", f"is {reprlib.repr(required)}, expected some of {', '.join(LEVELS)}")
        return Reported(
            file=self._name,
            **{name: self._text(whole, name) for name in ("bundle", "model", "target", "recipe")},
            engine=engine,
            policy=self._text(policy, "name", "policy.name"),
            policy_sha256=self._text(policy, "sha256", "policy.sha256"),
            required=tuple(map(str, required)),
            checks=found,
            environment=self._texts(self._given(whole, "environment"), "environment"),
            hashes=hashes,
            measured=measured,
        )

    def _schema(self, whole: Mapping[str, Any]) -> None:
        schema = self._given(whole, "schema")
        if type(schema) is not int or schema != REPORT_SCHEMA:
            self._refuse("schema", f"is {reprlib.repr(schema)}, this Lehr reads {REPORT_SCHEMA}: run the gate again")

    def _check(self, data: Any, where: str) -> Check:
        whole = self._typed(data, dict, where)
        outcome = self._text(whole, "outcome", f"{where}.outcome")
        if outcome not in {known.value for known in Outcome}:
            self._refuse(f"{where}.outcome", f"is {reprlib.repr(outcome)}")
        return Check(
            name=self._text(whole, "name", f"{where}.name"),
            outcome=Outcome(outcome),
            reason=self._text(whole, "reason", f"{where}.reason", most=MAX_TEXT),
            value=self._number(whole, "value", where),
            limit=self._number(whole, "limit", where),
        )

    # ------------------------------------------------------------------------------------------------ fields

    def _given(self, whole: Mapping[str, Any], key: str) -> Any:
        if key not in whole:
            self._refuse(key, "is missing")
        return whole[key]

    def _typed(self, value: Any, kind: type[_T], where: str) -> _T:
        if not isinstance(value, kind) or isinstance(value, bool):
            self._refuse(where, f"is {reprlib.repr(value)}, expected {kind.__name__}")
        return value

    def _text(self, whole: Mapping[str, Any], key: str, where: str | None = None, *, most: int = _NAME) -> str:
        text = self._typed(self._given(whole, key), str, where or key)
        if not text or len(text) > most:
            self._refuse(where or key, f"has {len(text)} characters, expected 1 to {most}")
        return text

    def _texts(self, value: Any, where: str) -> dict[str, str]:
        whole = self._typed(value, dict, where)
        if len(whole) > MAX_ENTRIES:
            self._refuse(where, f"has {len(whole)} entries, expected at most {MAX_ENTRIES}")
        return {name: self._text(whole, name, f"{where}.{name[:_NAME]}") for name in whole}

    def _number(self, whole: Mapping[str, Any], key: str, where: str) -> float | None:
        value = self._given(whole, key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self._refuse(f"{where}.{key}", f"is {reprlib.repr(value)}, expected a number or null")
        return float(value)

    def _refuse(self, where: str, why: str) -> NoReturn:
        raise InvalidInput(f"{self._name} is no report that can be used: {where} {why}.")
