"""A diffusers scheduler run as its pipeline would run it, with everything that goes in or out of it in our hands."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from lehr.export.schedulers.basis import BrownianPath, Interceptor
from lehr.export.schedulers.points import Family, family_of
from lehr.export.schedulers.refusals import is_a, quiet, settings
from lehr.runtime.errors import UnsupportedScheduler

# What a scheduler's code is seen to raise for configurations that it cannot run.
_BREAKS = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError)
_TINY = 1e-30  # 1e-15 as an amplitude: the rest of a step does not notice it
_LEARNED = {"learned", "learned_range"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A scheduler with its timesteps set, ready to be copied and run."""

    scheduler: Any
    family: Family
    timesteps: list[torch.Tensor]
    arguments: Mapping[str, Any]
    brownian: BrownianPath | None
    extra_channels: bool

    @classmethod
    def of(cls, scheduler: Any, arguments: Mapping[str, Any]) -> Run:
        family = family_of(scheduler)
        timesteps = list(scheduler.timesteps)
        config = scheduler.config
        # Of the DPM-Solver family only the epsilon branch splits the channels; the DDPM family always does.
        splits = not hasattr(scheduler, "convert_model_output") or config.get("prediction_type") == "epsilon"
        run = cls(
            scheduler=scheduler,
            family=family,
            timesteps=timesteps[:-1] if family.ends_in_data else timesteps,
            arguments=arguments,
            brownian=BrownianPath() if hasattr(scheduler, "noise_sampler") else None,
            extra_channels=config.get("variance_type") in _LEARNED and splits,
        )
        if run.brownian is not None:
            zeros = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
            ask = run.brownian.ask

            def nothing(sigma: Any, sigma_next: Any) -> torch.Tensor:
                ask(sigma, sigma_next)
                return zeros

            run(zeros, lambda _i, x, _t: x, Interceptor(run.name, (1, 1, 1, 1), lambda _j: zeros), sampler=nothing)
            run.brownian.cut()
        return run

    def without_zero_alpha(self) -> Run:
        """Itself, or with an alpha too small to matter where alpha is 0 and the division by it is clipped.

        With a zero terminal SNR an epsilon prediction gives D = ±infinity at first, and clipping makes it ±1.
        """
        scheduler, config = self.scheduler, self.scheduler.config
        clips = config.get("thresholding") or config.get("clip_sample")
        if not (clips and config.get("rescale_betas_zero_snr") and config.get("prediction_type") == "epsilon"):
            return self
        scheduler = copy.deepcopy(scheduler)
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.clamp(min=_TINY)
        return replace(self, scheduler=scheduler)

    @property
    def name(self) -> str:
        return settings(self.scheduler)

    @property
    def num_steps(self) -> int:
        return int(getattr(self.scheduler, "num_inference_steps", None) or len(self.timesteps))

    def __call__(
        self,
        x: torch.Tensor,
        network: Callable[[int, torch.Tensor, float], torch.Tensor],
        interceptor: Interceptor,
        *,
        threshold: Callable[[torch.Tensor], torch.Tensor] | None = None,
        sampler: Callable[[Any, Any], torch.Tensor] | None = None,
        before: Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None,
        after: Callable[[int, Any], None] | None = None,
    ) -> torch.Tensor:
        """Run from ``x`` to the final sample; ``before`` and ``after`` see the scheduler around each step."""
        scheduler = copy.deepcopy(self.scheduler)
        if threshold is not None:
            scheduler._threshold_sample = threshold
        if sampler is not None:
            scheduler.noise_sampler = sampler
        scale = getattr(scheduler, "scale_model_input", lambda sample, _timestep: sample)
        denoised = None
        with torch.no_grad(), quiet(), interceptor:
            for i, t in enumerate(self.timesteps):
                timestep = t.expand(1) if is_a(scheduler, "DDPMWuerstchenScheduler") else t
                with self._in_diffusers(i):
                    if getattr(scheduler, "step_index", 0) is None and hasattr(scheduler, "_init_step_index"):
                        scheduler._init_step_index(timestep)
                    model_input = scale(x, timestep)
                if before is not None:
                    before(scheduler, timestep, x, model_input)
                output = network(i, model_input, float(t))
                extra = self._extra(scheduler, i, denoised)
                with self._in_diffusers(i):
                    result = scheduler.step(
                        model_output=output, timestep=timestep, sample=x, return_dict=False, **extra, **self.arguments
                    )
                x, denoised = result[0], result[-1]
                if after is not None:
                    after(i, scheduler)
        return x

    @contextmanager
    def _in_diffusers(self, i: int) -> Iterator[None]:
        try:
            yield
        except _BREAKS as e:
            raise UnsupportedScheduler(
                f"{self.name} fails in diffusers itself at evaluation {i} of {len(self.timesteps)}: "
                f"{type(e).__name__}: {e}. Use another number of steps or another option."
            ) from e

    def _extra(self, scheduler: Any, i: int, denoised: torch.Tensor | None) -> dict[str, Any]:
        """What the pipelines of two schedulers hand to ``step`` beside its three arguments."""
        if is_a(scheduler, "UnCLIPScheduler"):
            return {"prev_timestep": self.timesteps[i + 1] if i + 1 < len(self.timesteps) else None}
        if is_a(scheduler, "CogVideoXDPMScheduler"):
            return {"old_pred_original_sample": denoised, "timestep_back": self.timesteps[i - 1] if i else None}
        return {}

    def not_finite(self, i: int) -> UnsupportedScheduler:
        """The refusal of a configuration whose values are not finite at evaluation ``i``."""
        return UnsupportedScheduler(
            f"{self.name} gives values that are not finite in diffusers itself, at evaluation {i} of "
            f"{len(self.timesteps)}. Use another number of steps or another option."
        )
