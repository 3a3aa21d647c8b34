"""Record golden data: eager evaluations, eager loops, and how far eager itself moves in other formats."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from lehr.export.eager import eager
from lehr.runtime.denoiser import Denoiser, null_conditions, synthetic_conditions
from lehr.runtime.golden import Floor, Golden, StepsGolden, Tier, Trajectory
from lehr.runtime.guidance import classifier_free
from lehr.runtime.loop import Step, sample
from lehr.runtime.noise import batch_normal
from lehr.runtime.parity import compare, relative_error, score
from lehr.runtime.solvers import default_sampler, solver_table
from lehr.runtime.spec import ModelSpec
from lehr.runtime.verify import replay

NUM_STEPS = 10  # timesteps of the steps tier
NUM_LOOP_STEPS = 20  # evaluations of a loop in the full tier
BATCH = 4  # samples of golden data; a small class table has one sample a class instead
SEED = 20_000  # of golden noise, away from the seeds people choose
FLOOR_BATCH = 2  # samples that floors are measured on; fp16 convolutions are emulated on CPUs and cost 20 x fp32's
FORMATS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}

FULL_BELOW, STEPS_BELOW = 200_000_000, 2_000_000_000  # parameters, for the default tier


def default_tier(parameters: int) -> Tier:
    """Full up to 200M parameters, steps up to 2B, none above."""
    return Tier.FULL if parameters <= FULL_BELOW else Tier.STEPS if parameters <= STEPS_BELOW else Tier.NONE


def record(
    module: nn.Module,
    spec: ModelSpec,
    tier: Tier,
    *,
    device: str = "cpu",
    seed: int = SEED,
    progress: Callable[[str], None],
) -> Golden:
    """Run ``module`` (float32, on ``device``) and record what a parity check needs, on noise from ``seed``.

    Inputs lie on the model's own trajectory, because errors on other inputs say little. Floors in fp16 and bf16
    are recorded in both tiers, fp64 in the full one.
    """
    denoiser = eager(module, spec, device=device)
    progress("golden: single evaluations")
    steps = _record_steps(denoiser, seed)
    trajectories: tuple[Trajectory, ...] = ()
    if tier is Tier.FULL:
        progress("golden: loops")
        trajectories = _record_trajectories(denoiser, seed)
    golden = Golden(tier=tier, steps=steps, trajectories=trajectories, floors={})
    formats = [name for name in FORMATS if tier is Tier.FULL or name != "fp64"]
    floors = {}
    for name in formats:
        progress(f"golden: eager in {name}")
        floors[name] = floor(module, spec, golden, FORMATS[name], device)
    return replace(golden, floors=floors)


def _batch(spec: ModelSpec) -> int:
    return spec.num_classes if spec.num_classes is not None and spec.num_classes <= 16 else BATCH


def _starting_noise(spec: ModelSpec, seed: int, batch: int, scale: float) -> np.ndarray:
    noise = batch_normal(seed, range(batch), spec.sample_shape(batch)[1:])
    return np.asarray(noise * np.float32(scale))


def _record_steps(denoiser: Denoiser, seed: int) -> StepsGolden:
    spec, batch = denoiser.spec, _batch(denoiser.spec)
    conditions = synthetic_conditions(spec, batch, seed)
    table = solver_table(default_sampler(spec.path), spec.path, spec.prediction, NUM_STEPS)
    seen: list[Step] = []
    sample(
        lambda x, timestep: denoiser(x, timestep, conditions),
        table,
        _starting_noise(spec, seed, batch, table.init_noise_sigma),
        on_step=seen.append,
    )
    return StepsGolden(
        timesteps=table.timesteps,
        alphas=table.alphas,
        sigmas=table.sigmas,
        inputs=np.stack([step.sample for step in seen]),
        outputs=np.stack([step.output for step in seen]),
        conditions=conditions,
    )


def _record_trajectories(denoiser: Denoiser, seed: int) -> tuple[Trajectory, ...]:
    """The model's default guidance on one seed and, for guided models, no guidance on another."""
    spec, batch = denoiser.spec, _batch(denoiser.spec)
    name = spec.sampling.sampler or default_sampler(spec.path)
    table = solver_table(name, spec.path, spec.prediction, NUM_LOOP_STEPS)
    conditions = synthetic_conditions(spec, batch, seed)
    cases = [("unguided", 1.0)]
    if spec.null_class is not None:
        cases.append(("guided", spec.sampling.guidance_scale if spec.sampling.guidance_scale != 1.0 else 3.0))
    recorded = []
    for number, (case, scale) in enumerate(cases):
        noise = batch_normal(seed + 1 + number, range(batch), spec.sample_shape(batch)[1:])
        x_T = np.asarray(noise * np.float32(table.init_noise_sigma))
        unconditional = null_conditions(spec, batch) if scale != 1.0 else {}
        seen: list[np.ndarray] = []
        final = sample(
            classifier_free(denoiser, conditions, unconditional, scale),
            table,
            x_T,
            on_step=lambda step, seen=seen: seen.append(step.sample),  # type: ignore[misc]
        )
        recorded.append(
            Trajectory(
                name=case,
                table=table,
                guidance_scale=scale,
                conditions=conditions,
                unconditional=unconditional,
                x_T=x_T,
                inputs=np.stack(seen),
                final=final,
                seed=seed + 1 + number,
            )
        )
    return tuple(recorded)


def floor(module: nn.Module, spec: ModelSpec, golden: Golden, dtype: torch.dtype, device: str) -> Floor:
    """Run eager in ``dtype`` on the first golden samples; a module that PyTorch cannot run there says so instead."""
    try:
        other = eager(copy.deepcopy(module).to(dtype), spec, dtype=dtype, device=device)
        steps = golden.steps
        conditions = _first(spec, steps.conditions)
        errors = []
        for k, timestep in enumerate(steps.timesteps):
            inputs, expected = steps.inputs[k, :FLOOR_BATCH], steps.outputs[k, :FLOOR_BATCH]
            point = (spec.prediction, float(steps.alphas[k]), float(steps.sigmas[k]), inputs)
            output = other(inputs, float(timestep), conditions)
            errors.append(relative_error(score(*point, expected), score(*point, output)))
        finals = []
        for whole in golden.trajectories:
            part = replace(
                whole,
                x_T=whole.x_T[:FLOOR_BATCH],
                inputs=whole.inputs[:, :FLOOR_BATCH],
                final=whole.final[:FLOOR_BATCH],
                conditions=_first(spec, whole.conditions),
                unconditional=_first(spec, whole.unconditional),
            )
            finals.append(compare(part.final, replay(other, part)[0], spec.value_range))
    except RuntimeError as e:  # what PyTorch raises for an operator without a kernel in a format
        return Floor(unavailable=str(e).strip().splitlines()[0])
    return Floor(
        rel_error=tuple(errors),
        psnr_db=min((parity.psnr_db for parity in finals), default=None),
        snr_db=min((parity.snr_db for parity in finals), default=None),
    )


def _first(spec: ModelSpec, conditions: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The conditions of the first samples; FLUX's position ids are shared by all."""
    batched = {tensor.name for tensor in spec.conditions if tensor.batched}
    return {name: value[:FLOOR_BATCH] if name in batched else value for name, value in conditions.items()}
