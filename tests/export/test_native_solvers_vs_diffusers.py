"""Native samplers against the diffusers schedulers of the same name, on the same noise, where the two coincide.

Where they do not, the sampler's own file says why; those reasons that can be measured are tested here as well.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from lehr.runtime.loop import sample  # noqa: E402 - after the skips
from lehr.runtime.paths import EDM, VE, VP, BetaSchedule, LinearFlow, Path  # noqa: E402
from lehr.runtime.prediction import (  # noqa: E402
    EPSILON,
    FLOW_PREDICTION,
    SAMPLE,
    SCORE,
    V_PREDICTION,
    Prediction,
    PredictionKind,
)
from lehr.runtime.schedules import (  # noqa: E402
    Beta,
    Flow,
    Karras,
    Polyexponential,
    Schedule,
    Sigmas,
    Spacing,
    Timesteps,
    noise_levels,
    timesteps,
)
from lehr.runtime.solvers import sampler, solver_table  # noqa: E402
from lehr.runtime.solvers.ddpm import Variance  # noqa: E402
from lehr.runtime.solvers.dpmpp_2s import Layout  # noqa: E402
from lehr.runtime.solvers.dpmpp_3m_sde import Curvature  # noqa: E402
from lehr.runtime.solvers.pndm import Warmup  # noqa: E402
from lehr.runtime.solvers.sa_solver import Weights  # noqa: E402
from lehr.runtime.solvers.sampler import Final, SolverType  # noqa: E402
from lehr.runtime.solvers.unipc import BFunction  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # diffusers deprecates its own options
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # it divides by its final sigma of 0
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

Array = npt.NDArray[np.float64]
SHAPE, STEPS, TOLERANCE = (2, 12), (2, 10, 20), 1e-5

MIXING = np.random.default_rng(0).normal(size=(12, 12)) / np.sqrt(12)


def network(x: Array, timestep: float) -> Array:
    """Gentle: a steep network measures how a float32 scheduler amplifies its own rounding."""
    return np.asarray(0.6 * np.tanh(0.5 * x @ MIXING + 0.3) + 0.25 * np.sin(0.002 * timestep + 0.4 * x))


def blind(x: Array, timestep: float) -> Array:
    """For schedulers that tell the network a rounded timestep."""
    return network(x, 0.0)


# -------------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True, kw_only=True)
class Case:
    """A scheduler and the native sampler it should equal.

    Attributes:
        scheduler: makes it, with its timesteps set for a number of steps.
        name, changes, path, prediction, schedule: the native table's.
        in_ratio: the scheduler's sample is x / alpha, as in Karras et al.
        step: further arguments of the scheduler's ``step``.
        steps: numbers of steps to try.
    """

    scheduler: Callable[[int], Any]
    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    path: Path = field(default_factory=VP)
    prediction: Prediction = EPSILON
    schedule: Callable[[int], Spacing | Schedule] = lambda steps: Spacing.TRAILING
    in_ratio: bool = False
    step: dict[str, Any] = field(default_factory=dict)
    network: Callable[[Array, float], Array] = network
    steps: tuple[int, ...] = STEPS


def noises(count: int) -> list[Array]:
    generator = np.random.default_rng(1)
    return [generator.normal(size=SHAPE) for _ in range(count)]


def run_scheduler(case: Case, scheduler: Any, x: Array, drawn: list[Array], patch: pytest.MonkeyPatch) -> Array:
    """The scheduler's own loop, in float64 as far as it lets one."""
    module = importlib.import_module(type(scheduler).__module__)
    queue: Iterator[Array] = iter(drawn)
    if hasattr(module, "randn_tensor"):
        patch.setattr(module, "randn_tensor", lambda *args, **kwargs: torch.from_numpy(next(queue)))
    for name in ("sigmas", "alphas_cumprod"):
        if torch.is_tensor(getattr(scheduler, name, None)):
            setattr(scheduler, name, getattr(scheduler, name).double())
    if case.changes.get("final") is Final.SIGMA_MIN and hasattr(scheduler, "sigmas"):
        # sqrt(1 - alpha_bar) in float32 leaves four digits of the smallest sigma.
        smallest = noise_levels(case.path, [case.path.last_timestep])[0]
        assert float(scheduler.sigmas[-1]) == pytest.approx(smallest, rel=1e-3)
        scheduler.sigmas[-1] = smallest
    state = torch.from_numpy(x)
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(state, timestep) if hasattr(scheduler, "scale_model_input") else state
        output = torch.from_numpy(case.network(seen.double().numpy(), float(timestep)))
        state = scheduler.step(output, timestep, state, **case.step).prev_sample.double()
    return np.asarray(state.numpy())


def difference(case: Case, steps: int, patch: pytest.MonkeyPatch) -> float:
    schedule = case.schedule(steps)
    options = replace(sampler(case.name).options, **case.changes)
    table = solver_table(case.name, case.path, case.prediction, steps, spacing=schedule, options=options)
    x_T = np.random.default_rng(2).normal(size=SHAPE) * table.init_noise_sigma
    drawn = noises(3 * steps + 3)
    ours = sample(case.network, table, x_T, injected=drawn)
    alpha = float(case.path.alpha_sigma(timesteps(case.path, steps, schedule)[0])[0])
    theirs = run_scheduler(case, case.scheduler(steps), x_T / alpha if case.in_ratio else x_T, drawn, patch)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def made(kind: str, **config: Any) -> Callable[[int], Any]:
    def make(steps: int) -> Any:
        scheduler = getattr(diffusers, kind)(**config)
        scheduler.set_timesteps(steps)
        return scheduler

    return make


# ---------------------------------------------------------------------------------------------- the linear VP path

LINEAR: dict[str, Any] = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
TRAILING: dict[str, Any] = {**LINEAR, "timestep_spacing": "trailing"}
LEADING: dict[str, Any] = {**LINEAR, "timestep_spacing": "leading"}
PREDICTIONS = {"epsilon": EPSILON, "v_prediction": V_PREDICTION, "sample": SAMPLE}
NO_SAMPLE = {"EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"}


def leading(steps: int) -> Spacing:
    return Spacing.LEADING


def single_step(**config: Any) -> Callable[[int], Any]:
    def make(steps: int) -> Any:
        scheduler = diffusers.DPMSolverSinglestepScheduler(**LINEAR, lower_order_final=True, **config)
        scheduler.set_timesteps(timesteps=[int(t) for t in timesteps(VP(), steps, Spacing.TRAILING)])
        return scheduler

    return make


def on_vp() -> Iterator[Any]:
    """Cases on the linear path, for every prediction the scheduler has."""
    unclipped, to_zero = {"clip_sample": False}, {"set_alpha_to_one": True, "clip_sample": False}
    no_prk, prk = {"skip_prk_steps": True, "set_alpha_to_one": True}, {"set_alpha_to_one": True}
    rows: list[tuple[str, dict[str, Any], str, dict[str, Any], dict[str, Any]]] = [
        ("DDPMScheduler", {**TRAILING, **unclipped, "variance_type": "fixed_small"}, "ddpm", {}, {}),
        ("DDPMScheduler", {**LEADING, **unclipped, "variance_type": "fixed_large"}, "ddpm",
         {"variance": Variance.FIXED_LARGE}, {"schedule": leading}),
        ("DDIMScheduler", {**LEADING, **to_zero}, "ddim", {}, {"schedule": leading}),
        ("DDIMScheduler", {**LEADING, **to_zero}, "ddim", {"eta": 0.7}, {"schedule": leading, "step": {"eta": 0.7}}),
        ("EulerDiscreteScheduler", TRAILING, "euler", {}, {"in_ratio": True}),
        ("EulerAncestralDiscreteScheduler", TRAILING, "euler_ancestral", {}, {"in_ratio": True}),
        ("HeunDiscreteScheduler", TRAILING, "heun", {}, {"in_ratio": True}),
        ("LMSDiscreteScheduler", TRAILING, "lms", {}, {"in_ratio": True}),
        ("KDPM2DiscreteScheduler", TRAILING, "dpm_2", {}, {"in_ratio": True}),
        # sigma_down is a difference of squares in float32, of which two steps leave three digits.
        ("KDPM2AncestralDiscreteScheduler", TRAILING, "dpm_2_ancestral", {}, {"in_ratio": True, "steps": (10, 20)}),
        ("PNDMScheduler", {**LEADING, **no_prk}, "pndm", {}, {"schedule": leading, "steps": (4, 10, 20)}),
        ("PNDMScheduler", {**LEADING, **prk}, "pndm", {"warmup": Warmup.RUNGE_KUTTA},
         {"schedule": leading, "steps": (4, 10, 20)}),
    ]  # fmt: skip
    for kind in SolverType:
        config, changes = {**TRAILING, "solver_type": kind.value}, {"solver_type": kind}
        third = {**changes, "eta": 0.0, "curvature": Curvature.CIRCULATED}
        rows += [
            ("DPMSolverMultistepScheduler", config, "dpmpp_2m", changes, {}),
            (
                "DPMSolverMultistepScheduler",
                {**config, "algorithm_type": "sde-dpmsolver++"},
                "dpmpp_2m_sde",
                changes,
                {},
            ),
            ("DPMSolverMultistepScheduler", {**config, "solver_order": 3}, "dpmpp_3m_sde", third, {}),
        ]
    for order in (1, 2, 3):
        config, changes = {**TRAILING, "solver_order": order}, {"order": order, "final": Final.SIGMA_MIN}
        rows += [
            ("UniPCMultistepScheduler", config, "unipc", {"order": order}, {}),
            ("UniPCMultistepScheduler", {**config, "final_sigmas_type": "sigma_min"}, "unipc", changes, {}),
            ("UniPCMultistepScheduler", {**config, "final_sigmas_type": "sigma_min", "solver_type": "bh1"}, "unipc",
             {**changes, "solver_type": BFunction.BH1}, {}),
            ("DEISMultistepScheduler", config, "deis", changes, {}),
        ]  # fmt: skip
    for predictor, corrector in ((1, 1), (2, 2), (3, 4), (2, 1)):
        config = {**TRAILING, "predictor_order": predictor, "corrector_order": corrector}
        config["tau_func"] = lambda t: torch.tensor(0.8, dtype=torch.float64)
        changes = {"eta": 0.8, "predictor_order": predictor, "corrector_order": corrector}
        changes |= {"weights": Weights.SHORTENED, "final": Final.SIGMA_MIN}
        rows.append(("SASolverScheduler", config, "sa_solver", changes, {}))
    for number, ((kind_name, config, name, changes, more), (text, prediction)) in enumerate(
        itertools.product(rows, PREDICTIONS.items())
    ):
        if kind_name in NO_SAMPLE and text == "sample":
            continue
        if kind_name == "PNDMScheduler" and text != "epsilon":
            continue  # it averages the network's outputs, which are eps for epsilon predictions alone
        scheduler = made(kind_name, **config, prediction_type=text)
        case = Case(scheduler=scheduler, name=name, changes=changes, prediction=prediction, **more)
        yield pytest.param(case, id=f"{number}-{name}-{text}")
    for kind in SolverType:
        case = Case(
            scheduler=single_step(solver_type=kind.value), name="dpmpp_2s",
            changes={"layout": Layout.GRID, "solver_type": kind},
        )  # fmt: skip
        yield pytest.param(case, id=f"dpmpp_2s-grid-{kind.value}")


@pytest.mark.parametrize("case", list(on_vp()))
def test_a_native_sampler_equals_the_scheduler(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for steps in case.steps:
        with monkeypatch.context() as patch:
            assert difference(case, steps, patch) <= TOLERANCE, steps


# ---------------------------------------------------------------------------- schedules, flows, EDM, distilled models

SD = VP(schedule=BetaSchedule.SCALED_LINEAR, beta_start=0.00085, beta_end=0.012)
SD_CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EDM_F = Prediction(kind=PredictionKind.EDM)
SHIFTED_MIN = 3 * 0.001 / (1 + 2 * 0.001)


def spaced_range(steps: int) -> dict[str, float]:
    """The schedulers in sigma take Karras's range from their spaced timesteps, not from the whole path."""
    levels = noise_levels(VP(), timesteps(VP(), steps, Spacing.TRAILING))
    return {"sigma_min": float(levels[-1]), "sigma_max": float(levels[0])}


def flow_sigmas(kind: str, **config: Any) -> Callable[[int], Any]:
    """A flow scheduler with the sigmas FLUX's pipeline gives it."""
    arguments = {"mu": config.pop("mu")} if "mu" in config else {}

    def make(steps: int) -> Any:
        scheduler = getattr(diffusers, kind)(**config)
        scheduler.set_timesteps(sigmas=(1 - np.arange(steps) / steps).tolist(), **arguments)
        return scheduler

    return make


def unipc_flow_levels(steps: int) -> Sigmas:
    levels = np.linspace(1, 0.001, steps + 1)[:-1]
    levels = 2 * levels / (1 + levels)
    levels[0] -= 1e-6
    return Sigmas(levels.tolist())


def same_flow(**more: Any) -> dict[str, Any]:
    return {"path": LinearFlow(), "prediction": FLOW_PREDICTION, **more}


OTHERS = {
    "euler-karras": Case(
        scheduler=made("EulerDiscreteScheduler", **TRAILING, use_karras_sigmas=True), name="euler",
        schedule=lambda n: Karras(**spaced_range(n)), in_ratio=True),
    "heun-exponential": Case(
        scheduler=made("HeunDiscreteScheduler", **TRAILING, use_exponential_sigmas=True), name="heun",
        schedule=lambda n: Polyexponential(**spaced_range(n)), in_ratio=True),
    "lms-beta": Case(
        scheduler=made("LMSDiscreteScheduler", **TRAILING, use_beta_sigmas=True), name="lms",
        schedule=lambda n: Beta(**spaced_range(n)), in_ratio=True),
    "dpmpp-2m-exponential": Case(
        scheduler=made("DPMSolverMultistepScheduler", **TRAILING, use_exponential_sigmas=True), name="dpmpp_2m",
        schedule=lambda n: Spacing.EXPONENTIAL, network=blind),
    "dpmpp-2m-karras": Case(
        scheduler=made("DPMSolverMultistepScheduler", **TRAILING, use_karras_sigmas=True), name="dpmpp_2m",
        schedule=lambda n: Spacing.KARRAS, network=blind),
    "euler-zero-snr-leading": Case(
        scheduler=made("DDIMScheduler", **LEADING, rescale_betas_zero_snr=True, clip_sample=False,
                       prediction_type="v_prediction"),
        name="ddim", path=VP(zero_terminal_snr=True), prediction=V_PREDICTION, schedule=leading),
    "ddim-zero-snr": Case(
        scheduler=made("DDIMScheduler", **TRAILING, rescale_betas_zero_snr=True, clip_sample=False,
                       prediction_type="v_prediction"),
        name="ddim", path=VP(zero_terminal_snr=True), prediction=V_PREDICTION, steps=(2, 10, 20)),
    "lcm": Case(scheduler=made("LCMScheduler", **SD_CONFIG), name="lcm", path=SD,
                schedule=lambda n: Spacing.AUTO, steps=(1, 2, 4, 8)),
    "tcd": Case(scheduler=made("TCDScheduler", **SD_CONFIG), name="tcd", path=SD, changes={"final": Final.SIGMA_MIN},
                schedule=lambda n: Spacing.AUTO, steps=(1, 2, 4, 8)),
    "tcd-eta": Case(
        scheduler=made("TCDScheduler", **SD_CONFIG), name="tcd", path=SD, step={"eta": 0.8},
        changes={"final": Final.SIGMA_MIN, "eta": 0.8}, schedule=lambda n: Spacing.AUTO, steps=(2, 4, 8)),
    "flow-euler": Case(
        scheduler=flow_sigmas("FlowMatchEulerDiscreteScheduler"), name="flow_euler",
        **same_flow(schedule=lambda n: Spacing.AUTO)),
    "flow-euler-shift": Case(
        scheduler=flow_sigmas("FlowMatchEulerDiscreteScheduler", shift=3.0), name="flow_euler",
        **same_flow(schedule=lambda n: Flow(shift=3))),
    "flow-euler-shifted-twice": Case(
        scheduler=made("FlowMatchEulerDiscreteScheduler", shift=3.0), name="flow_euler",
        **same_flow(schedule=lambda n: Flow(shift=3, end=SHIFTED_MIN))),
    "flow-euler-dynamic": Case(
        scheduler=flow_sigmas("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True,
                              mu=0.5 + (1024 - 256) * 0.65 / 3840),
        name="flow_euler", **same_flow(schedule=lambda n: Flow.dynamic(1024))),
    "flow-heun": Case(
        scheduler=made("FlowMatchHeunDiscreteScheduler", shift=3.0), name="flow_heun",
        **same_flow(schedule=lambda n: Flow(shift=3, end=SHIFTED_MIN))),
    "flow-lcm": Case(
        scheduler=flow_sigmas("FlowMatchLCMScheduler"), name="lcm", **same_flow(schedule=lambda n: Spacing.AUTO)),
    "flow-unipc": Case(
        scheduler=made("UniPCMultistepScheduler", use_flow_sigmas=True, flow_shift=2.0,
                       prediction_type="flow_prediction"),
        name="unipc", network=blind, **same_flow(schedule=unipc_flow_levels)),
    "edm-euler": Case(
        scheduler=made("EDMEulerScheduler"), name="euler", path=EDM(), prediction=EDM_F,
        schedule=lambda n: Spacing.KARRAS, in_ratio=True),
    "edm-dpmpp-2m": Case(
        scheduler=made("EDMDPMSolverMultistepScheduler", sigma_schedule="exponential"), name="dpmpp_2m", path=EDM(),
        prediction=EDM_F, schedule=lambda n: Spacing.EXPONENTIAL, in_ratio=True),
    "edm-dpmpp-3m": Case(
        scheduler=made("EDMDPMSolverMultistepScheduler", solver_order=3), name="dpmpp_3m_sde", path=EDM(),
        changes={"eta": 0.0, "curvature": Curvature.CIRCULATED, "solver_type": SolverType.MIDPOINT},
        prediction=EDM_F, schedule=lambda n: Spacing.KARRAS, in_ratio=True),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_it_does_so_on_other_paths_and_schedules(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for steps in OTHERS[name].steps:
        with monkeypatch.context() as patch:
            assert difference(OTHERS[name], steps, patch) <= TOLERANCE, steps


# ------------------------------------------------------------------------ schedulers that are run in a way of their own


class Brownian:
    """The noise of DPMSolverSDEScheduler: two intervals a step, of which the second contains the first."""

    def __init__(self, drawn: list[Array]) -> None:
        self.drawn, self.calls = drawn, 0

    def __call__(self, sigma: Any, sigma_next: Any) -> Any:
        first = self.calls % 2 == 0
        self.calls += 1
        if first:
            self.start, self.middle = float(sigma), float(sigma_next)
            return torch.from_numpy(self.drawn[self.calls - 1])
        share = (self.start - self.middle) / (self.start - float(sigma_next))
        return torch.from_numpy(
            np.sqrt(share) * self.drawn[self.calls - 2] + np.sqrt(1 - share) * self.drawn[self.calls - 1]
        )


@pytest.mark.parametrize("text", ["epsilon", "v_prediction"])
def test_dpmpp_sde_equals_dpmsolversde_on_one_brownian_motion(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchsde", reason="diffusers' scheduler needs it, though its noise is replaced here")

    def make(steps: int) -> Any:
        scheduler = made("DPMSolverSDEScheduler", **TRAILING, prediction_type=text)(steps)
        scheduler.noise_sampler = Brownian(noises(3 * steps + 3))
        return scheduler

    case = Case(scheduler=make, name="dpmpp_sde", prediction=PREDICTIONS[text], in_ratio=True)
    for steps in (2, 10, 20):
        assert difference(case, steps, monkeypatch) <= TOLERANCE


@pytest.mark.parametrize("steps", [1, 2, 5, 10])
def test_multistep_consistency_equals_cmstochasticiterative(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = diffusers.CMStochasticIterativeScheduler(clip_denoised=False)
    scheduler.set_timesteps(steps)
    levels = Sigmas(scheduler.sigmas[:-1].double().tolist())
    case = Case(
        scheduler=lambda n: scheduler,
        name="multistep_consistency",
        path=EDM(),
        prediction=EDM_F,
        schedule=lambda n: levels,
        network=blind,
        in_ratio=True,
    )
    assert difference(case, steps, monkeypatch) <= TOLERANCE


@pytest.mark.parametrize("steps", [2, 10, 20])
def test_ipndm_equals_the_scheduler_on_a_grid_below_pure_noise(steps: int) -> None:
    visited = timesteps(VP(), steps, Spacing.TRAILING)
    alpha, sigma = VP().alpha_sigma(visited)
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(steps)
    scheduler.alphas, scheduler.betas = torch.tensor([*alpha, 1.0]), torch.tensor([*sigma, 0.0])
    scheduler.timesteps = torch.tensor(visited)
    x_T = np.random.default_rng(2).normal(size=SHAPE)
    state = torch.from_numpy(x_T)
    for timestep in scheduler.timesteps:
        output = torch.from_numpy(network(state.numpy(), float(timestep)))
        state = scheduler.step(output, timestep, state).prev_sample
    ours = sample(network, solver_table("ipndm", VP(), V_PREDICTION, steps, spacing=Spacing.TRAILING), x_T)
    assert np.allclose(ours, state.numpy(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [2, 10, 20])
def test_the_reverse_diffusion_predictor_equals_scoresdeve(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def score(x: Array, sigma: float) -> Array:
        return np.asarray((np.tanh(x @ MIXING / (1 + sigma)) - x) / sigma**2)

    scheduler = diffusers.ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=50.0)
    scheduler.set_timesteps(steps)
    scheduler.set_sigmas(steps)
    scheduler.discrete_sigmas = scheduler.discrete_sigmas.double()
    levels = scheduler.discrete_sigmas.flip(0).tolist()
    options = replace(sampler("predictor_corrector").options, corrector_steps=0)
    path = VE(sigma_max=levels[0])
    table = solver_table("predictor_corrector", path, SCORE, steps, spacing=Timesteps(levels), options=options)
    x_T, drawn = np.random.default_rng(2).normal(size=SHAPE) * levels[0], noises(steps)
    queue = iter(drawn)
    module = importlib.import_module(type(scheduler).__module__)
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: torch.from_numpy(next(queue)))
    state = torch.from_numpy(x_T)
    for timestep, level in zip(scheduler.timesteps, levels, strict=True):
        done = scheduler.step_pred(torch.from_numpy(score(state.numpy(), level)), timestep, state)
        state = done.prev_sample
    ours = sample(score, table, x_T, injected=drawn)
    assert np.abs(ours - done.prev_sample_mean.numpy()).max() <= TOLERANCE * np.abs(ours).max()


# ------------------------------------------------------------------------------------- where they differ, and how much


def test_the_sde_of_third_order_has_another_sign_in_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**TRAILING, "solver_order": 3, "algorithm_type": "sde-dpmsolver++"}
    changes = {"curvature": Curvature.CIRCULATED, "solver_type": SolverType.MIDPOINT}
    case = Case(scheduler=made("DPMSolverMultistepScheduler", **config), name="dpmpp_3m_sde", changes=changes)
    assert difference(case, 3, monkeypatch) <= TOLERANCE  # too few steps for the third order
    with monkeypatch.context() as patch:
        assert difference(case, 10, patch) > 1e-3


def test_pndm_averages_velocities_in_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**LEADING, "skip_prk_steps": True, "set_alpha_to_one": True, "prediction_type": "v_prediction"}
    case = Case(scheduler=made("PNDMScheduler", **config), name="pndm", prediction=V_PREDICTION, schedule=leading)
    assert difference(case, 10, monkeypatch) > 1e-2


def test_unipc_bh1_to_sigma_zero_is_not_a_number_in_diffusers_and_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(
        scheduler=made("UniPCMultistepScheduler", **TRAILING, solver_type="bh1"),
        name="unipc",
        changes={"solver_type": BFunction.BH1},
    )
    assert np.isnan(difference(case, 10, monkeypatch))
    table = solver_table("unipc", VP(), EPSILON, 10, options=replace(sampler("unipc").options, **case.changes))
    assert np.all(np.isfinite(table.coefficients))
