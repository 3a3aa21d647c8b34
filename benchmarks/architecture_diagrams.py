"""Diagrams of every family, drawn from the code: the modules that run, what feeds what, and how often.

    python benchmarks/architecture_diagrams.py     writes them into docs/architectures.md

The smallest preset of each family runs once on the meta device, where tensors have shapes and no values. Each carries
what it depends on and which modules made it, so an arrow is a tensor that really went that way, and a colour is the
rate at which the split by rate lets a module run (``lehr.engines.graph.rates``). Blocks of a list are drawn once, with
their number; inside of a block the arrows are those of its own modules.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lehr.engines.graph.rates import Depends, Rate, rate_of
from lehr.export.backbones import families
from lehr.export.backbones._table import FILE as TABLE
from lehr.export.backbones.preset import Preset
from lehr.runtime.spec import Varies

DOCUMENT = Path(__file__).parents[1] / "docs" / "architectures.md"
LISTS = (nn.ModuleList, nn.ModuleDict)
BEGIN, END = "<!-- diagrams:begin -->", "<!-- diagrams:end -->"
OUTPUT = "output"
COLOURS = {  # fill, stroke
    Rate.CONSTANT: ("#f4f4f4", "#999999"),
    Rate.PROMPT: ("#e3efda", "#5b8c3a"),
    Rate.SCHEDULE: ("#fdebc8", "#c68a1d"),
    Rate.STEP: ("#dbe8f8", "#3a6ea5"),
}
_DEPENDS = {
    Varies.CONSTANT: Depends.PROMPT,
    Varies.PROMPT: Depends.PROMPT,
    Varies.TIMESTEP: Depends.TIMESTEP,
    Varies.SAMPLE: Depends.SAMPLE,
}


# ----------------------------------------------------------------------------------------------------- tracing


class Traced(Tensor):
    """A tensor that knows what it depends on, and the places it comes from without another one between."""

    depends: Depends
    makers: frozenset[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        return marked(result, *of_all((args, kwargs)))


def of_all(tree: Any) -> tuple[Depends, frozenset[str]]:
    """What any of the tensors in ``tree`` depends on and comes from."""
    traced = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Traced)]
    depends = functools.reduce(lambda a, b: a | b, (t.depends for t in traced), Depends.NOTHING)
    return depends, frozenset().union(*(t.makers for t in traced))


def marked(tree: Any, depends: Depends | None, makers: frozenset[str]) -> Any:
    """The tree with every tensor marked anew; ``depends`` None keeps what each depends on.

    Lists stay the objects that they are, their tensors with them: U-Nets hand one down and change it.
    """

    def mark(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        result = leaf.as_subclass(Traced)
        kept = leaf.depends if isinstance(leaf, Traced) else Depends.NOTHING
        result.depends, result.makers = kept if depends is None else depends, makers
        return result

    return tree_map(mark, tree, is_leaf=lambda node: isinstance(node, list))


@dataclass(slots=True)
class Place:
    """A box of the diagram: a module, or all modules of one kind in a list.

    Attributes:
        title, kind: its name among its neighbours, and that of the class.
        inside: the box around it, if there is one.
        depends: of what it computes.
        modules: paths of the modules that ran here.
    """

    title: str
    kind: str
    inside: str | None
    depends: Depends = Depends.NOTHING
    modules: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Diagram:
    """Places by name in the order in which they first ran, and arrows."""

    places: dict[str, Place]
    arrows: dict[tuple[str, str], None]
    inputs: dict[str, Depends]


class Tracer:
    """Runs a module and notes who feeds whom."""

    def __init__(self, module: nn.Module) -> None:
        self.diagram = Diagram({}, {}, {})
        self._running: list[str] = []  # places from the outermost in
        self._entered: list[bool] = []
        for path, part in module.named_modules():
            if path and not isinstance(part, LISTS):
                boxes = boxes_of(module, path)
                part.register_forward_pre_hook(functools.partial(self._enter, boxes), with_kwargs=True)
                part.register_forward_hook(functools.partial(self._leave, path, boxes[-1].name))

    def _enter(self, boxes: tuple[Box, ...], module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        name = boxes[-1].name
        self._entered.append(name not in self._running)
        if not self._entered[-1]:
            return None
        for outer, box in zip((None, *boxes), boxes, strict=False):
            self.diagram.places.setdefault(box.name, Place(box.title, box.kind, outer.name if outer else None))
        self._running.append(name)
        for maker in sorted(of_all((args, kwargs))[1]):
            self._arrow(maker, name)
        # What is inside of a box starts with the box.
        return marked(args, None, frozenset()), marked(kwargs, None, frozenset())

    def _leave(self, path: str, name: str, module: nn.Module, args: Any, result: Any) -> Any:
        if not self._entered.pop():
            return None
        self._running.pop()
        place = self.diagram.places[name]
        place.depends |= of_all(result)[0]
        place.modules.add(path)
        return marked(result, None, frozenset([name]))

    def _arrow(self, maker: str, name: str) -> None:
        if maker != name:  # one block of a list to the next
            self.diagram.arrows[maker, name] = None

    def run(self, module: nn.Module, preset: Preset) -> Diagram:
        """Draw a preset; its module is on the meta device."""
        sizes, feeds = preset.spec.default_sizes(), {}
        for tensor in preset.spec.inputs:
            empty = torch.empty(tensor.sizes(sizes), dtype=getattr(torch, tensor.dtype.value), device="meta")
            depends = _DEPENDS[tensor.varies]
            feeds[tensor.name] = marked(empty, depends, frozenset([tensor.name]))
            self.diagram.inputs[tensor.name] = depends
        for maker in sorted(of_all(module(**feeds))[1]):
            self._arrow(maker, OUTPUT)
        return self.diagram


@dataclass(frozen=True, slots=True)
class Box:
    """Where a module is drawn: ``name`` is unique, ``title`` is read, ``kind`` is a class."""

    name: str
    title: str
    kind: str


def boxes_of(module: nn.Module, path: str) -> tuple[Box, ...]:
    """The boxes that the submodule at ``path`` belongs to, outermost first.

    A child of the model is a box; so are, together, the members of one class in a list of the model, and, within
    these, their own children, or the children of those that only hold others.
    """
    words = path.split(".")
    chain = [module.get_submodule(".".join(words[: depth + 1])) for depth in range(len(words))]
    if not isinstance(chain[0], LISTS):
        return (Box(words[0], words[0], type(chain[0]).__name__),)
    kind = type(chain[1]).__name__
    box = Box(f"{words[0]} {kind}", words[0], kind)
    if len(words) == 2:
        return (box,)
    holds = not isinstance(chain[2], LISTS) and type(chain[2]).forward is nn.Module.forward
    own = 3 if holds or isinstance(chain[2], LISTS) else 2
    title = type(chain[2]).__name__ if words[2].isdigit() else ".".join(words[2:4] if holds else words[2:3])
    return (box, Box(f"{box.name} {title}", title, type(chain[min(own, len(chain) - 1)]).__name__))


def diagram(preset: Preset) -> Diagram:
    """What runs in a preset."""
    with torch.device("meta"), torch.no_grad():
        module = preset.module().eval()
        return Tracer(module).run(module, preset)


def smallest(family: str) -> tuple[str, Preset]:
    """A family's preset with the fewest parameters, by the committed table."""
    parameters = {row["name"]: row["parameters"] for row in json.loads(TABLE.read_text(encoding="utf-8"))}
    found: dict[str, Preset] = importlib.import_module(f"lehr.export.backbones.{family}").PRESETS
    name = min(found, key=parameters.__getitem__)
    return name, found[name]


# ----------------------------------------------------------------------------------------------------- drawing


def mermaid(drawn: Diagram) -> str:
    """The diagram in Mermaid's language."""
    ids = {name: f"n{number}" for number, name in enumerate([*drawn.inputs, *drawn.places, OUTPUT])}
    inner = {name: [n for n, p in drawn.places.items() if p.inside == name] for name in drawn.places}

    def box(name: str, usual: int) -> str:
        place = drawn.places[name]
        kind = "" if place.kind == place.title else f"<br/><small>{place.kind}</small>"
        return f'{ids[name]}["{place.title}{_times(place, usual)}{kind}"]:::{rate_of(place.depends).value}'

    def arrows(among: Collection[str]) -> list[str]:
        return [f"{ids[a]} --> {ids[b]}" for a, b in drawn.arrows if {a, b} <= set(among)]

    lines = ["flowchart TB"]
    lines += [f"  {ids[name]}([{name}]):::{rate_of(depends).value}" for name, depends in drawn.inputs.items()]
    for name, place in drawn.places.items():
        if place.inside is not None:
            continue
        if not inner[name]:
            lines.append(f"  {box(name, 1)}")
            continue
        lines.append(f'  subgraph {ids[name]}["{place.title}: {place.kind}{_times(place, 1)}"]')
        lines += [f"    {box(child, len(place.modules))}" for child in inner[name]]
        lines += [f"    {arrow}" for arrow in arrows(inner[name])]
        lines.append("  end")
    lines.append(f"  {ids[OUTPUT]}([{OUTPUT}]):::{Rate.STEP.value}")
    outer = {*drawn.inputs, OUTPUT} | {name for name, place in drawn.places.items() if place.inside is None}
    lines += [f"  {arrow}" for arrow in arrows(outer)]
    for rate, (fill, stroke) in COLOURS.items():
        lines.append(f"  classDef {rate.value} fill:{fill},stroke:{stroke},color:#000")
    return "\n".join(lines)


def _times(place: Place, usual: int) -> str:
    return "" if len(place.modules) == usual else f" × {len(place.modules)}"


def section(names: Iterable[str]) -> str:
    """The document's section: one diagram a family, folded away."""
    parts = []
    for family in names:
        name, preset = smallest(family)
        summary = f"<details><summary><code>{family}</code>, drawn from <code>{name}</code></summary>"
        parts.append(f"{summary}\n\n```mermaid\n{mermaid(diagram(preset))}\n```\n\n</details>")
    return "\n\n".join(parts)


def document(content: str) -> str:
    """``content`` of the document with the diagrams between their marks."""
    made = f"{BEGIN}\n{section(families())}\n{END}"
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: made, content, flags=re.DOTALL)


def main() -> None:
    """Write the document anew."""
    DOCUMENT.write_text(document(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
