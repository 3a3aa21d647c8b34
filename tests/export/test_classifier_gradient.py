"""A classifier's gradient as a module without automatic differentiation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lehr.engines.build import build
from lehr.engines.target import target
from lehr.export.backbones import _adm_classifier, adm
from lehr.export.classifier_gradient import ClassifierGradient, adm_classifier_gradient
from lehr.export.package import Options, export
from lehr.runtime.errors import ExportFailed
from lehr.runtime.paths import VP
from lehr.runtime.pipeline import open_denoiser
from lehr.runtime.recipe import recipe

PARAMS = _adm_classifier.Params(
    encoder=adm.Params(
        in_channels=1,
        model_channels=32,
        channel_mult=(1, 1),
        num_res_blocks=1,
        attention_downsampling=(),
        num_classes=None,
        num_head_channels=32,
    ),
    image_size=4,
    num_classes=3,
)


def make():
    torch.manual_seed(0)
    classifier = _adm_classifier.NoisyClassifier(PARAMS)
    for parameter in classifier.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return adm_classifier_gradient("tiny", PARAMS, VP(), classifier)


def by_autograd(classifier, x, t, y):
    x = x.clone().requires_grad_(True)
    chosen = torch.log_softmax(classifier(x, t), dim=-1).gather(1, y[:, None]).sum()
    return torch.autograd.grad(chosen, x)[0]


def feeds(count: int):
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 1, 4, 4, generator=generator)
    return x, torch.rand(count, generator=generator) * 999, torch.arange(count) % 3


def test_it_is_what_autograd_computes_at_any_batch_without_autograd():
    module, spec = make()
    for count in (1, 2, 5):
        x, t, y = feeds(count)
        with torch.inference_mode():
            got = module(x, t, y)
        expected = by_autograd(module.classifier, x, t, y)
        assert float(expected.abs().max()) > 1e-4
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert {tensor.name for tensor in spec.inputs} == {"sample", "timestep", "class_labels"}
    assert all(name.startswith("classifier.") for name in module.state_dict())


def test_a_backward_pass_that_cannot_be_written_out_is_refused():
    class Upsampling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.ConvTranspose2d(1, 3, 4)

        def forward(self, sample, timestep):
            return self.layer(sample).mean(dim=(2, 3))

    with pytest.raises(ExportFailed, match="transposed convolution"):
        ClassifierGradient(Upsampling(), (1, 4, 4))


@pytest.mark.long
def test_it_exports_and_its_engine_equals_autograd(tmp_path):
    factory = tmp_path / "factory.py"
    factory.write_text(
        f"import importlib.util\nspec = importlib.util.spec_from_file_location('source', {__file__!r})\n"
        "source = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(source)\nmake = source.make\n"
    )
    bundle = tmp_path / "gradient.lehr"
    export(f"{factory}:make", bundle, Options(), progress=lambda text: None)
    build(bundle, target("cpu"), recipe("fp32"))
    module, _ = make()
    x, t, y = feeds(4)
    t[:] = 500.0
    got = open_denoiser(bundle)(x.numpy(), 500.0, {"class_labels": y.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), by_autograd(module.classifier, x, t, y), rtol=1e-4, atol=1e-6)
