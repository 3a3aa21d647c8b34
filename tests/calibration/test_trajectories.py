"""Calibration data: drawn once and resumed, or recorded by a user and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lehr.calibration.collected import BATCH, Trajectories, cache_folder
from lehr.calibration.recorded import LEAST_RECORDED, recorded
from lehr.calibration.trajectories import CALIBRATION_SEEDS, collect
from lehr.runtime.arrays import write_arrays
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import InvalidInput
from lehr.runtime.noise import batch_normal


class Stop(Exception):
    pass


def hashes(data: Trajectories) -> list[str]:
    return [hashlib.sha256(part.read_bytes()).hexdigest() for part in data.parts]


@pytest.fixture(scope="module")
def bundle(dit_bundle: Path) -> Bundle:
    return Bundle.open(dit_bundle)


@pytest.fixture(scope="module")
def drawn(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Trajectories:
    return collect(bundle, num=6, steps=3, threads=1, folder=tmp_path_factory.mktemp("drawn"))


# ----------------------------------------------------------------------------------------------------------- drawn


def test_every_evaluation_of_every_sample_is_there_in_both_halves_of_guidance(drawn: Trajectories) -> None:
    found = list(drawn.evaluations())
    assert [evaluation.index for evaluation in found] == [0, 1, 2, 0, 1, 2]
    assert [len(evaluation.sample) for evaluation in found] == [2 * BATCH] * 3 + [2 * (6 - BATCH)] * 3
    labels = found[0].conditions["class_labels"]
    assert labels[:BATCH].tolist() == [10] * BATCH  # the class that means none
    assert labels[BATCH:].tolist() == [0, 1, 2, 3]
    assert found[3].conditions["class_labels"][2:].tolist() == [4, 5]
    for evaluation in found:
        assert evaluation.timestep == pytest.approx(drawn.timesteps[evaluation.index], rel=1e-6)
    assert drawn.gains.shape == drawn.timesteps.shape


def test_calibration_starts_from_seeds_of_its_own(drawn: Trajectories) -> None:
    first = next(drawn.evaluations()).sample[:BATCH]
    for k in range(BATCH):
        assert np.array_equal(first[k : k + 1], batch_normal(CALIBRATION_SEEDS + k, [0], first.shape[1:]))


def test_the_same_settings_are_collected_once(bundle: Bundle, drawn: Trajectories) -> None:
    before = [part.stat().st_mtime_ns for part in drawn.parts]
    again = collect(bundle, num=6, steps=3, threads=1, folder=drawn.parts[0].parents[1])
    assert again.digest == drawn.digest
    assert [part.stat().st_mtime_ns for part in again.parts] == before


def test_another_seed_is_other_data(bundle: Bundle, drawn: Trajectories, tmp_path: Path) -> None:
    other = collect(bundle, num=2, steps=2, seed=1, threads=1, folder=tmp_path)
    assert other.digest != drawn.digest
    assert not np.array_equal(next(other.evaluations()).sample[0], next(drawn.evaluations()).sample[0])


def test_an_interrupted_collection_goes_on_and_ends_with_the_same_bytes(
    bundle: Bundle, drawn: Trajectories, tmp_path: Path
) -> None:
    told: list[int] = []

    def stop(done: int, total: int) -> None:
        assert total == 6
        if done == 5:
            raise Stop

    with pytest.raises(Stop):
        collect(bundle, num=6, steps=3, threads=1, folder=tmp_path, on_step=stop)
    left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["part-00000.npz"]  # whole parts only
    data = collect(bundle, num=6, steps=3, threads=1, folder=tmp_path, on_step=lambda done, total: told.append(done))
    assert told[0] == 3
    assert hashes(data) == hashes(drawn)


def test_a_damaged_part_is_drawn_again(bundle: Bundle, drawn: Trajectories, tmp_path: Path) -> None:
    data = collect(bundle, num=6, steps=3, threads=1, folder=tmp_path)
    data.parts[1].write_bytes(data.parts[1].read_bytes()[:-100])
    again = collect(bundle, num=6, steps=3, threads=1, folder=tmp_path)
    assert hashes(again) == hashes(drawn)


def test_the_cache_lies_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "lehr" / "trajectories"


@pytest.mark.parametrize("given", [{"seed": -1}, {"seed": 1 << 31}, {"num": 0}])
def test_settings_out_of_range_are_refused(bundle: Bundle, tmp_path: Path, given: dict[str, int]) -> None:
    with pytest.raises(InvalidInput, match="must"):
        collect(bundle, folder=tmp_path, **given)


# -------------------------------------------------------------------------------------------------------- recorded


def rows(count: int = 20) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "sample": random.standard_normal((count, 1, 28, 28)).astype(np.float32),
        "timestep": np.resize(np.array([900.0, 500.0, 100.0], np.float32), count),
        "class_labels": np.arange(count) % 10,
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def made(name: str = "inputs.npz", **changed: np.ndarray) -> Path:
        arrays = {key: value for key, value in (rows() | changed).items() if value is not None}
        path = tmp_path / name
        write_arrays(path, arrays)
        return path

    return made


def test_recorded_rows_are_put_together_by_timestep(bundle: Bundle, write: Callable[..., Path], tmp_path: Path) -> None:
    data = recorded(bundle, write(), folder=tmp_path / "data")
    found = list(data.evaluations())
    assert data.timesteps.tolist() == [900.0, 500.0, 100.0]
    assert sum(len(evaluation.sample) for evaluation in found) == data.samples == 20
    first = found[0]
    chosen = rows()["timestep"] == 900
    assert np.array_equal(first.sample, rows()["sample"][chosen][: len(first.sample)])
    assert np.array_equal(first.conditions["class_labels"], rows()["class_labels"][chosen][: len(first.sample)])
    assert data.source == "recorded"


def test_a_folder_of_files_is_read_whole_and_its_content_is_its_identity(
    bundle: Bundle, write: Callable[..., Path], tmp_path: Path
) -> None:
    write("a.npz")
    one = recorded(bundle, write("b.npz").parent, folder=tmp_path / "data")
    assert one.samples == 40
    write("b.npz", sample=rows()["sample"] * 2)
    other = recorded(bundle, tmp_path, folder=tmp_path / "data")
    assert one.digest != other.digest


def broken(value: float) -> np.ndarray:
    sample = rows()["sample"]
    sample[3, 0, 1, 2] = value
    return sample


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"sample": broken(np.nan)}, "'sample' is nan in row 3"),
        ({"sample": broken(np.inf)}, "'sample' is inf in row 3"),
        ({"sample": rows()["sample"][:, :, :, :26]}, "width"),
        ({"sample": rows()["sample"][:5]}, "batch"),
        ({"class_labels": None}, "lacks class_labels"),
        ({"prompt": np.zeros(20, np.float32)}, "unknown prompt"),
        ({"class_labels": np.zeros(20, np.float32)}, "holds float32, expected int64"),
        (rows(LEAST_RECORDED - 1), f"at least {LEAST_RECORDED}"),
    ],
    ids=["nan", "inf", "size", "rows", "missing", "unknown", "type", "few"],
)
def test_recorded_data_that_does_not_fit_is_refused(
    bundle: Bundle, write: Callable[..., Path], tmp_path: Path, changed: dict[str, np.ndarray], words: str
) -> None:
    with pytest.raises(InvalidInput, match=words):
        recorded(bundle, write(**changed), folder=tmp_path / "data")


def test_what_is_no_file_of_arrays_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no such file"):
        recorded(bundle, tmp_path / "gone.npz")
    with pytest.raises(InvalidInput, match=r"no \.npz"):
        recorded(bundle, tmp_path)
    (tmp_path / "x.npz").write_bytes(b"PK nothing")
    with pytest.raises(InvalidInput, match=r"x\.npz cannot be read"):
        recorded(bundle, tmp_path / "x.npz")
