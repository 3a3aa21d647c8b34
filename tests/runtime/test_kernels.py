"""The kernels' source computes what the fake device computes, and the PTX that is shipped was made from it."""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from fake_device import FakeDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_on_a_processor import KERNELS, compiled_kernels

from lehr.runtime import device_loop

compiler = shutil.which("g++")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> ctypes.CDLL:
    if compiler is None:
        pytest.skip("there is no g++ here")
    return ctypes.CDLL(str(compiled_kernels(compiler, tmp_path_factory.mktemp("kernels"))))


def both(compiled: ctypes.CDLL, kernel: str, arrays: dict[str, np.ndarray], arguments: list) -> None:
    """Run a kernel on copies of ``arrays`` in both; names among the arguments stand for their addresses."""
    device = FakeDevice()
    stream = device.create_stream()
    host = {name: array.copy() for name, array in arrays.items()}
    there = {}
    for name, array in arrays.items():
        there[name] = device.allocate(array.nbytes)
        device.upload(there[name], array.ctypes.data, array.nbytes, stream)
    if "sources" in arrays:  # addresses of pieces
        for memory, base in ((host, host["pieces"].ctypes.data), (None, there["pieces"])):
            table = arrays["sources"] + np.uint64(base)
            if memory is not None:
                memory["sources"] = table
            else:
                device.synchronize(stream)
                device.upload(there["sources"], table.ctypes.data, table.nbytes, stream)
                device.synchronize(stream)

    def given_to(places) -> list:
        return [ctypes.c_void_p(places[a]) if isinstance(a, str) else a for a in arguments]

    getattr(compiled, kernel)(*given_to({name: array.ctypes.data for name, array in host.items()}))
    device.launch(kernel, given_to(there), 1, stream)
    device.synchronize(stream)
    for name, array in host.items():
        if name != "sources":
            view = device.view(there[name], array.size, array.dtype, writes=False)
            np.testing.assert_array_equal(view, array.reshape(-1), err_msg=name)


numbers = st.integers(0, 2**32 - 1)


@given(seed=numbers, wide=st.booleans(), row=st.integers(0, 3), copies=st.integers(1, 2))
@settings(max_examples=40)
def test_the_compiled_source_sums_rows_as_the_fake_device_does(compiled, seed, wide, row, copies):
    random, kind, elements = np.random.default_rng(seed), np.dtype("float64" if wide else "float32"), 11
    counts = random.integers(0, 5, 4)
    arrays = {
        "row": np.array([row], np.int32),
        "first": np.cumsum([0, *counts], dtype=np.int32),
        "source": random.integers(-2, 3, max(1, counts.sum())).astype(np.int32),
        "factor": random.standard_normal(max(1, counts.sum())),
        "target": random.integers(-1, 5, 4).astype(np.int32),
        "slots": random.standard_normal((5, elements)).astype(kind),
        "noises": random.standard_normal((2, elements)).astype(np.float32),
        "into": np.zeros((2, elements), np.float32),
    }
    arrays["target"][row] = random.choice([-1, 3, 4])  # not one that the row reads
    arguments = [*arrays, ctypes.c_int(copies), ctypes.c_longlong(elements)]
    both(compiled, f"lehr_combine_{kind}", arrays, arguments)


@given(seed=numbers, wide=st.booleans(), guided=st.integers(0, 1), extra=st.integers(0, 1), zero=st.booleans())
@settings(max_examples=40)
def test_the_compiled_source_keeps_evaluations_as_the_fake_device_does(compiled, seed, wide, guided, extra, zero):
    random, kind, batch, per_sample = np.random.default_rng(seed), np.dtype("float64" if wide else "float32"), 2, 6
    per_output, rows = per_sample * (1 + extra), 3
    weights = {name: random.standard_normal(rows) * (0 if zero and "input" in name else 1) for name in WEIGHTS}
    arrays = {
        "row": np.array([random.integers(rows)], np.int32),
        "output": random.standard_normal((1 + guided, batch, per_output)).astype(np.float32),
        **weights,
        "input_slot": random.integers(0, 2, rows).astype(np.int32),
        "kept_slot": random.choice([-1, 2], rows).astype(np.int32),
        "clipped_slot": random.choice([-1, 3], rows).astype(np.int32),
        "slots": random.standard_normal((4, batch * per_sample)).astype(kind),
    }
    if seed % 5 == 0:
        arrays["output"][0, 0, 0] = np.nan
    arguments = ["row", "output", ctypes.c_int(guided), *WEIGHTS, "input_slot", "kept_slot", "clipped_slot"]
    arguments += [ctypes.c_double(0.5), "slots"]
    arguments += [ctypes.c_longlong(size) for size in (batch * per_sample, per_sample, per_output)]
    both(compiled, f"lehr_absorb_{kind}", arrays, arguments)


WEIGHTS = ("scale", "kept_input", "kept_output", "denoised_input", "denoised_output")


@given(seed=numbers, count=st.integers(1, 3), size=st.integers(1, 13))
@settings(max_examples=40)
def test_the_compiled_source_gathers_as_the_fake_device_does(compiled, seed, count, size):
    random = np.random.default_rng(seed)
    arrays = {
        "row": np.array([random.integers(3)], np.int32),
        "pieces": random.integers(0, 255, 16 * 4).astype(np.uint8),
        "sources": random.integers(0, 4, (3, count)).astype(np.uint64) * np.uint64(16),
        "into": np.zeros(count * size, np.uint8),
    }
    both(compiled, "lehr_gather", arrays, ["row", "sources", "into", ctypes.c_int(count), ctypes.c_longlong(size)])


def test_the_compiled_source_counts(compiled):
    both(compiled, "lehr_advance", {"row": np.array([6], np.int32)}, ["row"])


# ------------------------------------------------------------------------------------------------------- the PTX


def test_the_ptx_was_made_from_the_source_that_stands_beside_it():
    ptx = (KERNELS / "table.ptx").read_text()
    assert hashlib.sha256((KERNELS / "table.cu").read_bytes()).hexdigest() in ptx.splitlines()[0]


def test_the_ptx_runs_on_every_target_and_fuses_no_product_with_a_sum():
    ptx = (KERNELS / "table.ptx").read_text()
    assert ".target sm_75" in ptx
    assert ".version 7.0" in ptx
    assert not re.findall(r"\b(fma|mad)\.(rn\.)?f(32|64)", ptx)


def test_the_ptx_holds_every_kernel_that_the_loop_launches_with_as_many_parameters(compiled):
    ptx = (KERNELS / "table.ptx").read_text()
    entries = {name: body.count(".param") for name, body in re.findall(r"\.entry (\w+)\(([^)]*)\)", ptx)}
    assert entries == {
        "lehr_combine_float32": 10,
        "lehr_combine_float64": 10,
        "lehr_absorb_float32": 16,
        "lehr_absorb_float64": 16,
        "lehr_gather": 5,
        "lehr_advance": 1,
    }
    launched = set(re.findall(r'"(lehr_\w+?)[_"{]', Path(device_loop.__file__).read_text()))
    assert launched == {"lehr_combine", "lehr_absorb", "lehr_gather", "lehr_advance"}
