"""What verbs share: results on stdout (prose or one JSON value), progress on stderr, options spelled once."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def json_option(function: F) -> F:
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON value on stdout and nothing else there."
    )(function)


def bundle_argument(function: F) -> F:
    return click.argument("bundle", type=click.Path(path_type=Path), metavar="NAME.lehr")(function)


def engine_options(function: F) -> F:
    function = click.option(
        "--recipe", default="fp32", show_default=True, help="Number formats; see lehr list recipes."
    )(function)
    return click.option("--target", default="cpu", show_default=True, help="Class of machine; see lehr list targets.")(
        function
    )


def emit(as_json: bool, data: Any, prose: str) -> None:
    """The result of a verb: ``data`` as JSON or ``prose`` for people."""
    click.echo(json.dumps(data) if as_json else prose)


class Progress:
    """Lines on stderr with the seconds since the start; on a terminal, steps of a loop redraw one line."""

    def __init__(self) -> None:
        self._started, self._drawn = time.monotonic(), 0.0

    def __call__(self, text: str) -> None:
        click.echo(f"[{time.monotonic() - self._started:6.1f} s] {text}", err=True)

    def steps(self, done: int, total: int, text: str) -> None:
        """A loop's progress; silent where stderr is no terminal, at most ten times a second."""
        if not sys.stderr.isatty() or (time.monotonic() - self._drawn < 0.1 and done < total):
            return
        self._drawn = time.monotonic()
        end = "\n" if done >= total else ""
        click.echo(f"\r[{self._drawn - self._started:6.1f} s] {text} {done}/{total}{end}", err=True, nl=False)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Plain columns; numbers to the right, words to the left."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]
    right = [all(_is_number(row[k]) for row in cells[1:]) and len(cells) > 1 for k in range(len(header))]
    lines = [
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    return cell.replace(",", "").replace(".", "").replace("-", "").replace("e", "").isdigit() or cell in ("", "-")
