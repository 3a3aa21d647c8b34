"""Every ``lehr`` line in the documents and in the help has options that exist, with values that they take."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from lehr.cli import VERBS

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)
HELP = ("-h", "--help", "--version")


def lines(text: str) -> Iterator[list[str]]:
    """The words of each ``lehr`` command in shell text."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True) if line.lstrip().startswith("lehr ") else []
        while words:
            end = next((k for k, word in enumerate(words) if word in ("&&", "|", ">", ";")), len(words))
            if words[0] == "lehr":
                yield words[1:end]
            words = words[end + 1 :]


def documented() -> Iterator[tuple[str, list[str]]]:
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in FENCE.findall(file.read_text(encoding="utf-8")):
            yield from ((file.name, words) for words in lines(block))
    for verb in VERBS:
        yield from ((f"lehr {verb} --help", words) for words in lines(command(verb).help or ""))


def command(verb: str) -> click.Command:
    found = importlib.import_module(f"lehr.commands.{verb}").command
    assert isinstance(found, click.Command)
    return found


def check(words: list[str]) -> None:
    """Raise click's UsageError for what the command line does not know."""
    verb, *arguments = words
    if verb in HELP:
        return
    if verb not in VERBS:
        raise click.UsageError(f"no such command: {verb}")
    chosen = command(verb)
    context = click.Context(chosen, info_name=verb)
    if isinstance(chosen, click.Group):
        if arguments and arguments[0] not in (*chosen.list_commands(context), *HELP):
            raise click.UsageError(f"no such command: {verb} {arguments[0]}")
        return
    given, _, _ = chosen.make_parser(context).parse_args(arguments)
    for parameter in chosen.params:
        value = given.get(parameter.name or "")
        if not isinstance(parameter.type, (click.Choice, click.IntRange, click.FloatRange)) or parameter.nargs != 1:
            continue
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(one, str):
                parameter.type.convert(one, parameter, context)


def problem(words: list[str]) -> str:
    """What the command line would say against a command; empty for one that it takes."""
    try:
        check(words)
    except click.UsageError as e:
        return e.format_message()
    return ""


@pytest.mark.parametrize("place", sorted({place for place, _ in documented()}))
def test_every_documented_command_has_options_that_exist(place: str) -> None:
    wrong = {shlex.join(words): problem(words) for where, words in documented() if where == place}
    assert not {words: said for words, said in wrong.items() if said}


@pytest.mark.parametrize(
    "line", ["lehr bild d.lehr", "lehr build d.lehr --taret cpu", "lehr build d.lehr --spinning maybe", "lehr list x"]
)
def test_a_command_that_does_not_exist_would_be_noticed(line: str) -> None:
    (words,) = lines(line)
    assert problem(words)
