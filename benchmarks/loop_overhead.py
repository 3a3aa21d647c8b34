"""What the sampling loop costs beside the network, and beside diffusers' schedulers.

    python benchmarks/loop_overhead.py     writes benchmarks/results/loop_overhead.json

The network costs nothing: it returns the same array whatever it is shown. Times are medians over whole loops of 50
steps on a 1x4x64x64 sample, one thread, divided by the evaluations; ours and diffusers' run in turn, so that the
machine's load is shared. A scheduler's time is its ``scale_model_input`` and ``step``. Latents kept are those alive
between two rows, the newest input and output included; at the peak come the next row's sum, its scratch, and where a
row keeps something else than outputs the output itself. Tables are made before the loop; their time is CPU time.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before any library starts its threads

import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from environment import write

from lehr.runtime.loop import sample
from lehr.runtime.noise import batch_normal
from lehr.runtime.paths import VP, LinearFlow, Path
from lehr.runtime.prediction import EPSILON, FLOW_PREDICTION, Prediction
from lehr.runtime.schedules import is_flow
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.solvers import samplers, solver_table

SHAPE, STEPS, ROUNDS = (1, 4, 64, 64), 50, 25
MAX_STEP_US, MAX_NOISE_US, MAX_TABLE_MS, MORE_LATENTS = 30, 200, 50, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A deterministic sampler and the diffusers scheduler of that method; ``order`` is that of its formula.

    PNDM's and iPNDM's formulas are of order 4, though both converge at order 2 because of how they start.
    """

    name: str
    order: int
    scheduler: Any
    path: Path
    prediction: Prediction


def diffusion(name: str, order: int, scheduler: Any) -> Peer:
    """On the usual VP path."""
    return Peer(name=name, order=order, scheduler=scheduler, path=VP(), prediction=EPSILON)


SCHEDULERS: Any = diffusers  # whose constructors have no types
PEERS = (
    diffusion("ddim", 1, SCHEDULERS.DDIMScheduler(clip_sample=False)),
    diffusion("euler", 1, SCHEDULERS.EulerDiscreteScheduler()),
    diffusion("heun", 2, SCHEDULERS.HeunDiscreteScheduler()),
    diffusion("dpm_2", 2, SCHEDULERS.KDPM2DiscreteScheduler()),
    diffusion("lms", 4, SCHEDULERS.LMSDiscreteScheduler()),
    diffusion("dpmpp_2m", 2, SCHEDULERS.DPMSolverMultistepScheduler()),
    diffusion("dpmpp_2s", 2, SCHEDULERS.DPMSolverSinglestepScheduler()),
    diffusion("unipc", 3, SCHEDULERS.UniPCMultistepScheduler(solver_order=3)),
    diffusion("deis", 3, SCHEDULERS.DEISMultistepScheduler(solver_order=3)),
    diffusion("pndm", 4, SCHEDULERS.PNDMScheduler(skip_prk_steps=True)),
    diffusion("ipndm", 4, SCHEDULERS.IPNDMScheduler()),
    Peer(
        name="flow_euler",
        order=1,
        scheduler=SCHEDULERS.FlowMatchEulerDiscreteScheduler(),
        path=LinearFlow(),
        prediction=FLOW_PREDICTION,
    ),
    Peer(
        name="flow_heun",
        order=2,
        scheduler=SCHEDULERS.FlowMatchHeunDiscreteScheduler(),
        path=LinearFlow(),
        prediction=FLOW_PREDICTION,
    ),
)


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def scheduler_seconds(scheduler: Any, x_T: torch.Tensor, output: torch.Tensor) -> tuple[float, int]:
    """One whole loop of diffusers, without ``set_timesteps``: seconds and evaluations."""
    scheduler.set_timesteps(STEPS)
    started, x = time.perf_counter(), x_T
    for t in scheduler.timesteps:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return time.perf_counter() - started, len(scheduler.timesteps)


def peak_latents(table: SolverTable, x_T: Any, output: Any) -> float:
    """The most that is allocated at once, in latents: those kept, the network's last output, and a sum in progress."""
    tracemalloc.start()
    sample(lambda _x, _t: output.copy(), table, x_T)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / float(x_T.nbytes)


def compare(peer: Peer) -> dict[str, Any]:
    """One sampler beside its scheduler."""
    table = solver_table(peer.name, peer.path, peer.prediction, STEPS)
    form = table.recurrence()
    if form is None:
        raise RuntimeError(f"{peer.name} has no recurrence, so there is nothing to time here")
    x_T, output = (np.random.default_rng(k).standard_normal(SHAPE).astype(np.float32) for k in (0, 1))
    ours, theirs = [], []
    with torch.no_grad():
        for _ in range(ROUNDS):
            ours.append(timed(lambda: sample(lambda _x, _t: output, table, x_T)) / len(table))
            seconds, evaluations = scheduler_seconds(peer.scheduler, torch.from_numpy(x_T), torch.from_numpy(output))
            theirs.append(seconds / evaluations)
    return {
        "sampler": peer.name,
        "us_a_step": round(statistics.median(ours) * 1e6, 1),
        "diffusers": type(peer.scheduler).__name__,
        "diffusers_us_a_step": round(statistics.median(theirs) * 1e6, 1),
        "order": peer.order,
        "latents_kept": form.depth,
        "latents_allowed": peer.order + MORE_LATENTS,
        "latents_at_peak": round(peak_latents(table, x_T, output), 2),
        "float64_state": form.wide,
    }


def tables() -> list[dict[str, Any]]:
    """Milliseconds of CPU time to make every native sampler's table and to find its recurrence."""
    rows = []
    for name, found in samplers().items():
        path: Path = LinearFlow() if all(is_flow_type(kind) for kind in found.paths) else VP()
        prediction = FLOW_PREDICTION if is_flow(path) else EPSILON
        solver_table(name, path, prediction, 2)  # imports
        build, search = [], []
        for _ in range(5):
            started = time.process_time()
            table = solver_table(name, path, prediction, STEPS)
            made = time.process_time()
            table.recurrence()
            build.append((made - started) * 1e3)
            search.append((time.process_time() - made) * 1e3)
        row = {"sampler": name, "build_ms": statistics.median(build), "recurrence_ms": statistics.median(search)}
        rows.append({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()})
    return rows


def is_flow_type(kind: type) -> bool:
    """Whether a path's class is a flow's."""
    return kind.__name__ in {"LinearFlow", "Interpolant"}


def main() -> None:
    """Measure, write, and say what is missed."""
    torch.set_num_threads(1)
    noise = [timed(lambda: batch_normal(0, range(1), SHAPE[1:])) * 1e6 for _ in range(40 * ROUNDS)]
    generator = torch.Generator().manual_seed(0)
    drawn = [timed(lambda: torch.randn(SHAPE, generator=generator)) * 1e6 for _ in range(40 * ROUNDS)]
    loops, built = [compare(peer) for peer in PEERS], tables()
    figures = {
        "us_a_step": max(row["us_a_step"] for row in loops),
        "noise_us": round(statistics.median(noise), 1),
        "latents_over_order": max(row["latents_kept"] - row["order"] for row in loops),
        "table_ms": round(max(row["build_ms"] + row["recurrence_ms"] for row in built), 2),
    }
    limits = dict(zip(figures, (MAX_STEP_US, MAX_NOISE_US, MORE_LATENTS, MAX_TABLE_MS), strict=True))
    path = write(
        "loop_overhead",
        {
            "shape": SHAPE,
            "steps": STEPS,
            "rounds": ROUNDS,
            "threads": 1,
            "largest": figures,
            "at_most": limits,
            "met": all(figures[name] <= limit for name, limit in limits.items()),
            "torch_randn_us": round(statistics.median(drawn), 1),
            "loops": loops,
            "tables": built,
        },
    )
    print(path.read_text())


if __name__ == "__main__":
    main()
