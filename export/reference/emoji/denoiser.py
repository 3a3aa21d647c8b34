"""The denoiser of the emoji and its text encoder, trained together by rectified flow.

Liu et al. 2022, arXiv:2209.03003, with the logit-normal times of Esser et al. 2024, arXiv:2403.03206. The denoiser
is a small PixArt (Chen et al. 2023, arXiv:2310.00426). Everything random about a step depends on the seed and the
step alone, so an interrupted run goes on as it would have.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lehr.export.backbones import pixart
from lehr.export.reference.emoji import captions, text, text_encoder
from lehr.export.reference.emoji.data import Emoji
from lehr.export.reference.emoji.run import SAVE_EVERY, Log, average, averaged_weights, save


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Sizes and hyper-parameters.

    Attributes:
        constant: steps before the learning rate falls as one over the square root of the step; it does not know the
            number of steps, so that a run can be stopped, or go on, at any time.
    """

    denoiser: pixart.Params = pixart.EMOJI
    text: text_encoder.Params = field(default_factory=text_encoder.Params)
    batch: int = 64
    learning_rate: float = 1e-3
    warmup: int = 500
    constant: int = 4000
    weight_decay: float = 0.01
    ema: float = 0.9995
    seed: int = 0


class Model(nn.Module):
    """Both networks: tokens and x_t -> the flow."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.text = text_encoder.TextEncoder(settings.text)
        self.denoiser = pixart.PixArt(settings.denoiser)
        initialise(self.denoiser)

    def forward(self, x_t: Tensor, timestep: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """x_t (B, 4, 16, 16), timestep (B,) in 0 … 1000, ids and mask (B, M) -> eps - x_0."""
        features, _ = self.text(ids, mask)
        flow: Tensor = self.denoiser(x_t, timestep, features, mask)
        return flow


def initialise(denoiser: pixart.PixArt) -> None:
    """Start from blocks that pass no text and an output of zero, as DiT and PixArt do."""
    for module in denoiser.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in (*denoiser.t_embedder.mlp, denoiser.t_block[1]):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    for block in denoiser.blocks:
        nn.init.zeros_(block.cross_attn.proj.weight)  # type: ignore[union-attr,arg-type]
    nn.init.zeros_(denoiser.final_layer.linear.weight)


def loss(model: Model, x_0: Tensor, ids: Tensor, mask: Tensor, rng: torch.Generator) -> Tensor:
    """Mean squared error of the flow eps - x_0 at x_t = (1 - s) x_0 + s eps, s logit-normal."""
    s = torch.sigmoid(torch.randn(len(x_0), generator=rng))
    eps = torch.randn(x_0.shape, generator=rng)
    mixed = s[:, None, None, None]
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # math: a quarter over flash's speed
        output = model((1 - mixed) * x_0 + mixed * eps, 1000 * s, ids, mask)
    return F.mse_loss(output.float(), eps - x_0)


def train(
    latents: Tensor,
    emoji: tuple[Emoji, ...],
    tokenizer: Tokenizer,
    folder: Path,
    log: Log,
    settings: Settings,
    steps: int,
    *,
    show: Callable[[Model, int], None],
    show_every: float,
) -> Model:
    """Train up to ``steps`` steps in all, earlier runs counted; return the averaged model.

    Args:
        latents: (N, 4, 16, 16), of unit variance per channel.
        emoji: what is known of each.
        tokenizer: of the captions.
        folder: where ``denoiser.ckpt`` goes.
        log: where progress goes.
        settings: sizes and hyper-parameters.
        steps: the step to stop at.
        show: called with the averaged model and the step every ``show_every`` seconds and at the end.
        show_every: seconds.
    """
    torch.manual_seed(settings.seed)
    model, mean, checkpoint = Model(settings), Model(settings), folder / "denoiser.ckpt"
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    averaged, first = averaged_weights(model), 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        averaged, first = state["averaged"], state["step"]
    weights = torch.tensor([one.weight for one in emoji])
    saved = shown = time.monotonic()
    for step in range(first, steps):
        rng = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        picked = torch.multinomial(weights, settings.batch, generator=rng)
        words = random.Random(f"{settings.seed} {step}")  # noqa: S311 - no secret
        ids, mask = text.tokens(tokenizer, [captions.draw(emoji[i], words) for i in picked.tolist()])
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate(step, settings)
        batch_loss = loss(model, latents[picked], ids, mask, rng)
        optimizer.zero_grad()
        batch_loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average(averaged, model, step, settings.ema)
        log.add(step, batch_loss.item(), settings.batch)
        now = time.monotonic()
        if now - saved > SAVE_EVERY or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "averaged": averaged}
            save(checkpoint, state | {"step": step + 1})
            saved = now
        if now - shown > show_every:
            mean.load_state_dict(averaged)
            show(mean, step + 1)
            shown = time.monotonic()
    mean.load_state_dict(averaged)
    show(mean, max(first, steps))
    return mean


def rate(step: int, settings: Settings) -> float:
    """The learning rate of a step, over the largest one."""
    return min(1.0, (step + 1) / settings.warmup, math.sqrt(settings.constant / (step + 1)))


@torch.no_grad()
def sample(model: Model, tokenizer: Tokenizer, prompts: list[str], *, steps: int, guidance: float, seed: int) -> Tensor:
    """Latents (N, 4, 16, 16) of ``prompts`` by Euler's method and classifier-free guidance."""
    p = model.denoiser.params
    side = p.base_size * p.patch_size
    rng = torch.Generator().manual_seed(seed)
    parts: list[Tensor] = []
    for start in range(0, len(prompts), 50):
        some = prompts[start : start + 50]
        ids, mask = text.tokens(tokenizer, [*some, *[""] * len(some)])
        x = torch.randn(len(some), p.in_channels, side, side, generator=rng)
        times = torch.linspace(1, 0, steps + 1)
        for t_cur, t_next in itertools.pairwise(times):
            both = torch.cat([x, x])
            with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                flow = model(both, (1000 * t_cur).expand(len(both)), ids, mask).float()
            wanted, unconditional = flow.chunk(2)
            x = x + (t_next - t_cur) * (unconditional + guidance * (wanted - unconditional))
        parts.append(x)
    return torch.cat(parts)
