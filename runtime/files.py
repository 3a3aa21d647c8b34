"""Files of a bundle on disk: nothing but regular files behind real folders, with the bytes that were recorded.

Guards against a bundle that someone else made or that a disk damaged, not against someone who changes it while
it is being read.
"""

from __future__ import annotations

import errno
import hashlib
import os
import pathlib
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lehr.runtime.errors import BundleError, InvalidInput, LehrError, RunFailed
from lehr.runtime.manifest import FileEntry
from lehr.runtime.names import folders_of

_CHUNK = 1 << 20
_RACY_NS = 100_000_000  # a file changed so recently could change again within its time stamp's resolution

# ------------------------------------------------------------------------------------------- finding a file


def locate(root: pathlib.Path, name: str) -> os.stat_result:
    """Status of the regular file ``name`` under ``root``.

    Raises:
        BundleError: it is missing, or it or a folder above it is a link or something else that it must not be.
    """
    try:
        for folder in folders_of(name):
            if not stat.S_ISDIR(os.lstat(root / folder).st_mode):
                raise BundleError(f"{root}: {folder!r} is no real folder (links are refused). Copy the bundle again.")
        status = os.lstat(root / name)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise BundleError(f"{root}: {name!r} is missing. The bundle is incomplete: copy, export or build again.") from e
    except OSError as e:
        raise BundleError(f"{root}: {name!r} cannot be read ({e.strerror}). Check the folder's permissions.") from e
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{root}: {name!r} is no regular file (links are refused). Copy the bundle again.")
    return status


def check_size(root: pathlib.Path, name: str, entry: FileEntry) -> os.stat_result:
    """Status of a listed file; raises BundleError if it is missing, a link, or not of the recorded size."""
    status = locate(root, name)
    if status.st_size != entry.bytes:
        raise BundleError(
            f"{root}: {name!r} has {status.st_size} bytes, recorded were {entry.bytes}. "
            "It is truncated or was altered: copy, export or build again."
        )
    return status


@contextmanager
def _opened(root: pathlib.Path, name: str) -> Iterator[int]:
    """A descriptor of a regular file; what the system refuses while it is read is a BundleError."""
    locate(root, name)
    try:
        descriptor = os.open(root / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as e:
        raise BundleError(f"{root}: {name!r} cannot be read ({e.strerror}). Check the disk and permissions.") from e


# ------------------------------------------------------------------------------------------- checking bytes


def hash_descriptor(descriptor: int) -> FileEntry:
    """SHA-256 and size of what an open file holds from its current position on."""
    digest, size, buffer = hashlib.sha256(), 0, bytearray(_CHUNK)
    while count := os.readv(descriptor, [buffer]):
        digest.update(memoryview(buffer)[:count])
        size += count
    return FileEntry(sha256=digest.hexdigest(), bytes=size)


_Identity = tuple[int, int, int, int, int]
_checked: dict[str, tuple[_Identity, str]] = {}  # path -> what the file was when its hash was taken, and the hash


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def verify_file(root: pathlib.Path, name: str, entry: FileEntry) -> None:
    """Hash a listed file; raises BundleError unless it is what was recorded."""
    check_size(root, name, entry)
    with _opened(root, name) as descriptor:
        status = os.fstat(descriptor)
        found = hash_descriptor(descriptor)
    if found != entry:
        raise altered(root, name)
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _RACY_NS:
        _checked[str(root / name)] = (_identity(status), entry.sha256)


def checked_path(root: pathlib.Path, name: str, entry: FileEntry) -> pathlib.Path:
    """Path of a listed file, hashed unless this process has hashed the very same file before."""
    status = check_size(root, name, entry)
    if _checked.get(str(root / name)) != (_identity(status), entry.sha256):
        verify_file(root, name, entry)
    return root / name


def altered(root: pathlib.Path, name: str) -> BundleError:
    """The error for a listed file whose hash is another."""
    return BundleError(
        f"{root}: {name!r} is not the file that was recorded (its SHA-256 differs). "
        "It was altered or damaged: copy the bundle again, or export/build again."
    )


def read_bounded(root: pathlib.Path, name: str, limit: int) -> bytes:
    """Bytes of a regular file; raises BundleError if it has more than ``limit``, before reading them."""
    with _opened(root, name) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise BundleError(f"{root}: {name!r} has {size} bytes, at most {limit} are read. Export or build it again.")
        parts, left = [], limit + 1
        while left and (part := os.read(descriptor, min(left, _CHUNK))):
            parts.append(part)
            left -= len(part)
    if not left:
        raise BundleError(f"{root}: {name!r} grew beyond {limit} bytes while it was read. Try again.")
    return b"".join(parts)


# -------------------------------------------------------------------------------------------------- writing


def sync_file(path: pathlib.Path) -> FileEntry:
    """Flush a file to the disk; return its hash and size."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
        return hash_descriptor(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: pathlib.Path) -> None:
    """Flush a folder's entries to the disk, so that a rename survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EROFS, errno.EACCES, errno.EPERM)


def _storage_failure(failure: OSError, what: str) -> LehrError:
    if failure.errno in _FULL:
        return RunFailed(f"{what} failed, the disk is full ({failure}). Free some space and run it again.")
    if failure.errno in _DENIED:
        return InvalidInput(f"{what} failed ({failure}). The folder must be writable: choose another or allow it.")
    return RunFailed(f"{what} failed ({failure}). Check the disk, and that nothing else writes there.")


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn what the system refuses into RunFailed (disk full, input/output) or InvalidInput (not writable)."""
    try:
        yield
    except OSError as e:
        raise _storage_failure(e, what) from e


@contextmanager
def full_disk_errors(what: str) -> Iterator[None]:
    """As :func:`storage_errors` around code that is not ours: only errors that tell of the disk are turned."""
    try:
        yield
    except OSError as e:
        if e.errno in (*_FULL, errno.EROFS):
            raise _storage_failure(e, what) from e
        raise
