"""Timing an engine in a process of its own, on request, so that engines take turns without sharing one.

Run as ``python -m lehr.runtime.timing BUNDLE ENGINE-FOLDER INPUTS.npz``. Threads of one engine library slow
whatever runs next in the same process, so whoever compares engines starts a process for each and asks them in turn.
The conversation is lines of JSON: after its first evaluation the process prints :class:`Started`; to each request read
from standard input, ``{"evaluations": N}`` or ``{"loop": STEPS}``, it answers with a list of seconds. To ``{"inputs":
FILE.npz, "output": FILE.npy}`` it writes what it computes from other inputs of the same sizes and answers ``[]``. It
ends with its input.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.bundle import Bundle
from lehr.runtime.engine import engines
from lehr.runtime.errors import InvalidInput
from lehr.runtime.hoisted import load_denoiser
from lehr.runtime.host import peak_rss_mb
from lehr.runtime.pipeline import Pipeline, Request

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

MARK = "lehr.timing "  # begins every line of an answer: libraries print what they like


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """What a process says after its first evaluation; the clock is the caller's, who knows when it began.

    Attributes:
        peak_mb: largest resident memory so far, in MB (10^6 bytes).
        base_mb: the same before anything was loaded.
    """

    peak_mb: float
    base_mb: float


def serve(
    evaluate: Callable[[Feeds], Array], inputs: Path, *, base_mb: float, loop: Callable[[int], object] | None = None
) -> None:
    """Evaluate once, then answer requests until standard input ends.

    Args:
        evaluate: one evaluation; what it returns is synchronised, on the host.
        inputs: of the evaluations that are timed, by :func:`write_inputs`.
        base_mb: resident memory before the engine was loaded.
        loop: draws a picture in so many steps, for processes that can.

    Raises:
        InvalidInput: a request that this process cannot answer.
    """
    feeds = read_inputs(inputs)
    evaluate(feeds)
    _say(asdict(Started(peak_mb=peak_rss_mb(), base_mb=base_mb)))
    for line in sys.stdin:
        asked = json.loads(line)
        if "evaluations" in asked:
            _say([_seconds(partial(evaluate, feeds)) for _ in range(int(asked["evaluations"]))])
        elif "inputs" in asked:
            made = np.asarray(evaluate(read_inputs(Path(asked["inputs"]))), dtype=np.float32)
            np.save(asked["output"], made, allow_pickle=False)
            _say([])
        elif "loop" in asked and loop is not None:
            _say([_seconds(partial(loop, int(asked["loop"])))])
        else:
            raise InvalidInput(f"this process times evaluations{' and loops' if loop else ''}, asked for {asked}.")


def read_inputs(path: Path) -> dict[str, Array]:
    """Inputs of one evaluation by name, which :func:`write_inputs` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


def write_inputs(path: Path, feeds: Feeds) -> None:
    """Write the inputs of one evaluation, by name."""
    with path.open("wb") as file:
        np.savez(file, **feeds)  # type: ignore[arg-type]  # names are keywords to numpy


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _say(value: Any) -> None:
    sys.stdout.write(f"{MARK}{json.dumps(value)}\n")
    sys.stdout.flush()


def main(root: str, folder: str, inputs: str) -> None:
    """Time one engine of a bundle."""
    base = peak_rss_mb()
    bundle = Bundle.open(root)
    record = next(record for record in engines(bundle) if record.folder == folder)
    denoiser = load_denoiser(bundle, record)
    spec, pipeline = denoiser.spec, Pipeline(denoiser)
    first = read_inputs(Path(inputs))
    sizes = {name: size for name, size in spec.check_feeds(first).items() if name != "batch"}
    num, conditions = len(first[spec.sample.name]), {tensor.name: first[tensor.name] for tensor in spec.conditions}

    def evaluate(feeds: Feeds) -> Array:
        given = {tensor.name: feeds[tensor.name] for tensor in spec.conditions}
        return denoiser.with_variance(feeds[spec.sample.name], float(feeds[spec.timestep.name][0]), given)

    def draw(steps: int) -> Array:
        request = Request(
            num=num,
            batch=num,
            num_inference_steps=steps,
            guidance_scale=1.0,
            conditions=conditions,
            sizes=sizes,
        )
        return pipeline(request)

    serve(evaluate, Path(inputs), base_mb=base, loop=draw)


if __name__ == "__main__":
    main(*sys.argv[1:])
