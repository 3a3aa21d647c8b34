"""The text encoder learns, before the denoiser does, which emoji a caption is of and roughly what that looks like.

The first is the words' half of CLIP (Radford et al. 2021, arXiv:2103.00020), with a learnt vector a picture in the
place of an image encoder: the cosine of caption and picture, over all pictures at once. The second is the denoiser's
draft, by least squares. Minutes of both know a paraphrase; from the denoiser's loss alone, which says little about
words, the same takes hours. The encoder then stays as it is.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from lehr.export.backbones import pixart
from lehr.export.reference.emoji import captions, text, text_encoder
from lehr.export.reference.emoji.data import Emoji
from lehr.export.reference.emoji.run import SAVE_EVERY, Log, save

REMEMBERED = 8  # captions of each picture whose mean the memory holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Hyper-parameters."""

    batch: int = 256
    learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.05
    label_smoothing: float = 0.05  # names are shared: a caption may be of several pictures
    log_scale: float = 3.0  # of the cosines, where it starts
    draft_weight: float = 4.0  # of the draft's mean squared error, beside the cross-entropy
    seed: int = 3


class Matcher(nn.Module):
    """Caption -> logits over all pictures, and a draft of the latents."""

    def __init__(
        self, encoder: text_encoder.Params, denoiser: pixart.Params, pictures: int, settings: Settings
    ) -> None:
        super().__init__()
        self.encoder = text_encoder.TextEncoder(encoder)
        self.draft = pixart.Draft(denoiser)
        self.pictures = nn.Parameter(0.02 * torch.randn(pictures, encoder.hidden_size))
        self.log_scale = nn.Parameter(torch.tensor(settings.log_scale))

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """ids and mask (B, M) -> (B, pictures), (B, C, S, S)."""
        with torch.autocast("cpu", torch.bfloat16):
            _, pooled = self.encoder.embed(ids, mask)
            draft = self.draft(pooled)
        cosine = F.normalize(pooled.float(), dim=1) @ F.normalize(self.pictures, dim=1).T
        return self.log_scale.exp() * cosine, draft.float()


def train(
    latents: Tensor,
    emoji: Sequence[Emoji],
    tokenizer: Tokenizer,
    params: tuple[text_encoder.Params, pixart.Params],
    folder: Path,
    log: Log,
    seconds: float,
    settings: Settings | None = None,
) -> Matcher:
    """Train for ``seconds`` in all, earlier runs counted; write ``text.pt``.

    Args:
        latents: (N, C, S, S), of unit variance per channel.
        emoji: what is known of each picture.
        tokenizer: of the captions.
        params: architectures of the encoder and of the denoiser whose draft is trained.
        folder: where the checkpoint and the result go.
        log: where progress goes; its last line says how many held-out prompts are understood.
        seconds: processor time to spend, of one thread.
        settings: hyper-parameters.
    """
    settings = settings or Settings()
    torch.manual_seed(settings.seed)
    matcher, result, checkpoint = Matcher(*params, len(emoji), settings), folder / "text.pt", folder / "text.ckpt"
    if result.exists():
        matcher.load_state_dict(torch.load(result, weights_only=True))
        return matcher
    optimizer = torch.optim.AdamW(
        matcher.parameters(),
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    step, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        matcher.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    weights = torch.tensor([one.weight for one in emoji])
    started, saved = time.process_time() - spent, time.monotonic()
    while spent < seconds:
        picked, ids, mask = batch(emoji, weights, tokenizer, step, settings)
        rate = min(1.0, (step + 1) / settings.warmup) * max(0.02, 1 - spent / seconds)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate
        logits, draft = matcher(ids, mask)
        error = F.mse_loss(draft, latents[picked])
        loss = F.cross_entropy(logits, picked, label_smoothing=settings.label_smoothing) + settings.draft_weight * error
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(matcher.parameters(), 1.0)
        optimizer.step()
        log.add(step, error.item(), settings.batch)
        step, spent = step + 1, time.process_time() - started
        if time.monotonic() - saved > SAVE_EVERY:
            state = {"model": matcher.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": spent}
            save(checkpoint, state)
            saved = time.monotonic()
    log.write(f"done at step {step}: {understood(matcher, emoji, tokenizer)}")
    remember(matcher.encoder, emoji, tokenizer, settings.seed)
    save(result, matcher.state_dict())
    return matcher


def batch(
    emoji: Sequence[Emoji], weights: Tensor, tokenizer: Tokenizer, step: int, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures and their captions' tokens and mask; the seed and the step alone decide which."""
    rng = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    words = random.Random(f"{settings.seed} {step}")  # noqa: S311 - no secret
    picked = torch.multinomial(weights, settings.batch, replacement=True, generator=rng)
    drawn = [captions.draw(emoji[i], words, empty_share=0.0) for i in picked.tolist()]
    return picked, *text.tokens(tokenizer, drawn, multiple=4)


@torch.no_grad()
def remember(encoder: text_encoder.TextEncoder, emoji: Sequence[Emoji], tokenizer: Tokenizer, seed: int) -> None:
    """Fill the encoder's memory: the mean of some captions of every picture, and last the empty text."""
    total = torch.zeros_like(encoder.memory)
    for k in range(REMEMBERED):
        words = random.Random(f"{seed} memory {k}")  # noqa: S311 - no secret
        texts = [*(captions.draw(one, words, empty_share=0.0) for one in emoji), ""]
        parts = [texts[i : i + 512] for i in range(0, len(texts), 512)]
        total += torch.cat([encoder.embed(*text.tokens(tokenizer, part))[1] for part in parts])
    encoder.memory.copy_(F.rms_norm(total, total.shape[-1:]))


@torch.no_grad()
def understood(matcher: Matcher, emoji: Sequence[Emoji], tokenizer: Tokenizer) -> str:
    """How many of the held-out prompts have their own picture first, and among the first five, in words."""
    place = {one.hexcode: i for i, one in enumerate(emoji)}
    pairs = [(place[hexcode], prompt) for hexcode, prompt in captions.held_out() if hexcode in place]
    if not pairs:
        return "no held-out prompt is of these pictures"
    logits, _ = matcher(*text.tokens(tokenizer, [prompt for _, prompt in pairs]))
    own = logits.gather(1, torch.tensor([[i] for i, _ in pairs]))
    better = (logits > own).sum(dim=1)
    first, five = ((better < k).double().mean().item() for k in (1, 5))
    return f"held-out prompts are matched first with their picture in {first:.0%}, among the first five in {five:.0%}"
