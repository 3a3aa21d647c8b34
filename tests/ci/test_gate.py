"""The gate's verdict and exit codes, what it refuses to judge, and the files it writes."""

from __future__ import annotations

import datetime as dt
import html.parser
import json
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lehr import cli
from lehr.ci import cost, junit
from lehr.ci import gate as gates
from lehr.ci.checks import Check, Outcome, Report, StepSeries, first_above, judged
from lehr.ci.footprint import footprint
from lehr.ci.markdown import markdown
from lehr.ci.page import page
from lehr.ci.policy import CostLimits, policies, policy
from lehr.runtime import engine as engines
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import RunFailed
from lehr.runtime.golden import Tier

TODAY = dt.date(2030, 1, 1)


@pytest.fixture
def bundle(dit_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(dit_bundle, tmp_path / "d.lehr"))


@pytest.fixture(scope="module")
def report(dit_bundle) -> Report:
    """What the policy ``release`` says of a good engine."""
    opened = Bundle.open(dit_bundle)
    return gates.gate(opened, engines.find(opened, "cpu", "fp32"), few(policy("release", TODAY)))


def few(asked):
    """The policy with as few samples of L3 as there may be."""
    return replace(asked, limits=replace(asked.limits, L3=replace(asked.limits.L3, samples=20.0)))


def lehr(*arguments, capsys):
    """Run a command line in this process: (exit code, stdout, stderr)."""
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(exit_.value.code or 0), out, err


def damage(root, *, factor=1.001):
    """Golden outputs that the engine does not reproduce."""
    opened = Bundle.open(root)
    arrays = opened.read_arrays("golden/steps.npz")
    with opened.edit() as edit:
        edit.add_arrays("golden/steps.npz", {**arrays, "outputs": arrays["outputs"] * np.float32(factor)})


def some(*checks, required=("L0", "L1")):
    """A report with these checks."""
    return Report(
        bundle="m<b>.lehr",
        model="m",
        engine="engines/e",
        target="cpu",
        recipe="fp32",
        baseline=None,
        policy="p",
        policy_sha256="0" * 64,
        required=required,
        checks=checks,
        steps=StepSeries(timesteps=(2.0, 1.0), rel_error=(1e-6, 0.0), limits=(1e-4, 1e-4)),
        loops={},
        value_range=(-1.0, 1.0),
        environment={"lehr": "1"},
        hashes={"file": "0" * 64},
    )


GOOD = (judged("L0.runs", True, "ran"), judged("L1.score", True, "equal"))

# ----------------------------------------------------------------------------------------------------- the verdict


def test_nothing_passes_by_default():
    assert some(*GOOD).passed
    assert not some().passed
    assert not some(GOOD[0]).passed
    assert not some(*GOOD, required=("L0", "L1", "L2")).passed


@pytest.mark.parametrize("outcome", [Outcome.NOT_RUN, Outcome.NOTED])
def test_a_level_that_was_not_judged_is_no_pass(outcome):
    assert not some(GOOD[0], Check(name="L1.score", outcome=outcome, reason="")).passed


def test_one_failure_in_a_level_that_is_not_required_is_a_failure():
    assert not some(*GOOD, judged("L2.x.ssim", False, "low")).passed
    assert some(*GOOD, Check(name="L2.x.ssim", outcome=Outcome.WAIVED, reason="known")).passed


def test_the_first_value_above_its_limit_is_found_and_a_nan_is_above():
    assert first_above(np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 3.0])) == 2
    assert first_above(np.array([1.0, np.nan]), np.array([1.0, 3.0])) == 1
    assert first_above(np.array([1.0]), np.array([1.0])) is None


# ------------------------------------------------------------------------------------------------- the command line


def test_a_good_engine_passes_smoke_and_twice_says_the_same(dit_bundle, capsys):
    code, out, _ = lehr("gate", dit_bundle, "--policy", "smoke", "--json", capsys=capsys)
    data = json.loads(out)
    assert code == 0
    assert data["passed"] is True
    assert {check["level"] for check in data["checks"]} == {"L0", "L1", "L2", "L3", "L4"}
    assert all(check["reason"] for check in data["checks"])
    assert len(data["series"]["drift"]["guided"]) == 21
    assert lehr("gate", dit_bundle, "--policy", "smoke", "--json", capsys=capsys)[1] == out


def test_a_bad_engine_exits_with_1_and_leaves_every_file_that_was_asked_for(bundle, tmp_path, monkeypatch, capsys):
    damage(bundle)
    xml, summary = tmp_path / "gate.xml", tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    options = ("--policy", "release", "--junit", xml, "--report", tmp_path / "new" / "gate")
    code, out, _ = lehr("gate", bundle, *options, capsys=capsys)
    assert code == 1
    assert "does NOT pass policy release" in out
    assert next(line for line in out.splitlines() if line.startswith("L1.score")).split()[1] == "FAIL"
    assert ET.parse(xml).getroot()[0].get("failures") == "1"
    assert summary.read_text().startswith("before\n### `d.lehr` does NOT pass policy release")
    assert "does NOT pass policy release" in (tmp_path / "new" / "gate" / "report.html").read_text()


def test_a_waiver_lets_a_failure_through_and_one_that_nothing_needs_is_named(bundle, tmp_path, capsys):
    damage(bundle)
    file = tmp_path / "mine.toml"
    waiver = '[[waivers]]\ncheck = "{}"\nexpires = 9999-12-31\nreason = "a known change"\n'
    file.write_text(
        policies()["release"].read_text().replace("samples = 100", "samples = 20")
        + waiver.format("L1.score")
        + waiver.format("L2.*")
    )
    code, out, _ = lehr("gate", bundle, "--policy", file, "--json", capsys=capsys)
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert code == 0
    assert checks["L1.score"]["outcome"] == "waived"
    assert "a known change" in checks["L1.score"]["reason"]
    assert checks["waiver.L2.*"]["outcome"] == "note"


def test_an_expired_waiver_is_wrong_usage(dit_bundle, tmp_path, capsys):
    file = tmp_path / "old.toml"
    waiver = '[[waivers]]\ncheck = "L1.*"\nexpires = 2020-01-31\nreason = "long ago"\n'
    file.write_text(policies()["release"].read_text() + waiver)
    code, _, err = lehr("gate", dit_bundle, "--policy", file, capsys=capsys)
    assert code == 2
    assert "waivers.expires was 2020-01-31" in err


# ------------------------------------------------------------------------------------------- what it refuses to judge


def test_a_bundle_without_golden_data_exits_with_5_and_says_so_in_the_junit_file(bundle, tmp_path, capsys):
    opened = Bundle.open(bundle)
    with opened.edit() as edit:
        for name in opened.names("golden/"):
            edit.remove(name)
        edit.set_manifest(golden_tier="none")
    xml = tmp_path / "gate.xml"
    code, _, err = lehr("gate", bundle, "--policy", "smoke", "--junit", xml, capsys=capsys)
    assert code == 5
    assert "no golden data" in err
    (case,) = ET.parse(xml).getroot()[0]
    assert case[0].tag == "error"
    assert "no golden data" in case[0].get("message")


def test_golden_data_without_loops_does_for_smoke_and_exits_with_5_for_release(bundle, monkeypatch, capsys):
    read = gates.read
    monkeypatch.setattr(gates, "read", lambda opened: replace(read(opened), tier=Tier.STEPS, trajectories=()))
    code, out, _ = lehr("gate", bundle, "--policy", "smoke", capsys=capsys)
    assert code == 0
    assert "golden data of tier 'steps' holds no loops" in out
    code, _, err = lehr("gate", bundle, "--policy", "release", capsys=capsys)
    assert code == 5
    assert "--golden full" in err


def test_an_engine_that_was_not_built_exits_with_5_and_the_command_that_builds_it(dit_bundle, capsys):
    code, _, err = lehr("gate", dit_bundle, "--policy", "smoke", "--recipe", "bf16", capsys=capsys)
    assert code == 5
    assert "lehr build digits-dit.lehr --target cpu --recipe bf16" in err


def test_a_policy_that_requires_cost_wants_a_baseline(dit_bundle, capsys):
    code, _, err = lehr("gate", dit_bundle, "--policy", "strict", capsys=capsys)
    assert code == 2
    assert "--baseline" in err


@pytest.mark.parametrize(
    ("change", "says"), [({"name": "other"}, "of model 'other'"), ({"inputs": None}, "other inputs")]
)
def test_a_baseline_of_another_model_is_wrong_usage(dit_bundle, bundle, change, says, capsys):
    opened = Bundle.open(bundle)
    model = opened.manifest.model
    if "inputs" in change:
        first, *rest = model.inputs
        change = {"inputs": (replace(first, shape=("batch", 1, 32, 32)), *rest)}
        change |= {"outputs": tuple(replace(tensor, shape=("batch", 1, 32, 32)) for tensor in model.outputs)}
    with opened.edit() as edit:
        edit.set_manifest(model=replace(model, **change))
    code, _, err = lehr("gate", dit_bundle, "--policy", "release", "--baseline", bundle, capsys=capsys)
    assert code == 2
    assert says in err


@pytest.mark.parametrize(
    ("option", "name"), [("--junit", "gate.txt"), ("--junit", "gone/gate.xml"), ("--report", "file")]
)
def test_a_file_that_cannot_be_written_is_named_before_the_work(
    dit_bundle, tmp_path, option, name, monkeypatch, capsys
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(gates, "load_denoiser", None)
    code, _, err = lehr("gate", dit_bundle, "--policy", "smoke", option, tmp_path / name, capsys=capsys)
    assert code == 2
    assert name.partition("/")[0] in err


# ------------------------------------------------------------------------------------------------------- the files


def test_junit_has_a_testcase_for_every_check_and_counts_that_agree(report, tmp_path):
    made = replace(report, checks=(*report.checks, judged("L2.x.ssim", False, "low \x00 & <b>")))
    junit.write(tmp_path / "g.xml", made)
    root = ET.parse(tmp_path / "g.xml").getroot()
    (suite,) = root
    cases = suite.findall("testcase")
    assert (root.tag, suite.tag) == ("testsuites", "testsuite")
    assert [child.tag for child in suite] == ["properties", *["testcase"] * len(cases)]
    assert [case.get("name") for case in cases] == [check.name for check in made.checks]
    assert {child.tag for case in cases for child in case} <= {"failure", "skipped", "system-out"}
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    found = {tag: sum(case.find(tag) is not None for case in cases) for tag in ("failure", "skipped")}
    assert counts == {"tests": len(cases), "failures": found["failure"], "errors": 0, "skipped": found["skipped"]}
    assert counts["failures"] == 1
    assert cases[-1][0].get("message") == "low \N{REPLACEMENT CHARACTER} & <b>"


def test_the_summary_has_a_row_for_every_check_and_text_breaks_no_row():
    lines = markdown(some(*GOOD, judged("L2.x", False, "a|b\n<i>c"))).splitlines()
    rows = [line for line in lines if line.startswith(("| ✅", "| ❌"))]
    assert len(rows) == 3
    assert rows[-1] == "| ❌ | `L2.x` | a\\|b &lt;i>c |"


class Reader(html.parser.HTMLParser):
    """Tags that are open, those that were seen, and everything that a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.fetched = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.fetched += [value for name, value in attrs if name in {"src", "href"}]
        if tag not in {"meta", "img", "line"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_well_formed_file_that_fetches_nothing(report):
    text = page(report)
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert len(text) < 2_000_000
    assert reader.seen.count("svg") == 1 + len(report.loops)
    assert reader.seen.count("img") == 3 * (len(report.loops) + 1)  # loops, and what L3 drew
    assert all(value.startswith("data:image/png;base64,") for value in reader.fetched)
    assert "url(" not in text
    assert "http" not in text
    for check in report.checks:
        assert f"<code>{check.name}</code>" in text


def test_a_report_of_large_pictures_stays_small_and_one_of_latents_says_that_it_has_none(report):
    rng = np.random.default_rng(0)
    loop = report.loops["guided"]
    for channels, pictures in ((3, 3), (4, 0)):
        noise = [rng.uniform(-1, 1, (12, channels, 512, 512)).astype(np.float32) for _ in range(2)]
        shown = {"guided": replace(loop, eager=noise[0], engine=noise[1])}
        text = page(replace(report, loops=shown, distribution=None))
        assert text.count("<img") == pictures
        assert ("are no pictures" in text) == (pictures == 0)
        assert len(text) < 2_000_000


def test_a_report_of_an_engine_that_returns_nan_and_of_names_with_markup_is_drawn(report):
    loop = report.loops["guided"]
    broken = np.full_like(loop.engine, np.nan)
    drift = (*loop.drift[:-1], 1e9)
    text = page(replace(report, loops={"guided": replace(loop, engine=broken, drift=drift, diverges_at=20)}))
    assert 'class="mark"' in text
    assert "m&lt;b&gt;.lehr" in page(some(*GOOD))


# ---------------------------------------------------------------------------------------------------- paired ratios


LIMITS = CostLimits(latency_ratio=1.10, size_ratio=1.2, confidence=0.99, max_seconds=1e9)


def timed(ratio, *, noise=0.05, seed=0, drift=0.0):
    """Two engines on a clock of our own: ``noise`` of each evaluation, and a machine that becomes slower."""
    rng, now = np.random.default_rng(seed), [0.0]

    def run(cost):
        now[0] += cost * (1 + drift * now[0]) * (1 + noise * abs(rng.standard_normal()))

    loads = (lambda: lambda: run(ratio), lambda: lambda: run(1.0))
    return cost.paired_ratio(*loads, LIMITS, clock=lambda: now[0])


@pytest.mark.parametrize(("ratio", "decided"), [(0.8, True), (1.0, True), (1.05, True), (1.15, False), (1.5, False)])
@pytest.mark.parametrize("seed", range(4))
def test_a_ratio_is_decided_as_it_is_also_on_a_machine_that_becomes_slower(ratio, decided, seed):
    found = timed(ratio, seed=seed, drift=0.001)
    assert found.decided is decided
    assert found.median == pytest.approx(ratio, rel=0.03)
    assert found.low <= found.median <= found.high


def test_a_ratio_at_the_limit_is_not_decided_and_takes_all_pairs():
    found = timed(1.10, noise=0.3)
    assert found.decided is None
    assert found.pairs == cost.MOST_PAIRS


def test_the_interval_of_a_median_holds_it_as_often_as_it_says():
    rng = np.random.default_rng(1)
    held = [
        low <= 1.0 <= high
        for low, high in (cost.median_interval(np.exp(0.1 * rng.standard_normal(80)), 0.9) for _ in range(150))
    ]
    assert 0.8 <= np.mean(held) <= 0.97


def test_memory_and_start_up_are_facts_of_a_process_that_runs_the_engine_alone(dit_bundle):
    opened = Bundle.open(dit_bundle)
    record = engines.find(opened, "cpu", "fp32")
    ballast = np.ones(100_000_000)  # 800 MB that are not the engine's
    made = footprint(opened, record)
    assert ballast.nbytes / 1e6 > made.peak_mb > cost.engine_bytes(opened, record) / 1e6
    assert 0 < made.start_seconds < 60


def test_an_engine_whose_process_fails_is_no_fact(dit_bundle):
    opened = Bundle.open(dit_bundle)
    record = replace(engines.find(opened, "cpu", "fp32"), library_version="0.1")
    with pytest.raises(RunFailed, match="measuring the memory"):
        footprint(opened, record)


def test_an_undecided_ratio_is_no_pass(dit_bundle, monkeypatch):
    undecided = cost.Ratio(median=1.0, low=0.5, high=2.0, pairs=20, decided=None)
    monkeypatch.setattr(cost, "paired_ratio", lambda *given, **named: undecided)
    opened = Bundle.open(dit_bundle)
    record = engines.find(opened, "cpu", "fp32")
    made = gates.gate(opened, record, few(policy("release", TODAY)), baseline=opened)
    assert not made.passed
    assert "did not decide" in next(check.reason for check in made.checks if check.name == "L4.latency")
