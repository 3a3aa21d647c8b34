"""A bundle: the folder ``NAME.lehr`` that holds everything about one model, read without trust and changed at once.

Reading writes nothing and works on a read-only file system, with one exception: an edit that was killed while it
was being committed is finished by whoever opens the bundle next (see :mod:`lehr.runtime.commit`).
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt

from lehr.runtime.arrays import MAX_ARRAYS_BYTES, read_arrays
from lehr.runtime.commit import load, looks_like_bundle
from lehr.runtime.edit import Edit, Start, edit_in_place, make_new
from lehr.runtime.errors import BundleError, InvalidInput
from lehr.runtime.files import altered, check_size, checked_path, read_bounded, verify_file
from lehr.runtime.jsonlike import decode_json
from lehr.runtime.manifest import FileEntry, Manifest

__all__ = ["MAX_JSON_BYTES", "Bundle", "Edit"]

MAX_JSON_BYTES = 64 << 20


class Bundle:
    """An opened bundle.

    Attributes:
        root: the folder, absolute.
        manifest: what it holds, as of opening or of this object's last edit.
    """

    def __init__(self, root: pathlib.Path, manifest: Manifest) -> None:
        self.root = root
        self.manifest = manifest

    @classmethod
    def open(cls, root: str | os.PathLike[str]) -> Bundle:
        """Open a bundle; every listed file is there and has its size, hashes are checked when a file is used.

        Raises:
            InvalidInput: there is no such folder.
            BundleError: it is no bundle, is damaged or incomplete, holds links, or has another schema version.
        """
        folder = _resolve(root)
        if not folder.is_dir():
            what = "it is no folder" if folder.exists() else "there is no such folder"
            raise InvalidInput(f"no such bundle: {root} ({what}). Make one with: lehr export SOURCE -o {root}")
        return cls(folder, load(folder))

    # ------------------------------------------------------------------------------------------------ reading

    def names(self, prefix: str = "") -> list[str]:
        """Names of listed files that start with ``prefix``, a plain string, sorted."""
        return sorted(name for name in self.manifest.files if name.startswith(prefix))

    def path(self, name: str) -> pathlib.Path:
        """Absolute path of a listed file, whose hash is checked once a process.

        Raises:
            BundleError: no such file is listed, it is missing, or it is not what was recorded.
        """
        return checked_path(self.root, name, self._entry(name))

    def read_bytes(self, name: str, max_bytes: int) -> bytes:
        """Content of a listed file of at most ``max_bytes``; raises as :meth:`path` does."""
        entry = self._entry(name)
        check_size(self.root, name, entry)
        data = read_bounded(self.root, name, max_bytes)
        if FileEntry(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data)) != entry:
            raise altered(self.root, name)
        return data

    def read_json(self, name: str) -> Any:
        """Content of a listed JSON file of at most 64 MiB; raises as :meth:`path` does."""
        try:
            return decode_json(self.read_bytes(name, MAX_JSON_BYTES))
        except ValueError as e:
            raise BundleError(f"{self.root}: {name!r} is no JSON that Lehr reads ({e}). Make it again.") from e

    def read_arrays(self, name: str, *, max_bytes: int = MAX_ARRAYS_BYTES) -> dict[str, npt.NDArray[Any]]:
        """Arrays of a listed ``.npz`` file, of at most ``max_bytes`` together; raises as :meth:`path` does."""
        return read_arrays(self.path(name), max_bytes=max_bytes)

    def verify(self) -> None:
        """Hash every file anew; raises BundleError for the first that is not what was recorded."""
        for name in self.names():
            verify_file(self.root, name, self.manifest.files[name])

    def _entry(self, name: str) -> FileEntry:
        if name in self.manifest.left_out:
            raise BundleError(f"{self.root} has no file {name!r}: it was left out when the bundle was packed.")
        if name not in self.manifest.files:
            raise BundleError(f"{self.root} has no file {name!r}: the bundle was made without it. Make or export it.")
        return self.manifest.files[name]

    # ------------------------------------------------------------------------------------------------ writing

    @contextmanager
    def edit(self) -> Iterator[Edit]:
        """Change the bundle: ``with bundle.edit() as edit: …``; what raises inside leaves it as it was.

        ``manifest`` is read again when the block begins, under the lock, and is the new one after it.

        Raises:
            InvalidInput: another process is writing, or the bundle cannot be written.
            RunFailed: the disk is full.
        """
        with edit_in_place(self.root, Start.AS_IT_IS) as (edit, before):
            if before is not None:
                self.manifest = before
            yield edit
        self.manifest = load(self.root)

    @classmethod
    @contextmanager
    def create(cls, root: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Edit]:
        """Make a new bundle: ``with Bundle.create("m.lehr", overwrite=False) as edit: …``.

        With ``overwrite`` an existing bundle, of any schema version, is replaced, at the very end and all at once.

        Raises:
            InvalidInput: something is there that may not be overwritten, or the place cannot be written.
            RunFailed: the disk is full.
        """
        folder = _resolve(root)
        if not os.path.lexists(folder):
            with make_new(folder) as edit:
                yield edit
            return
        if not overwrite:
            raise InvalidInput(f"{root} exists already. Remove it, choose another name, or ask to overwrite it.")
        if not looks_like_bundle(folder):
            raise InvalidInput(f"{root} is no Lehr bundle, so it is not overwritten. Remove it or choose another name.")
        with edit_in_place(folder, Start.EMPTY) as (edit, _):
            yield edit


def _resolve(root: str | os.PathLike[str]) -> pathlib.Path:
    try:
        return pathlib.Path(root).resolve()
    except (OSError, RuntimeError, ValueError) as e:
        raise InvalidInput(f"{os.fspath(root)!r} is no usable path ({e})") from e
