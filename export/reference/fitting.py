"""Fit a small denoiser of any family to samples that are made while it trains: seeded, checkpointed, resumable.

One loss serves every path and prediction. Noise-to-signal ratios r = sigma / alpha are drawn from a log-normal, and the
squared error of the x_0 estimate is weighted with 1 + 1 / r², EDM's weight for data of unit variance (Karras et al.
2022, arXiv:2206.00364, table 1), up to a limit.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lehr.export.backbones import preset
from lehr.export.reference.emoji.run import average, averaged_weights, save
from lehr.runtime.spec import ModelSpec

HEAVIEST = 5.0  # of the weights (Min-SNR-5: Hang et al. 2023, arXiv:2303.09556), or the finest noise takes all steps

Draw = Callable[[np.random.Generator, int], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Hyper-parameters of one run.

    Attributes:
        ratio_mean, ratio_spread: of the logarithm of the noise-to-signal ratio.
        ema: longest memory of the averaged weights, which are what is kept.
    """

    steps: int
    batch: int
    learning_rate: float
    ratio_mean: float = 0.0
    ratio_spread: float = 1.5
    warmup: int = 100
    ema: float = 0.997
    seed: int = 0


def loss(
    model: nn.Module, spec: ModelSpec, x_0: Tensor, given: dict[str, Tensor], ratio: Tensor, eps: Tensor
) -> Tensor:
    """Weighted mean squared error of the x_0 estimate; ``ratio`` (B,) is sigma / alpha, ``eps`` of x_0's shape."""
    timestep = spec.path.timestep_of(ratio.numpy())
    alpha, sigma = spec.path.alpha_sigma(timestep)
    on_sample, on_output = spec.prediction.denoised_coefficients(alpha, sigma)
    scale = spec.prediction.input_scale(alpha, sigma)
    a, s, c_in, on_x, on_f = (
        torch.from_numpy(np.asarray(value)).float().reshape(-1, *(1,) * (x_0.ndim - 1))
        for value in (alpha, sigma, scale, on_sample, on_output)
    )
    x_t = a * x_0 + s * eps
    with torch.autocast("cpu", torch.bfloat16):
        output = model(c_in * x_t, torch.from_numpy(timestep).float(), **given)
    denoised = on_x * x_t + on_f * output.float()
    weight = (1 + (a / s) ** 2).clamp(max=HEAVIEST)
    return (weight * (denoised - x_0).square()).mean()


def fit(
    name: str, draw: Draw, schedule: Schedule, out: Path, *, threads: int, minutes: float, stop: int | None = None
) -> dict[str, Any]:
    """Train preset ``name`` and write ``NAME.safetensors``, averaged weights in float16.

    Args:
        name: the preset.
        draw: makes x_0 and the network's further inputs from a random generator and a number of samples.
        schedule: of the run. The random stream of a step depends on the seed and the step alone.
        out: folder of the checkpoint, from which a run that was interrupted goes on, and of the weights.
        threads: of PyTorch.
        minutes: between checkpoints.
        stop: the step to stop after, of the schedule's; a later run goes on from there. None runs all.

    Returns:
        The record of the run: schedule, steps done, loss curve, processor seconds, parameters.
    """
    end = schedule.steps if stop is None else min(stop, schedule.steps)
    chosen = preset(name)
    torch.set_num_threads(threads)
    torch.manual_seed(schedule.seed)
    model = chosen.module().train()
    averaged = averaged_weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, weight_decay=0.01, fused=True)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / f"{name}.ckpt"
    first, used, running, curve = 0, 0.0, 0.0, list[list[float]]()
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        averaged, curve, first = state["averaged"], state["curve"], state["step"]
        used, running = state["seconds"], state["running"]
    started, saved = time.process_time() - used, time.monotonic()
    for step in range(first, end):
        rng = np.random.default_rng((schedule.seed, step))
        warm = min(1.0, (step + 1) / schedule.warmup)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / schedule.steps))
        x_0, given = draw(rng, schedule.batch)
        ratio = np.exp(rng.normal(schedule.ratio_mean, schedule.ratio_spread, schedule.batch))
        eps = torch.from_numpy(rng.standard_normal(x_0.shape, dtype=np.float32))
        batch_loss = loss(model, chosen.spec, x_0, given, torch.from_numpy(ratio), eps)
        optimizer.zero_grad()
        batch_loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average(averaged, model, step, schedule.ema)
        running = batch_loss.item() if step == 0 else 0.98 * running + 0.02 * batch_loss.item()
        last = step + 1 == end
        if (step + 1) % 100 == 0 or last:
            curve.append([step + 1, round(running, 5)])
            click.echo(f"{name} step {step + 1}/{schedule.steps} loss {running:.4f}", err=True)
        if last or time.monotonic() - saved > 60 * minutes:
            saved, used = time.monotonic(), time.process_time() - started
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "averaged": averaged}
            save(checkpoint, {**state, "curve": curve, "step": step + 1, "seconds": used, "running": running})
    half = {key: value.half().contiguous() for key, value in averaged.items()}
    save_file(half, out / f"{name}.safetensors")
    return {
        "schedule": asdict(schedule),
        "steps": max(first, end),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "torch": torch.__version__,
        "processor_seconds": round(used),
        "loss": curve,
    }


def fit_and_record(
    name: str, draw: Draw, schedule: Schedule, out: Path, *, threads: int, minutes: float, stop: int | None
) -> None:
    """:func:`fit`, with the record beside the weights as ``NAME.json`` and a line on stdout."""
    record = fit(name, draw, schedule, out, threads=threads, minutes=minutes, stop=stop)
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    click.echo(f"{name}: loss {record['loss'][-1][1]:.4f}, {record['processor_seconds']} s of processor time")
