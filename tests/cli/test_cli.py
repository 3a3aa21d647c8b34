"""The command line: what it prints, its exit codes, and every wrong input named in its help."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lehr import cli


def lehr(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run a command line in this process: (exit code, stdout, stderr)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return int(exit_.value.code or 0), out, err


@pytest.fixture
def built(dit_bundle, tmp_path) -> Path:
    """A private copy of a built digits-dit bundle."""
    return Path(shutil.copytree(dit_bundle, tmp_path / "d.lehr"))


# ------------------------------------------------------------------------------------------------- the main job


def test_export_build_run_verify_inspect_do_the_main_job(tmp_path, capsys):
    bundle, png, npz = tmp_path / "a.lehr", tmp_path / "out.png", tmp_path / "out.npz"
    code, out, _ = lehr("export", "digits-adm", "-o", bundle, "--json", capsys=capsys)
    exported = json.loads(out)
    assert code == 0
    assert {"bundle", "seconds", "peak_rss_mb", "parameters"} <= set(exported)
    code, out, _ = lehr("build", bundle, "--target", "cpu", "--json", capsys=capsys)
    built = json.loads(out)
    assert {"target", "recipe", "library", "seconds", "peak_rss_mb", "engine"} <= set(built)
    assert (bundle / built["engine"] / "build.json").is_file()
    code, out, _ = lehr("run", bundle, "--class-label", 3, "--num", 8, "-o", png, "--json", capsys=capsys)
    assert (code, json.loads(out)["shape"]) == (0, [8, 1, 28, 28])
    with Image.open(png) as picture:
        assert picture.size[0] > 28
    code, out, _ = lehr("run", bundle, "--num", 2, "--sampler", "ddim", "--steps", 5, "-o", npz, capsys=capsys)
    with np.load(npz) as arrays:
        assert arrays["samples"].dtype == np.float32
        assert arrays["samples"].shape == (2, 1, 28, 28)
    code, out, _ = lehr("verify", bundle, "--json", capsys=capsys)
    verdict = json.loads(out)
    assert code == 0
    assert verdict["passed"] is True
    assert verdict["levels"]["L0"]["passed"] is True
    assert verdict["levels"]["L1"]["max_rel_error"] < 1e-4
    assert verdict["levels"]["L2"]["psnr_db"] >= 60
    assert {"snr_db", "max_abs"} <= set(verdict["levels"]["L2"])
    code, out, _ = lehr("inspect", bundle, "--verify-files", "--json", capsys=capsys)
    shown = json.loads(out)
    assert list(shown["graphs"])[-1] == "step"
    assert sum(graph["parameters"] for graph in shown["graphs"].values()) >= exported["parameters"]
    assert shown["graphs"]["step"]["parameters"] < exported["parameters"]
    assert {"target", "recipe", "library", "bytes", "achieved_precision"} <= set(shown["engines"][0])
    assert shown["engines"][0]["parity"]["passed"] is True


def test_the_same_seed_gives_the_same_samples_at_batch_1_4_and_16(built, tmp_path, capsys):
    drawn = []
    for batch in (1, 4, 16):
        out = tmp_path / f"{batch}.npz"
        code, _, _ = lehr("run", built, "--num", 16, "--seed", 5, "--batch", batch, "-o", out, capsys=capsys)
        assert code == 0
        drawn.append(np.load(out)["samples"])
    assert np.abs(drawn[0] - drawn[1]).max() <= 1e-5
    assert np.abs(drawn[0] - drawn[2]).max() <= 1e-5


def test_build_run_and_verify_work_where_torch_and_onnx_are_not_installed(built, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    for name in _with_requirements(["numpy", "onnxruntime", "click", "rich", "pillow"]):
        for file in metadata.files(name) or ():
            top = Path(str(file)).parts[0]
            origin = Path(str(metadata.distribution(name).locate_file(top)))
            if top not in ("..", "__pycache__") and origin.exists() and not (site / top).exists():
                (site / top).symlink_to(origin)
    source = Path(cli.__file__).resolve().parents[1]
    commands = [
        ["build", built, "--target", "cpu"],
        ["run", built, "--num", "2", "-o", tmp_path / "o.png"],
        ["verify", built],
        ["gate", built, "--policy", "smoke", "--report", tmp_path / "gate"],
    ]
    for command in commands:
        arguments = [str(argument) for argument in command]
        code = (
            f"import sys, importlib.util as u; sys.path[:0] = [{str(source)!r}, {str(site)!r}]\n"
            f"assert not any(u.find_spec(name) for name in ('torch', 'onnx', 'onnx_ir', 'diffusers'))\n"
            f"from lehr.cli import main; main({arguments!r})"
        )
        done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def _with_requirements(names: list[str]) -> set[str]:
    found: set[str] = set()
    while names:
        name = names.pop()
        if name in found:
            continue
        found.add(name)
        for line in metadata.requires(name) or ():
            requirement = line.partition(";")
            wanted = requirement[0].split()[0].partition("[")[0]
            for mark in "<>=!~":
                wanted = wanted.partition(mark)[0]
            if "extra" not in requirement[2] and _installed(wanted):
                names.append(wanted)
    return found


def _installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


# -------------------------------------------------------------------------------------------------- list, help


@pytest.mark.parametrize("kind", ["backbones", "presets", "samplers", "targets", "recipes"])
def test_list_prints_an_array_for_machines_and_a_table_for_people(kind, capsys):
    code, out, err = lehr("list", kind, "--json", capsys=capsys)
    rows = json.loads(out)
    assert (code, err) == (0, "")
    assert all("name" in row for row in rows)
    code, out, _ = lehr("list", kind, capsys=capsys)
    assert all(row["name"] in out for row in rows)


def test_presets_have_the_fields_that_scripts_read(capsys):
    rows = json.loads(lehr("list", "presets", "--json", capsys=capsys)[1])
    assert all(set(row) == {"name", "family", "parameters", "prediction", "path"} for row in rows)


def test_samplers_have_the_fields_that_scripts_read(capsys):
    from lehr.runtime.solvers import samplers

    rows = json.loads(lehr("list", "samplers", "--json", capsys=capsys)[1])
    assert [row["name"] for row in rows] == list(samplers())
    assert all(set(row) == {"name", "order", "stochastic", "paths", "summary", "reference"} for row in rows)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_explains_itself_with_two_examples(verb, capsys):
    code, out, _ = lehr(verb, "--help", capsys=capsys)
    assert code == 0
    examples = [line for line in out.splitlines() if line.strip().startswith(f"lehr {verb}")]
    assert len(examples) >= 2
    assert cli._SUMMARIES[verb] in " ".join(out.split())


def test_doctor_says_what_is_ready(capsys):
    code, out, _ = lehr("doctor", "--json", capsys=capsys)
    assert code == 0
    assert {part["part"]: part["ready"] for part in json.loads(out)["parts"]}["export"] is True
    gpu = json.loads(out)["gpu"]
    assert "missing" in gpu or {"name", "sm", "memory_mb", "cuda", "driver"} < set(gpu)
    assert set(gpu["libraries"]) == {"tensorrt", "tensorrt_rtx", "onnxruntime-tensorrt"}
    code, out, _ = lehr("doctor", capsys=capsys)
    assert code == 0
    assert "GPU: " in out


# ------------------------------------------------------------------------------------------------ wrong inputs


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["exprt"], 2, "Did you mean 'export'"),
        (["list", "colours"], 2, "colours"),
        (["export", "digits-dot", "-o", "{tmp}/x.lehr"], 2, "Did you mean 'digits-dit'"),
        (["export", "digits-dit", "-o", "{tmp}/x.zip"], 2, "ends in .lehr"),
        (["export", "digits-dit", "-o", "{tmp}/no/x.lehr"], 2, "no"),
        (["export", "{tmp}/gone.safetensors", "--preset", "digits-dit", "-o", "{tmp}/x.lehr"], 2, "does not exist"),
        (["export", "{reshaped}", "-o", "{tmp}/x.lehr"], 2, "closest is 'digits-dit'"),
        (["export", "{user}", "-o", "{tmp}/x.lehr"], 2, "no weights file"),
        (["export", "{weights}", "--preset", "digits-dot", "-o", "{tmp}/x.lehr"], 2, "Did you mean"),
        (["export", "{weights}", "--preset", "digits-adm", "-o", "{tmp}/x.lehr"], 2, "missing"),
        (["export", "{truncated}", "--preset", "digits-dit", "-o", "{tmp}/x.lehr"], 2, "truncated"),
        (["export", "{reshaped}", "--preset", "digits-dit", "-o", "{tmp}/x.lehr"], 2, "final_layer.linear.bias"),
        (["export", "{nan}", "--preset", "digits-dit", "-o", "{tmp}/x.lehr"], 2, "final_layer.linear.bias"),
        (["export", "{tmp}/gone.py:make", "-o", "{tmp}/x.lehr"], 2, "does not exist"),
        (["export", "{user}:nothing", "-o", "{tmp}/x.lehr"], 2, "nothing"),
        (["export", "{user}:wrong", "-o", "{tmp}/x.lehr"], 2, "expected"),
        (["export", "{user}:broken", "-o", "{tmp}/x.lehr"], 3, "line"),
        (["export", "{user}:branches", "-o", "{tmp}/x.lehr"], 3, "data-dependent"),
        (["build", "{tmp}/gone.lehr"], 2, "no such bundle"),
        (["build", "{bundle}", "--target", "gpu"], 2, "unknown target"),
        (["build", "{bundle}", "--recipe", "fp33"], 2, "Did you mean 'fp32'"),
        (["build", "{bundle}", "--library", "tensort"], 2, "unknown engine library"),
        (["run", "{bundle}", "--class-label", "10", "-o", "{tmp}/o.png"], 2, "class label 10"),
        (["run", "{bundle}", "--sampler", "eulr", "-o", "{tmp}/o.png"], 2, "Did you mean"),
        (["run", "{bundle}", "--steps", "0", "-o", "{tmp}/o.png"], 2, "steps"),
        (["run", "{bundle}", "--num", "0", "-o", "{tmp}/o.png"], 2, "num"),
        (["run", "{bundle}", "-o", "{tmp}/no/o.png"], 2, "does not exist"),
        (["run", "{bundle}", "-o", "{tmp}/o.jpg"], 2, "must end in"),
        (["run", "{bundle}", "--guidance-scale", "nan", "-o", "{tmp}/o.png"], 2, "finite"),
        (["verify", "{tmp}/gone.lehr"], 2, "no such bundle"),
        (["inspect", "{weights}"], 2, "no folder"),
    ],
)
def test_wrong_input_gets_one_message_and_leaves_nothing_behind(arguments, code, says, inputs, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    got, out, err = lehr(*(argument.format(**inputs) for argument in arguments), "--json", capsys=capsys)
    assert got == code, err
    assert says in err
    error = json.loads(out)
    assert error["exit_code"] == code
    after = [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in path.parts]
    assert after == [path for path in before if "__pycache__" not in path.parts]


@pytest.fixture
def inputs(built, tmp_path) -> dict[str, Path]:
    """Files to go wrong with."""
    from safetensors.numpy import load_file, save_file

    from lehr.export.source import shipped_weights

    weights = shipped_weights("digits-dit")
    tensors = load_file(weights)
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(weights.read_bytes()[:-1000])
    reshaped = tmp_path / "reshaped.safetensors"
    save_file({**tensors, "final_layer.linear.bias": np.zeros(7, np.float32)}, reshaped)
    broken = tmp_path / "nan.safetensors"
    save_file({**tensors, "final_layer.linear.bias": np.full(16, np.nan, np.float32)}, broken)
    user = tmp_path / "user.py"
    user.write_text(USER)
    return {
        "tmp": tmp_path,
        "bundle": built,
        "weights": weights,
        "truncated": truncated,
        "reshaped": reshaped,
        "nan": broken,
        "user": user,
    }


USER = """
import torch
from lehr.runtime import BATCH, VP, ModelSpec, Prediction, PredictionKind, TensorSpec, Varies

SPEC = ModelSpec(
    name="user",
    inputs=(
        TensorSpec(name="sample", shape=("batch", 1, 8, 8), varies=Varies.SAMPLE),
        TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
    ),
    outputs=(TensorSpec(name="output", shape=("batch", 1, 8, 8), varies=Varies.SAMPLE),),
    dims=(BATCH,),
    path=VP(),
    prediction=Prediction(kind=PredictionKind.EPSILON),
)


class Good(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, sample, timestep):
        return self.conv(sample) + sample * torch.cos(timestep / 1000)[:, None, None, None]


class Branches(Good):
    def forward(self, sample, timestep):
        return sample if sample.sum() > 0 else self.conv(sample)


class State(Good):
    calls = 0

    def forward(self, sample, timestep):
        State.calls += 1
        return super().forward(sample, timestep) * (1 + State.calls / 100)


def good():
    torch.manual_seed(0)
    return Good(), SPEC


def branches():
    return Branches(), SPEC


def state():
    return State(), SPEC


def wrong():
    return Good()


def broken():
    raise ValueError("this factory is broken")
"""


def test_a_users_own_module_goes_all_the_way(inputs, tmp_path, capsys):
    bundle = tmp_path / "user.lehr"
    assert lehr("export", f"{inputs['user']}:good", "-o", bundle, capsys=capsys)[0] == 0
    assert lehr("build", bundle, capsys=capsys)[0] == 0
    assert lehr("run", bundle, "--num", 3, "-o", tmp_path / "u.npz", capsys=capsys)[0] == 0
    assert lehr("verify", bundle, capsys=capsys)[0] == 0


def test_a_module_that_computes_something_else_when_traced_does_not_leave_the_exporter(inputs, tmp_path, capsys):
    code, _, err = lehr("export", f"{inputs['user']}:state", "-o", tmp_path / "s.lehr", capsys=capsys)
    assert code == 3
    assert "differs" in err
    assert not (tmp_path / "s.lehr").exists()


# --------------------------------------------------------------------------------------------- damaged bundles


def test_an_altered_file_is_found_before_it_is_used(built, capsys):
    weights = built / "model" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    code, _, err = lehr("build", built, capsys=capsys)
    assert code == 5
    assert "weights.safetensors" in err


def test_a_missing_file_is_named(built, capsys):
    (built / "model" / "step.onnx").unlink()
    code, _, err = lehr("run", built, "-o", built.parent / "o.png", capsys=capsys)
    assert code == 5
    assert "model/step.onnx" in err


def test_an_engine_of_another_machine_is_refused_with_the_command_that_rebuilds_it(built, capsys, monkeypatch):
    from lehr.runtime import engine

    here = engine.host()
    monkeypatch.setattr(engine, "host", lambda: {**here, "isa": "something else"})
    code, _, err = lehr("run", built, "-o", built.parent / "o.png", capsys=capsys)
    assert code == 5
    assert "lehr build d.lehr --target cpu" in err


def test_a_bundle_without_an_engine_says_how_to_build_one(tmp_path, capsys):
    bundle = tmp_path / "s.lehr"
    assert lehr("export", "digits-dit", "-o", bundle, "--golden", "none", capsys=capsys)[0] == 0
    code, _, err = lehr("verify", bundle, capsys=capsys)
    assert code == 5
    assert "lehr build s.lehr" in err
    assert lehr("build", bundle, capsys=capsys)[0] == 0
    code, _, err = lehr("verify", bundle, capsys=capsys)
    assert code == 5
    assert "--golden" in err


def test_a_structure_only_bundle_cannot_be_built(tmp_path, capsys):
    bundle = tmp_path / "s.lehr"
    assert lehr("export", "dit-s-8", "--structure-only", "-o", bundle, capsys=capsys)[0] == 0
    code, _, err = lehr("build", bundle, capsys=capsys)
    assert code == 5
    assert "structure" in err


def test_an_engine_whose_weights_were_changed_fails_verification(built, capsys):
    """Sabotage: golden outputs no longer match the engine, and verify says no with exit code 1."""
    from lehr.runtime.bundle import Bundle

    bundle = Bundle.open(built)
    arrays = bundle.read_arrays("golden/steps.npz")
    with bundle.edit() as edit:
        edit.add_arrays("golden/steps.npz", {**arrays, "outputs": arrays["outputs"] * np.float32(1.001)})
    code, out, _ = lehr("verify", built, "--json", capsys=capsys)
    verdict = json.loads(out)
    assert code == 1
    assert verdict["passed"] is False
    assert verdict["levels"]["L1"]["passed"] is False
    assert verdict["levels"]["L2"]["passed"] is True


def test_an_export_that_is_interrupted_leaves_nothing_and_returns_130(tmp_path):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    heeding = ["env", "--default-signal=INT"]  # a shell's background jobs are started deaf to interrupts
    command = [*heeding, sys.executable, "-m", "lehr", "export", "digits-dit", "-o", str(tmp_path / "d.lehr")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        assert "tracing" in process.stderr.readline()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


def test_demo_does_everything_and_draws_a_picture(tmp_path, capfd):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["demo", "-o", str(tmp_path / "demo"), "--json"])
    out = json.loads(capfd.readouterr().out)
    assert exit_.value.code == 0
    assert out["passed"] is True
    assert len(out["bundles"]) == 2
    assert all(value >= 60 for value in out["psnr_db"].values())
    with Image.open(out["image"]) as picture:
        assert picture.size == (4 * (10 * 30 - 2), 4 * (4 * 30 - 2))
