"""Write the digits classifier as a feature network: ``python -m lehr.export.reference.feature_network OUT.onnx``.

The gate knows neither PyTorch nor this package, so the file is shipped with it (``ci/features``); a test holds it
against the classifier's weights.
"""

from __future__ import annotations

from pathlib import Path

import click
import onnx
import torch
from torch import Tensor, nn

from lehr.export.reference.classifier import Classifier, load


class _Both(nn.Module):
    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.classifier.features(images)
        return features, self.classifier.head(features)


def write(path: Path) -> None:
    """Write ``features`` (N, 128) and ``logits`` (N, 10) of ``images`` (N, 1, 28, 28) in [-1, 1]."""
    program = torch.onnx.export(
        _Both(load()),
        (torch.zeros(2, 1, 28, 28),),
        dynamo=True,
        opset_version=18,
        input_names=["images"],
        output_names=["features", "logits"],
        dynamic_shapes=({0: torch.export.Dim("samples", min=1, max=4096)},),
        verbose=False,
    )
    if program is None:
        raise TypeError("torch.onnx.export returned no program")
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.value_info[:], model.metadata_props[:]
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString(deterministic=True))


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path))
def main(out: Path) -> None:
    """Write the file."""
    write(out)


if __name__ == "__main__":
    main()
