"""The autoencoder of the emoji: 64 x 64 RGB to 4 x 16 x 16 latents and back.

A small autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752), trained on L1, L1 of half and
quarter size and L1 of the gradients: art of flat colours and sharp edges needs no perceptual network. The latents'
mean and deviation per channel are folded into the 1 x 1 convolutions next to them, so that the denoiser sees unit
variance and the scaling factor is 1.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lehr.export.autoencoders.kl import KLDecoder, KLEncoder, Params
from lehr.export.reference.emoji.run import SAVE_EVERY, Log, average, averaged_weights, save

CHANNELS = 4
PARAMS = Params(latent_channels=CHANNELS, block_out_channels=(24, 48, 96), layers_per_block=1, norm_num_groups=8)
KL_WEIGHT = 2e-5  # on the mean over latents; leaves a deviation of a few per cent
GRADIENT_WEIGHT = 0.5
BATCH = 16
LEARNING_RATE = 1e-3
WARMUP = 200
EMA = 0.999
SEED = 1


class Autoencoder(nn.Module):
    """``encode`` gives mean and standard deviation of the latents, ``decode`` the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = KLEncoder(PARAMS)
        self.decode = KLDecoder(PARAMS)


def loss(vae: Autoencoder, images: Tensor, rng: torch.Generator) -> Tensor:
    """Reconstruction and Kullback-Leibler loss of ``images`` (B, 3, 64, 64) in [-1, 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        mean, std = (part.float() for part in vae.encode(images))
        output = vae.decode(mean + std * torch.randn(mean.shape, generator=rng))
    kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
    total: Tensor = reconstruction(output.float(), images) + KL_WEIGHT * kl
    return total


def reconstruction(output: Tensor, images: Tensor) -> Tensor:
    """L1 at three scales and of the differences of neighbours."""
    total = F.l1_loss(output, images)
    for axis in (2, 3):
        total = total + GRADIENT_WEIGHT * F.l1_loss(output.diff(dim=axis), images.diff(dim=axis))
    for size in (2, 4):
        total = total + 0.5 * F.l1_loss(F.avg_pool2d(output, size), F.avg_pool2d(images, size))
    return total


def train(images: Tensor, weights: Tensor, folder: Path, log: Log, seconds: float) -> Autoencoder:
    """Train for ``seconds`` in all, earlier runs counted; then normalise the latents and write ``vae.pt``.

    Args:
        images: (N, 3, 64, 64) uint8.
        weights: (N,), how often each picture is shown.
        folder: where the checkpoint and the result go.
        log: where progress goes.
        seconds: processor time to spend, of one thread.
    """
    torch.manual_seed(SEED)
    vae, result, checkpoint = Autoencoder(), folder / "vae.pt", folder / "vae.ckpt"
    if result.exists():
        vae.load_state_dict(torch.load(result, weights_only=True))
        return vae
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    averaged, step, spent = averaged_weights(vae), 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        averaged, step, spent = state["averaged"], state["step"], state["spent"]
    started, saved = time.process_time() - spent, time.monotonic()
    while spent < seconds:
        rng = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        picked = torch.multinomial(weights, BATCH, generator=rng)
        batch = to_unit_range(images[picked])
        flipped = torch.rand(BATCH, generator=rng) < 0.5
        batch = torch.where(flipped[:, None, None, None], batch.flip(3), batch)
        # Linear to a tenth over the time there is; the result depends on the machine's speed in any case.
        rate = min(1.0, (step + 1) / WARMUP) * max(0.1, 1 - 0.9 * spent / seconds)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        batch_loss = loss(vae, batch, rng)
        optimizer.zero_grad()
        batch_loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average(averaged, vae, step, EMA)
        log.add(step, batch_loss.item(), BATCH)
        step, spent = step + 1, time.process_time() - started
        if time.monotonic() - saved > SAVE_EVERY:
            state = {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "averaged": averaged}
            save(checkpoint, state | {"step": step, "spent": spent})
            saved = time.monotonic()
    vae.load_state_dict(averaged)
    normalise(vae, encode(vae, images))
    log.write(f"done at step {step}: PSNR {psnr(vae, images[::10]):.2f} dB on every tenth picture")
    save(result, vae.state_dict())
    return vae


def to_unit_range(images: Tensor) -> Tensor:
    """Bytes -> [-1, 1]."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def encode(vae: Autoencoder, images: Tensor, batch: int = 64) -> Tensor:
    """Mean latents (N, 4, 16, 16) of (N, 3, 64, 64) uint8."""
    return torch.cat([vae.encode(to_unit_range(part))[0] for part in images.split(batch)])


@torch.no_grad()
def decode(vae: Autoencoder, latents: Tensor, batch: int = 64) -> Tensor:
    """(N, 4, 16, 16) -> (N, 3, 64, 64) uint8."""
    parts = [vae.decode(part) for part in latents.split(batch)]
    return ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


@torch.no_grad()
def normalise(vae: Autoencoder, latents: Tensor) -> None:
    """Fold the mean and deviation of ``latents`` per channel into the convolutions on either side of them."""
    before, after = vae.encode.quant_conv, vae.decode.post_quant_conv
    if before is None or before.bias is None or after is None or after.bias is None:
        raise TypeError("the autoencoder needs the 1 x 1 convolutions around its latents")
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    before.weight[:CHANNELS] /= deviation[:, None, None, None]
    before.bias[:CHANNELS] = (before.bias[:CHANNELS] - mean) / deviation
    before.bias[CHANNELS:] -= 2 * deviation.log()  # the other half is the log-variance
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= deviation[None, :, None, None]


def psnr(vae: Autoencoder, images: Tensor) -> float:
    """Peak signal-to-noise ratio of the reconstruction in dB, over all pixels together."""
    error = (decode(vae, encode(vae, images)).float() - images.float()).square().mean().item()
    return float(10 * torch.log10(torch.tensor(255.0**2 / error)))
