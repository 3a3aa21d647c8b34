"""Train the emoji model: ``python -m lehr.export.reference.emoji.train --data FOLDER --out FOLDER``.

One command for all of it: tokenizer, feature network, autoencoder, latents, text encoder, denoiser. Each stage
writes its result into ``--out``; a run that finds one goes on behind it, and a run that was killed goes on from its
last checkpoint, a few minutes old at most. ``log.txt`` gets a line a minute, ``sheet-STEP.png`` shows the held-out
prompts and, under them, the compositions; ``weights`` holds what a bundle needs, in half precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from lehr.export.reference.emoji import captions, data, denoiser, features, text, text_training, vae
from lehr.export.reference.emoji.run import Log, save

GUIDANCE, EULER_STEPS, COLUMNS = 2.0, 20, 20  # of the contact sheet


@dataclass(frozen=True, slots=True, kw_only=True)
class Minutes:
    """Of a processor, for each network but the denoiser."""

    features: float
    vae: float
    text: float


def train(folder: Path, out: Path, *, minutes: Minutes, steps: int, every: float) -> None:
    """Run every stage that is not done; ``every`` is the minutes between two contact sheets."""
    out.mkdir(parents=True, exist_ok=True)
    dataset = data.load(folder)
    images = torch.from_numpy(dataset.images).permute(0, 3, 1, 2).contiguous()
    weights = torch.tensor([one.weight for one in dataset.emoji])
    settings = denoiser.Settings()

    def log(stage: str) -> Log:
        return Log(path=out / "log.txt", stage=stage)

    tokenizer_file = out / "tokenizer.json"
    if tokenizer_file.exists():
        tokenizer = text.load_tokenizer(tokenizer_file)
    else:
        tokenizer = text.train_tokenizer(
            captions.texts(dataset.emoji), tokenizer_file, settings.text.vocabulary, settings.text.longest
        )
    judge = features.train(images, out, log("features"), 60 * minutes.features).eval()
    autoencoder = vae.train(images, weights, out, log("vae"), 60 * minutes.vae).eval()
    latents_file = out / "latents.pt"
    if not latents_file.exists():
        save(latents_file, {"latents": vae.encode(autoencoder, images)})
    latents: Tensor = torch.load(latents_file, weights_only=True)["latents"]
    words = text_training.train(
        latents, dataset.emoji, tokenizer, (settings.text, settings.denoiser), out, log("text"), 60 * minutes.text
    )
    place = dataset.index()
    held_out, progress = captions.held_out(), log("denoiser")
    wanted = torch.tensor([place[hexcode] for hexcode, _ in held_out])
    prompts = [prompt for _, prompt in held_out] + captions.compositions()

    def show(model: denoiser.Model, step: int) -> None:
        parts = {"denoiser": (model.denoiser,), "text": (model.text,), "vae": (autoencoder.encode, autoencoder.decode)}
        write_weights(out / "weights", parts)
        made = denoiser.sample(model, tokenizer, prompts, steps=EULER_STEPS, guidance=GUIDANCE, seed=0)
        pictures = vae.decode(autoencoder, made)
        contact_sheet(pictures, out / f"sheet-{step:06d}.png")
        found = features.ranks(judge, vae.to_unit_range(pictures[: len(wanted)]), images, wanted)
        progress.write(
            f"step {step} held-out prompts: the picture is first in {features.share(found, 1):.0%}, "
            f"in the first five in {features.share(found, 5):.0%}"
        )

    denoiser.train(
        latents, dataset.emoji, tokenizer, words, out, progress, settings, steps, show=show, show_every=60 * every
    )


def contact_sheet(pictures: Tensor, path: Path) -> None:
    """Write (N, 3, 64, 64) uint8 as one picture, row by row."""
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * 68, rows * 68), "grey")
    for i, picture in enumerate(pictures):
        one = Image.fromarray(picture.permute(1, 2, 0).numpy())
        sheet.paste(one, (i % COLUMNS * 68 + 2, i // COLUMNS * 68 + 2))
    sheet.save(path)


def write_weights(folder: Path, parts: dict[str, tuple[nn.Module, ...]]) -> None:
    """Write the modules of each part as one ``NAME.safetensors`` in float16; their names do not collide."""
    folder.mkdir(exist_ok=True)
    for name, modules in parts.items():
        state = {key: value for module in modules for key, value in module.state_dict().items()}
        half = {key: value.detach().half().contiguous() for key, value in state.items()}
        temporary = folder / f"{name}.tmp"
        save_file(half, temporary)
        temporary.replace(folder / f"{name}.safetensors")


@click.command(help=__doc__)
@click.option("--data", "folder", type=click.Path(path_type=Path), required=True, help="Folder of the two archives.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of checkpoints and results.")
@click.option("--steps", default=denoiser.Settings().steps, show_default=True, help="Step of the denoiser to stop at.")
@click.option("--threads", default=1, show_default=True)
@click.option("--feature-minutes", default=4.0, show_default=True, help="Processor minutes for the feature network.")
@click.option("--vae-minutes", default=25.0, show_default=True, help="Processor minutes for the autoencoder.")
@click.option("--text-minutes", default=24.0, show_default=True, help="Processor minutes for the text encoder.")
@click.option("--sheet-every", default=10.0, show_default=True, help="Minutes between contact sheets.")
def main(
    folder: Path,
    out: Path,
    steps: int,
    threads: int,
    feature_minutes: float,
    vae_minutes: float,
    text_minutes: float,
    sheet_every: float,
) -> None:
    """Parse the command line and train."""
    torch.set_num_threads(threads)
    minutes = Minutes(features=feature_minutes, vae=vae_minutes, text=text_minutes)
    train(folder, out, minutes=minutes, steps=steps, every=sheet_every)


if __name__ == "__main__":
    main()
