"""Options of ``lehr build`` beside target and recipe, as text and as what the builders take."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lehr.runtime.errors import InvalidInput

if TYPE_CHECKING:
    from lehr.engines.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])

_ADDED = (
    click.option(
        "--batch", default="", metavar="N,…", help="TensorRT: tune for these batch sizes; guidance doubles them."
    ),
    click.option("--sizes", default="", metavar="HxW,…", help="TensorRT: tune for these sizes of the sample."),
    click.option("--workspace", default=0, type=click.IntRange(0), metavar="MB", help="TensorRT: scratch of a kernel."),
    click.option(
        "--tactic-memory", default=0, type=click.IntRange(0), metavar="MB", help="TensorRT: memory for trying kernels."
    ),
    click.option("--effort", default=None, type=click.IntRange(0, 5), help="TensorRT: of the search for kernels."),
    click.option(
        "--compatible",
        default="none",
        type=click.Choice(["none", "version", "hardware", "capability"]),
        help="TensorRT: load with later versions, on any GPU since Ampere, or of the same compute capability.",
    ),
    click.option(
        "--weights",
        default="embedded",
        type=click.Choice(["embedded", "stripped", "streamed"]),
        help="TensorRT: in the engine, in the bundle alone, or kept in host memory.",
    ),
    click.option(
        "--mode",
        default="latency",
        type=click.Choice(["latency", "throughput"]),
        help="OpenVINO: one answer soon, or many at the same time.",
    ),
    click.option(
        "--spinning",
        default="auto",
        type=click.Choice(["auto", "on", "off"]),
        help="ONNX Runtime: threads poll while they wait; auto tries it where --library auto measures.",
    ),
    click.option("--no-cache", is_flag=True, help="Build anew, and keep nothing in the user's cache."),
)


def settings_options(function: F) -> F:
    """Add the options; the command takes one parameter for each."""
    for option in reversed(_ADDED):
        function = option(function)
    return function


def settings(
    *,
    batch: str,
    sizes: str,
    workspace: int,
    tactic_memory: int,
    effort: int | None,
    compatible: str,
    weights: str,
    mode: str,
    spinning: str,
    no_cache: bool,
) -> Settings:
    """What the options say; raises InvalidInput for lists that cannot be read."""
    from lehr.engines.settings import Compatible, Mode, Settings, Spinning, Weights

    return Settings(
        batches=tuple(row[0] for row in _rows("--batch", batch, r"\d{1,6}")),
        sizes=tuple(_rows("--sizes", sizes, r"\d{1,6}(x\d{1,6})*")),
        workspace_mb=workspace,
        tactic_mb=tactic_memory,
        effort=effort,
        compatible=Compatible(compatible),
        weights=Weights(weights),
        mode=Mode(mode),
        spinning=Spinning(spinning),
        cached=not no_cache,
    )


def _rows(option: str, text: str, pattern: str) -> list[tuple[int, ...]]:
    items = [item.strip() for item in text.split(",")] if text else []
    for item in items:
        if not re.fullmatch(pattern, item):
            example = "1,2,8" if option == "--batch" else "64x64,96x96"
            raise InvalidInput(f"{option} {text!r} cannot be read at {item!r}, expected such as {example}.")
    return [tuple(int(number) for number in item.split("x")) for item in items]
