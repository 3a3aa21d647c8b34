"""How a bundle changes on disk: all at once, whenever the process is killed.

An edit is prepared in a folder of its own inside the bundle, laid out as the bundle is, with its new manifest.
Renaming that folder to ``.lehr-commit`` is the moment at which the edit happens. What follows only tidies up:
files are moved over the old ones, the manifest last, and what is no longer listed is deleted. A kill before the
rename leaves the old state and strays; a kill after it leaves a folder from which the next to open the bundle
finishes. Moving a file twice does nothing, so finishing may itself be killed and repeated. A plain rename per file
would not do: between two renames a replaced file disagrees with the hash that the old manifest holds.
"""

from __future__ import annotations

import fcntl
import os
import pathlib
import re
import shutil
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

from lehr.runtime.errors import BundleError, InvalidInput
from lehr.runtime.files import check_size, read_bounded, storage_errors, sync_folder
from lehr.runtime.jsonlike import decode_json
from lehr.runtime.manifest import Manifest
from lehr.runtime.names import MANIFEST_NAME, RESERVED_PREFIX, folders_of

MAX_MANIFEST_BYTES = 16 << 20
COMMIT_NAME = f"{RESERVED_PREFIX}commit"
LOCK_NAME = f"{RESERVED_PREFIX}lock"

_TEMPORARY = re.compile(re.escape(RESERVED_PREFIX) + r"tmp-(?P<pid>\d{1,9})-[0-9a-f]{16}")
_PATIENCE = 5.0  # seconds a reader waits for a commit in progress, which is renames only
_POLL = 0.02  # seconds

# ------------------------------------------------------------------------------------------------- reading


def parse_manifest(root: pathlib.Path, data: bytes) -> Manifest:
    """Read the text of a manifest; raises BundleError."""
    try:
        return Manifest.from_json(decode_json(data))
    except ValueError as e:
        raise BundleError(f"{root}: {MANIFEST_NAME} is damaged ({e}). Copy the bundle again or export it.") from e
    except BundleError as e:
        raise BundleError(f"{root}: {e}") from e


def read_manifest(root: pathlib.Path) -> bytes:
    """Text of a bundle's manifest; raises BundleError if there is none or it is too large."""
    if not os.path.lexists(root / MANIFEST_NAME):
        raise BundleError(
            f"{root} holds no {MANIFEST_NAME}, so it is no Lehr bundle or an incomplete one. "
            "Make one with: lehr export SOURCE -o NAME.lehr"
        )
    return read_bounded(root, MANIFEST_NAME, MAX_MANIFEST_BYTES)


def check_listed(root: pathlib.Path, manifest: Manifest) -> None:
    """Raise BundleError unless every listed file is there, regular, behind real folders and of its size."""
    for name, entry in manifest.files.items():
        check_size(root, name, entry)


def load(root: pathlib.Path) -> Manifest:
    """The manifest of a bundle whose listed files are all there, after a commit in progress has ended.

    Raises:
        BundleError: see :func:`parse_manifest` and :func:`check_listed`; or an edit was interrupted while it was
            being committed and cannot be finished here.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        settle(root)
        text = read_manifest(root)
        manifest = parse_manifest(root, text)
        try:
            check_listed(root, manifest)
        except BundleError:
            # A writer may have committed between the two lines above; then the files belong to a newer manifest.
            if time.monotonic() > deadline or (not unfinished(root) and read_manifest(root) == text):
                raise
        else:
            return manifest


def looks_like_bundle(folder: pathlib.Path) -> bool:
    """Whether ``folder`` holds a manifest of any schema; used before something is overwritten."""
    try:
        data = decode_json(read_bounded(folder, MANIFEST_NAME, MAX_MANIFEST_BYTES))
    except (BundleError, ValueError):
        return False
    return isinstance(data, dict) and "schema_version" in data and "files" in data


# ------------------------------------------------------------------------------------------------- the lock


@contextmanager
def writing(root: pathlib.Path) -> Iterator[None]:
    """Be the only writer of an existing bundle.

    Raises:
        InvalidInput: another writer is at work, or the bundle cannot be written.
    """
    with storage_errors(f"locking {root}"):
        lock = lock_folder(root)
    try:
        yield
    finally:
        unlock_folder(root, lock)


def lock_folder(folder: pathlib.Path) -> int:
    """Take the folder's lock, at once or not at all; return its descriptor. The system drops it with the process."""
    while True:
        lock = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.lstat(folder / LOCK_NAME)):
                    return lock
        except BlockingIOError as e:
            os.close(lock)
            raise InvalidInput(
                f"{folder} is being written by another process or edit. Wait for its end and try again."
            ) from e
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # its owner deleted the file between our open and our flock: it guards nothing


def unlock_folder(folder: pathlib.Path, lock: int) -> None:
    """Give back what :func:`lock_folder` took; ``folder`` may have been renamed in between."""
    try:
        with suppress(OSError):  # a lock file left behind is free, and harmless
            if os.path.samestat(os.fstat(lock), os.lstat(folder / LOCK_NAME)):
                (folder / LOCK_NAME).unlink()
    finally:
        os.close(lock)


# ----------------------------------------------------------------------------------------------- committing


def temporary_name() -> str:
    """A name that :func:`collect_abandoned` knows, and knows whose it is."""
    return f"{RESERVED_PREFIX}tmp-{os.getpid()}-{os.urandom(8).hex()}"


def commit(root: pathlib.Path, staging: pathlib.Path, manifest: Manifest) -> None:
    """Make what ``staging`` holds, flushed to the disk with its manifest, the state of the bundle. Needs the lock."""
    remove_tree(root / COMMIT_NAME)  # emptied long ago, but its writer was killed before deleting it
    staging.replace(root / COMMIT_NAME)
    sync_folder(root)
    _finish(root, manifest)


def unfinished(root: pathlib.Path) -> bool:
    """Whether a commit was begun whose manifest is not in place yet."""
    return os.path.lexists(root / COMMIT_NAME / MANIFEST_NAME)


def finish_interrupted(root: pathlib.Path) -> None:
    """Finish what a killed writer committed, if there is something. Needs the lock.

    Raises:
        BundleError: ``.lehr-commit`` is none of ours: its manifest is damaged.
    """
    if unfinished(root):
        manifest = parse_manifest(root, read_bounded(root, f"{COMMIT_NAME}/{MANIFEST_NAME}", MAX_MANIFEST_BYTES))
        # Whoever made the bundle may have put links there.
        sweep(root / COMMIT_NAME, {*manifest.files, MANIFEST_NAME})
        _finish(root, manifest)


def settle(root: pathlib.Path) -> None:
    """Wait for a commit in progress, or finish one that was interrupted.

    Raises:
        BundleError: a writer takes too long, or finishing needs a right to write that this process lacks.
    """
    deadline = time.monotonic() + _PATIENCE
    while unfinished(root):
        refused = _try_to_finish(root)
        if refused is not None and time.monotonic() > deadline:
            raise BundleError(
                f"{root}: an edit is being committed, or was interrupted, and cannot be finished here ({refused}) "
                "Run lehr inspect on it where the folder is writable."
            ) from refused
        if refused is not None:
            time.sleep(_POLL)


def _try_to_finish(root: pathlib.Path) -> InvalidInput | None:
    """Finish an interrupted commit, or return why this process may not: another writes, or the folder is read-only."""
    try:
        with writing(root), storage_errors(f"finishing an interrupted edit of {root}"):
            finish_interrupted(root)
    except InvalidInput as e:
        return e
    return None


def _finish(root: pathlib.Path, manifest: Manifest) -> None:
    staged = root / COMMIT_NAME
    _merge(staged, root, skip=MANIFEST_NAME)
    (staged / MANIFEST_NAME).replace(root / MANIFEST_NAME)
    sync_folder(root)
    with suppress(OSError):  # the bundle is complete; what is left over is ignored, and swept by the next writer
        sweep_bundle(root, manifest)


def _merge(source: pathlib.Path, target: pathlib.Path, *, skip: str | None = None) -> None:
    """Move all of ``source`` into the folder ``target``, over what is there; makes no folder, so needs no space."""
    for staged in sorted(source.iterdir()):
        final = target / staged.name
        if staged.name == skip:
            continue
        if _is_folder(staged) and _is_folder(final):
            _merge(staged, final)
            continue
        if _is_folder(final) or _is_folder(staged):
            remove_tree(final)  # a file becomes a folder or the reverse; a rename alone replaces files only
        staged.replace(final)
    sync_folder(target)


def _is_folder(path: pathlib.Path) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


# -------------------------------------------------------------------------------------------------- sweeping


def sweep_bundle(root: pathlib.Path, manifest: Manifest) -> None:
    """Delete what is not part of the bundle. Needs the lock."""
    sweep(root, {*manifest.files, MANIFEST_NAME, LOCK_NAME})


def sweep(folder: pathlib.Path, keep: Collection[str]) -> None:
    """Delete what is under ``folder`` and no regular file named in ``keep``: strays, links, empty folders."""
    _sweep(folder, "", keep, {above for name in keep for above in folders_of(name)})


def remove_tree(path: pathlib.Path) -> None:
    """Delete a file, a link or a folder, if it is there; never what a link points to."""
    if _is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sweep(folder: pathlib.Path, prefix: str, keep: Collection[str], folders: Collection[str]) -> None:
    for entry in list(os.scandir(folder)):
        name = prefix + entry.name
        if entry.is_dir(follow_symlinks=False) and name in folders:
            _sweep(folder / entry.name, f"{name}/", keep, folders)
        elif not (entry.is_file(follow_symlinks=False) and name in keep):
            remove_tree(folder / entry.name)


def collect_abandoned(parent: pathlib.Path) -> None:
    """Delete new bundles in ``parent`` that were never finished because their process was killed.

    A process is taken for dead if this system knows none of its number and the lock it would hold is free (it may
    run in another container). What cannot be deleted is left.
    """
    for entry in list(os.scandir(parent)):
        match = _TEMPORARY.fullmatch(entry.name)
        if match is None or not entry.is_dir(follow_symlinks=False) or _alive(int(match["pid"])):
            continue
        with suppress(OSError, InvalidInput):
            lock = lock_folder(parent / entry.name)
            shutil.rmtree(entry.path, ignore_errors=True)
            os.close(lock)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
