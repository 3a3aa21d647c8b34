"""The pictures of docs/samplers.md.

    python benchmarks/draw_samplers.py     writes docs/sampler-{tables,trajectories,quality}.png

Tables and trajectories are computed here; the curves of quality are drawn from benchmarks/results/sampler_quality.json.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from environment import RESULTS
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import SymLogNorm

from lehr.runtime.loop import Step, sample
from lehr.runtime.noise import START, batch_normal
from lehr.runtime.paths import VP, LinearFlow
from lehr.runtime.paths import Path as NoisePath
from lehr.runtime.prediction import EPSILON, FLOW_PREDICTION, Prediction, PredictionKind
from lehr.runtime.solvers import sampler, solver_table

Array = npt.NDArray[np.floating[Any]]
DOCS = Path(__file__).resolve().parents[1] / "docs"
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.bbox": "tight"})


def save(figure: Any, name: str) -> None:
    """Write docs/NAME.png, without a date."""
    figure.savefig(DOCS / f"{name}.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------- matrices

TABLES = ("ddim", "dpmpp_2m", "unipc", "heun", "pndm", "dpmpp_2m_sde")
TABLE_STEPS = 12


def draw_tables() -> None:
    """Coefficients of the network's outputs (left) and of x_T and the noises, a row an evaluation."""
    figure, axes = plt.subplots(2, 3, figsize=(10.5, 5.8), layout="constrained")
    norm = SymLogNorm(linthresh=0.03, vmin=-3, vmax=3)
    colours = ScalarMappable(norm, "RdBu_r")
    for axis, name in zip(axes.flat, TABLES, strict=True):
        table = solver_table(name, VP(), Prediction(kind=PredictionKind.SAMPLE), TABLE_STEPS)
        n, noises = len(table), table.num_noises
        matrix = np.concatenate([table.start[:, None], table.outputs, table.noises], axis=1)
        shown = np.where(matrix == 0, np.nan, matrix)
        axis.imshow(shown, cmap=colours.cmap, norm=norm, aspect="auto", interpolation="nearest")
        for border in (0.5, n + 0.5) if noises else (0.5,):
            axis.axvline(border, color="0.6", lw=0.8)
        axis.axhline(n - 0.5, color="0.6", lw=0.8)
        form = table.recurrence()
        kept = "dense" if form is None else f"keeps {form.depth} latents"
        axis.set_title(f"{name}: {n} evaluations, {kept}", fontsize=9)
        centres, labels = [0, n / 2 + 0.5], ["$x_T$", "outputs $F_j$"]
        if noises:
            centres, labels = [*centres, n + noises / 2 + 0.5], [*labels, "noises $z_j$"]
        axis.set_xticks(centres, labels)
        axis.set_yticks([0, n], ["first input", r"$x_\mathrm{final}$"])
        axis.tick_params(length=0)
        axis.set_frame_on(False)
    figure.colorbar(colours, ax=axes, shrink=0.75, label="coefficient", ticks=[-3, -1, -0.1, 0, 0.1, 1, 3], format="%g")
    save(figure, "sampler-tables")


# --------------------------------------------------------------------------------------------------- trajectories

MEANS, SPREAD, WEIGHTS = np.array([-1.0, 0.1, 1.2]), 0.12, np.array([0.4, 0.25, 0.35])
TRAJECTORIES: tuple[tuple[str, NoisePath, int], ...] = (
    ("ddim", VP(), 10),
    ("dpmpp_2m", VP(), 20),
    ("flow_euler", LinearFlow(), 10),
    ("ddpm", VP(), 20),
    ("dpmpp_2m_sde", VP(), 20),
    ("lcm", VP(), 4),
)
BESIDE, HEIGHT = 1.04, 0.38  # where the densities stand, and how far a density of 1 reaches


def denoised(x: Array, alpha: float, sigma: float) -> Array:
    """E[x_0 | x_t = x] for a mixture of Gaussians: exact, so that only the sampler errs."""
    variance = (alpha * SPREAD) ** 2 + sigma**2
    away = x[..., None] - alpha * MEANS
    logits = np.log(WEIGHTS) - away**2 / (2 * variance)
    share = np.exp(logits - logits.max(axis=-1, keepdims=True))
    share /= share.sum(axis=-1, keepdims=True)
    mean = MEANS + alpha * SPREAD**2 / variance * away
    return np.asarray((share * mean).sum(axis=-1))


def output(x: Array, timestep: float, path: NoisePath, prediction: Prediction) -> Array:
    """What a perfect network would return."""
    alpha, sigma = (float(value) for value in path.alpha_sigma(timestep))
    on_sample, on_output = prediction.denoised_coefficients(alpha, sigma)
    return np.asarray((denoised(x, alpha, sigma) - float(on_sample) * x) / float(on_output))


def density(values: Array) -> Array:
    """Of the data."""
    bumps = np.exp(-((values[:, None] - MEANS) ** 2) / (2 * SPREAD**2)) / (SPREAD * np.sqrt(2 * np.pi))
    return np.asarray(bumps @ WEIGHTS)


def draw_trajectories(shown: int = 16, counted: int = 4000) -> None:
    """Paths of a few samples through the noise, beside the histogram of many and the true density."""
    figure, axes = plt.subplots(2, 3, figsize=(10.5, 5.6), layout="constrained", sharey=True)
    for axis, (name, path, steps) in zip(axes.flat, TRAJECTORIES, strict=True):
        prediction = FLOW_PREDICTION if isinstance(path, LinearFlow) else EPSILON
        table = solver_table(name, path, prediction, steps)
        noise = batch_normal(0, range(counted), (1,), stream=START).astype(np.float64)
        inputs: list[Array] = []

        def keep(step: Step, inputs: list[Array] = inputs) -> None:
            inputs.append(step.sample[:shown, 0].copy())

        final = sample(
            partial(output, path=path, prediction=prediction),
            table,
            noise * table.init_noise_sigma,
            injected=lambda j: batch_normal(0, range(counted), (1,), stream=1 + j).astype(np.float64),
            on_step=keep,
        )
        times = np.append(np.arange(len(inputs)), len(inputs)) / len(inputs)
        rows = np.array([*inputs, final[:shown, 0]])
        axis.plot(times, rows, color="C0", lw=0.8, alpha=0.55)
        axis.plot(times, rows, ".", color="C0", ms=2.2, alpha=0.7)
        grid = np.linspace(-3, 3, 400)
        counts, edges = np.histogram(final[:, 0], bins=np.linspace(-3, 3, 121), density=True)
        axis.stairs(BESIDE + counts * HEIGHT, edges, baseline=BESIDE, orientation="horizontal", fill=True, color="C1")
        axis.plot(BESIDE + density(grid) * HEIGHT, grid, color="0.2", lw=1)
        axis.set_xlim(-0.03, BESIDE + 0.7)
        axis.set_title(f"{name}, {len(table)} evaluations", fontsize=9)
        axis.set_xticks([0, 1], ["noise", "sample"])
        axis.set_ylim(-3, 3)
    save(figure, "sampler-trajectories")


# -------------------------------------------------------------------------------------------------------- quality


WORST = 120  # what is farther away is no picture of a digit


def draw_quality() -> None:
    """Fréchet distance against evaluations, one panel a model and kind of sampler."""
    models = json.loads((RESULTS / "sampler_quality.json").read_text())["models"]
    figure, axes = plt.subplots(len(models), 2, figsize=(11, 4.2 * len(models)), layout="constrained", squeeze=False)
    for row, (model, entry) in zip(axes, models.items(), strict=True):
        for axis, stochastic in zip(row, (False, True), strict=True):
            _draw_panel(axis, model, entry, stochastic)
    save(figure, "sampler-quality")


def _draw_panel(axis: Axes, model: str, entry: dict[str, Any], stochastic: bool) -> None:
    cells = [cell for cell in entry["cells"] if draws_noise(sampler(cell["sampler"])) == stochastic]
    names = sorted({cell["sampler"] for cell in cells if "same_table_as" not in cell})
    twins: dict[str, list[str]] = {}
    for cell in cells:
        if "same_table_as" in cell and cell["sampler"] not in twins.setdefault(cell["same_table_as"], []):
            twins[cell["same_table_as"]].append(cell["sampler"])
    for k, name in enumerate(names):
        points = sorted((cell["evaluations"], cell["frechet_distance"]) for cell in cells if cell["sampler"] == name)
        label = " = ".join([name, *twins.get(name, [])])
        if all(distance > WORST for _, distance in points):
            label += f" (above {WORST})"
        style: dict[str, Any] = {"color": f"C{k % 10}", "ls": "-" if k < 10 else "--", "marker": "o" if k < 10 else "s"}
        axis.plot(*zip(*points, strict=True), label=label, lw=1.2, ms=3, **style)
    real = entry["frechet_distance_of_training_pictures"]
    axis.axhline(real, color="0.3", lw=1, ls=":", label=f"{entry['samples']} real pictures")
    axis.set(xscale="log", yscale="log", xlabel="evaluations of the network", ylabel="Fréchet distance")
    axis.set_xticks([4, 8, 16, 32, 50], ["4", "8", "16", "32", "50"])
    axis.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    marks = [5, 7, 10, 15, 20, 30, 50, 100]
    axis.set_yticks(marks, [str(mark) for mark in marks])
    axis.yaxis.set_minor_locator(mpl.ticker.NullLocator())
    shown = [d for d in (real, *(cell["frechet_distance"] for cell in entry["cells"])) if d <= WORST]
    axis.set_ylim(0.92 * min(shown), 1.08 * max(shown))
    axis.grid(lw=0.3)
    kind = "with noise" if stochastic else "without noise"
    axis.set_title(f"{model}, {kind}", fontsize=9)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def draws_noise(method: Any) -> bool:
    """Whether a sampler injects noise as it stands: always, or by a default share above 0."""
    return bool(method.stochastic and getattr(method.options, "eta", 1) != 0)


def main() -> None:
    """Draw all."""
    draw_tables()
    draw_trajectories()
    draw_quality()


if __name__ == "__main__":
    main()
