"""A feature network that tells emoji apart, for retrieval: which picture is a generated one most like?

Trained as SimCLR is (Chen et al. 2020, arXiv:2002.05709): two views of a picture, moved, scaled, recoloured, blurred
and noised, must be nearer to each other than to the views of the other pictures of the batch.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lehr.export.reference.emoji.run import SAVE_EVERY, Log, save
from lehr.export.reference.emoji.vae import to_unit_range

BATCH = 192
LEARNING_RATE = 2e-3
TEMPERATURE = 0.07
SEED = 2


class Features(nn.Module):
    """(B, 3, 64, 64) in [-1, 1] -> (B, 128) of length 1."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 96), (96, 128)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Linear(128 * 16, 64), nn.SiLU(), nn.Linear(64, 128))

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.head(self.trunk(images).flatten(1)), dim=1)


def view(images: Tensor, rng: torch.Generator) -> Tensor:
    """A changed copy of (B, 3, 64, 64) in [-1, 1]; what moves in is white, as the ground is."""
    b = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(b, *shape, generator=rng)

    theta = torch.zeros(b, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = uniform(0.92, 1.08), uniform(0.92, 1.08)
    theta[:, :, 2] = uniform(-0.08, 0.08, 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images - 1, grid, align_corners=False) + 1
    moved = moved * uniform(0.85, 1.15, 1, 1, 1) + uniform(-0.06, 0.06, 3, 1, 1)
    size = int(torch.randint(16, 65, (), generator=rng))
    small = F.interpolate(moved, size=(size, size), mode="bilinear", antialias=True)
    coarse = F.interpolate(small, size=(64, 64), mode="bilinear")
    chosen = torch.rand(b, 1, 1, 1, generator=rng) < 0.5
    patches = F.interpolate(torch.randn(b, 3, 16, 16, generator=rng), size=(64, 64), mode="bilinear")
    return torch.where(chosen, coarse, moved) + uniform(0, 0.12, 1, 1, 1) * patches


def train(images: Tensor, folder: Path, log: Log, seconds: float) -> Features:
    """Train for ``seconds`` of processor time in all, earlier runs counted, and write ``features.pt``.

    ``images`` is (N, 3, 64, 64) uint8.
    """
    torch.manual_seed(SEED)
    network, result, checkpoint = Features(), folder / "features.pt", folder / "features.ckpt"
    if result.exists():
        network.load_state_dict(torch.load(result, weights_only=True))
        return network
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    step, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    started, saved = time.process_time() - spent, time.monotonic()
    while spent < seconds:
        rng = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        batch = to_unit_range(images[torch.randperm(len(images), generator=rng)[:BATCH]])
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * max(0.05, 1 - spent / seconds)
        first, second = network(view(batch, rng)), network(view(batch, rng))
        similar = first @ second.T / TEMPERATURE
        target = torch.arange(len(batch))
        batch_loss = (F.cross_entropy(similar, target) + F.cross_entropy(similar.T, target)) / 2
        optimizer.zero_grad()
        batch_loss.backward()
        optimizer.step()
        log.add(step, batch_loss.item(), len(batch))
        step, spent = step + 1, time.process_time() - started
        if time.monotonic() - saved > SAVE_EVERY:
            state = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": spent}
            save(checkpoint, state)
            saved = time.monotonic()
    found = ranks(network, view(to_unit_range(images), torch.Generator().manual_seed(SEED)), images)
    log.write(f"done at step {step}: a changed picture finds itself first in {share(found, 1):.1%}")
    save(result, network.state_dict())
    return network


@torch.no_grad()
def embed(network: Features, images: Tensor) -> Tensor:
    """Features (N, 128) of (N, 3, 64, 64) in [-1, 1]."""
    return torch.cat([network(part) for part in images.split(256)])


def ranks(network: Features, made: Tensor, images: Tensor, wanted: Tensor | None = None) -> Tensor:
    """How many pictures are more like ``made[i]`` than the wanted one: (N,) int64, 0 for the first.

    Args:
        network: the feature network.
        made: (N, 3, 64, 64) in [-1, 1].
        images: (M, 3, 64, 64) uint8, all pictures.
        wanted: (N,) positions in ``images``; in order when absent. A picture that is drawn exactly as the wanted
            one (many flags, some people) is not counted against it.
    """
    similar = embed(network, made) @ embed(network, to_unit_range(images)).T
    wanted = torch.arange(len(made)) if wanted is None else wanted
    own = similar.gather(1, wanted[:, None])
    return (similar > own + 1e-6).sum(dim=1)


def share(found: Tensor, first: int) -> float:
    """The share of ranks below ``first``."""
    return (found < first).double().mean().item()
