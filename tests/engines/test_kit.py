"""Build kits: made here, finished on a device that has TensorRT and neither ONNX nor PyTorch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from lehr import cli
from lehr.engines.build import example_feeds
from lehr.engines.kit import KitBuilder, elsewhere, open_kit
from lehr.engines.target import target
from lehr.engines.tensorrt_family import TENSORRT
from lehr.runtime.bundle import Bundle
from lehr.runtime.engine import engines
from lehr.runtime.errors import BuildFailed, BundleError
from lehr.runtime.kits import KitRecord, find_kit, kits
from lehr.runtime.pack import pack, unpack
from lehr.runtime.parity import relative_error
from lehr.runtime.recipe import recipe

HERE = Path(__file__).parent
RELEASES = json.loads((HERE / "tensorrt_api.json").read_text())["releases"]
KIT = "kits/orin-agx--fp32"
BUILD = ("build", "d.lehr", "--target", "orin-agx", "--recipe", "fp32", "--threads", "3")


@pytest.fixture(scope="module")
def made(dit_bundle, tmp_path_factory) -> Path:
    """A bundle with a kit for a Jetson, as ``lehr build`` leaves it on this machine."""
    bundle = Path(shutil.copytree(dit_bundle, tmp_path_factory.mktemp("kit") / "d.lehr"))
    assert lehr("build", bundle, "--target", "orin-agx", "--threads", "3") == 0
    return bundle


@pytest.fixture
def bundle(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "d.lehr"))


def lehr(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


# ------------------------------------------------------------------------------------------------- making a kit


def test_a_target_that_builds_on_itself_gets_a_kit_and_says_what_to_do_there(bundle, capsys):
    assert lehr("build", bundle, "--target", "orin-agx", "--threads", "3", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["engine"], data["kit"]) == (None, KIT)
    assert data["command"] == ["lehr", *BUILD]
    assert not [record for record in engines(Bundle.open(bundle)) if record.target == "orin-agx"]
    assert lehr("build", bundle, "--target", "orin-agx") == 0
    assert "It is no engine yet: the orin-agx must finish it with tensorrt >=10.3,<12" in capsys.readouterr().out
    assert lehr("inspect", bundle, "--json") == 0
    assert json.loads(capsys.readouterr().out)["kits"] == [
        {"target": "orin-agx", "recipe": "fp32", "library": "tensorrt"}
    ]


def test_the_same_bundle_gives_the_same_kit(made, bundle):
    assert lehr("build", bundle, "--target", "orin-agx", "--threads", "3") == 0
    first, second = (Bundle.open(root).manifest.files for root in (made, bundle))
    assert {n: e for n, e in first.items() if n.startswith(KIT)} == {
        n: e for n, e in second.items() if n.startswith(KIT)
    }


@pytest.mark.parametrize(
    ("machine", "sm", "name", "there"),
    [
        ("aarch64", "8.7", "orin-agx", True),
        ("aarch64", "11.0", "orin-agx", False),
        ("aarch64", None, "orin-agx", False),
        ("x86_64", "8.7", "orin-agx", False),
        ("x86_64", "9.0", "h100", True),
        ("x86_64", "8.0", "h100", False),
    ],
)
def test_an_engine_is_finished_where_machine_and_gpu_are_the_targets(monkeypatch, machine, sm, name, there):
    monkeypatch.setattr("lehr.engines.kit.platform.machine", lambda: machine)
    monkeypatch.setattr("lehr.engines.kit.host.gpu_compute_capability", lambda: sm)
    assert elsewhere(target(name), recipe("fp32")) is not there


@pytest.mark.parametrize("name", ["cpu", "rtx-40"])
def test_targets_that_are_built_for_here_need_no_kit(name):
    assert not elsewhere(target(name), recipe("fp32"))


def test_every_graph_of_a_kit_computes_what_the_portable_one_does(made):
    opened = Bundle.open(made)
    record = find_kit(opened, "orin-agx", "fp32")
    assert record is not None
    for name, feeds in example_feeds(opened).items():
        portable = run(opened.path(opened.manifest.graphs[name].file), feeds)
        assert set(record.graphs[name]) == {"", "Attention"}
        for file in record.graphs[name].values():
            for ours, theirs in zip(run(opened.path(f"{KIT}/{file}"), feeds), portable, strict=True):
                assert relative_error(np.atleast_1d(theirs)[None], np.atleast_1d(ours)[None]) < 1e-5


def run(path: Path, feeds: dict) -> list[np.ndarray]:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)


def test_one_variant_is_for_old_releases_and_one_for_new_and_they_share_their_weights(made):
    folder = made / KIT / "step"
    assert sorted(path.name for path in folder.iterdir()) == ["step-in-pieces.onnx", "step.onnx", "weights.safetensors"]
    old, new = (onnx.load(folder / name, load_external_data=False) for name in ("step-in-pieces.onnx", "step.onnx"))
    assert "Attention" not in {node.op_type for node in old.graph.node}
    assert "Attention" in {node.op_type for node in new.graph.node}
    assert (old.opset_import[0].version, new.opset_import[0].version) == (20, 23)


@pytest.mark.parametrize(("option", "says"), [("--weights=stripped", "refitted"), ("--mode=throughput", "--mode")])
def test_an_option_that_the_device_would_refuse_is_refused_here(bundle, capsys, option, says):
    assert lehr("build", bundle, "--target", "orin-agx", option) == 2
    assert says in capsys.readouterr().err


def test_a_recipe_that_needs_an_audit_is_refused_without_one(made, tmp_path, capsys):
    bundle = shutil.copytree(made, tmp_path / "d.lehr")
    opened = Bundle.open(bundle)
    with opened.edit() as edit:
        for name in opened.names("calibration/"):
            edit.remove(name)
    assert lehr("build", bundle, "--target", "orin-agx", "--recipe", "fp16") == 2
    assert "lehr audit" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ finishing it on a device

# Python as it is on the device: the modules that a Jetson has not cannot be found, the machine is a Jetson, TensorRT is
# a fake of the release, and what the engine computes is what was recorded, times a factor.
DEVICE = """
import json, platform, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
platform.machine = lambda: "aarch64"
from lehr.runtime import backends, hoisted, host, verify
from lehr.runtime.golden import read

host.gpu_compute_capability = lambda: "8.7"
real = backends.backends
backends.backends = lambda: (*real(), *(() if "tensorrt" in real() else ("tensorrt",)))

class Recorded:
    def __init__(self, bundle, record):
        self.spec, self.steps = bundle.manifest.model, read(bundle).steps

    def prepare(self, timesteps, sizes, conditions):
        pass

    def __call__(self, sample, timestep, conditions):
        return self.steps.outputs[list(self.steps.timesteps).index(timestep)] * {factor}

verify.load_denoiser = Recorded
from lehr import cli
cli.main(sys.argv[1:])
"""
# The fake gives every graph the inputs that one file names; here each has its own, and keeps what was parsed.
BY_GRAPH = """

class OnnxParser(OnnxParser):
    def parse_from_file(self, path):
        name = Path(path).stem.removesuffix("-in-pieces")
        self._network._inputs = [ITensor(one) for one in _GOES["graphs"][name]]
        shutil.copy(path, _HERE / f"parsed-{name}.onnx")
        return super().parse_from_file(path)
"""
NOT_THERE = ("onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "torch", "networkx", "scipy", "safetensors")


def on_the_device(bundle: Path, *arguments: str, release: str | None, folder: Path, factor: float = 1.0):
    """(exit code, JSON or None, stderr) of a command line on a fake Jetson."""
    folder.mkdir()
    absent = (*NOT_THERE, "tensorrt_rtx", *(() if release else ("tensorrt",)))
    if release:
        (folder / "tensorrt.py").write_text((HERE / "fake_tensorrt.py").read_text() + BY_GRAPH)
        graphs = Bundle.open(bundle).manifest.graphs
        inputs = {name: [tensor.name for tensor in graph.signature.inputs] for name, graph in graphs.items()}
        product = {"Name": "product", "LayerType": "gemm", "Outputs": [{"Format/Datatype": "Float"}]}
        goes = {"way": "well", "inputs": [], "graphs": inputs, "inspected": {"Layers": [product]}}
        facts = {**RELEASES[release], "version": release.partition(" ")[2], "goes": goes}
        (folder / "release.json").write_text(json.dumps(facts))
    sources = HERE.parents[1] / "src"
    cache = {"LEHR_CACHE": str(folder / "cache"), "XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", DEVICE.format(absent=set(absent), factor=factor), *arguments, "--json"],
        env={**os.environ, **cache, "PYTHONPATH": os.pathsep.join([str(folder), str(sources)])},
        cwd=bundle.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr


def without_loops(root: Path) -> None:
    """Golden data of single evaluations alone, which the fake engine can answer."""
    opened = Bundle.open(root)
    index = opened.read_json("golden/golden.json")
    with opened.edit() as edit:
        for name in ("golden/guided.npz", "golden/unguided.npz"):
            edit.remove(name)
        edit.add_json("golden/golden.json", {**index, "tier": "steps", "trajectories": {}})
        edit.set_manifest(golden_tier="steps")


@pytest.fixture
def device(bundle, tmp_path) -> Path:
    """What arrives on the device: packed here, unpacked there."""
    without_loops(bundle)
    opened = Bundle.open(bundle)
    archive = pack(opened, kits(opened)[0], tmp_path / "d.zip", golden=True).path
    (tmp_path / "device").mkdir()
    return unpack(archive, tmp_path / "device" / "d.lehr").root


@pytest.mark.parametrize(
    ("release", "file"), [("tensorrt 10.3.0", "step-in-pieces.onnx"), ("tensorrt 11.4.0", "step.onnx")]
)
def test_the_same_command_finishes_and_verifies_the_engine_without_onnx(device, tmp_path, release, file):
    assert not (device / "model").exists()
    code, data, err = on_the_device(device, *BUILD, release=release, folder=tmp_path / "fake")
    assert code == 0, err
    assert data["engine"] == f"engines/orin-agx--fp32--tensorrt-{release.split()[1]}"
    assert data["verified"]["passed"] is True
    opened = Bundle.open(device)
    (record,) = engines(opened)
    assert set(record.plans) == {"prompt", "schedule", "step"}
    assert record.sources == kits(opened)[0].sources
    assert opened.manifest.parity[record.folder]["passed"] is True
    assert record.achieved_precision == {"float": 1.0}
    assert (tmp_path / "fake" / "parsed-step.onnx").read_bytes() == (device / KIT / "step" / file).read_bytes()


def test_an_engine_that_is_not_within_parity_exits_with_1_and_says_so(device, tmp_path):
    code, data, _ = on_the_device(device, *BUILD, release="tensorrt 10.3.0", folder=tmp_path / "fake", factor=1.1)
    assert (code, data["verified"]["passed"]) == (1, False)
    assert Bundle.open(device).manifest.parity[data["engine"]]["passed"] is False


def test_a_device_without_tensorrt_says_what_is_missing(device, tmp_path):
    code, data, _ = on_the_device(device, *BUILD, release=None, folder=tmp_path / "fake")
    assert code == 4
    assert "there is no Python module 'tensorrt' here" in data["message"]


# ------------------------------------------------------------------------------------------------------- damage


def test_a_kit_of_other_weights_is_refused_with_the_command_that_makes_it_again(bundle):
    opened = Bundle.open(bundle)
    with opened.edit() as edit:
        edit.add_bytes("model/weights.safetensors", b"new weights")
    with pytest.raises(BundleError, match=r"model/weights.safetensors has changed .* lehr build d.lehr --target orin"):
        open_kit(opened, "orin-agx", "fp32", "tensorrt")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 9}, "its version is 9"),
        ({"graphs": {"step": "step.onnx"}}, "graphs.step is 'step.onnx'"),
        ({"command": "rm"}, "command is 'rm'"),
        ({"extra": 1}, "'extra' is missing or unknown"),
    ],
)
def test_a_damaged_record_is_refused(made, change, says):
    record = kits(Bundle.open(made))[0]
    assert KitRecord.from_json(record.to_json()) == record
    with pytest.raises(BundleError, match=says):
        KitRecord.from_json({**record.to_json(), **change})


def test_a_kit_that_lacks_a_graph_or_points_outside_is_refused(bundle):
    opened = Bundle.open(bundle)
    record = opened.read_json(f"{KIT}/kit.json")
    for graphs in ({**record["graphs"], "step": {}}, {"step": {"": "../../model/step.onnx"}}):
        with opened.edit() as edit:
            edit.add_json(f"{KIT}/kit.json", {**record, "graphs": graphs})
        with pytest.raises(BundleError):
            open_kit(opened, "orin-agx", "fp32", "tensorrt")


def test_a_graph_that_the_kit_has_not_is_named(made, tmp_path):
    kit = open_kit(Bundle.open(made), "orin-agx", "fp32", "tensorrt")
    assert kit is not None
    assert isinstance(kit.builder, KitBuilder)
    assert kit.builder.version.__func__ is TENSORRT.version.__func__
    with pytest.raises(BuildFailed, match=r"GroupNormalization of step\.onnx in pieces"):
        kit.builder.readable(kit.graphs["step"], target("orin-agx"), tmp_path, frozenset({"GroupNormalization"}))


# --------------------------------------------------------------------------------------------------- the archive


def test_pack_takes_the_kit_where_there_is_no_engine_and_says_so(bundle, tmp_path, capsys):
    archive = tmp_path / "k.zip"
    assert lehr("pack", bundle, "--target", "orin-agx", "-o", archive, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["engine"], data["kit"], data["bytes"]) == (None, KIT, archive.stat().st_size)
    assert not [name for name in data["files"] if name.startswith(("model/", "golden/", "engines/"))]
    assert lehr("unpack", archive, "-o", tmp_path / "there.lehr") == 0
    said = capsys.readouterr().out
    assert "lehr build there.lehr --target orin-agx --recipe fp32 --threads 3" in said
    assert lehr("pack", bundle, "--target", "cpu", "-o", archive, "--json") == 0
    assert json.loads(capsys.readouterr().out)["kit"] is None
