"""The log-likelihood of data under a model, by the probability-flow ODE (Song et al. 2021, arXiv:2011.13456, D.2).

On every path a point is an angle: alpha = n cos(theta), sigma = n sin(theta), z = x_t / n. With D the x_0 estimate and
u = log tan(theta / 2), the ODE has no singularity from almost clean (theta near 0) to pure noise (theta = pi / 2):

    dz / du = cos(theta) z - D,     d log p(z) / du = -(d cos(theta) - tr dD/dz),     d dimensions

The trace is Hutchinson's estimate v·(dD/dz) v with Rademacher v (Grathwohl et al. 2019, arXiv:1810.01367). The data is
taken to stand at the path's last timestep, so the density is that of the data with the remaining noise, x_0 + r eps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from lehr.runtime.errors import ExportFailed, InvalidInput
from lehr.runtime.paths import Path
from lehr.runtime.prediction import Prediction, PredictionKind

Array = npt.NDArray[np.float64]
Network = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """Of B samples.

    Attributes:
        log_prob: (B,) in nats, of the continuous density of x_0.
        evaluations: of the network; each is followed by one backward pass a probe.
    """

    log_prob: Array
    evaluations: int
    dimensions: int

    def bits_per_dim(self, value_range: tuple[float, float] = (-1.0, 1.0), levels: int = 256) -> Array:
        """(B,) bits per dimension of data with ``levels`` values in ``value_range``, uniformly dequantised.

        A cell of width w = (high - low) / levels around a value has the probability p w in each dimension.
        """
        width = (value_range[1] - value_range[0]) / levels
        bits: Array = -(self.log_prob / self.dimensions + math.log(width)) / math.log(2)
        return bits


def log_likelihood(
    network: Network,
    path: Path,
    prediction: Prediction,
    x_0: Tensor,
    *,
    probes: int = 1,
    seed: int = 0,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Likelihood:
    """log p(x_0) of each sample.

    Args:
        network: ``network(sample, timestep)``, (B, …) and (B,) to the raw output (B, …), differentiable in the sample;
            conditions are bound, and the extra channels of a learned variance dropped, by the caller.
        path: of the model.
        prediction: what the network outputs.
        x_0: (B, …) data, in the network's dtype and on its device.
        probes: of the trace; the standard error of an estimate falls with its root.
        seed: of the probes, which are fixed along the path, as the adaptive solver needs them.
        rtol: relative tolerance of SciPy's RK45, for the sample and the log-density together.
        atol: absolute tolerance of the same.

    Raises:
        InvalidInput: no probes, no samples, tolerances that are not positive, or a prediction that says nothing about
            x_0 at the pure noise where the path starts.
        ExportFailed: the solver gave up, or the network returned values that are not finite.
    """
    if probes < 1:
        raise InvalidInput(f"the trace needs at least one probe, got {probes}.")
    if not (len(x_0) and math.isfinite(rtol) and rtol > 0 and math.isfinite(atol) and atol > 0):
        raise InvalidInput(
            f"a likelihood needs samples and positive tolerances, got {len(x_0)} samples, rtol {rtol} and atol {atol}."
        )
    noisiest = [float(value) for value in path.alpha_sigma(path.first_timestep)]
    cleanest = [float(value) for value in path.alpha_sigma(path.last_timestep)]
    if noisiest[0] == 0 and prediction.kind in (PredictionKind.EPSILON, PredictionKind.SCORE):
        raise InvalidInput(
            f"a network that predicts {prediction.kind.value} has no x_0 estimate at pure noise, where "
            f"{type(path).__name__} starts."
        )
    begin, end = _angle(*cleanest), _angle(*noisiest)
    count, dimensions = len(x_0), x_0[0].numel()
    generator = torch.Generator().manual_seed(seed)
    signs = [torch.randint(0, 2, x_0.shape, generator=generator).to(x_0) * 2 - 1 for _ in range(probes)]
    evaluations = 0

    def slope(u: float, state: Array) -> Array:
        nonlocal evaluations
        evaluations += 1
        z = torch.from_numpy(state[:-count]).to(x_0).reshape(x_0.shape)
        cosine = -math.tanh(u)
        denoised, trace = _denoised_and_trace(network, path, prediction, u, z, signs)
        change = (cosine * z.double() - denoised.double()).reshape(-1).cpu().numpy()
        rates = np.concatenate([change, trace.cpu().numpy() - dimensions * cosine])
        if not np.all(np.isfinite(rates)):  # RK45 would halve its step for ever
            raise ExportFailed(
                f"the probability-flow ODE cannot be solved: the network returned values that are not finite at u = "
                f"{u:.4g}. Evaluate it in float32 or float64."
            )
        return rates

    cosine = math.cos(2 * math.atan(math.exp(begin)))
    z_0 = cosine * x_0.detach().double().reshape(-1).cpu().numpy()
    solved = solve_ivp(slope, (begin, end), np.concatenate([z_0, np.zeros(count)]), rtol=rtol, atol=atol)
    if not solved.success:
        raise ExportFailed(f"the probability-flow ODE cannot be solved: {solved.message} Loosen rtol and atol.")
    z, change = solved.y[:-count, -1].reshape(count, dimensions), solved.y[-count:, -1]
    prior = path.init_noise_sigma(path.first_timestep) / math.hypot(*noisiest)
    at_noise = -0.5 * np.sum((z / prior) ** 2, axis=1) - dimensions * (math.log(prior) + 0.5 * math.log(2 * math.pi))
    # log p at the clean end is that at the noisy end minus the change; z = cos(theta) x_0 there.
    return Likelihood(
        log_prob=at_noise - change + dimensions * math.log(cosine), evaluations=evaluations, dimensions=dimensions
    )


def dequantise(x_0: Tensor, *, value_range: tuple[float, float] = (-1.0, 1.0), levels: int = 256, seed: int) -> Tensor:
    """Data at the centres of ``levels`` cells spread evenly inside them, as a continuous density needs."""
    width = (value_range[1] - value_range[0]) / levels
    noise = torch.rand(x_0.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x_0 + ((noise - 0.5) * width).to(x_0)


def _angle(alpha: float, sigma: float) -> float:
    """u = log tan(theta / 2)."""
    return math.log(math.tan(math.atan2(sigma, alpha) / 2))


def _denoised_and_trace(
    network: Network, path: Path, prediction: Prediction, u: float, z: Tensor, signs: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """D (B, …) and tr dD/dz (B,) at the angle of u."""
    theta = 2 * math.atan(math.exp(min(u, 0.0)))
    ratio = math.inf if u >= -1e-12 else math.tan(theta)
    timestep = float(path.timestep_of(ratio))
    alpha, sigma = (float(value) for value in path.alpha_sigma(timestep))
    on_sample, on_output = prediction.denoised_coefficients(alpha, sigma)
    scale = float(prediction.input_scale(alpha, sigma))
    with torch.enable_grad():
        point = z.detach().requires_grad_(True)
        x_t = math.hypot(alpha, sigma) * point
        steps = torch.full((len(z),), timestep, dtype=z.dtype, device=z.device)
        denoised = on_sample * x_t + on_output * network(scale * x_t, steps)
        trace = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        for number, sign in enumerate(signs):
            last = number == len(signs) - 1
            (product,) = torch.autograd.grad(denoised, point, sign, retain_graph=not last)
            trace += (product.double() * sign.double()).flatten(1).sum(dim=1) / len(signs)
    return denoised.detach(), trace
