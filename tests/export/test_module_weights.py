"""Modules as sources of weights, and sources read into modules, against ``state_dict`` and ``load_state_dict``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lehr.engines.graph.tensor_file import SafetensorsFile, write_safetensors
from lehr.export.weights import TorchModuleSource, load_into
from lehr.runtime.errors import InvalidInput

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


class Small(nn.Module):
    """A weight with two names, a buffer of integers, and one that is not stored."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4, dtype=dtype), nn.Linear(4, 4, bias=False, dtype=dtype)
        self.head.weight = self.first.weight
        self.register_buffer("ids", torch.arange(3))
        self.frozen = nn.Parameter(torch.randn((), dtype=dtype), requires_grad=False)


def stored(module: nn.Module, path: Path) -> SafetensorsFile:
    source = TorchModuleSource(module)
    write_safetensors(path, [(name, source.info(name), lambda n=name: source.read(n)) for name in source.names()])
    return SafetensorsFile(path)


def hollow(dtype: torch.dtype = torch.float32) -> Small:
    with torch.device("meta"):
        return Small(dtype)


def same(module: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    found = module.state_dict()
    return found.keys() == state.keys() and all(
        value.dtype == state[name].dtype and torch.equal(value, state[name]) for name, value in found.items()
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bool])
def test_every_element_type_leaves_pytorch_with_its_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    module = nn.Module()
    module.register_buffer("x", torch.arange(-4, 5).reshape(3, 3).to(dtype).T)  # not contiguous
    stored(module, tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")["x"]
    assert found.dtype == dtype
    assert torch.equal(found.float(), module.x.float())  # type: ignore[union-attr, operator]


def test_reading_copies_nothing_on_the_cpu() -> None:
    module = Small()
    array = TorchModuleSource(module).read("first.weight")
    with torch.no_grad():
        module.first.weight.fill_(7)
    assert (array == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hollow_module_is_filled(tmp_path: Path, dtype: torch.dtype) -> None:
    module, target = Small(dtype), hollow(dtype)
    assert load_into(target, stored(module, tmp_path / "a.safetensors")) is target
    assert same(target, module.state_dict())
    assert target.head.weight is target.first.weight
    assert target.first.weight.requires_grad
    assert not target.frozen.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_module_with_weights_takes_others(tmp_path: Path, dtype: torch.dtype) -> None:
    module, target = Small(dtype), Small(dtype)
    weight = target.first.weight
    load_into(target, stored(module, tmp_path / "a.safetensors"))
    assert same(target, module.state_dict())
    assert target.first.weight is weight


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_converted_to_the_modules_element_type(tmp_path: Path, dtype: torch.dtype) -> None:
    module = Small(dtype)
    target = load_into(hollow(), stored(module, tmp_path / "a.safetensors"))
    assert torch.equal(target.get_parameter("first.weight"), module.first.weight.float())


def test_the_file_may_hold_a_shared_weight_once(tmp_path: Path) -> None:
    module = Small()
    for name in ("first.weight", "head.weight"):
        state = {
            key: value for key, value in module.state_dict().items() if key in (name, "first.bias", "ids", "frozen")
        }
        save_file(state, tmp_path / "a.safetensors")
        assert same(load_into(hollow(), SafetensorsFile(tmp_path / "a.safetensors")), module.state_dict())


def test_names_are_mapped(tmp_path: Path) -> None:
    module = Small()
    save_file({f"net.{key}": value.clone() for key, value in module.state_dict().items()}, tmp_path / "a.safetensors")
    source = SafetensorsFile(tmp_path / "a.safetensors")
    target = load_into(hollow(), source, rename=lambda name: name.removeprefix("net."))
    assert same(target, module.state_dict())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"first.bias": None}, "missing (1): first.bias"),
        ({"other": torch.ones(1)}, "unexpected (1): other"),
        ({"frozen": torch.ones(2)}, "frozen is float32 (2,), expected float32 ()"),
        ({"ids": torch.ones(3)}, "ids is float32 (3,), expected int64 (3,)"),
        ({"first.bias": torch.full((4,), np.nan)}, "'first.bias' holds nan"),
    ],
)
def test_weights_of_another_module_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    state = {key: value.clone() for key, value in Small().state_dict().items()} | change
    save_file({key: value for key, value in state.items() if value is not None}, tmp_path / "a.safetensors")
    with pytest.raises(InvalidInput) as caught:
        load_into(hollow(), SafetensorsFile(tmp_path / "a.safetensors"))
    assert said in str(caught.value)


def test_a_hollow_module_is_no_source() -> None:
    with pytest.raises(InvalidInput, match=r"'frozen' has no values.*meta"):
        TorchModuleSource(hollow())


def test_a_hollow_buffer_that_no_file_can_fill_is_named(tmp_path: Path) -> None:
    source, target = stored(Small(), tmp_path / "a.safetensors"), hollow()
    target.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(InvalidInput, match="'table' is in no state dict"):
        load_into(target, source)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(InvalidInput, match="'x'"):
        TorchModuleSource(Small()).info("x")
