"""What one machine needs of a bundle, as one archive: an engine or a build kit, tables, and golden data if asked for.

The archive is a plain zip file without compression (plans and weights do not compress), of a folder that is a bundle
again: its manifest lists what is there and, under ``left_out``, the files that the engine was built from, whose hashes
still bind it. The same bundle gives the same bytes. An archive is read as hostile: stored regular files only, each
listed, none twice, none larger than recorded, every hash checked before the bundle appears.
"""

from __future__ import annotations

import shutil
import stat
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from lehr.runtime.bundle import Bundle
from lehr.runtime.calibrated import RECORD, calibrated_folder, recipe_of
from lehr.runtime.commit import MAX_MANIFEST_BYTES, parse_manifest
from lehr.runtime.engine import EngineRecord
from lehr.runtime.errors import BundleError, InvalidInput
from lehr.runtime.files import storage_errors
from lehr.runtime.jsonlike import encode_json
from lehr.runtime.kits import KitRecord
from lehr.runtime.manifest import Manifest
from lehr.runtime.names import MANIFEST_NAME

SUFFIX = ".zip"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first that a zip file can say; time stamps would make equal archives differ
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """An archive that was written: where, its size, and the names in it."""

    path: Path
    bytes: int
    files: tuple[str, ...]


Part = EngineRecord | KitRecord


def pack(bundle: Bundle, record: Part, output: Path, *, golden: bool, stages: Sequence[Part] = ()) -> Packed:
    """Write the archive of one engine, or of the kit from which a device makes its own.

    Args:
        bundle: opened.
        record: the engine or the kit.
        output: ends in ``.zip``; replaced in one step.
        golden: whether golden data goes along, with which the device can verify itself.
        stages: engines or kits of the stages that go along, with their tokenizers.

    Raises:
        InvalidInput: a name that does not end in ``.zip``, or a folder that cannot be written.
        BundleError: no golden data to take along, or damaged files.
        RunFailed: the disk is full.
    """
    if output.suffix != SUFFIX:
        raise InvalidInput(f"an archive's name ends in {SUFFIX}, got {output.name!r}.")
    if golden and not bundle.names("golden/"):
        raise BundleError(f"{bundle.root.name} holds no golden data. Export it with --golden steps or full.")
    recipes = (record.recipe, *(part.name for part in recipe_of(bundle, record.recipe).parts.values()))
    stated = [f"{calibrated_folder(name)}/{RECORD}" for name in recipes]  # what they are and what they may lose
    stated += [f"{calibrated_folder(stage.recipe, stage.stage)}/{RECORD}" for stage in stages]
    prefixes = [f"{record.folder}/", "tables/", *stated, *(["golden/"] if golden else [])]
    prefixes += [f"{stage.folder}/" for stage in stages]
    beside = _beside(bundle, [stage.stage for stage in stages if stage.stage is not None], golden=golden)
    names = sorted({name for prefix in prefixes for name in bundle.names(prefix)} | beside)
    folders = {record.folder, *(stage.folder for stage in stages)}
    manifest = replace(
        bundle.manifest,
        files={name: bundle.manifest.files[name] for name in names},
        left_out={name: entry for name, entry in bundle.manifest.known_files.items() if name not in names},
        golden_tier=bundle.manifest.golden_tier if golden else "none",
        parity={name: found for name, found in bundle.manifest.parity.items() if name in folders},
    )
    text = encode_json(manifest.to_json(), "manifest")
    partial = output.with_name(f".{output.name}.partial")
    try:
        with storage_errors(f"writing {output}"):
            with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
                archive.writestr(_member(bundle.root.name, MANIFEST_NAME, len(text)), text)
                for name in names:
                    with bundle.path(name).open("rb") as source:
                        info = _member(bundle.root.name, name, manifest.files[name].bytes)
                        with archive.open(info, "w", force_zip64=info.file_size >= 1 << 31) as target:
                            shutil.copyfileobj(source, target, _CHUNK)
            size = partial.stat().st_size
            partial.replace(output)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return Packed(path=output, bytes=size, files=(MANIFEST_NAME, *names))


def _beside(bundle: Bundle, stages: Sequence[str], *, golden: bool) -> set[str]:
    """What stages need beside their engines: tokenizers, and golden data if it goes along."""
    pipeline = bundle.manifest.pipeline
    names = {spec.file for name, spec in pipeline.tokenizers.items() if name in stages} if pipeline else set()
    if golden:
        names |= {entry.golden for entry in map(bundle.manifest.stage, stages) if entry.golden is not None}
    return names & set(bundle.manifest.files)


def _member(folder: str, name: str, size: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(f"{folder}/{name}", date_time=_EPOCH)
    info.external_attr = (stat.S_IFREG | 0o644) << 16
    info.file_size = size
    return info


def unpack(archive: Path, output: Path) -> Bundle:
    """Make the bundle ``output`` of an archive, whole or not at all.

    Raises:
        InvalidInput: no such archive, or ``output`` exists or cannot be written.
        BundleError: it is no archive of a bundle, or a damaged or altered one.
        RunFailed: the disk is full.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = _members(opened)
            manifest = _manifest(opened, members.pop(MANIFEST_NAME), archive)
            if set(members) != set(manifest.files):
                odd = min(set(members) ^ set(manifest.files))
                raise _damaged(archive, f"{odd!r} is in its list or in the archive, not in both")
            with Bundle.create(output, overwrite=False) as edit:
                for name, info in sorted(members.items()):
                    if info.file_size != manifest.files[name].bytes:
                        raise _damaged(archive, f"{name!r} has another size than recorded")
                    with edit.add_file(name) as path, opened.open(info) as source, path.open("wb") as target:
                        _copy(source, target, info.file_size, f"{archive.name}: {name!r}")
                edit.set_manifest(
                    model=manifest.model,
                    graphs=manifest.graphs,
                    source=manifest.source,
                    versions=manifest.versions,
                    command=manifest.command,
                    golden_tier=manifest.golden_tier,
                    parity=manifest.parity,
                    left_out=manifest.left_out,
                    stages=manifest.stages,
                    pipeline=manifest.pipeline,
                )
                edit.check_added(manifest.files)
    except OSError as e:
        raise InvalidInput(f"{archive} cannot be read ({e.strerror}). Expected an archive made by lehr pack.") from e
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError) as e:
        raise _damaged(archive, str(e)) from e
    return Bundle.open(output)


def _members(opened: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Members by their name in the bundle; all lie in one folder, are stored as they are, and none occurs twice."""
    found: dict[str, zipfile.ZipInfo] = {}
    path = Path(str(opened.filename))
    infos = opened.infolist()
    folder = infos[0].filename.split("/")[0] if infos else ""
    for info in infos:
        top, _, name = info.filename.partition("/")
        if top != folder or not name or name in found:
            raise _damaged(path, f"{info.filename!r} is twice in it, or outside of its folder")
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG) or info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise _damaged(path, f"{info.filename!r} is no plain stored file")
        found[name] = info
    if MANIFEST_NAME not in found:
        raise _damaged(path, f"it holds no {MANIFEST_NAME}")
    return found


def _manifest(opened: zipfile.ZipFile, info: zipfile.ZipInfo, archive: Path) -> Manifest:
    if info.file_size > MAX_MANIFEST_BYTES:
        raise _damaged(archive, f"its manifest claims {info.file_size} bytes")
    with opened.open(info) as source:
        return parse_manifest(archive, source.read(MAX_MANIFEST_BYTES + 1))


def _copy(source: IO[bytes], target: IO[bytes], size: int, what: str) -> None:
    """Copy ``size`` bytes and not one more."""
    for chunk in _chunks(source, size):
        target.write(chunk)
        size -= len(chunk)
    if size:
        raise BundleError(f"{what} is cut short. Copy the archive again, or pack it again.")


def _chunks(source: IO[bytes], size: int) -> Iterable[bytes]:
    while size > 0 and (chunk := source.read(min(size, _CHUNK))):
        size -= len(chunk)
        yield chunk


def _damaged(archive: Path, problem: str) -> BundleError:
    return BundleError(f"{archive} is no archive of a bundle, or a damaged one: {problem}. Copy or pack it again.")
