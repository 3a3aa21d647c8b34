"""Templates for build servers: valid by their schemas, and their shell steps do what they say."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lehr.ci.policy import policies

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / "ci" / "workflows"
ACTION = WORKFLOWS / "github" / "action.yml"
EXAMPLE = WORKFLOWS / "github" / "release-gate.yml"
GITLAB = WORKFLOWS / "gitlab" / "release-gate.gitlab-ci.yml"

# `lehr` as the steps find it. Exporting takes too long here, so a bundle that was exported before is copied; evidence
# comes from no device, so the CPU's is given another name.
LEHR = f"""#!{sys.executable}
import json, os, pathlib, shutil, sys
sys.path.insert(0, {str(ROOT / "src")!r})
from lehr import cli

verb, *rest = sys.argv[1:]
log = pathlib.Path(os.environ["STEPS_LOG"])
log.write_text((log.read_text() if log.exists() else "") + " ".join(sys.argv[1:]) + "\\n")
if verb == "export":
    shutil.copytree(os.environ["STEPS_BUNDLE"], rest[rest.index("-o") + 1])
elif verb == "audit":
    pass
elif verb == "evidence":
    report = json.loads(pathlib.Path(os.environ["STEPS_REPORT"]).read_text())
    target, recipe = rest[rest.index("--target") + 1], rest[rest.index("--recipe") + 1]
    engine = f"engines/{{target}}--{{recipe}}--tensorrt-10.3.0"
    shared = {{n: h for n, h in report["hashes"].items() if not n.startswith("engines/")}}
    report |= {{"target": target, "recipe": recipe, "engine": engine}}
    report["hashes"] = {{**shared, engine + "/build.json": "5" * 64}}
    whole = {{"schema": report["schema"], "kind": "evidence", "date": "2030-01-01", "gate": report, "measured": {{}}}}
    pathlib.Path(rest[rest.index("-o") + 1]).write_text(json.dumps(whole))
else:
    cli.main(sys.argv[1:])
"""
PIP = '#!/bin/sh\necho "python $*" >> "$STEPS_LOG"\n'


@pytest.fixture
def steps(dit_bundle, tmp_path):
    """A function that runs one shell step in a folder of its own, as a build server would, and gives what it called."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("lehr", LEHR), ("python", PIP)):
        (tools / name).write_text(text)
        (tools / name).chmod(stat.S_IRWXU)
    log = tmp_path / "log"
    fixed = {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "STEPS_LOG": str(log),
        "STEPS_BUNDLE": str(dit_bundle),
        "STEPS_REPORT": str(tmp_path / "report-for-evidence.json"),
        "LEHR_CACHE": str(tmp_path / "cache"),
    }

    def run(script: str, cwd: Path, **environment: str) -> list[str]:
        log.unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
            cwd=cwd,
            env={**fixed, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        return log.read_text().splitlines() if log.exists() else []

    return run


def substituted(text: str, **values: str) -> str:
    """Expressions of GitHub's in ``text``, by their last name."""
    return re.sub(r"\$\{\{\s*[\w.]*?([\w-]+)\s*\}\}", lambda match: values[match[1]], text)


def scripts(job: dict) -> list[dict]:
    return [step for step in job["steps"] if "run" in step]


# -------------------------------------------------------------------------------------------------- their schemas


@pytest.mark.parametrize(
    ("file", "options"),
    [
        (ACTION, ["--builtin-schema", "vendor.github-actions"]),
        (EXAMPLE, ["--builtin-schema", "vendor.github-workflows"]),
        (GITLAB, ["--builtin-schema", "vendor.gitlab-ci", "--data-transform", "gitlab-ci"]),
    ],
    ids=["action", "workflow", "gitlab"],
)
def test_a_template_is_valid_and_a_broken_one_is_not(file, options, tmp_path):
    command = [sys.executable, "-m", "check_jsonschema", *options]
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    broken = tmp_path / file.name
    broken.write_text(file.read_text().replace("using: composite", "using: magic").replace("needs:", "nedds:"))
    assert subprocess.run([*command, str(broken)], capture_output=True, check=False).returncode == 1


def test_no_expression_stands_inside_a_script():
    """What a build server pastes into a script is run by it; what arrives in the environment is not."""
    for file in (ACTION, EXAMPLE):
        whole = yaml.safe_load(file.read_text())
        jobs = whole["jobs"].values() if "jobs" in whole else [whole["runs"]]
        found = [step["run"] for job in jobs for step in scripts(job)]
        assert found
        assert not [script for script in found if "${{" in script]


def test_the_example_expects_each_engine_that_it_builds_and_uses_inputs_that_the_action_has():
    jobs = yaml.safe_load(EXAMPLE.read_text())["jobs"]
    verdict = next(step["run"] for step in scripts(jobs["verdict"]) if "--merge" in step["run"])
    for row in jobs["gate"]["strategy"]["matrix"]["include"]:
        assert f"--expect {row['target']}:{row['recipe']}" in verdict
    used = next(step for step in jobs["gate"]["steps"] if "lehr-gate" in step.get("uses", ""))["with"]
    assert set(used) <= set(yaml.safe_load(ACTION.read_text())["inputs"])


# ------------------------------------------------------------------------------------------------ their shell steps


def test_the_steps_of_the_example_make_one_verdict_from_a_server_and_a_device(steps, tmp_path):
    """Both templates of GitHub, step by step; uploads and downloads are copies here."""
    whole, action = yaml.safe_load(EXAMPLE.read_text()), yaml.safe_load(ACTION.read_text())
    environment = {**whole["env"], "DEVICE_RECIPE": "fp32", "POLICY": "smoke"}
    server, device, last = (tmp_path / name for name in ("server", "device", "last"))
    for folder in (server, device, last / "reports"):
        folder.mkdir(parents=True)

    called = [line for step in scripts(whole["jobs"]["export"]) for line in steps(step["run"], server, **environment)]
    assert called[0].startswith("python -m pip install")
    assert [line.split()[0] for line in called[1:]] == ["export", "audit", "build", "pack"]
    assert (server / "device.zip").is_file()

    given = {name: item.get("default", "") for name, item in action["inputs"].items()}
    given |= {"bundle": "model.lehr", "policy": "smoke", "temp": str(tmp_path)}
    output = tmp_path / "output"
    for step in scripts(action["runs"]):
        variables = {name: substituted(value, **given) for name, value in step.get("env", {}).items()}
        steps(step["run"], server, **variables, GITHUB_OUTPUT=str(output))
    assert output.read_text() == "report=lehr-gate/report.json\n"
    assert {path.name for path in (server / "lehr-gate").iterdir()} >= {
        "report.html",
        "report.json",
        "junit.xml",
        "gate.sarif",
    }
    shutil.copytree(server / "lehr-gate", last / "reports" / "report-cpu-fp32")
    shutil.copy(server / "lehr-gate" / "report.json", tmp_path / "report-for-evidence.json")

    shutil.copy(server / "device.zip", device)
    (script,) = (step["run"] for step in scripts(whole["jobs"]["device"]))
    for _ in range(2):  # a runner that is used again has the folder of the run before
        steps(script, device, **environment)
    (last / "reports" / "report-device").mkdir()
    shutil.copy(device / "report.json", last / "reports" / "report-device")

    shutil.copytree(server / "model.lehr", last / "model.lehr")
    _, script = (step["run"] for step in scripts(whole["jobs"]["verdict"]))
    steps(script.replace("--expect cpu:fp16", ""), last, **environment)
    data = json.loads((last / "verdict" / "report.json").read_text())
    assert data["passed"] is True
    assert [row["target"] for row in data["reports"]] == ["cpu", "orin-agx"]
    assert (last / "verdict.sarif").is_file()


def test_the_scripts_of_the_gitlab_template_make_one_verdict(steps, tmp_path):
    whole = yaml.safe_load(GITLAB.read_text())
    environment = {**whole["variables"], "POLICY": "smoke", "LEHR_DEVICE": "orin-agx", "LEHR_DEVICE_RECIPE": "fp32"}
    environment |= {"TARGET": "cpu", "RECIPE": "fp32", "LEHR_CACHE": str(tmp_path / "cache")}
    folder = tmp_path / "project"
    folder.mkdir()

    def job(name: str) -> None:
        lines = "\n".join(whole[name]["script"]).replace("--expect cpu:fp16", "")
        steps(lines, folder, **environment)

    job("lehr-export")
    job("lehr-gate")
    shutil.copy(folder / "reports" / "cpu-fp32" / "report.json", tmp_path / "report-for-evidence.json")
    assert (folder / "cpu-fp32.xml").is_file()
    job("lehr-device")
    job("lehr-verdict")
    assert json.loads((folder / "verdict" / "report.json").read_text())["passed"] is True


def test_the_hook_for_commits_gates_a_bundle_within_twenty_seconds(steps, dit_bundle):
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert hook["entry"].split("--policy ")[1] in policies()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    steps(f"{hook['entry']} {dit_bundle}", dit_bundle.parent)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of the processor: it runs on one thread, and how busy this machine is says nothing about the hook.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20
