"""Evidence from a machine: readings of its tools, what the report holds, and that it merges."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import stat
import time
from pathlib import Path

import numpy as np
import pytest

from lehr import cli
from lehr.ci import evidence as making
from lehr.ci import sensors
from lehr.export import device_floors
from lehr.runtime.bundle import Bundle
from lehr.runtime.golden import read

# As JetPack 6 prints it on an AGX Orin, and as JetPack 5 does on a Xavier NX.
ORIN = (
    "11-22-2026 10:00:00 RAM 3011/30697MB (lfb 5x4MB) SWAP 0/15348MB (cached 0MB) CPU [5%@1190,0%@2201,off,off] "
    "EMC_FREQ 1%@3199 GR3D_FREQ 97%@[1300,1300] VIC_FREQ 729 APE 174 CV0@-256C CPU@48.2C tj@51.5C gpu@50.1C "
    "VDD_GPU_SOC 12407mW/9000mW VDD_CPU_CV 1401mW/1401mW VIN_SYS_5V0 4010mW/3910mW VDDQ_VDD2_1V8AO 500mW/400mW"
)
XAVIER = (
    "RAM 1/7774MB SWAP 0/3887MB CPU [1%@1190] EMC_FREQ 0%@1600 GR3D_FREQ 0%@114 AUX@30C VDD_IN 4940/4940 "
    "VDD_CPU_GPU_CV 500/500"
)


def test_a_line_of_tegrastats_is_read_rail_by_rail():
    reading = sensors.parse_tegrastats(ORIN)
    assert reading.rails == {
        "VDD_GPU_SOC": 12.407,
        "VDD_CPU_CV": 1.401,
        "VIN_SYS_5V0": 4.01,
        "VDDQ_VDD2_1V8AO": 0.5,
    }
    assert reading.watts == pytest.approx(18.318)
    assert reading.clocks_mhz == {"emc": 3199.0, "gr3d": 1300.0, "cpu": 2201.0}
    assert reading.celsius == 51.5


def test_a_board_with_an_input_rail_is_not_counted_twice():
    reading = sensors.parse_tegrastats(XAVIER)
    assert reading.watts == 4.94
    assert reading.clocks_mhz["gr3d"] == 114.0


def test_a_line_that_says_nothing_gives_nothing():
    assert sensors.parse_tegrastats("hello") == sensors.Reading(watts=None)


def tool(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def jetson(tmp_path, monkeypatch) -> Path:
    """A PATH with a board's tools in front."""
    folder = tmp_path / "bin"
    folder.mkdir()
    line = ORIN.replace("12407mW", "$((12407 + 1000 * (n % 2)))mW")
    loop = f'n=0\nwhile :; do echo "{line}"; n=$((n+1)); sleep 0.02; done\n'
    tool(folder, "tegrastats", f'#!/bin/sh\necho "$*" > "{folder}/asked"\n{loop}')
    tool(folder, "nvpmodel", '#!/bin/sh\necho "NV Power Mode: MODE_30W"\necho 2\n')
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_power_is_read_while_something_runs_and_the_tool_ends_with_it(jetson):
    with sensors.Meter(sensors.find_source()) as meter:
        time.sleep(0.4)
    power = meter.power
    assert (power.source, power.reason) == ("tegrastats", "")
    assert power.samples >= 2
    assert 18.3 < power.watts < 19.4
    assert power.peak_watts == pytest.approx(19.318)
    assert power.clocks_mhz["gr3d"] == 1300.0
    assert (jetson / "asked").read_text().split() == ["--interval", "100"]
    count = power.samples
    time.sleep(0.1)
    assert meter.power.samples == count


def test_the_power_mode_is_the_boards_own(jetson):
    assert sensors.power_mode() == "MODE_30W"
    assert sensors.machine()["power_mode"] == "MODE_30W"


@pytest.mark.parametrize("text", ["#!/bin/sh\nexit 1\n", "#!/bin/sh\necho nothing\n"])
def test_a_power_mode_that_cannot_be_read_is_none(jetson, text):
    tool(jetson, "nvpmodel", text)
    assert sensors.power_mode() is None


class Driver:
    """NVML of one GPU; functions in ``refuses`` answer with an error."""

    refuses: frozenset[str] = frozenset()

    def __getattr__(self, name):
        def call(*arguments):
            if name in self.refuses:
                return 3  # NVML_ERROR_NOT_SUPPORTED
            if name == "nvmlDeviceGetName":
                arguments[1].value = b"NVIDIA Fake"
            elif name == "nvmlSystemGetDriverVersion":
                arguments[0].value = b"580.1"
            elif name.startswith("nvmlDeviceGet") and name != "nvmlDeviceGetHandleByIndex_v2":
                assert isinstance(arguments[-1]._obj, ctypes.c_uint)
                arguments[-1]._obj.value = {
                    "nvmlDeviceGetPowerUsage": 250_000,
                    "nvmlDeviceGetEnforcedPowerLimit": 700_000,
                    "nvmlDeviceGetTemperature": 61,
                    "nvmlDeviceGetClockInfo": 1000 + arguments[1] if len(arguments) > 2 else 0,
                }[name]
            return 0

        return call


def test_nvml_gives_power_clocks_and_what_the_gpu_is(monkeypatch):
    made = sensors.Nvml(Driver())
    assert made.open()
    assert made.facts() == {"gpu": "NVIDIA Fake", "driver": "580.1", "power_limit_w": "700"}
    monkeypatch.setattr(sensors, "INTERVAL", 0.01)
    with sensors.Meter(made) as meter:
        time.sleep(0.1)
    power = meter.power
    assert (power.source, power.watts, power.celsius) == ("nvml", 250.0, 61)
    assert power.clocks_mhz == {"graphics": 1000.0, "memory": 1002.0, "sm": 1001.0}


def test_what_a_gpu_does_not_tell_is_left_out_and_no_gpu_is_no_source(monkeypatch):
    class Silent(Driver):
        refuses = frozenset({"nvmlDeviceGetPowerUsage", "nvmlDeviceGetClockInfo", "nvmlDeviceGetName"})

    made = sensors.Nvml(Silent())
    assert made.open()
    assert made.read() == sensors.Reading(watts=None, clocks_mhz={}, celsius=61)
    assert "gpu" not in made.facts()

    class Absent(Driver):
        refuses = frozenset({"nvmlInit_v2"})

    monkeypatch.setattr(sensors.ctypes, "CDLL", lambda name: Absent())
    assert sensors.open_nvml() is None


def test_without_any_tool_nothing_is_claimed():
    with sensors.Meter(None) as meter:
        pass
    assert meter.power.watts is None
    assert "neither tegrastats nor" in meter.power.reason


# ---------------------------------------------------------------------------------------------------- the report


def lehr(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_evidence_of_this_machine_merges_and_holds_times_power_and_eagers_noise(
    dit_bundle, jetson, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(making, "_eager", lambda bundle, floors, progress: {"unavailable": floors.value})
    path = tmp_path / "cpu.json"
    options = ("--policy", "smoke", "--seconds", "0.2", "--eager", "no", "-o", path)
    assert lehr("evidence", dit_bundle, "--target", "cpu", *options, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data == json.loads(path.read_text())
    bench = data["measured"]["bench"]
    assert min(bench[key] for key in ("step_ms", "p90_ms", "loop_s", "start_s", "peak_mb", "bytes")) > 0
    assert bench["sqnr_db"] > 60
    assert bench["power"]["source"] == "tegrastats"
    assert bench["joules_a_step"] == pytest.approx(bench["power"]["watts"] * bench["step_ms"] / 1000, abs=1e-5)
    assert data["measured"]["machine"]["power_mode"] == "MODE_30W"
    assert data["measured"]["eager"] == {"unavailable": "no"}
    assert lehr("gate", "--merge", dit_bundle, path, "--policy", "smoke", "--expect", "cpu") == 0
    data["gate"]["schema"] = 9
    path.write_text(json.dumps(data))
    assert lehr("gate", "--merge", path, "--policy", "smoke") == 2


def test_evidence_for_another_machines_target_is_refused_with_the_way_to_get_it(dit_bundle, tmp_path, capsys):
    assert lehr("evidence", dit_bundle, "--target", "orin-agx", "-o", tmp_path / "orin.json") == 5
    assert "Make a build kit with lehr build digits-dit.lehr --target orin-agx" in capsys.readouterr().err
    assert not (tmp_path / "orin.json").exists()


@pytest.fixture
def untimed(monkeypatch) -> None:
    monkeypatch.setattr(making, "_bench", lambda *arguments: {"step_ms": 1.0})
    monkeypatch.setattr("lehr.commands.evidence._prose", lambda data, output, policy: "")


def test_an_engine_that_fails_the_gate_leaves_its_evidence_and_exits_with_1(dit_bundle, tmp_path, untimed):
    bundle = shutil.copytree(dit_bundle, tmp_path / "d.lehr")
    opened = Bundle.open(bundle)
    arrays = opened.read_arrays("golden/steps.npz")
    with opened.edit() as edit:
        edit.add_arrays("golden/steps.npz", {**arrays, "outputs": arrays["outputs"] * np.float32(1.01)})
    options = ("--policy", "smoke", "--eager", "no", "-o", tmp_path / "cpu.json")
    assert lehr("evidence", bundle, "--target", "cpu", *options) == 1
    assert json.loads((tmp_path / "cpu.json").read_text())["gate"]["passed"] is False


def test_a_missing_engine_is_built_first(dit_bundle, tmp_path, capsys, monkeypatch, untimed):
    monkeypatch.setenv("LEHR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lehr.engines.build.candidates", lambda *arguments: ("onnxruntime",))
    bundle = shutil.copytree(dit_bundle, tmp_path / "d.lehr")
    opened = Bundle.open(bundle)
    with opened.edit() as edit:
        for name in opened.names("engines/"):
            edit.remove(name)
    options = ("--policy", "smoke", "--eager", "no", "-o", tmp_path / "cpu.json")
    assert lehr("evidence", bundle, "--target", "cpu", *options) == 0
    assert "building for cpu in fp32" in capsys.readouterr().err


def test_eagers_noise_on_this_device_is_that_of_the_export_on_the_same_machine(dit_bundle):
    opened = Bundle.open(dit_bundle)
    found = device_floors.measured(opened)
    assert found["rel_error"] < 1e-4
    recorded = read(opened).floors
    for name in ("fp16", "bf16"):
        ours, theirs = (max(errors) for errors in (found["floors"][name]["rel_error"], recorded[name].rel_error))
        assert 0.5 < ours / theirs < 2


def test_eager_is_measured_by_a_process_of_its_own_and_a_source_that_is_gone_is_said(dit_bundle, tmp_path, monkeypatch):
    bundle = shutil.copytree(dit_bundle, tmp_path / "d.lehr")
    opened = Bundle.open(bundle)
    with opened.edit() as edit:
        edit.set_manifest(source="gone/model.safetensors")
    asked = (opened, making.EagerFloors.AUTO, lambda text: None)
    assert "gone/model.safetensors" in making._eager(*asked)["unavailable"]
    monkeypatch.setattr(making, "_FLOORS", "lehr.export.gone")
    assert "No module named lehr.export.gone" in making._eager(*asked)["unavailable"]
