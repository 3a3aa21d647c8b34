"""DiT (Peebles & Xie 2023, arXiv:2212.09748), after ``DiTPipeline``: a class in place of a prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from lehr.runtime.errors import BundleError, InvalidInput, UnknownName
from lehr.runtime.pipelines.family import Conditions, Drawing, Family
from lehr.runtime.pipelines.text import TextEncoders


class DiT(Family):
    """Asked in classes, by number or by name."""

    guidance_scale = 4.0
    prompted = False

    def conditions(self, drawing: Drawing, encoders: TextEncoders) -> Conditions:
        name, null = "class_labels", self.model.null_class
        given = {name: np.array(drawing.labels, dtype=np.int64)}
        if not drawing.guided:
            return Conditions(given=given)
        if null is None:
            raise InvalidInput(f"{self.model.name} has no 'no class' label; draw without guidance (scale 1).")
        return Conditions(given=given, without={name: np.full(drawing.num, null, dtype=np.int64)})

    def class_numbers(self, labels: Sequence[int | str]) -> tuple[int, ...]:
        """Classes by number or by any of their names, "tench" or "Tinca tinca"; letters' case does not matter.

        Raises:
            InvalidInput: a name that no class has, or that several have.
        """
        return tuple(self._number(label) for label in labels)

    def _number(self, label: int | str) -> int:
        if isinstance(label, int) or label.strip().isdecimal():
            return int(label)
        names = self._names()
        found = names.get(label.strip().casefold(), ())
        if not found:
            raise UnknownName("class", label, names)
        if len(found) > 1:
            numbers = ", ".join(str(number) for number in found)
            raise InvalidInput(f"several classes are called {label!r}; name one by its number: {numbers}.")
        return found[0]

    def _names(self) -> dict[str, tuple[int, ...]]:
        text = self.spec.options.get("id2label", "{}")
        try:
            labels = json.loads(str(text))
            pairs = [(int(number), str(name)) for number, name in labels.items()]
        except (AttributeError, ValueError, RecursionError) as e:
            raise BundleError(f"pipeline option 'id2label' is no JSON object ({e}). Export the model again.") from e
        names: dict[str, tuple[int, ...]] = {}
        for number, together in pairs:
            for name in dict.fromkeys([together, *together.split(",")]):
                key = name.strip().casefold()
                if number not in names.get(key, ()):
                    names[key] = (*names.get(key, ()), number)
        return names


FAMILY = DiT
