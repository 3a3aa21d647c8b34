"""The denoiser of the emoji, trained by rectified flow on the features of a text encoder that stays as it is.

Liu et al. 2022, arXiv:2209.03003, with the logit-normal times of Esser et al. 2024, arXiv:2403.03206. The denoiser
is a small PixArt (Chen et al. 2023, arXiv:2310.00426). Everything random about a step depends on the seed and the
step alone, so an interrupted run goes on as it would have.
"""

from __future__ import annotations

import itertools
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
from lehr.export.reference.emoji import captions, text, text_encoder, text_training
from lehr.export.reference.emoji.data import Emoji
from lehr.export.reference.emoji.run import SAVE_EVERY, Log, average, averaged_weights, save

BLUR = 0.5  # the most noise on pooled features


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Sizes and hyper-parameters.

    Attributes:
        steps: of the whole training.
        decay: the last share of them, over which the learning rate falls to nothing; until there it is constant, so
            that a checkpoint from before can go on for longer (Hägele et al. 2024, arXiv:2405.18392).
    """

    denoiser: pixart.Params = pixart.EMOJI
    text: text_encoder.Params = field(default_factory=text_encoder.Params)
    batch: int = 64
    learning_rate: float = 1e-3
    steps: int = 5_000
    warmup: int = 300
    decay: float = 0.3
    weight_decay: float = 0.01
    ema: float = 0.998
    seed: int = 0


class Model(nn.Module):
    """Both networks: tokens and x_t -> the flow. The text encoder's weights are frozen."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.text = text_encoder.TextEncoder(settings.text).requires_grad_(False)
        self.denoiser = pixart.PixArt(settings.denoiser)
        initialise(self.denoiser)

    def forward(self, x_t: Tensor, timestep: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """x_t (B, 4, 16, 16), timestep (B,) in 0 … 1000, ids and mask (B, M) -> eps - x_0."""
        features, pooled = self.text(ids, mask)
        flow: Tensor = self.denoiser(x_t, timestep, features, mask, pooled_projections=pooled)
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


def loss(model: Model, x_0: Tensor, ids: Tensor, mask: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mean squared error of the flow eps - x_0 at x_t = (1 - s) x_0 + s eps, s logit-normal; and of the draft."""
    s = torch.sigmoid(torch.randn(len(x_0), generator=rng))
    eps = torch.randn(x_0.shape, generator=rng)
    mixed = s[:, None, None, None]
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # math: a quarter over flash's speed
        features, pooled = model.text(ids, mask)
        pooled = blurred(pooled, rng)
        draft = model.denoiser.draft(pooled)
        output = model.denoiser((1 - mixed) * x_0 + mixed * eps, 1000 * s, features, mask, pooled_projections=pooled)
    return F.mse_loss(output.float(), eps - x_0), F.mse_loss(draft.float(), x_0)


def blurred(pooled: Tensor, rng: torch.Generator) -> Tensor:
    """Pooled features (B, D) of unit mean square with noise of a random amount, so that a draft may be wrong.

    What captions training has not seen are drafted worse than its own; a denoiser that only met good drafts would
    copy the bad ones. Conditioning augmentation, as between the models of a cascade (Ho et al. 2022,
    arXiv:2106.15282); none is added when sampling.
    """
    amount = BLUR * torch.rand(len(pooled), 1, generator=rng)
    return F.rms_norm(pooled + amount * torch.randn(pooled.shape, generator=rng), pooled.shape[-1:])


def train(
    latents: Tensor,
    emoji: tuple[Emoji, ...],
    tokenizer: Tokenizer,
    words: text_training.Matcher,
    folder: Path,
    log: Log,
    settings: Settings,
    steps: int,
    *,
    show: Callable[[Model, int], None],
    show_every: float,
) -> Model:
    """Train up to step ``steps`` of ``settings.steps``, earlier runs counted; return the averaged model.

    Args:
        latents: (N, 4, 16, 16), of unit variance per channel.
        emoji: what is known of each.
        tokenizer: of the captions.
        words: the trained text encoder and draft.
        folder: where ``denoiser.ckpt`` goes.
        log: where progress goes.
        settings: sizes and hyper-parameters.
        steps: the step to stop at.
        show: called with the averaged model and the step every ``show_every`` seconds and at the end.
        show_every: seconds.
    """
    torch.manual_seed(settings.seed)
    model, mean, checkpoint = Model(settings), Model(settings), folder / "denoiser.ckpt"
    model.text.load_state_dict(words.encoder.state_dict())
    model.denoiser.draft.load_state_dict(words.draft.state_dict())
    optimizer = torch.optim.AdamW(
        model.denoiser.parameters(),
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
        chance = random.Random(f"{settings.seed} {step}")  # noqa: S311 - no secret
        drawn = [captions.draw(emoji[i], chance) for i in picked.tolist()]
        ids, mask = text.tokens(tokenizer, drawn, multiple=4)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate(step, settings)
        batch_loss, draft_loss = loss(model, latents[picked], ids, mask, rng)
        optimizer.zero_grad()
        (batch_loss + draft_loss).backward()
        nn.utils.clip_grad_norm_(model.denoiser.parameters(), 1.0)
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
    left = (settings.steps - step) / (settings.decay * settings.steps)
    return max(0.0, min(1.0, (step + 1) / settings.warmup, left))


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
