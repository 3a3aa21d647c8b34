"""Names of files in a bundle: whatever is allowed stays inside, whatever leads out is refused."""

from __future__ import annotations

import os
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lehr.runtime.names import folders_of, name_problem, nested_name

# Much of what is drawn must be dangerous, or the property below would hold for want of trying.
PIECES = st.sampled_from(
    ["..", ".", "/", "//", "\\", "C:", "c:/", "\0", "\n", "\x7f", "\x85", "a", "step.onnx", " ", "ü", "~"]
)
NAMES = st.one_of(st.lists(PIECES, max_size=6).map("".join), st.text(max_size=30))


@given(NAMES)
def test_a_name_that_is_allowed_stays_inside_the_bundle_on_every_system(name: str) -> None:
    if name_problem(name) is not None:
        return
    posix, windows = pathlib.PurePosixPath(name), pathlib.PureWindowsPath(name)
    assert not posix.is_absolute()
    assert not windows.is_absolute()
    assert not windows.drive
    assert not windows.root
    assert ".." not in posix.parts
    assert ".." not in windows.parts
    assert str(posix) == name  # no part is dropped or joined, so one file has one name
    assert posix.parts == windows.parts
    assert os.path.normpath(f"/bundle/{name}") == f"/bundle/{name}"
    os.fsencode(name)


@given(st.lists(st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True), min_size=1, max_size=5))
def test_plain_names_are_allowed(parts: list[str]) -> None:
    name = "/".join(parts)
    assert (name_problem(name) is None) == (name != "manifest.json")


@pytest.mark.parametrize(
    "name",
    [
        "", "/", "/etc/passwd", "../../etc/passwd", "model/../../x", "model/..", "./x", "a//b", "a/", "a\\b", "..\\x",
        "C:/x", "C:x", "a\0b", "a\nb", "a\x7fb", "a\x9bb", "\ud800", "manifest.json", ".lehr-lock", "a/.lehr-tmp-1",
        "x" * 256, "é" * 128, "a/" * 300 + "a", 7, None, b"a", ["a"],
    ],
)  # fmt: skip
def test_names_that_lead_out_or_mislead_are_refused(name: object) -> None:
    assert name_problem(name)


def test_engine_folder_names_are_allowed() -> None:
    assert name_problem("engines/cpu--int8-sq--onnxruntime-1.31.1/build.json") is None
    assert name_problem("stages/vae/manifest.json") is None


def test_a_name_cannot_be_a_file_and_a_folder() -> None:
    assert list(folders_of("a/b/c")) == ["a", "a/b"]
    assert nested_name(["a-b", "a/b/c", "a/b"]) == ("a/b", "a/b/c")
    assert nested_name(["a", "ab", "b/a"]) is None
