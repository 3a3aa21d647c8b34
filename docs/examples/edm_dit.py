"""A user's own model for ``lehr export``: a small class-conditional transformer with EDM preconditioning.

    EDM_DIT_WEIGHTS=dit_edm.safetensors lehr export edm_dit.py:make -o edm.lehr

The architecture and its checkpoint are those of DM-DiT-EDM-MNIST-class-cond-ImageGen by Franfee (MIT licence), 388,672
parameters trained on MNIST. The network is F of Karras et al. 2022 (arXiv:2206.00364, equation 7), so its spec says
prediction ``edm`` on an ``EDM`` path; the solver table then holds c_skip, c_out, c_in and c_noise, and the module
needs none of them.

Shape legend: B batch, 49 tokens, 64 token channels, 4 heads of 64 channels.
"""

from __future__ import annotations

import os

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lehr.runtime import BATCH, EDM, DType, ModelSpec, Prediction, PredictionKind, Sampling, TensorSpec, Varies


class TimeEmbedding(nn.Module):
    """(B,) -> (B, 64), sines first; the frequencies are a buffer of the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("half_emb", torch.empty(32))

    def forward(self, timestep: Tensor) -> Tensor:
        phase = timestep[:, None] * self.half_emb
        return torch.cat([phase.sin(), phase.cos()], dim=-1)


class Block(nn.Module):
    """Transformer block; six linear layers regress gain, shift and gate of both halves from the condition."""

    def __init__(self, dim: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        for name in ("gamma1", "beta1", "alpha1", "gamma2", "beta2", "alpha2"):
            setattr(self, name, nn.Linear(dim, dim))
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.wq, self.wk, self.wv = (nn.Linear(dim, heads * dim) for _ in range(3))
        self.lv = nn.Linear(heads * dim, dim)
        self.ff = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))

    def attention(self, x: Tensor) -> Tensor:
        b, length, dim = x.shape
        q, k, v = (w(x).reshape(b, length, self.heads, dim).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        x = F.scaled_dot_product_attention(q, k, v, scale=49**-0.5)  # trained with the token count here
        return self.lv(x.transpose(1, 2).reshape(b, length, self.heads * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        c = c.unsqueeze(1)
        x = x + self.alpha1(c) * self.attention(self.ln1(x) * (1 + self.gamma1(c)) + self.beta1(c))
        return x + self.alpha2(c) * self.ff(self.ln2(x) * (1 + self.gamma2(c)) + self.beta2(c))


class EdmDiT(nn.Module):
    """F(c_in x, c_noise, class) at 28 x 28 pixels, patches of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 4, stride=4)
        self.patch_emb = nn.Linear(16, 64)
        self.patch_pos_emb = nn.Parameter(torch.empty(1, 49, 64))
        self.time_emb = nn.Sequential(TimeEmbedding(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        self.label_emb = nn.Embedding(10, 64)
        self.dits = nn.ModuleList(Block() for _ in range(3))
        self.ln = nn.LayerNorm(64)
        self.linear = nn.Linear(64, 16)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        x = self.patch_emb(self.conv(sample).permute(0, 2, 3, 1).reshape(-1, 49, 16)) + self.patch_pos_emb
        c = self.time_emb(timestep) + self.label_emb(class_labels)
        for block in self.dits:
            x = block(x, c)
        x = self.linear(self.ln(x)).reshape(-1, 7, 7, 1, 4, 4)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, 1, 28, 28)


def make() -> tuple[nn.Module, ModelSpec]:
    """The module with the weights that EDM_DIT_WEIGHTS names, and its spec."""
    module = EdmDiT()
    module.load_state_dict(load_file(os.environ["EDM_DIT_WEIGHTS"]))
    pictures = ("batch", 1, 28, 28)
    return module, ModelSpec(
        name="edm-dit",
        inputs=(
            TensorSpec(name="sample", shape=pictures, varies=Varies.SAMPLE),
            TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
            TensorSpec(name="class_labels", dtype=DType.INT64, shape=("batch",), varies=Varies.PROMPT),
        ),
        outputs=(TensorSpec(name="output", shape=pictures, varies=Varies.SAMPLE),),
        dims=(BATCH,),
        path=EDM(sigma_min=0.002, sigma_max=80.0),
        prediction=Prediction(kind=PredictionKind.EDM, sigma_data=0.5),
        num_classes=10,
        sampling=Sampling(sampler="dpmpp_2m", num_inference_steps=20),
    )
