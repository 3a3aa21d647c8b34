"""Shipped recipes: complete, consistent between the runtime's values and calibration's policies, and checked early."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest

from lehr.calibration.configs import (
    Float8,
    Int8,
    Keep,
    Rounding,
    WeightOnly,
    ZeroPoint,
    config_from_json,
    config_to_json,
    formats_of,
)
from lehr.calibration.layers import Kind, Layer, Role, layers
from lehr.calibration.quantize import HANDLERS, applies
from lehr.calibration.recipes import POLICIES, mixed_recipe, needs_grams, plan_of, resting_in
from lehr.engines.builders import candidates, fitting
from lehr.engines.target import target, targets
from lehr.runtime.errors import InvalidInput
from lehr.runtime.recipe import QUANTISED, RECIPES, Format, Recipe, recipe

CALIBRATED = [name for name, found in RECIPES.items() if found.calibrated]


def layer(name: str, kind: Kind = Kind.MATMUL, *roles: Role) -> Layer:
    return Layer(
        name=name,
        kind=kind,
        group="g",
        inputs=("x",),
        output="y",
        weight="w",
        weight_shape=(64, 64),
        nbytes=4 * 64 * 64,
        macs=64 * 64,
        roles=frozenset(roles),
    )


FOUND = [
    layer("first", Kind.CONV, Role.FIRST),
    layer("a"),
    layer("c", Kind.CONV),
    layer("t", Kind.ATTENTION),
    layer("n", Kind.MATMUL, Role.CONDITIONING),
    layer("last", Kind.MATMUL, Role.LAST),
]


def test_every_quantised_recipe_has_a_policy_and_no_other_has() -> None:
    assert set(POLICIES) == set(CALIBRATED)
    assert not {"fp32", "fp16", "bf16"} & set(CALIBRATED)


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_recipe_says_what_its_policy_does(name: str) -> None:
    plan, found = plan_of(name, FOUND), recipe(name)
    pairs = {formats_of(config) for config in plan.values()}
    weighted = {la.name for la in FOUND if la.kind is not Kind.ATTENTION}
    stored = {formats_of(config)[0] for key, config in plan.items() if key in weighted}
    assert (stored or {Format.FP32}) == {found.weights}  # attention has no weight
    assert {product or Format.FP32 for _, product in pairs} == {found.arithmetic}
    assert all(applies(next(la for la in FOUND if la.name == key), config) for key, config in plan.items())
    assert all(type(config) in HANDLERS for config in plan.values())
    assert {config_from_json(config_to_json(config)) for config in plan.values()} == set(plan.values())
    assert set(needs_grams(plan)) == {k for k, c in plan.items() if getattr(c, "rounding", None) is Rounding.GPTQ}
    assert "last" not in plan  # nothing damps what the last layer errs
    assert ("first" in plan) == (name == "int8-weight")
    assert ("t" in plan) == (name in ("fp8", "int8-attention", "int8-asym-attention"))
    assert found.rel_error is not None
    assert found.psnr_db is not None


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_a_recipe_without_scales_is_built_and_not_calibrated(name: str) -> None:
    with pytest.raises(InvalidInput, match=f"lehr build NAME.lehr --recipe {name}"):
        plan_of(name, FOUND)


def test_a_recipe_that_fits_no_layer_is_refused() -> None:
    with pytest.raises(InvalidInput, match="quantises no layer"):
        plan_of("nvfp4", [layer("c", Kind.CONV)])


def test_old_recipes_ask_for_the_formats_that_they_asked_for_before() -> None:
    assert {name: recipe(name).formats for name in ("fp32", "fp16", "bf16")} == {
        "fp32": {Format.FP32},
        "fp16": {Format.FP16},
        "bf16": {Format.BF16},
    }


def test_a_quantised_recipe_must_state_its_loss() -> None:
    with pytest.raises(InvalidInput, match="must state the loss"):
        Recipe(name="x", version=1, weights=Format.INT8, arithmetic=Format.INT8, summary="")
    with pytest.raises(InvalidInput, match="the rest cannot be int8"):
        Recipe(name="x", version=1, weights=Format.FP32, arithmetic=Format.FP32, summary="", rest=Format.INT8)


def test_the_rest_may_compute_otherwise() -> None:
    assert resting_in(recipe("int8-sq"), Format.BF16).computes == {Format.INT8, Format.BF16}
    assert resting_in(recipe("int8-weight"), Format.BF16).arithmetic is Format.BF16


def test_a_mixture_asks_for_what_its_layers_need() -> None:
    plan = {"a": Int8(), "b": WeightOnly(format=Format.INT4), "c": Keep(), "d": Int8()}
    made = mixed_recipe("mixed", plan, psnr_db=35.0, rel_error=0.1)
    assert (made.weights, made.arithmetic, made.others) == (Format.INT8, Format.INT8, (Format.INT4,))
    assert made.formats == {Format.INT8, Format.INT4, Format.FP32}
    assert mixed_recipe("m", {"a": Float8(), "b": Int8()}, psnr_db=1, rel_error=1).others == (Format.INT8,)
    assert mixed_recipe("m", {"a": Int8(zero=ZeroPoint.OWN)}, psnr_db=1, rel_error=1).others == (Format.UINT8,)
    with pytest.raises(InvalidInput, match="quantises no layer"):
        mixed_recipe("m", {"a": Keep()}, psnr_db=1, rel_error=1)


# --------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("name", "asked", "nearest"),
    [("rtx-30", "fp8", "int8"), ("rtx-40", "nvfp4", "int4-weight"), ("a100", "fp8", "int8"), ("rtx-20", "int8", None)],
)
def test_a_target_without_the_format_names_the_nearest_recipe(name: str, asked: str, nearest: str | None) -> None:
    if nearest is None:
        target(name).check(recipe(asked))
        return
    with pytest.raises(InvalidInput, match=f"--recipe {nearest}"):
        target(name).check(recipe(asked))


def test_eight_bit_integers_build_everywhere_that_has_a_builder_for_them() -> None:
    for found in targets().values():
        if "tensorrt" in " ".join(found.libraries) or found.name == "cpu":
            assert fitting(found, recipe("int8")), found.name
    assert fitting(target("cpu"), recipe("fp8")) == ("onnxruntime",)
    assert set(fitting(target("rtx-50"), recipe("nvfp4"))) == {"tensorrt_rtx"}
    assert not fitting(target("rtx-40"), recipe("nvfp4"))


def test_zero_points_of_activations_are_built_on_processors_only() -> None:
    for name in ("int8-asym", "int8-asym-attention", "int8-attention"):
        assert fitting(target("cpu"), recipe(name)) == ("onnxruntime", "openvino")
        for found in targets().values():
            if found.sm:
                with pytest.raises(InvalidInput, match=r"no uint8.*--recipe int8"):
                    found.check(recipe(name))


def test_a_library_without_the_format_is_refused_with_one_that_has_it() -> None:
    with pytest.raises(InvalidInput, match="openvino has no fp8; use --library onnxruntime"):
        candidates(target("cpu"), recipe("fp8"), "openvino")


def test_a_processor_without_8_bit_products_is_refused_them_and_may_have_8_bit_weights() -> None:
    with pytest.raises(InvalidInput, match="no int8 arithmetic"):
        target("cpu").check_machine(recipe("int8"), ["avx2"])
    target("cpu").check_machine(recipe("int8-weight"), ["avx2"])
    target("cpu").check_machine(recipe("int8"), ["avx2", "avx512_vnni"])
    with pytest.raises(InvalidInput, match="no bf16 arithmetic"):
        target("cpu").check_machine(resting_in(recipe("int8"), Format.BF16), ["avx512_vnni"])


@pytest.mark.parametrize("name", CALIBRATED)
def test_every_recipe_plans_a_real_step_graph(name: str, dit_bundle: Path) -> None:
    found = layers(ir.load(dit_bundle / "model" / "step.onnx"), {"batch": 1, "height": 28, "width": 28})
    plan = plan_of(name, found)
    share = sum(la.macs for la in found if la.name in plan) / sum(la.macs for la in found)
    assert share > (0.05 if name == "int8-attention" else 0.8)  # what is kept holds little of the work
    assert json.dumps({key: config_to_json(config) for key, config in plan.items()})
    assert {formats_of(config)[0] for config in plan.values()} <= QUANTISED
