"""Targets: every file is valid and sourced, what one cannot do is refused with what it can, and the list is honest."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tomllib
from hypothesis import given
from hypothesis import strategies as st

from lehr import cli
from lehr.engines import target as module
from lehr.engines.builders import buildable, fitting, installed
from lehr.engines.target import HARDWARE_FORMATS, Target, read_target, target, targets
from lehr.runtime.backends import backends
from lehr.runtime.errors import InvalidInput, UnknownName
from lehr.runtime.recipe import RECIPES, Format, recipe

FOLDER = Path(module.__file__).parent / "targets"
GPUS = sorted(name for name, facts in targets().items() if facts.sm)
PROMISED = {
    "cpu", "cuda", "orin-nano", "orin-nx", "orin-agx", "thor", "a100", "a10", "l4", "l40s", "h100", "h200", "b200",
    "rtx-20", "rtx-30", "rtx-40", "rtx-50", "dgx-spark",
}  # fmt: skip

# ----------------------------------------------------------------------------------------------------- the files


def test_there_is_a_target_for_every_machine_that_is_promised():
    assert set(targets()) >= PROMISED


@pytest.mark.parametrize("name", GPUS)
def test_every_fact_has_its_source_on_its_line(name):
    """A section whose heading has a source has it for all of its facts."""

    def has_source(line: str) -> bool:
        return "https://" in line.partition("#")[2] or "tests/" in line.partition("#")[2]

    sourced, heading = 0, ""
    for line in (FOLDER / f"{name}.toml").read_text().splitlines():
        if line.startswith("["):
            heading = line
        elif "=" in line.split("#")[0] and not line.startswith(("name", "summary")):
            assert has_source(line) or has_source(heading), line
            sourced += 1
    assert sourced >= 8


@pytest.mark.parametrize("name", GPUS)
def test_a_gpus_facts_agree_with_each_other(name):
    facts = target(name)
    # Weights in int4 are widened before they are multiplied, which every GPU can.
    computed = {{"nvfp4": "fp4"}.get(form.value, form.value) for form in facts.formats} - {"int4"}
    assert computed <= set(facts.native) <= HARDWARE_FORMATS
    capabilities = [tuple(map(int, sm.split("."))) for sm in facts.sm]
    assert ("bf16" in facts.native) == all(sm >= (8, 0) for sm in capabilities)
    assert ("tf32" in facts.native) == all(sm >= (8, 0) for sm in capabilities)
    assert ("fp8" in facts.native) == all(sm >= (8, 9) for sm in capabilities)
    assert ("fp4" in facts.native) == all(sm >= (10, 0) for sm in capabilities)
    assert set(facts.versions) == set(facts.libraries)
    assert facts.memory_gb is not None
    assert facts.bandwidth_gb_s is not None
    assert 4 <= facts.memory_gb[0] <= facts.memory_gb[1] <= 288
    assert 30 <= facts.bandwidth_gb_s[0] <= facts.bandwidth_gb_s[1] <= 8000
    assert (facts.dla[1] > 0) == (name in ("orin-nx", "orin-agx"))


GOOD = """name = "t"
summary = ""
os = ["linux"]
arch = ["x86_64"]
libraries = ["tensorrt"]
formats = ["fp16"]
opset = 20
"""


def read(folder: Path, text: str) -> Target:
    (folder / "t.toml").write_text(text)
    return read_target(folder / "t.toml")


def test_a_file_with_the_least_facts_is_read_and_one_with_all(tmp_path):
    least = read(tmp_path, GOOD)
    assert least.formats == (Format.FP16,)
    assert (least.sm, least.memory_gb, least.dla, dict(least.versions)) == ((), None, (0, 0), {})
    text = (
        GOOD + 'sm = ["8.7"]\nmemory_gb = [4, 8]\nbandwidth_gb_s = 68.3\ndla = 1\n[versions]\ntensorrt = ">=10.3,<12"\n'
    )
    most = read(tmp_path, text)
    assert most.memory_gb == (4, 8)
    assert most.bandwidth_gb_s == (68.3, 68.3)
    assert most.dla == (1, 1)


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("", "colour = 3\n", r"t\.toml has the unknown key 'colour'; known: name, summary"),
        ("opset = 20\n", "", r"t\.toml lacks opset"),
        ('name = "t"', 'name = "u"', "its name is 'u', expected 't'"),
        ("fp16", "fp17", "'fp17' is not a valid Format"),
        ('"fp16"', "", "formats must name at least one"),
        ("opset = 20", "opset = 3", "opset is 3, expected 17 to 26"),
        ("linux", "plan9", "os is"),
        ("x86_64", "vax", "arch is"),
        ("", 'sm = ["sm_89"]\n', "sm is"),
        ("", 'native = ["fp17"]\n', r"native names \['fp17'\]"),
        ("", "memory_gb = [8, 4]\n", "memory_gb is"),
        ("", 'memory_gb = "8 GB"\n', "neither a number nor a pair"),
        ("", "dla = -1\n", "dla is"),
        ("", '[versions]\nopenvino = ">=1"\n', "not among its libraries"),
        ("", '[versions]\ntensorrt = "new"\n', "version range of tensorrt is 'new'"),
        ("opset = 20", "opset = ", "is no TOML"),
        ("opset = 20", 'opset = "20"', "of another kind"),
    ],
)
def test_a_file_with_a_wrong_fact_is_refused_by_name(tmp_path, before, after, says):
    with pytest.raises(InvalidInput, match=says):
        read(tmp_path, GOOD.replace(before, after, 1) if before else GOOD + after)


def test_an_unknown_target_is_refused_with_the_closest():
    with pytest.raises(UnknownName, match="Did you mean 'rtx-40'"):
        target("rtx40")


# ----------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", sorted(targets()))
@pytest.mark.parametrize("asked", sorted(RECIPES))
def test_a_recipe_is_taken_or_refused_with_one_that_is_taken(name, asked):
    facts, wanted = target(name), recipe(asked)
    if not facts.missing(wanted):
        facts.check(wanted)
        assert facts.nearest(wanted) == wanted
        return
    near = facts.nearest(wanted)
    assert near is not None
    facts.check(near)
    with pytest.raises(InvalidInput, match=rf"cannot run recipe '{asked}': no .*--recipe {near.name}\."):
        facts.check(wanted)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("orin-agx", "fp8"),
        ("orin-nano", "fp8"),
        ("rtx-30", "fp8"),
        ("rtx-20", "bf16"),
        ("h100", "nvfp4"),
        ("l4", "nvfp4"),
    ],
)
def test_formats_that_the_hardware_has_not_are_refused_before_anything_is_built(name, asked):
    with pytest.raises(InvalidInput, match=f"target '{name}' cannot run recipe '{asked}': no {asked}"):
        target(name).check(recipe(asked))


@pytest.mark.parametrize(
    ("formats", "asked", "near"),
    [
        ((Format.FP16,), "bf16", "fp16"),
        ((Format.FP32,), "bf16", "fp32"),
        ((Format.FP32, Format.FP16), "bf16", "fp16"),
        ((Format.BF16,), "fp32", "bf16"),
    ],
)
def test_the_nearest_recipe_has_the_closest_width(formats, asked, near):
    odd = Target(name="t", summary="", os=("linux",), arch=("x86_64",), libraries=(), formats=formats, opset=20)
    assert odd.nearest(recipe(asked)) == recipe(near)


@pytest.mark.parametrize(
    ("wanted", "within", "without"),
    [
        (">=10.3,<12", ["10.3.0", "10.3", "10.16.1", "11.4.1.7"], ["10.2.9", "12.0", "9"]),
        ("==10.3", ["10.3.0.30"], ["10.4", "10"]),
        (">10.3,<=11.4", ["10.4", "11.4.1"], ["10.3.9", "11.5"]),
    ],
)
def test_a_version_out_of_range_is_refused_with_the_range(wanted, within, without):
    facts = Target(
        name="t",
        summary="",
        os=("linux",),
        arch=("x86_64",),
        libraries=("tensorrt",),
        formats=(Format.FP16,),
        opset=20,
        versions={"tensorrt": wanted},
    )
    for version in within:
        facts.check_version("tensorrt", version)
    for version in without:
        with pytest.raises(InvalidInput, match=rf"'t' needs tensorrt {wanted}, and {version} is installed"):
            facts.check_version("tensorrt", version)
    facts.check_version("another", "0.0")


@given(
    version=st.lists(st.integers(0, 99), min_size=3, max_size=4),
    bound=st.lists(st.integers(0, 99), min_size=3, max_size=3),
)
def test_versions_compare_as_numbers(version, bound):
    text, wanted = ".".join(map(str, version)), ".".join(map(str, bound))
    assert module._within(text, f">={wanted}") == (version[:3] >= bound)
    assert module._within(text, f"<{wanted}") == (version[:3] < bound)


# ------------------------------------------------------------------------------------------------------ the list


def lehr_list(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(["list", "targets", *arguments])
    assert not ended.value.code
    return capsys.readouterr().out


def test_the_list_says_what_can_be_built_here_and_what_can_be_run(capsys):
    rows = {row["name"]: row for row in json.loads(lehr_list(capsys, "--json"))}
    assert set(rows) == set(targets())
    for name, row in rows.items():
        facts = target(name)
        assert row["recipes"] == [r.name for r in RECIPES.values() if fitting(facts, r)]
        assert set(row["builds_here"]) <= {library for library in facts.libraries if installed(library)}
        assert row["runs_with"] == [library for library in facts.libraries if library in backends()]
    assert {"fp32", "fp16"} <= set(rows["cuda"]["recipes"])
    assert {"fp16"} <= set(rows["rtx-20"]["recipes"])
    assert not {"fp32", "bf16", "fp8"} & set(rows["rtx-20"]["recipes"])
    assert "cpu" in {name for name, row in rows.items() if row["runs_with"]}
    prose = lehr_list(capsys)
    assert prose.count("not yet") == sum(not row["runs_with"] for row in rows.values())


def test_a_target_of_another_kind_of_machine_is_not_built_here():
    assert buildable(target("orin-agx"), "linux", "x86_64") == ()
    assert buildable(target("rtx-40"), "linux", "aarch64") == ()
    assert buildable(target("rtx-40"), "win32", "x86_64") == ()


def test_a_target_is_not_built_here_without_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert buildable(target("rtx-40"), "linux", "x86_64") == ()
    assert not installed("tensorrt_rtx")


def test_the_readme_has_every_target():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    for name in targets():
        assert f"`{name}`" in text, name


def test_the_extra_that_brings_a_library_asks_for_the_targets_versions():
    with (Path(__file__).parents[2] / "pyproject.toml").open("rb") as file:
        asked = tomllib.load(file)["project"]["optional-dependencies"]["trt-rtx"]
    assert asked[0].partition(";")[0] == f"tensorrt-rtx-cu13{target('rtx-40').versions['tensorrt_rtx']}"
