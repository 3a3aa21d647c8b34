"""The gradient of a noisy classifier, grad log p(y | x_t) in x_t, as a module that exports like a denoiser.

Automatic differentiation leaves no trace in an exported graph, so the backward pass is written out beforehand:
``make_fx`` records it as operators, and what ONNX has not (the backward forms of SiLU, group norm, convolution, average
pooling) is decomposed into what it has. The result is a network of (sample, timestep, class_labels) whose prediction is
a score, so it becomes a bundle and an engine as any other, and guides as ``Pipeline(…, classifier=…)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from lehr.export.backbones import _adm_classifier
from lehr.runtime.errors import ExportFailed
from lehr.runtime.paths import Path
from lehr.runtime.prediction import SCORE
from lehr.runtime.spec import DType, ModelSpec, TensorSpec, Varies

_BATCH = 3  # of the recording; 0 and 1 would be baked in
aten = torch.ops.aten


class ClassifierGradient(nn.Module):
    """grad_x log softmax(classifier(x_t, t))[y].

    Args:
        classifier: ``classifier(sample, timestep) -> (B, classes)`` logits; each sample's depend on itself alone.
        sample_shape: (C, H, W), which the recording fixes.

    Raises:
        ExportFailed: the backward pass cannot be recorded.
    """

    def __init__(self, classifier: nn.Module, sample_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.classifier = classifier.eval().requires_grad_(False)
        self._names = list(_state(classifier))
        self._backward = self._record(sample_shape)

    def _record(self, sample_shape: tuple[int, ...]) -> torch.fx.GraphModule:
        def gradient(sample: Tensor, timestep: Tensor, class_labels: Tensor, *state: Tensor) -> Tensor:
            with torch.enable_grad():
                x = sample.detach().requires_grad_(True)
                logits = functional_call(
                    self.classifier, dict(zip(self._names, state, strict=True)), (x, timestep), strict=True
                )
                chosen = torch.log_softmax(logits, dim=-1).gather(1, class_labels[:, None])
                return torch.autograd.grad(chosen.sum(), x)[0]

        state = [tensor.detach() for tensor in _state(self.classifier).values()]
        like = next((tensor for tensor in state if tensor.is_floating_point()), torch.zeros(()))
        feeds = (
            torch.zeros(_BATCH, *sample_shape).to(like),
            torch.ones(_BATCH).to(like),
            torch.zeros(_BATCH, dtype=torch.int64, device=like.device),
        )
        table = {**core_aten_decompositions(), **_DECOMPOSITIONS}
        try:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has a fused backward, which has no decomposition
                return make_fx(gradient, decomposition_table=table, tracing_mode="symbolic")(*feeds, *state)
        except (RuntimeError, TypeError, NotImplementedError) as e:
            raise ExportFailed(f"the classifier's backward pass cannot be recorded: {e}") from e

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """Evaluate the gradient.

        Args:
            sample: (B, C, H, W) x_t.
            timestep: (B,) float.
            class_labels: (B,) int64 y.

        Returns:
            (B, C, H, W).
        """
        state = _state(self.classifier)
        return self._backward(sample, timestep, class_labels, *(state[name] for name in self._names))


def gradient_spec(name: str, params: _adm_classifier.Params, path: Path) -> ModelSpec:
    """The contract of the gradient of ADM's classifier."""
    inputs, _, dims = _adm_classifier.signature(params)
    labels = TensorSpec(name="class_labels", dtype=DType.INT64, shape=("batch",), varies=Varies.PROMPT)
    return ModelSpec(
        name=name,
        family="adm-classifier-gradient",
        inputs=(*inputs, labels),
        outputs=(TensorSpec(name="gradient", shape=inputs[0].shape, varies=Varies.SAMPLE),),
        dims=dims,
        path=path,
        prediction=SCORE,
        num_classes=params.num_classes,
    )


def adm_classifier_gradient(
    name: str, params: _adm_classifier.Params, path: Path, classifier: _adm_classifier.NoisyClassifier
) -> tuple[ClassifierGradient, ModelSpec]:
    """Module and contract, what a factory given to ``lehr export FILE.py:FACTORY`` returns."""
    shape = (params.encoder.in_channels, params.image_size, params.image_size)
    return ClassifierGradient(classifier, shape), gradient_spec(name, params, path)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


# ------------------------------------------------------------------------------- what has no decomposition of its own


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    _bias_sizes: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    _output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor, None, None]:
    """The gradient in the input alone: a transposed convolution, padded to the input's size."""
    if transposed or output_mask[1] or output_mask[2]:
        raise NotImplementedError("the backward of a transposed convolution, or in a convolution's weights")
    reached = [
        (grad.shape[2 + k] - 1) * stride[k] - 2 * padding[k] + dilation[k] * (weight.shape[2 + k] - 1) + 1
        for k in range(len(stride))
    ]
    missing = [x.shape[2 + k] - size for k, size in enumerate(reached)]
    out = aten.convolution.default(grad, weight, None, stride, padding, dilation, True, missing, groups)
    return out, None, None


def _avg_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    _count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Windows that do not overlap and cover the input: every pixel takes its window's share."""
    height, width = kernel_size
    tiles = tuple(stride or kernel_size) == (height, width) and not any(padding) and not ceil_mode
    if not tiles or x.shape[-2] != grad.shape[-2] * height or x.shape[-1] != grad.shape[-1] * width:
        raise NotImplementedError("the backward of average pooling with padding or overlapping windows")
    spread = grad[..., :, None, :, None].expand(*grad.shape[:-2], grad.shape[-2], height, grad.shape[-1], width)
    return spread.reshape(x.shape) / (divisor_override or height * width)


_DECOMPOSITIONS = {
    aten.convolution_backward.default: _convolution_backward,
    aten.avg_pool2d_backward.default: _avg_pool2d_backward,
}
