"""``lehr bench``: processes that take turns, rows that say what was measured, and the least time a machine allows."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from lehr.cli import main
from lehr.engines.bench import EVALUATIONS, MOST_EVALUATIONS, Contestant, compare, turn_of
from lehr.engines.roofline import Roof, bound, measured_roof, roof_of, stored_bytes
from lehr.engines.target import targets
from lehr.runtime.bundle import Bundle
from lehr.runtime.recipe import recipe

# Says what the protocol of lehr.runtime.timing says, of an evaluation that takes as long as it is told to.
FAKE = """
import json, sys, time
import numpy as np
from pathlib import Path
from lehr.runtime.timing import serve
seconds, offset, inputs = float(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
print("a library says hello")
def evaluate(feeds):
    time.sleep(seconds)
    return feeds["x"] + offset
serve(evaluate, Path(inputs), base_mb=1.0, loop=lambda steps: time.sleep(steps * seconds))
"""


def fake(name: str, seconds: float, offset: float = 0.0, **options: object) -> Contestant:
    return Contestant(name=name, command=(sys.executable, "-c", FAKE, str(seconds), str(offset)), **options)


@pytest.fixture
def inputs(tmp_path) -> Path:
    path = tmp_path / "inputs.npz"
    np.savez(path, x=np.arange(1.0, 9.0, dtype=np.float32).reshape(2, 1, 2, 2))
    return path


def test_ratios_errors_and_loops_are_those_of_the_contestants(inputs):
    slow, fast = fake("slow", 0.02, loops=True), fake("fast", 0.005, 0.1, size=7)
    rows = compare([slow, fast], [inputs], loop_steps=3, seconds=0)
    assert [row.name for row in rows] == ["slow", "fast"]
    assert rows[0].ratio == 1
    assert 0.1 < rows[1].ratio < 0.6  # of 20 ms and 5 ms, on a machine that may be busy
    assert rows[0].step_ms >= 20
    assert rows[0].p90_ms >= rows[0].step_ms
    assert rows[0].loop_s >= 0.06
    assert rows[1].loop_s is None
    assert rows[1].bytes == 7
    x = np.arange(1.0, 9.0)
    assert rows[0].sqnr_db == 999
    assert rows[1].sqnr_db == pytest.approx(10 * np.log10(np.sum(x**2) / (8 * 0.01)), abs=0.05)
    assert rows[0].start_s > 0.05  # a process and its imports
    assert rows[0].engine_mb == pytest.approx(rows[0].peak_mb - 1.0, abs=0.11)


def test_a_contestant_that_fails_is_a_row_with_its_reason_and_stops_nobody(inputs):
    broken = Contestant(name="broken", command=(sys.executable, "-c", "raise SystemExit('no such library')"))
    dies = Contestant(
        name="dies",
        command=(sys.executable, "-c", FAKE.replace("return feeds", "raise ValueError('x'); feeds"), "0", "0"),
    )
    rows = compare([broken, fake("fine", 0.001), dies], [inputs], seconds=0)
    assert "no such library" in rows[0].reason
    assert rows[0].step_ms is None
    assert rows[1].ratio == 1
    assert not rows[1].reason
    assert "ValueError: x" in rows[2].reason


# ------------------------------------------------------------------------------------------------------- the roof


def test_the_least_time_is_the_slower_of_arithmetic_and_memory(dit_bundle):
    graph = Bundle.open(dit_bundle).manifest.graphs["step"]
    weights = stored_bytes(graph, recipe("fp32"))
    assert weights == 4 * graph.parameters
    slow_sums = bound(graph, 4, weights, 0, Roof(gflops=1.0, gb_s=1e6, source="made up"))
    assert (slow_sums.limited_by, slow_sums.ms) == ("arithmetic", pytest.approx(4 * graph.flops / 1e6))
    slow_memory = bound(graph, 4, weights, 1000, Roof(gflops=1e9, gb_s=1.0, source="made up"))
    assert (slow_memory.limited_by, slow_memory.ms) == ("memory", pytest.approx((weights + 1000) / 1e6))
    unknown = bound(graph, 4, weights, 0, Roof(gflops=None, gb_s=None, source="nobody"))
    assert unknown.ms is None


def test_this_machine_has_a_roof_and_published_targets_state_theirs():
    roof = measured_roof()
    assert roof.gflops > 0.5
    assert roof.gb_s > 0.1
    h100 = roof_of(targets()["h100"], recipe("fp16"))
    assert (h100.gflops, h100.gb_s) == (989_000, 3900)
    for target in targets().values():
        assert all(peak > 1 for peak in target.tflops.values())


# ------------------------------------------------------------------------------------------------ the command line


def lehr(*words: object) -> int:
    """The exit code of a command."""
    try:
        main([str(word) for word in words])
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 0
    return 0


def test_bench_measures_the_engines_of_a_bundle(dit_bundle, tmp_path, capsys):
    made = tmp_path / "bench.json"
    words = ["bench", str(dit_bundle), "--steps", "2", "--seconds", "0", "-o", str(made), "--json"]
    assert lehr(*words) == 0
    data = json.loads(capsys.readouterr().out)
    assert data == json.loads(made.read_text())
    row = data["rows"][0]
    assert row["name"] == "lehr fp32 onnxruntime"
    assert 0 < row["step_ms"] <= row["p90_ms"]
    assert row["loop_s"] > row["step_ms"] / 1000
    assert row["sqnr_db"] > 100  # against what eager returned
    assert row["bytes"] > 4 * 1_190_800
    assert row["engine_mb"] > 5
    assert row["roofline"]["gflop"] == pytest.approx(2 * 0.124, rel=0.01)
    assert data["reference"] == "golden data"


def test_a_precision_schedule_is_measured_with_the_recipes_of_its_ends(dit_bundle, tmp_path, capsys):
    bundle = shutil.copytree(dit_bundle, tmp_path / "d.lehr")
    assert lehr("audit", bundle) == 0
    assert lehr("calibrate", bundle, "--recipe", "fp32", "--last", "2:fp16", "--name", "late") == 0
    assert lehr("build", bundle, "--recipe", "late", "--library", "onnxruntime") == 0
    capsys.readouterr()
    words = ["bench", bundle, "--recipe", "late", "--recipe", "fp32", "--steps", "4", "--seconds", "0", "--json"]
    assert lehr(*words) == 0
    late, plain = json.loads(capsys.readouterr().out)["rows"]
    assert (late["name"], late["reason"]) == ("lehr late onnxruntime", "")
    assert 40 < late["sqnr_db"] < 90 < plain["sqnr_db"]  # the worst step is one in fp16
    assert late["bytes"] > 1.3 * plain["bytes"]  # weights of both
    assert late["loop_s"] > late["step_ms"] / 1000
    assert late["roofline"]["gflop"] == plain["roofline"]["gflop"]


@pytest.mark.parametrize(
    "words, code, says",
    [
        (["--recipe", "bf16"], 5, "lehr build"),
        (["--target", "orin-agx"], 5, "no engine for orin-agx"),
        (["--batch", "100000"], 2, "batch"),
        (["-o", "/nowhere/at/all.json"], 2, "no folder"),
    ],
)
def test_bench_refuses_what_it_cannot_measure(dit_bundle, capsys, words, code, says):
    assert lehr("bench", dit_bundle, *words) == code
    assert says in capsys.readouterr().err


@pytest.mark.long
def test_peers_run_the_same_model(dit_bundle, capsys):
    assert lehr("bench", dit_bundle, "--peers", "--seconds", "0", "--steps", "1", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    for name in ("eager fp32", "torch.compile fp32", "onnxruntime fp32", "openvino f32"):
        assert rows[name]["sqnr_db"] > 100, name
        assert rows[name]["start_s"] > 0


@pytest.mark.parametrize(
    "seconds, evaluations", [(0.001, MOST_EVALUATIONS), (0.01, 10), (0.05, EVALUATIONS), (3, EVALUATIONS)]
)
def test_short_evaluations_have_turns_as_long_as_a_loop(seconds: float, evaluations: int) -> None:
    assert turn_of(seconds) == evaluations
