"""Writing bundles: files are gathered under temporary names, then become part of the bundle all at once."""

from __future__ import annotations

import errno
import os
import pathlib
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Any

import numpy.typing as npt

from lehr.runtime.arrays import write_arrays
from lehr.runtime.commit import (
    LOCK_NAME,
    MAX_MANIFEST_BYTES,
    check_listed,
    collect_abandoned,
    commit,
    finish_interrupted,
    lock_folder,
    looks_like_bundle,
    parse_manifest,
    read_manifest,
    remove_tree,
    sweep,
    sweep_bundle,
    temporary_name,
    unlock_folder,
    writing,
)
from lehr.runtime.errors import BundleError, InvalidInput
from lehr.runtime.files import checked_path, full_disk_errors, storage_errors, sync_file, sync_folder
from lehr.runtime.jsonlike import encode_json
from lehr.runtime.manifest import FileEntry, GraphEntry, Manifest, StageEntry
from lehr.runtime.names import MANIFEST_NAME, folders_of, name_problem
from lehr.runtime.pipeline_spec import PipelineSpec
from lehr.runtime.spec import ModelSpec

# ------------------------------------------------------------------------------------------------- one edit


class Edit:
    """Changes to one bundle, none of them visible before the ``with`` block that made this object ends well.

    Paths handed out lie in a temporary folder with the bundle's layout, so a graph and the weights it refers to
    are neighbours there as well, provided that both were added in this edit.
    """

    def __init__(self, root: pathlib.Path, staging: pathlib.Path, before: Manifest | None) -> None:
        self._root = root
        self._staging = staging
        self._kept: dict[str, FileEntry] = {} if before is None else dict(before.files)
        self._added: dict[str, FileEntry] = {}
        self._folders: set[str] = set()
        self._open = True
        self._model = None if before is None else before.model
        self._source = None if before is None else before.source
        self._graphs: Mapping[str, GraphEntry] = {} if before is None else before.graphs
        self._versions: Mapping[str, str] = {} if before is None else before.versions
        self._command: tuple[str, ...] = () if before is None else before.command
        self._golden_tier = "none" if before is None else before.golden_tier
        self._parity: Mapping[str, Any] = {} if before is None else before.parity
        self._left_out: Mapping[str, FileEntry] = {} if before is None else before.left_out
        self._stages: Mapping[str, StageEntry] = {} if before is None else before.stages
        self._pipeline = None if before is None else before.pipeline

    # ----------------------------------------------------------------------------------------- adding files

    @contextmanager
    def add_file(self, name: str) -> Iterator[pathlib.Path]:
        """Yield a path to write the file's content to; it replaces a file of that name.

        Raises:
            InvalidInput: the name is not allowed, or nothing was written.
        """
        path = self._claim(name)
        done = False
        try:
            yield path
            if not path.is_file() or path.is_symlink():
                raise InvalidInput(f"{name!r} was added to {self._root}, but no file was written to the path given")
            with storage_errors(f"writing {name!r} of {self._root}"):
                self._added[name] = sync_file(path)
            done = True
        finally:
            if not done:
                self._added.pop(name, None)
                remove_tree(path)

    def add_bytes(self, name: str, data: bytes) -> None:
        with self.add_file(name) as path, storage_errors(f"writing {name!r} of {self._root}"):
            path.write_bytes(data)

    def add_json(self, name: str, value: Any) -> None:
        """Add ``value`` as JSON; raises InvalidInput for what JSON cannot hold, NaN and infinity included."""
        self.add_bytes(name, encode_json(value, name))

    def add_arrays(self, name: str, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Add arrays as ``.npz``; equal arrays give equal bytes."""
        with self.add_file(name) as path, storage_errors(f"writing {name!r} of {self._root}"):
            write_arrays(path, arrays)

    def folder(self, name: str) -> pathlib.Path:
        """A fresh, empty folder; what it holds when the edit ends replaces all that the bundle had under ``name``."""
        self._check_usable(name)
        self.remove(name)
        path = self._staging / name
        with storage_errors(f"making the folder {name!r} of {self._root}"):
            path.mkdir(parents=True)
        self._folders.add(name)
        return path

    # ---------------------------------------------------------------------------------- looking and removing

    def path(self, name: str) -> pathlib.Path:
        """Where a file that was in the bundle, or was added in this edit, can be read now.

        Raises:
            InvalidInput: there is no such file.
            BundleError: a file that was in the bundle is damaged.
        """
        self._check_usable(name)
        staged = self._staging / name
        if name in self._added or (self._in_folder(name) and staged.is_file()):
            return staged
        if name not in self._kept:
            raise InvalidInput(f"{self._root} has no file {name!r}, nor was it added")
        return checked_path(self._root, name, self._kept[name])

    def entry(self, name: str) -> FileEntry:
        """Size and hash of a file as it stands in this edit; one in a fresh folder is read for it.

        Raises:
            InvalidInput: there is no such file.
        """
        if name in self._added:
            return self._added[name]
        path = self.path(name)
        return sync_file(path) if path.is_relative_to(self._staging) else self._kept[name]

    def remove(self, name: str) -> list[str]:
        """Remove a file, or all files of a folder, and return the names of those that were there.

        ``name`` is matched in whole parts: "engines/cpu" is the folder, not "engines/cpu-2".
        """
        name = name.rstrip("/")
        self._check_usable(name)
        gone = [known for known in (*self._kept, *self._added) if known == name or known.startswith(f"{name}/")]
        for known in gone:
            self._kept.pop(known, None)
            self._added.pop(known, None)
        self._folders = {folder for folder in self._folders if folder != name and not folder.startswith(f"{name}/")}
        with storage_errors(f"removing {name!r} from an edit of {self._root}"):
            remove_tree(self._staging / name)
        return sorted(set(gone))

    def set_manifest(
        self,
        *,
        model: ModelSpec | None = None,
        graphs: Mapping[str, GraphEntry] | None = None,
        source: str | None = None,
        versions: Mapping[str, str] | None = None,
        command: tuple[str, ...] | None = None,
        golden_tier: str | None = None,
        parity: Mapping[str, Any] | None = None,
        left_out: Mapping[str, FileEntry] | None = None,
        stages: Mapping[str, StageEntry] | None = None,
        pipeline: PipelineSpec | None = None,
    ) -> None:
        """Replace fields of the manifest; None leaves one as it is. A new bundle needs ``model`` and ``source``."""
        self._model = self._model if model is None else model
        self._graphs = self._graphs if graphs is None else dict(graphs)
        self._source = self._source if source is None else source
        self._versions = self._versions if versions is None else dict(versions)
        self._command = self._command if command is None else command
        self._golden_tier = self._golden_tier if golden_tier is None else golden_tier
        self._parity = self._parity if parity is None else dict(parity)
        self._left_out = self._left_out if left_out is None else dict(left_out)
        self._stages = self._stages if stages is None else dict(stages)
        self._pipeline = self._pipeline if pipeline is None else pipeline

    # ------------------------------------------------------------------------------------------- at the end

    def finish(self) -> Manifest:
        """Write the new manifest beside the new files and flush all of it to the disk; called when the block ends.

        Raises:
            InvalidInput: the manifest lacks a field or has a wrong one, or a folder holds what is no plain file.
        """
        self._open = False
        for folder in sorted(self._folders):
            for name in self._walk(folder):
                if name not in self._added:
                    self._added[name] = sync_file(self._staging / name)
        files = {**self._kept, **self._added}
        if self._model is None or self._source is None:
            raise InvalidInput(f"{self._root}: a new bundle needs set_manifest(model=…, source=…)")
        manifest = Manifest(
            model=self._model,
            graphs=self._graphs,
            files=files,
            source=self._source,
            versions=self._versions,
            command=self._command,
            golden_tier=self._golden_tier,
            parity=self._parity,
            left_out={name: entry for name, entry in self._left_out.items() if name not in files},
            stages=self._stages,
            pipeline=self._pipeline,
        )
        text = encode_json(manifest.to_json(), "manifest")
        if len(text) > MAX_MANIFEST_BYTES:
            raise InvalidInput(f"{self._root}: the manifest would have {len(text)} bytes, at most {MAX_MANIFEST_BYTES}")
        try:
            parse_manifest(self._root, text)
        except BundleError as e:
            raise InvalidInput(f"set_manifest was given a value that cannot be read back: {e}") from e
        sweep(self._staging, {*self._added, LOCK_NAME})  # what was written beside the paths handed out
        (self._staging / MANIFEST_NAME).write_bytes(text)
        sync_file(self._staging / MANIFEST_NAME)
        for folder_path, _, _ in os.walk(self._staging):
            sync_folder(pathlib.Path(folder_path))
        return manifest

    def close(self) -> None:
        """Refuse further use."""
        self._open = False

    def check_added(self, expected: Mapping[str, FileEntry]) -> None:
        """Raise BundleError unless the files added so far have the sizes and hashes of ``expected``."""
        for name in sorted({*self._added, *expected}):
            if self._added.get(name) != expected.get(name):
                raise BundleError(
                    f"{self._root}: {name!r} is not the file that was recorded (its SHA-256 differs). "
                    "It was altered or damaged: copy it again."
                )

    def _claim(self, name: str) -> pathlib.Path:
        self._check_usable(name)
        path = self._staging / name
        if path.is_dir():
            raise InvalidInput(f"{name!r} is a folder of this edit and cannot be a file too")
        for folder in folders_of(name):
            if folder in self._added:
                raise InvalidInput(f"{folder!r} is a file of this edit and cannot be a folder, for {name!r}, too")
        with storage_errors(f"writing {name!r} of {self._root}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
        self._added.pop(name, None)
        return path

    def _check_usable(self, name: str) -> None:
        if not self._open:
            raise InvalidInput(f"this edit of {self._root} has ended; begin another one")
        if problem := name_problem(name):
            raise InvalidInput(f"{name!r} cannot be a file or folder in a bundle: {problem}")

    def _in_folder(self, name: str) -> bool:
        return any(folder in self._folders for folder in folders_of(name))

    def _walk(self, folder: str) -> Iterator[str]:
        for entry in sorted(os.scandir(self._staging / folder), key=lambda entry: entry.name):
            name = f"{folder}/{entry.name}"
            if problem := name_problem(name):
                raise InvalidInput(f"{name!r} cannot be a file or folder in a bundle: {problem}")
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(name)
            elif stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
                yield name
            else:
                raise InvalidInput(f"{name!r} is no plain file (links are refused); write a copy instead")


# ------------------------------------------------------------------------------------------------- the blocks


class Start(Enum):
    """What an edit of an existing bundle starts from."""

    AS_IT_IS = "as it is"
    EMPTY = "empty"  # every file of the old state goes


@contextmanager
def edit_in_place(root: pathlib.Path, start: Start) -> Iterator[tuple[Edit, Manifest | None]]:
    """Lock an existing bundle and yield an edit and the manifest it starts from; commit if the block ends well."""
    with writing(root):
        staging = root / temporary_name()
        with storage_errors(f"editing {root}"):
            before = _begin(root, start)
        edit = Edit(root, staging, before)
        try:
            with storage_errors(f"editing {root}"):
                staging.mkdir()
            with full_disk_errors(f"editing {root}"):
                yield edit, before
            with storage_errors(f"editing {root}"):
                commit(root, staging, edit.finish())
        finally:
            edit.close()
            shutil.rmtree(staging, ignore_errors=True)


def _begin(root: pathlib.Path, start: Start) -> Manifest | None:
    try:
        finish_interrupted(root)
        before = parse_manifest(root, read_manifest(root))
        check_listed(root, before)
    except BundleError:
        if start is Start.EMPTY:  # a damaged bundle, or one of another schema, may be replaced
            return None
        raise
    sweep_bundle(root, before)
    return None if start is Start.EMPTY else before


@contextmanager
def make_new(root: pathlib.Path) -> Iterator[Edit]:
    """Yield an edit of a bundle that does not exist yet; it appears, whole, if the block ends well."""
    parent = root.parent
    if not parent.is_dir():
        raise InvalidInput(f"cannot make {root}: there is no folder {parent}. Make it first, or choose another.")
    if any(looks_like_bundle(folder) for folder in root.parents):
        raise InvalidInput(f"cannot make {root}: it lies inside another bundle. Choose a place outside of it.")
    staging, lock = parent / temporary_name(), -1
    edit = Edit(root, staging, None)
    try:
        with storage_errors(f"making {root}"):
            collect_abandoned(parent)
            staging.mkdir()
            lock = lock_folder(staging)
        with full_disk_errors(f"making {root}"):
            yield edit
        with storage_errors(f"making {root}"):
            edit.finish()
            _appear(staging, root)
            sync_folder(parent)
    finally:
        edit.close()
        if lock >= 0:
            unlock_folder(staging if staging.exists() else root, lock)
        shutil.rmtree(staging, ignore_errors=True)


def _appear(staging: pathlib.Path, root: pathlib.Path) -> None:
    try:
        staging.replace(root)
    except OSError as e:
        if e.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise InvalidInput(f"{root} was made by something else in the meantime; nothing was overwritten.") from e
        raise
