"""Archives for devices: what is in them, and that nothing else comes out of them."""

from __future__ import annotations

import shutil
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lehr.runtime.bundle import Bundle
from lehr.runtime.engine import find
from lehr.runtime.errors import BundleError, InvalidInput
from lehr.runtime.pack import pack, unpack
from lehr.runtime.pipeline import Pipeline, Request
from lehr.runtime.verify import verify


def archive_of(bundle: Path, output: Path, *, golden: bool = False) -> Path:
    opened = Bundle.open(bundle)
    return pack(opened, find(opened, "cpu", "fp32"), output, golden=golden).path


def test_an_archive_draws_the_same_samples_without_portable_graphs(dit_bundle, tmp_path):
    archive = archive_of(dit_bundle, tmp_path / "d.zip")
    there = unpack(archive, tmp_path / "there.lehr")
    assert not there.names("model/")
    assert not there.names("golden/")
    assert sum(f.bytes for f in there.manifest.files.values()) <= archive.stat().st_size
    request = Request(num=2, num_inference_steps=3)
    np.testing.assert_array_equal(Pipeline.open(there.root)(request), Pipeline.open(dit_bundle)(request))
    with pytest.raises(BundleError, match="left out when the bundle was packed"):
        there.path("model/step.onnx")


def test_golden_data_goes_along_if_asked_for_and_verifies_there(dit_bundle, tmp_path):
    there = unpack(archive_of(dit_bundle, tmp_path / "d.zip", golden=True), tmp_path / "there.lehr")
    assert verify(there, find(there, "cpu", "fp32")).passed
    again = archive_of(there.root, tmp_path / "again.zip", golden=True)
    assert unpack(again, tmp_path / "twice.lehr").manifest.left_out == there.manifest.left_out


def test_equal_bundles_give_equal_archives(dit_bundle, tmp_path):
    first, second = (archive_of(dit_bundle, tmp_path / name / "d.zip") for name in folders(tmp_path))
    assert first.read_bytes() == second.read_bytes()


def folders(tmp_path: Path) -> tuple[str, str]:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    return "a", "b"


# ------------------------------------------------------------------------------------------------ hostile archives


def rewritten(source: Path, target: Path, change: Callable[[zipfile.ZipFile, zipfile.ZipInfo, bytes], None]) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            change(new, info, old.read(info))
    return target


def keep(new: zipfile.ZipFile, info: zipfile.ZipInfo, data: bytes) -> None:
    new.writestr(info, data)


def is_plan(info: zipfile.ZipInfo) -> bool:
    return info.filename.endswith("/step.onnx")


def altered(new, info, data):
    keep(new, info, data[:-1] + bytes([data[-1] ^ 1]) if is_plan(info) else data)


def shortened(new, info, data):
    keep(new, info, data[:-1] if is_plan(info) else data)


def compressed(new, info, data):
    new.writestr(info, data, compress_type=zipfile.ZIP_DEFLATED if is_plan(info) else zipfile.ZIP_STORED)


def lacking(new, info, data):
    if not is_plan(info):
        keep(new, info, data)


def twice(new, info, data):
    keep(new, info, data)
    if is_plan(info):
        keep(new, info, data)


def link(new, info, data):
    if is_plan(info):
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
    keep(new, info, data)


def escaping(new, info, data):
    keep(new, info, data)
    if is_plan(info):
        new.writestr(zipfile.ZipInfo("../outside.txt"), b"x")


def extra(new, info, data):
    keep(new, info, data)
    if is_plan(info):
        new.writestr(zipfile.ZipInfo(info.filename + ".py"), b"x")


def without_manifest(new, info, data):
    if not info.filename.endswith("manifest.json"):
        keep(new, info, data)


CHANGES = [altered, shortened, compressed, lacking, link, escaping, extra, without_manifest]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_archive_is_refused_and_leaves_nothing(change, dit_bundle, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    bad = rewritten(archive_of(dit_bundle, tmp_path / "d.zip"), tmp_path / "bad.zip", change)
    with pytest.raises(BundleError):
        unpack(bad, place / "m.lehr")
    assert list(place.iterdir()) == []
    assert not (tmp_path / "outside.txt").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_occurs_twice_is_refused(dit_bundle, tmp_path):
    bad = rewritten(archive_of(dit_bundle, tmp_path / "d.zip"), tmp_path / "bad.zip", twice)
    with pytest.raises(BundleError, match="twice"):
        unpack(bad, tmp_path / "m.lehr")


@pytest.mark.parametrize("keep_bytes", [0, 10, 1000, -200, -1])
def test_a_truncated_archive_is_refused(keep_bytes, dit_bundle, tmp_path):
    archive = archive_of(dit_bundle, tmp_path / "d.zip")
    archive.write_bytes(archive.read_bytes()[:keep_bytes])
    with pytest.raises(BundleError, match="damaged"):
        unpack(archive, tmp_path / "m.lehr")
    assert not (tmp_path / "m.lehr").exists()


def test_a_size_in_the_directory_is_not_believed(dit_bundle, tmp_path):
    archive = archive_of(dit_bundle, tmp_path / "d.zip")
    data = bytearray(archive.read_bytes())
    at = data.rfind(b"PK\x01\x02")  # the last entry of the central directory: its uncompressed size
    struct.pack_into("<I", data, at + 24, 1 << 30)
    archive.write_bytes(bytes(data))
    with pytest.raises(BundleError):
        unpack(archive, tmp_path / "m.lehr")


def test_wrong_names_are_refused(dit_bundle, tmp_path):
    opened = Bundle.open(dit_bundle)
    with pytest.raises(InvalidInput, match=r"ends in \.zip"):
        pack(opened, find(opened, "cpu", "fp32"), tmp_path / "d.tar", golden=False)
    with pytest.raises(InvalidInput, match="cannot be read"):
        unpack(tmp_path / "none.zip", tmp_path / "m.lehr")
    archive = archive_of(dit_bundle, tmp_path / "d.zip")
    (tmp_path / "m.lehr").mkdir()
    with pytest.raises(InvalidInput, match="exists"):
        unpack(archive, tmp_path / "m.lehr")


def test_golden_data_that_is_not_there_cannot_go_along(dit_bundle, tmp_path):
    copy = tmp_path / "copy.lehr"
    shutil.copytree(dit_bundle, copy)
    with Bundle.open(copy).edit() as edit:
        edit.remove("golden")
        edit.set_manifest(golden_tier="none")
    with pytest.raises(BundleError, match="no golden data"):
        archive_of(copy, tmp_path / "d.zip", golden=True)
