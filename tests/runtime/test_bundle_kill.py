"""A process killed at any system call that changes the disk leaves the old bundle or the new one, never a third.

This file is also the program under test: it forks itself once for every call, and the child dies just before it.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lehr.runtime.bundle import Bundle, Edit
from lehr.runtime.commit import unfinished
from lehr.runtime.manifest import GraphEntry
from lehr.runtime.paths import EDM
from lehr.runtime.prediction import SAMPLE
from lehr.runtime.spec import ModelSpec, TensorSpec, Varies

# Of module posix. Bytes written to a file that is not listed yet, and fsync, change nothing that another process sees.
CHANGES_THE_DISK = {"replace", "rename", "unlink", "remove", "rmdir", "mkdir", "open"}
KILLED = 42
NOTHING = "no bundle"

Action = Callable[[pathlib.Path], None]


def spec() -> ModelSpec:
    shape = ("batch", 1, 4, 4)
    return ModelSpec(
        name="tiny",
        inputs=(
            TensorSpec(name="sample", shape=shape, varies=Varies.SAMPLE),
            TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
        ),
        outputs=(TensorSpec(name="denoised", shape=shape, varies=Varies.SAMPLE),),
        path=EDM(),
        prediction=SAMPLE,
    )


def fill(edit: Edit, content: bytes) -> None:
    edit.add_bytes("model/step.onnx", b"graph " + content)
    edit.add_bytes("model/weights.safetensors", content)
    edit.add_bytes("golden/index.json", b"{}")
    edit.add_bytes("reports", b"a file")
    step = GraphEntry(
        file="model/step.onnx",
        weights="model/weights.safetensors",
        opset=20,
        parameters=1,
        nodes=1,
        weight_bytes=4,
        flops=2,
        signature=spec().signature,
    )
    edit.set_manifest(model=spec(), graphs={"step": step}, source="tiny")


def create(root: pathlib.Path) -> None:
    with Bundle.create(root, overwrite=False) as edit:
        fill(edit, b"first")


def overwrite(root: pathlib.Path) -> None:
    with Bundle.create(root, overwrite=True) as edit:
        fill(edit, b"second")


def edit(root: pathlib.Path) -> None:
    with Bundle.open(root).edit() as edit:
        edit.add_bytes("model/step.onnx", b"of another size")
        edit.add_bytes("model/weights.safetensors", b"FIRST")  # of the same size
        (edit.folder("engines/cpu--fp32") / "plan").write_bytes(b"plan")
        edit.remove("golden")
        edit.remove("reports")
        edit.add_bytes("reports/one", b"a folder now")
        edit.set_manifest(parity={"cpu--fp32": {"passed": True}})


def state(root: pathlib.Path) -> Any:
    """All that a reader can see, after every hash was checked."""
    if not root.exists():
        return NOTHING
    bundle = Bundle.open(root)
    bundle.verify()
    content = tuple((name, bundle.read_bytes(name, 1000)) for name in bundle.names())
    return str(bundle.manifest.to_json()), content


def dies(action: Action, root: pathlib.Path, at: int) -> bool:
    """Run ``action`` in a child that dies before its ``at``-th change of the disk; False if it has fewer."""
    child = os.fork()
    if child == 0:
        _run_doomed(action, root, at)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED), f"the child failed by itself before change {at}"
    return code == KILLED


def _run_doomed(action: Action, root: pathlib.Path, at: int) -> None:
    seen = 0

    def watch(_: Any, event: str, function: Any) -> None:
        nonlocal seen
        if event == "c_call" and function.__module__ == "posix" and function.__name__ in CHANGES_THE_DISK:
            if seen == at:
                os._exit(KILLED)
            seen += 1

    code = 1
    try:
        sys.setprofile(watch)
        action(root)
        code = 0
    finally:
        os._exit(code)


def assert_tidy(root: pathlib.Path) -> None:
    """After one more writer nothing is left but what is listed."""
    with Bundle.open(root).edit():
        pass
    listed = {*Bundle.open(root).names(), "manifest.json"}
    assert {str(p.relative_to(root)) for p in root.rglob("*") if not p.is_dir()} == listed
    assert all(any(p.iterdir()) for p in root.rglob("*") if p.is_dir())


def kill_everywhere(action: Action, base: pathlib.Path | None, work: pathlib.Path) -> None:
    """Kill ``action`` before each change; where a repair is left to do for the first time, kill that everywhere too."""
    reference = work / "reference" / "m.lehr"
    reference.parent.mkdir(parents=True)
    if base is not None:
        shutil.copytree(base, reference)
    old = state(reference)
    action(reference)
    new = state(reference)
    assert old != new
    seen, repaired, at = [], 0, 0
    while True:
        root = work / str(at) / "m.lehr"
        root.parent.mkdir()
        if base is not None:
            shutil.copytree(base, root)
        if not dies(action, root, at):
            break
        if not repaired and root.exists() and unfinished(root):
            repaired = _kill_the_repair(root, work / f"{at}-again", new)
        seen.append(state(root))
        assert seen[-1] in (old, new), f"neither old nor new when killed before change {at}"
        if seen[-1] != NOTHING:
            assert_tidy(root)
            assert state(root) == seen[-1]
        else:
            create(root)  # what the dead process left beside it does not hinder the next, and is collected
            assert [p.name for p in root.parent.iterdir()] == ["m.lehr"]
        shutil.rmtree(root.parent)
        at += 1
    switch = seen.index(new)
    assert switch > 0
    assert all(s == old for s in seen[:switch])
    assert all(s == new for s in seen[switch:])
    sys.stdout.write(f"{action.__name__}: {len(seen)} kills, old before {switch}, {repaired} kills of a repair\n")


def _kill_the_repair(root: pathlib.Path, work: pathlib.Path, new: Any) -> int:
    at = 0
    while True:
        copy = work / str(at) / "m.lehr"
        shutil.copytree(root, copy)
        killed = dies(lambda path: Bundle.open(path) and None, copy, at)
        assert state(copy) == new, f"a repair that was killed before change {at} was not repaired"
        if not killed:
            shutil.rmtree(work)
            return at
        at += 1


def main(work: pathlib.Path) -> None:
    os.fsync = lambda _: None  # a killed process takes nothing with it that the system has; only a power cut does
    create(work / "base.lehr")
    kill_everywhere(create, None, work / "create")
    kill_everywhere(edit, work / "base.lehr", work / "edit")
    kill_everywhere(overwrite, work / "base.lehr", work / "overwrite")


@pytest.fixture
def fast_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder in memory where there is one: thousands of small files take minutes on a busy disk."""
    shared = pathlib.Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield pathlib.Path(folder)


def test_a_process_killed_at_any_moment_leaves_the_old_bundle_or_the_new_one(
    fast_disk: pathlib.Path, run_python: Callable[..., str]
) -> None:
    # A process of its own: forking one that holds threads, as a test runner's may, is not safe.
    code = f"import pathlib, runpy\nrunpy.run_path({__file__!r})['main'](pathlib.Path({str(fast_disk)!r}))"
    lines = run_python(code).splitlines()
    assert [line.split(":")[0] for line in lines] == ["create", "edit", "overwrite"]
    kills = [int(line.split()[1]) for line in lines]
    assert min(kills) >= 15
    assert all("0 kills of a repair" not in line for line in lines[1:])


@pytest.mark.parametrize("name", ["create", "edit", "overwrite"])
def test_ctrl_c_at_any_moment_leaves_the_old_bundle_or_the_new_one_and_no_lock(
    fast_disk: pathlib.Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    action: Action = globals()[name]
    if name != "create":
        create(fast_disk / "base.lehr")
    results = set()
    for at in range(1000):
        root = fast_disk / str(at) / "m.lehr"
        root.parent.mkdir()
        if name != "create":
            shutil.copytree(fast_disk / "base.lehr", root)
        before = str(state(root))
        finished = _interrupted(action, root, at)
        results.add(str(state(root)))
        assert [p.name for p in root.parent.iterdir()] in (["m.lehr"], [])
        if root.exists():
            assert_tidy(root)
        if finished:
            break
    assert finished
    assert len(results) == 2
    assert before in results


def _interrupted(action: Action, root: pathlib.Path, at: int) -> bool:
    seen = 0

    def watch(_: Any, event: str, function: Any) -> None:
        nonlocal seen
        if event == "c_call" and function.__module__ == "posix" and function.__name__ in CHANGES_THE_DISK:
            seen += 1
            if seen > at:
                sys.setprofile(None)
                raise KeyboardInterrupt

    try:
        sys.setprofile(watch)
        action(root)
    except KeyboardInterrupt:
        return False
    finally:
        sys.setprofile(None)
    return True
