"""Key maps: what a rule matches, and how tensors of a checkpoint become one of ours."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch

from lehr.export.checkpoints import maps
from lehr.export.checkpoints.rules import CopiesDiffer, Origin, Rule, Transform, ignored, origin
from lehr.runtime.errors import InvalidInput

QKV = Rule("blocks.{i}.qkv.{leaf}", tuple(f"layers.{{i}}.to_{part}.{{leaf}}" for part in "qkv"))
TABLE = Rule("table.{leaf}", ("layers.{any}.table.{leaf}",))


def test_placeholders_carry_over_to_every_source() -> None:
    found = origin((QKV,), "blocks.12.qkv.bias", ())
    assert found.keys == ("layers.12.to_q.bias", "layers.12.to_k.bias", "layers.12.to_v.bias")


def test_sources_are_concatenated_along_the_first_dimension_in_order() -> None:
    tensors = {f"layers.0.to_{part}.weight": torch.full((2, 3), float(n)) for n, part in enumerate("qkv")}
    whole = origin((QKV,), "blocks.0.qkv.weight", tensors).read(tensors.__getitem__)
    assert whole[:, 0].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("key", ["blocks.x.qkv.weight", "blocks.1.qkv.weight.more", "ablocks.1.qkv.weight", "other"])
def test_key_that_no_rule_matches_keeps_its_name(key: str) -> None:
    assert origin((QKV,), key, ()) == Origin(parts=((key,),))


def test_first_matching_rule_wins() -> None:
    special = Rule("blocks.0.qkv.{leaf}", ("first.{leaf}",))
    assert origin((special, QKV), "blocks.0.qkv.weight", ()).keys == ("first.weight",)
    assert origin((special, QKV), "blocks.10.qkv.weight", ()).keys[0] == "layers.10.to_q.weight"


def test_dots_in_patterns_match_dots_alone() -> None:
    assert origin((Rule("a.b", ("c",)),), "axb", ()).keys == ("axb",)


def test_equal_copies_in_several_blocks_become_one_tensor() -> None:
    tensors = {f"layers.{n}.table.weight": torch.ones(2) for n in (0, 1, 10)}
    found = origin((TABLE,), "table.weight", tensors)
    assert set(found.keys) == set(tensors)
    assert found.read(tensors.__getitem__).tolist() == [1, 1]


def test_copies_that_differ_are_refused() -> None:
    tensors = {"layers.0.table.weight": torch.ones(2), "layers.1.table.weight": torch.zeros(2)}
    with pytest.raises(CopiesDiffer, match=r"layers\.1\.table\.weight"):
        origin((TABLE,), "table.weight", tensors).read(tensors.__getitem__)


def test_copies_that_are_missing_are_named_by_their_pattern() -> None:
    assert origin((TABLE,), "table.weight", ("unrelated",)).keys == ("layers.{any}.table.weight",)


def test_swapped_halves_exchange_scale_and_shift() -> None:
    found = origin((Rule("m.{leaf}", ("n.{leaf}",), Transform.SWAP_HALVES),), "m.bias", ())
    assert found.read(lambda key: torch.arange(6)).tolist() == [3, 4, 5, 0, 1, 2]
    with pytest.raises(InvalidInput, match="odd"):
        found.read(lambda key: torch.arange(5))


def grid(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    pairs = [[torch.cat([column, row]) for column in columns] for row in rows]
    return torch.stack([torch.stack(line) for line in pairs]).reshape(1, len(rows) * len(columns), -1)


def test_position_grid_is_taken_apart_into_its_rows_and_columns() -> None:
    rows, columns = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    for transform, expected in ((Transform.GRID_ROWS, rows), (Transform.GRID_COLUMNS, columns)):
        found = origin((Rule("ours", ("theirs",), transform),), "ours", ())
        assert torch.equal(found.read(lambda key: grid(rows, columns)), expected)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.randn(1, 16, 6, generator=torch.Generator().manual_seed(1)), "no sin-cos grid"),
        (torch.zeros(1, 15, 6), "must have the shape"),
        (torch.zeros(2, 16, 6), "must have the shape"),
        (torch.zeros(1, 16, 5), "must have the shape"),
        (torch.zeros(16, 6), "must have the shape"),
    ],
)
def test_table_that_is_no_grid_is_refused(table: torch.Tensor, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        origin((Rule("ours", ("theirs",), Transform.GRID_ROWS),), "ours", ()).read(lambda key: table)


def test_ignored_keys_are_matched_whole() -> None:
    assert ignored(("pos_embed", "blocks.{i}.ids"), "blocks.3.ids")
    assert not ignored(("pos_embed",), "pos_embed.proj.weight")


def test_rules_with_unknown_or_unbound_placeholders_are_refused() -> None:
    with pytest.raises(InvalidInput, match="does not bind"):
        Rule("a.{leaf}", ("b.{i}.{leaf}",))
    with pytest.raises(InvalidInput, match="known"):
        Rule("a.{n}", ("b.{n}",))
    with pytest.raises(InvalidInput, match="no source"):
        Rule("a", ())


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(maps.__path__)])
def test_map_holds_rules_and_ignored_keys_for_at_least_one_format(name: str) -> None:
    tables = vars(importlib.import_module(f"{maps.__name__}.{name}"))
    formats = [form for form in ("DIFFUSERS", "ORIGINAL") if form in tables]
    assert formats
    for form in formats:
        assert all(isinstance(rule, Rule) for rule in tables[form])
        assert len({rule.ours for rule in tables[form]}) == len(tables[form]), "a key pattern of ours stands twice"
        assert all(isinstance(key, str) for key in tables[f"{form}_IGNORED"])
