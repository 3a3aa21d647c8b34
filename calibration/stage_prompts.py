"""Prompts that text encoders are calibrated with: a user's own, or a built-in list of plain ones."""

from __future__ import annotations

from pathlib import Path

from lehr.runtime.errors import InvalidInput

MAX_BYTES = 1 << 24  # of a file of prompts: some hundred thousand of them

# Of what people ask for: things, creatures, people, places, styles, single words and long sentences.
PROMPTS = (
    "a red apple on a wooden table",
    "a fox in the snow at sunrise",
    "portrait of an old fisherman, oil painting",
    "a mountain lake under a cloudy sky, wide angle photograph",
    "sunflower",
    "a small robot watering plants on a balcony",
    "an astronaut riding a horse through a desert, cinematic lighting",
    "a bowl of ramen with a boiled egg, seen from above",
    "a city street at night in the rain, neon signs reflected in puddles",
    "watercolour of a sailing boat near the coast",
    "a cat asleep on a pile of books",
    "two children building a sandcastle",
    "an isometric drawing of a tiny house with a garden",
    "a waterfall in a green forest, long exposure",
    "a black and white photograph of a jazz musician playing the saxophone",
    "logo of a bakery, flat colours, simple shapes",
    "a dragon curled around a tower, highly detailed fantasy illustration",
    "the surface of mars with a research station in the distance",
    "a blue vintage car parked in front of a yellow wall",
    "a woman with curly hair laughing, soft window light, shallow depth of field",
    "snow",
    "a stained glass window that shows a peacock",
    "an owl made of paper",
    "a bridge over a wide river in autumn, trees in red and gold",
    "a cup of coffee beside an open notebook and a fountain pen",
    "a flock of birds over a field of wheat at dusk",
    "a wooden chair, studio photograph on a white background",
    "a knight in silver armour standing in tall grass",
    "an underwater scene with corals, a turtle and rays of light from above",
    "a market with baskets of spices, people in colourful clothes",
    "pixel art of a castle on a hill",
    "a chocolate cake with strawberries, one slice cut out",
    "a smiling face",
    "a steam train crossing a viaduct in the mountains",
    "a pencil sketch of two hands holding a seedling",
    "the night sky over a desert, milky way, a tent that glows from inside",
    "a golden retriever catching a frisbee in a park",
    "a modern living room with large windows and a grey sofa",
    "a lighthouse in a storm, waves breaking against the rocks",
    "a macro photograph of a dewdrop on a leaf",
    "an old map of an island with mountains, forests and a harbour",
    "a violin and a sheet of music",
    "a crowd of people with umbrellas crossing a square, seen from a roof",
    "a green glass bottle with a ship inside",
    "a fire truck",
    "a ballet dancer in mid-air, motion blur, dark stage, a single spotlight from the left",
    "an abstract composition of circles and triangles in orange, teal and black",
    "a penguin wearing a scarf",
)


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a file: UTF-8, one a line; empty lines and repetitions are left out.

    Raises:
        InvalidInput: no such file, one that is too large or is not UTF-8, or one without a prompt.
    """
    expected = "Expected a text file in UTF-8 with a prompt a line."
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InvalidInput(f"{path} has {path.stat().st_size:,} bytes, more than {MAX_BYTES:,}. {expected}")
        data = path.read_bytes()
    except OSError as e:
        raise InvalidInput(f"the prompts in {path} cannot be read ({e.strerror}). {expected}") from e
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as e:
        line = data[: e.start].count(b"\n") + 1
        raise InvalidInput(f"{path} is not UTF-8: line {line} holds the byte {data[e.start]:#04x}. {expected}") from e
    found = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not found:
        raise InvalidInput(f"{path} holds no prompt. {expected}")
    return found
