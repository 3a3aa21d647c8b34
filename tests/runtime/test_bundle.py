"""Bundles: what is written is read back, what was altered is noticed, and a failure leaves nothing behind."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from lehr.runtime import commit, files
from lehr.runtime.bundle import Bundle, Edit
from lehr.runtime.errors import BundleError, InvalidInput, LehrError, RunFailed
from lehr.runtime.manifest import GraphEntry
from lehr.runtime.paths import LinearFlow
from lehr.runtime.prediction import FLOW_PREDICTION
from lehr.runtime.spec import ModelSpec, TensorSpec, Varies

SHAPE = ("batch", 1, 8, 8)
SPEC = ModelSpec(
    name="tiny",
    inputs=(
        TensorSpec(name="sample", shape=SHAPE, varies=Varies.SAMPLE),
        TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
    ),
    outputs=(TensorSpec(name="flow", shape=SHAPE, varies=Varies.SAMPLE),),
    path=LinearFlow(),
    prediction=FLOW_PREDICTION,
)
STEP = GraphEntry(
    file="model/step.onnx",
    weights="model/weights.safetensors",
    opset=20,
    parameters=3,
    nodes=1,
    weight_bytes=4,
    flops=2,
    signature=SPEC.signature,
)
ARRAYS = {"x_T": np.arange(6, dtype=np.float32).reshape(2, 3), "seed": np.array(7)}


def fill(edit: Edit) -> None:
    with edit.add_file("model/step.onnx") as graph, edit.add_file("model/weights.safetensors") as weights:
        assert graph.parent == weights.parent  # external data is found beside the graph
        graph.write_bytes(b"graph")
        weights.write_bytes(b"weights")
    edit.add_arrays("golden/steps.npz", ARRAYS)
    edit.add_json("golden/index.json", {"tier": "steps", "floors": {}})
    edit.set_manifest(
        model=SPEC,
        graphs={"step": STEP},
        source="tiny",
        versions={"lehr": "0.1.0"},
        command=("lehr", "export", "tiny"),
        golden_tier="steps",
    )


def add_all(edit: Edit, names: list[str]) -> None:
    for name in names:
        edit.add_bytes(name, b"x")


def change_much(edit: Edit) -> None:
    fill(edit)
    edit.add_bytes("model/step.onnx", b"another graph")
    edit.remove("golden")


@contextmanager
def ending_with(failure: BaseException | type[BaseException]) -> Iterator[None]:
    yield
    raise failure


def make(root: pathlib.Path) -> Bundle:
    with Bundle.create(root, overwrite=False) as edit:
        fill(edit)
    return Bundle.open(root)


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "m.lehr"


@pytest.fixture
def bundle(root: pathlib.Path) -> Bundle:
    return make(root)


def tree(root: pathlib.Path) -> dict[str, bytes]:
    """Every file under ``root``, hidden ones too."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if not p.is_dir()}


def rewrite(root: pathlib.Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((root / "manifest.json").read_text())
    change(data)
    (root / "manifest.json").write_text(json.dumps(data))


# ------------------------------------------------------------------------------------------ writing and reading


def test_a_bundle_holds_what_was_put_into_it(bundle: Bundle) -> None:
    assert bundle.names() == ["golden/index.json", "golden/steps.npz", "model/step.onnx", "model/weights.safetensors"]
    assert bundle.names("golden/") == ["golden/index.json", "golden/steps.npz"]
    assert bundle.path("model/step.onnx").read_bytes() == b"graph"
    assert bundle.path("model/step.onnx").is_absolute()
    assert bundle.read_bytes("model/weights.safetensors", 7) == b"weights"
    assert bundle.read_json("golden/index.json") == {"tier": "steps", "floors": {}}
    read = bundle.read_arrays("golden/steps.npz")
    assert {name: array.tolist() for name, array in read.items()} == {k: v.tolist() for k, v in ARRAYS.items()}
    assert bundle.manifest.model == SPEC
    assert bundle.manifest.graphs == {"step": STEP}
    assert bundle.manifest.command == ("lehr", "export", "tiny")
    assert bundle.manifest.golden_tier == "steps"
    bundle.verify()


def test_two_equal_exports_are_equal_byte_by_byte(tmp_path: pathlib.Path) -> None:
    first, second = make(tmp_path / "a.lehr"), make(tmp_path / "b.lehr")
    assert tree(first.root) == tree(second.root)
    assert set(tree(first.root)) == {*first.names(), "manifest.json"}


def test_json_is_written_sorted_with_a_final_newline(bundle: Bundle) -> None:
    assert (bundle.root / "golden/index.json").read_bytes() == b'{\n "floors": {},\n "tier": "steps"\n}\n'


def test_the_manifest_records_size_and_hash(bundle: Bundle) -> None:
    entry = bundle.manifest.files["model/step.onnx"]
    assert (entry.bytes, entry.sha256) == (5, hashlib.sha256(b"graph").hexdigest())


def test_an_edit_adds_replaces_and_removes(bundle: Bundle) -> None:
    with bundle.edit() as edit:
        edit.add_bytes("model/step.onnx", b"another graph")
        assert edit.path("model/step.onnx").read_bytes() == b"another graph"
        assert edit.path("model/weights.safetensors").read_bytes() == b"weights"
        assert edit.remove("golden") == ["golden/index.json", "golden/steps.npz"]
        assert edit.remove("gold") == []
        folder = edit.folder("engines/cpu--fp32")
        (folder / "sub").mkdir()
        (folder / "sub" / "plan").write_bytes(b"plan")
        edit.add_json("engines/cpu--fp32/build.json", {})
        edit.set_manifest(golden_tier="none", parity={"cpu--fp32": {"passed": True}})
        assert (bundle.root / "model/step.onnx").read_bytes() == b"graph"  # not before the end
    for seen in (bundle, Bundle.open(bundle.root)):
        assert seen.names("engines/") == ["engines/cpu--fp32/build.json", "engines/cpu--fp32/sub/plan"]
        assert seen.names("golden") == []
        assert seen.read_bytes("model/step.onnx", 100) == b"another graph"
        assert seen.manifest.parity == {"cpu--fp32": {"passed": True}}
        assert (seen.manifest.golden_tier, seen.manifest.source) == ("none", "tiny")
        seen.verify()
    assert set(tree(bundle.root)) == {*bundle.names(), "manifest.json"}
    assert not (bundle.root / "golden").exists()


def test_a_folder_replaces_all_that_was_under_its_name(bundle: Bundle) -> None:
    with bundle.edit() as edit:
        edit.add_bytes("engines/x/old", b"1")
        edit.add_bytes("engines/x-2/plan", b"1")
    with bundle.edit() as edit:
        (edit.folder("engines/x") / "new").write_bytes(b"2")
    assert bundle.names("engines") == ["engines/x-2/plan", "engines/x/new"]


def test_a_file_may_become_a_folder_and_a_folder_a_file(bundle: Bundle) -> None:
    with bundle.edit() as edit:
        edit.add_bytes("reports", b"one")
        edit.add_bytes("stages/vae/a", b"two")
    with bundle.edit() as edit:
        edit.remove("reports")
        edit.remove("stages/vae")
        edit.add_bytes("reports/one", b"1")
        edit.add_bytes("stages/vae", b"2")
    assert bundle.read_bytes("reports/one", 9) == b"1"
    assert Bundle.open(bundle.root).read_bytes("stages/vae", 9) == b"2"


def test_what_is_added_later_in_an_edit_wins(bundle: Bundle) -> None:
    with bundle.edit() as edit:
        edit.add_bytes("a", b"first")
        edit.add_bytes("a", b"second")
        edit.add_bytes("b", b"x")
        edit.remove("b")
        edit.add_bytes("c", b"x")
        edit.remove("c")
        edit.add_bytes("c", b"again")
    assert [bundle.read_bytes(name, 9) for name in ("a", "c")] == [b"second", b"again"]
    assert "b" not in bundle.names()


def test_what_is_written_beside_the_paths_handed_out_does_not_get_in(root: pathlib.Path) -> None:
    with Bundle.create(root, overwrite=False) as edit:
        fill(edit)
        with edit.add_file("model/extra") as path:
            path.write_bytes(b"x")
            path.with_name("stray").write_bytes(b"y")
    assert set(tree(root)) == {*Bundle.open(root).names(), "manifest.json"}
    assert "model/extra" in Bundle.open(root).names()


def test_an_edit_that_adds_a_file_twice_as_folder_is_refused(bundle: Bundle) -> None:
    before = tree(bundle.root)
    for names in (["a", "a/b"], ["a/b", "a"], ["model/step.onnx/b"], ["model"]):
        with pytest.raises(InvalidInput, match="folder"), bundle.edit() as edit:
            add_all(edit, names)
    assert tree(bundle.root) == before


def test_a_bundle_that_is_open_elsewhere_sees_the_others_edit_when_it_edits(bundle: Bundle) -> None:
    other = Bundle.open(bundle.root)
    with bundle.edit() as edit:
        edit.set_manifest(parity={"first": 1})
    with other.edit() as edit:
        edit.set_manifest(parity={**other.manifest.parity, "second": 2})
    assert Bundle.open(bundle.root).manifest.parity == {"first": 1, "second": 2}


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a//b", "manifest.json", ".lehr-lock", "a\\b", ""])
def test_names_that_lead_out_are_refused_when_writing(bundle: Bundle, name: str) -> None:
    with bundle.edit() as edit:
        for use in (edit.folder, edit.path, edit.remove, lambda n: edit.add_bytes(n, b"")):
            with pytest.raises(InvalidInput, match="cannot be a file"):
                use(name)


def test_an_edit_refuses_what_is_not_a_plain_file(bundle: Bundle) -> None:
    with pytest.raises(InvalidInput, match="no file was written"), bundle.edit() as edit, edit.add_file("a"):
        pass
    with pytest.raises(InvalidInput, match="no file was written"), bundle.edit() as edit, edit.add_file("a") as path:
        path.symlink_to("/etc/hostname")
    with pytest.raises(InvalidInput, match="no plain file"), bundle.edit() as edit:
        (edit.folder("a") / "link").symlink_to("/etc/hostname")
    with pytest.raises(InvalidInput, match="has no file"), bundle.edit() as edit:
        edit.path("nothing")
    bundle.verify()


def test_an_edit_cannot_be_used_after_its_block(bundle: Bundle) -> None:
    with bundle.edit() as edit:
        pass
    with pytest.raises(InvalidInput, match="has ended"):
        edit.add_bytes("a", b"")
    assert set(tree(bundle.root)) == {*bundle.names(), "manifest.json"}


def test_a_new_bundle_needs_a_model_and_a_source(root: pathlib.Path) -> None:
    with pytest.raises(InvalidInput, match="set_manifest"), Bundle.create(root, overwrite=False) as edit:
        edit.add_bytes("a", b"")
    assert not list(root.parent.iterdir())


def test_a_manifest_that_could_not_be_read_back_is_not_written(bundle: Bundle) -> None:
    before = tree(bundle.root)
    for wrong in ({"parity": {"x": float("nan")}}, {"versions": {"torch": 2}}, {"golden_tier": "most"}):
        with pytest.raises(InvalidInput), bundle.edit() as edit:
            edit.set_manifest(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="not listed"), bundle.edit() as edit:
        edit.remove("model/weights.safetensors")
    assert tree(bundle.root) == before


# ---------------------------------------------------------------------------------------------------- opening


def test_no_folder_is_a_wrong_argument(tmp_path: pathlib.Path) -> None:
    for path in (tmp_path / "none.lehr", tmp_path / "none" / "none.lehr"):
        with pytest.raises(InvalidInput, match="no such bundle"):
            Bundle.open(path)
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match="it is no folder"):
        Bundle.open(tmp_path / "file")
    with pytest.raises(InvalidInput, match="no usable path"):
        Bundle.open("a\0b")


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: pathlib.Path) -> None:
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"schema_version": 1}', b"[" * 1_000_000])
def test_a_damaged_manifest_is_a_bundle_error(bundle: Bundle, text: bytes) -> None:
    (bundle.root / "manifest.json").write_bytes(text)
    with pytest.raises(BundleError, match=r"manifest"):
        Bundle.open(bundle.root)


def test_a_manifest_that_is_too_large_is_not_read(bundle: Bundle) -> None:
    os.truncate(bundle.root / "manifest.json", 1 << 40)  # a hole: it would fill the memory, not the disk
    with pytest.raises(BundleError, match="at most 16777216"):
        Bundle.open(bundle.root)


def test_another_schema_version_says_what_to_do(bundle: Bundle) -> None:
    rewrite(bundle.root, lambda data: data.update(schema_version=99))
    with pytest.raises(BundleError, match="upgrade"):
        Bundle.open(bundle.root)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "model/../../x", "C:\\x", "a//b"])
def test_a_manifest_that_lists_a_name_leading_out_is_refused(bundle: Bundle, name: str) -> None:
    def add(data: dict[str, Any]) -> None:
        data["files"][name] = {"sha256": "0" * 64, "bytes": pathlib.Path("/etc/passwd").stat().st_size}

    rewrite(bundle.root, add)
    with pytest.raises(BundleError, match="cannot be a file in a bundle"):
        Bundle.open(bundle.root)


def test_a_missing_a_truncated_and_a_grown_file_are_noticed_on_opening(bundle: Bundle) -> None:
    weights = bundle.root / "model/weights.safetensors"
    weights.write_bytes(b"weight")
    with pytest.raises(BundleError, match=r"has 6 bytes, recorded were 7"):
        Bundle.open(bundle.root)
    weights.write_bytes(b"weights!")
    with pytest.raises(BundleError, match=r"has 8 bytes, recorded were 7"):
        Bundle.open(bundle.root)
    weights.unlink()
    with pytest.raises(BundleError, match=r"'model/weights.safetensors' is missing"):
        Bundle.open(bundle.root)


def test_an_altered_byte_is_noticed_when_the_file_is_used(bundle: Bundle) -> None:
    (bundle.root / "model/step.onnx").write_bytes(b"grabh")
    other = Bundle.open(bundle.root)
    for use in (other.path, other.read_json, other.read_arrays, lambda n: other.read_bytes(n, 100)):
        with pytest.raises(BundleError, match=r"'model/step.onnx' is not the file that was recorded.*again"):
            use("model/step.onnx")
    with pytest.raises(BundleError, match="not the file"):
        other.verify()
    assert other.path("model/weights.safetensors").exists()


def test_a_file_is_hashed_once_and_again_when_it_changed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_RACY_NS", -1)  # else files as young as these are never taken for unchanged
    hashed: list[int] = []
    original = files.hash_descriptor
    monkeypatch.setattr(files, "hash_descriptor", lambda fd: (hashed.append(fd), original(fd))[1])
    for _ in range(3):
        Bundle.open(bundle.root).path("model/step.onnx")
    assert len(hashed) == 1
    os.utime(bundle.root / "model/step.onnx", ns=(1, 1))
    bundle.path("model/step.onnx")
    assert len(hashed) == 2
    bundle.verify()
    assert len(hashed) == 2 + len(bundle.names())


def test_a_file_altered_in_place_with_its_old_time_stamp_is_noticed(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_RACY_NS", -1)
    step = bundle.root / "model/step.onnx"
    bundle.path("model/step.onnx")
    status = step.stat()
    time.sleep(0.05)  # longer than the system's clock tick
    with step.open("r+b") as file:  # same inode and size
        file.write(b"grabh")
    os.utime(step, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(BundleError, match="not the file"):
        bundle.path("model/step.onnx")


def test_a_young_file_is_hashed_again_for_its_time_stamps_may_not_tell(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_RACY_NS", 10**18)  # all files are young
    monkeypatch.setattr(files, "_identity", lambda _: (0, 0, 0, 0, 0))  # and the clock stands still
    bundle.path("model/step.onnx")
    (bundle.root / "model/step.onnx").write_bytes(b"grabh")
    with pytest.raises(BundleError, match="not the file"):
        bundle.path("model/step.onnx")


def test_a_file_larger_than_asked_for_is_not_read(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="at most 4 are read"):
        bundle.read_bytes("model/step.onnx", 4)


def test_a_file_that_is_not_listed_is_not_part_of_the_bundle(bundle: Bundle) -> None:
    (bundle.root / "model/stray").write_bytes(b"x")
    with pytest.raises(BundleError, match="has no file 'model/stray'"):
        bundle.path("model/stray")
    assert "model/stray" not in bundle.names()


def test_damaged_json_and_arrays_are_bundle_errors(bundle: Bundle) -> None:
    with bundle.edit() as edit:
        edit.add_bytes("a.json", b"{")
        edit.add_bytes("a.npz", b"PK")
    with pytest.raises(BundleError, match=r"'a\.json' is no JSON"):
        bundle.read_json("a.json")
    with pytest.raises(BundleError, match=r"a\.npz"):
        bundle.read_arrays("a.npz")


def test_links_are_refused_wherever_they_stand(bundle: Bundle, tmp_path: pathlib.Path) -> None:
    step = bundle.root / "model/step.onnx"
    (tmp_path / "outside").write_bytes(b"graph")
    step.unlink()
    step.symlink_to(tmp_path / "outside")
    for use in (lambda: Bundle.open(bundle.root), lambda: bundle.path("model/step.onnx"), bundle.verify):
        with pytest.raises(BundleError, match="links are refused"):
            use()
    step.unlink()
    step.write_bytes(b"graph")
    (bundle.root / "model").rename(tmp_path / "model")
    (bundle.root / "model").symlink_to(tmp_path / "model")
    with pytest.raises(BundleError, match="'model' is no real folder"):
        Bundle.open(bundle.root)
    (bundle.root / "manifest.json").rename(tmp_path / "manifest.json")
    (bundle.root / "manifest.json").symlink_to(tmp_path / "manifest.json")
    with pytest.raises(BundleError, match=r"'manifest\.json' is no regular file"):
        Bundle.open(bundle.root)


def test_a_pipe_in_place_of_a_file_does_not_block(bundle: Bundle) -> None:
    (bundle.root / "manifest.json").unlink()
    os.mkfifo(bundle.root / "manifest.json")
    with pytest.raises(BundleError, match="no regular file"):
        Bundle.open(bundle.root)


def test_the_bundle_itself_may_be_reached_through_a_link(bundle: Bundle, tmp_path: pathlib.Path) -> None:
    (tmp_path / "latest").symlink_to(bundle.root)
    assert Bundle.open(tmp_path / "latest").root == bundle.root


def test_reading_changes_nothing_on_disk(bundle: Bundle) -> None:
    def stamps() -> dict[str, tuple[int, int, int]]:
        paths = [bundle.root, *bundle.root.rglob("*")]
        return {str(p): (p.stat().st_mtime_ns, p.stat().st_ctime_ns, p.stat().st_ino) for p in paths}

    for path in (bundle.root, *bundle.root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = stamps()
    opened = Bundle.open(bundle.root)
    opened.verify()
    opened.path("model/step.onnx")
    opened.read_arrays("golden/steps.npz")
    assert stamps() == before
    for path in (bundle.root, *(p for p in bundle.root.rglob("*") if p.is_dir())):
        path.chmod(0o755)


# --------------------------------------------------------------------------------------------------- creating


def test_what_exists_is_not_overwritten_unless_asked_and_only_if_it_is_a_bundle(
    bundle: Bundle, tmp_path: pathlib.Path
) -> None:
    before = tree(tmp_path)
    with pytest.raises(InvalidInput, match="exists already"), Bundle.create(bundle.root, overwrite=False):
        pass
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("years of work")
    (tmp_path / "folder" / "manifest.json").write_text('{"name": "a web page"}')
    (tmp_path / "file").write_text("x")
    for other in ("folder", "file"):
        with pytest.raises(InvalidInput, match="no Lehr bundle"), Bundle.create(tmp_path / other, overwrite=True):
            pass
    assert (tmp_path / "folder" / "thesis.tex").read_text() == "years of work"
    assert tree(bundle.root) == {k.split("/", 1)[1]: v for k, v in before.items()}


def test_overwriting_leaves_the_old_bundle_until_the_end_and_nothing_of_it_after(bundle: Bundle) -> None:
    with bundle.edit() as edit:
        edit.add_bytes("engines/x/plan", b"plan")
        edit.set_manifest(parity={"x": 1})
    with Bundle.create(bundle.root, overwrite=True) as edit:
        fill(edit)
        edit.add_bytes("model/step.onnx", b"new graph")
        assert Bundle.open(bundle.root).read_bytes("model/step.onnx", 99) == b"graph"
    new = Bundle.open(bundle.root)
    new.verify()
    assert new.names("engines") == []
    assert new.manifest.parity == {}
    assert new.read_bytes("model/step.onnx", 99) == b"new graph"
    assert set(tree(bundle.root)) == {*new.names(), "manifest.json"}


@pytest.mark.parametrize("damage", ["schema", "missing", "link"])
def test_a_bundle_that_cannot_be_opened_can_be_overwritten(bundle: Bundle, tmp_path: pathlib.Path, damage: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "step.onnx").write_bytes(b"not to be touched")
    if damage == "schema":
        rewrite(bundle.root, lambda data: data.update(schema_version=99))
    else:
        (bundle.root / "model").rename(tmp_path / "moved")
    if damage == "link":
        (bundle.root / "model").symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError):
        Bundle.open(bundle.root)
    with Bundle.create(bundle.root, overwrite=True) as edit:
        fill(edit)
    Bundle.open(bundle.root).verify()
    assert tree(tmp_path / "outside") == {"step.onnx": b"not to be touched"}


def test_a_place_that_is_not_there_or_is_a_bundle_is_refused(bundle: Bundle, tmp_path: pathlib.Path) -> None:
    with pytest.raises(InvalidInput, match="there is no folder"), Bundle.create(tmp_path / "a/b.lehr", overwrite=False):
        pass
    with pytest.raises(InvalidInput, match="another bundle"), Bundle.create(bundle.root / "model/b", overwrite=False):
        pass
    bundle.verify()


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_interrupted_creation_leaves_nothing(root: pathlib.Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), Bundle.create(root, overwrite=False) as edit, ending_with(failure):
        fill(edit)
    assert not list(root.parent.iterdir())


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError, SystemExit])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_edit_changes_nothing(bundle: Bundle, failure: type[BaseException], overwrite: bool) -> None:
    before = tree(bundle.root)
    block = Bundle.create(bundle.root, overwrite=True) if overwrite else bundle.edit()
    with pytest.raises(failure), block as edit, ending_with(failure):
        change_much(edit)
    assert tree(bundle.root) == before
    bundle.verify()


def test_a_place_taken_in_the_meantime_is_not_overwritten(root: pathlib.Path) -> None:
    def take_the_place(edit: Edit) -> None:
        fill(edit)
        root.mkdir()
        (root / "thesis.tex").write_text("years of work")

    with pytest.raises(InvalidInput, match="in the meantime"), Bundle.create(root, overwrite=False) as edit:
        take_the_place(edit)
    assert tree(root.parent) == {"m.lehr/thesis.tex": b"years of work"}


# --------------------------------------------------------------------------------------------- a disk that fails


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, owner: Any, call: str, number: int, only: str = "") -> Iterator[None]:
    """Let ``owner.call`` fail with ``number`` for paths that hold ``only``."""
    original = getattr(owner, call)

    def fail(target: Any, *args: Any, **kwargs: Any) -> Any:
        if only in str(target):
            raise OSError(number, os.strerror(number), str(target))
        return original(target, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, call, fail)
        yield


@pytest.mark.parametrize(
    ("number", "error"), [(errno.ENOSPC, RunFailed), (errno.EDQUOT, RunFailed), (errno.EIO, RunFailed)]
)
def test_a_full_or_broken_disk_is_said_and_leaves_no_trace(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, number: int, error: type[LehrError]
) -> None:
    before = tree(bundle.root.parent)
    with (
        failing(monkeypatch, os, "fsync", number),
        pytest.raises(error, match=os.strerror(number)),
        bundle.edit() as edit,
    ):
        edit.add_bytes("a", b"")
    with failing(monkeypatch, os, "fsync", number), pytest.raises(error, match=os.strerror(number)):
        make(bundle.root.with_name("b.lehr"))
    assert tree(bundle.root.parent) == before
    assert len(list(bundle.root.parent.iterdir())) == 1


def test_a_full_disk_met_by_the_callers_own_writing_is_said_too(bundle: Bundle) -> None:
    before = tree(bundle.root)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        pytest.raises(RunFailed, match="disk is full"),
        bundle.edit() as edit,
        edit.add_file("a") as path,
        ending_with(full),
    ):
        path.write_bytes(b"half of it")
    with pytest.raises(FileNotFoundError), bundle.edit(), ending_with(FileNotFoundError()):
        pass  # an error that is the caller's own stays what it is
    assert tree(bundle.root) == before


def test_a_place_that_cannot_be_written_is_a_wrong_argument(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (errno.EROFS, errno.EACCES):
        with (
            failing(monkeypatch, os, "open", number, "lehr-lock"),
            pytest.raises(InvalidInput, match="writable"),
            bundle.edit(),
        ):
            pass
        with failing(monkeypatch, pathlib.Path, "mkdir", number), pytest.raises(InvalidInput, match="writable"):
            make(bundle.root.with_name("b.lehr"))
    assert len(list(bundle.root.parent.iterdir())) == 1


# ------------------------------------------------------------------------------------------------- many at once


def test_two_writers_at_once_fail_clearly(bundle: Bundle, run_python: Callable[..., str]) -> None:
    code = f"""
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import LehrError
b = Bundle.open({str(bundle.root)!r})
try:
    with b.edit() as edit:
        edit.add_bytes("theirs", b"x")
except LehrError as e:
    print(type(e).__name__, e)
else:
    print("written")
"""
    with bundle.edit() as edit:
        edit.add_bytes("ours", b"x")
        answer = run_python(code)
        with pytest.raises(InvalidInput, match="being written"), Bundle.create(bundle.root, overwrite=True):
            pass
    assert answer.startswith("InvalidInput")
    assert "being written by another process" in answer
    assert bundle.names("ours") == ["ours"]
    assert run_python(code) == "written\n"
    assert Bundle.open(bundle.root).names("theirs") == ["theirs"]


def test_a_lock_on_a_file_that_was_deleted_meanwhile_is_not_taken(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        if not calls:  # its owner ends between our opening and our locking, and a third writer comes
            (tmp_path / ".lehr-lock").unlink()
            (tmp_path / ".lehr-lock").touch()
        calls.append(descriptor)
        original(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = commit.lock_folder(tmp_path)
    assert len(calls) == 2
    assert os.path.samestat(os.fstat(lock), (tmp_path / ".lehr-lock").stat())
    commit.unlock_folder(tmp_path, lock)
    assert not list(tmp_path.iterdir())


def test_opening_succeeds_at_any_moment_of_another_writers_edits(bundle: Bundle) -> None:
    def write() -> None:
        for turn in range(25):
            with Bundle.open(bundle.root).edit() as edit:
                edit.add_bytes("model/step.onnx", b"x" * turn)
                edit.add_bytes(f"turn-{turn}/file", b"x")
                edit.remove(f"turn-{turn - 1}")

    writer = threading.Thread(target=write)
    writer.start()
    opened = 0
    while writer.is_alive():
        Bundle.open(bundle.root)
        opened += 1
    writer.join()
    assert opened > 25
    last = Bundle.open(bundle.root)
    last.verify()
    assert last.names("turn-") == ["turn-24/file"]


def test_strays_are_ignored_by_readers_and_collected_by_the_next_writer(bundle: Bundle, tmp_path: pathlib.Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").write_bytes(b"x")
    (bundle.root / ".lehr-tmp-1-0000000000000000" / "model").mkdir(parents=True)
    (bundle.root / ".lehr-tmp-1-0000000000000000" / "model" / "step.onnx").write_bytes(b"half")
    (bundle.root / ".lehr-lock").touch()  # a killed writer's: it holds nothing
    (bundle.root / "model" / "stray").write_bytes(b"x")
    (bundle.root / "stray" / "deep").mkdir(parents=True)
    (bundle.root / "link").symlink_to(tmp_path / "outside")
    other = Bundle.open(bundle.root)
    assert other.names() == bundle.names()
    with other.edit():
        pass
    assert {p.name for p in bundle.root.iterdir()} == {"manifest.json", "model", "golden"}
    assert set(tree(bundle.root)) == {*bundle.names(), "manifest.json"}
    assert (tmp_path / "outside" / "kept").exists()


def test_abandoned_new_bundles_are_collected_but_not_those_of_a_living_process(tmp_path: pathlib.Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = {
        "dead": f".lehr-tmp-{gone.pid}-0123456789abcdef",
        "alive": f".lehr-tmp-{os.getpid()}-0123456789abcdef",
        "locked": f".lehr-tmp-{gone.pid}-fedcba9876543210",  # of a process in another container, say
        "other": f".lehr-tmp-{gone.pid}-mine",
    }
    for name in names.values():
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "weights").write_bytes(b"x")
    lock = commit.lock_folder(tmp_path / names["locked"])
    make(tmp_path / "m.lehr")
    commit.unlock_folder(tmp_path / names["locked"], lock)
    assert {p.name for p in tmp_path.iterdir()} == {names["alive"], names["locked"], names["other"], "m.lehr"}


# ----------------------------------------------------------------------------------------- an interrupted commit


def begin_commit(bundle: Bundle) -> pathlib.Path:
    """Leave a bundle as a writer does that is killed right after its edit took effect."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commit, "_finish", lambda *_: None)
        with bundle.edit() as edit:
            edit.add_bytes("model/step.onnx", b"new graph")
            patch.setattr("lehr.runtime.bundle.load", lambda _: bundle.manifest)
    return bundle.root / ".lehr-commit"


def test_an_interrupted_commit_is_finished_on_opening(bundle: Bundle) -> None:
    begin_commit(bundle)
    assert (bundle.root / "model/step.onnx").read_bytes() == b"graph"
    new = Bundle.open(bundle.root)
    assert new.read_bytes("model/step.onnx", 99) == b"new graph"
    new.verify()
    assert set(tree(bundle.root)) == {*new.names(), "manifest.json"}


def test_an_interrupted_commit_on_a_read_only_disk_is_a_bundle_error(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_commit(bundle)
    before = tree(bundle.root)
    monkeypatch.setattr(commit, "_PATIENCE", 0.05)
    with (
        failing(monkeypatch, os, "open", errno.EROFS, "lehr-lock"),
        pytest.raises(BundleError, match="where the folder is writable"),
    ):
        Bundle.open(bundle.root)
    assert tree(bundle.root) == before


def test_a_forged_commit_cannot_lead_out_of_the_bundle(bundle: Bundle, tmp_path: pathlib.Path) -> None:
    staged = begin_commit(bundle)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "step.onnx").write_bytes(b"not to be touched")
    (bundle.root / "model").rename(tmp_path / "model")
    (bundle.root / "model").symlink_to(tmp_path / "outside")
    (staged / "golden").symlink_to(tmp_path / "outside")
    (staged / "evil").write_bytes(b"x")
    (staged / ".lehr-lock").write_bytes(b"x")
    with pytest.raises(BundleError, match="missing"):  # the weights went with the folder
        Bundle.open(bundle.root)
    assert tree(tmp_path / "outside") == {"step.onnx": b"not to be touched"}
    assert (bundle.root / "model/step.onnx").read_bytes() == b"new graph"
    assert not (bundle.root / "evil").exists()
    assert not (bundle.root / "model").is_symlink()
    assert not (bundle.root / "golden").is_symlink()


def test_a_forged_commit_cannot_replace_a_folder_by_a_link(bundle: Bundle, tmp_path: pathlib.Path) -> None:
    (begin_commit(bundle) / "golden").symlink_to(tmp_path)
    Bundle.open(bundle.root).verify()
    assert Bundle.open(bundle.root).read_json("golden/index.json")["tier"] == "steps"


def test_a_commit_that_is_a_link_or_damaged_is_a_bundle_error(bundle: Bundle, tmp_path: pathlib.Path) -> None:
    staged = begin_commit(bundle)
    staged.rename(tmp_path / "elsewhere")
    staged.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="links are refused"):
        Bundle.open(bundle.root)
    staged.unlink()
    (tmp_path / "elsewhere").rename(staged)
    (staged / "manifest.json").write_bytes(b"{")
    with pytest.raises(BundleError, match="damaged"):
        Bundle.open(bundle.root)
    with Bundle.create(bundle.root, overwrite=True) as edit:  # what cannot be repaired can be replaced
        fill(edit)
    Bundle.open(bundle.root).verify()
    assert not os.path.lexists(staged)
