"""Every sampler on every path it claims, what samplers have in common, and what their options refuse."""

from __future__ import annotations

import importlib
import io
import json
import time
from dataclasses import asdict, replace
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lehr.runtime.errors import InvalidInput, UnknownName
from lehr.runtime.loop import sample
from lehr.runtime.paths import EDM, VE, VP, BetaSchedule, Curve, Interpolant, LinearFlow, Path
from lehr.runtime.prediction import EPSILON, SAMPLE, SCORE, V_PREDICTION, Prediction, PredictionKind
from lehr.runtime.schedules import Flow, Karras, Sigmas, Spacing, Timesteps
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.solvers import default_sampler, sampler, samplers, solver_table
from lehr.runtime.solvers.dpmpp_2s import Layout
from lehr.runtime.solvers.euler_maruyama import Diffusion
from lehr.runtime.solvers.predictor_corrector import Predictor
from lehr.runtime.solvers.sampler import DIFFUSIONS, Final, Options

PATHS: dict[str, Path] = {
    "vp": VP(),
    "vp-cosine": VP(schedule=BetaSchedule.COSINE),
    "vp-zero-snr": VP(zero_terminal_snr=True),
    "edm": EDM(),
    "ve": VE(),
    "flow": LinearFlow(),
    "sit": Interpolant(),
    "sit-gvp": Interpolant(curve=Curve.GVP),
    "sit-vp": Interpolant(curve=Curve.VP),
}
CLAIMED = [
    (name, path)
    for name, one in samplers().items()
    for path, value in PATHS.items()
    if isinstance(value, one.paths) and not (path == "vp-zero-snr" and one.paths == DIFFUSIONS)
]
STEPS = (1, 2, 3, 10, 50)
ALWAYS_NOISY = {name for name, one in samplers().items() if one.stochastic and not one.takes_eta}
X_0 = np.array([[0.3, -1.2, 0.7]])


def options(name: str, **changes: Any) -> Options:
    return replace(sampler(name).options, **changes)


def same(a: SolverTable, b: SolverTable) -> bool:
    if len(a) != len(b) or a.num_noises != b.num_noises:
        return False
    return np.allclose(a.coefficients, b.coefficients, rtol=1e-9, atol=1e-11)


# ----------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("name, path", CLAIMED)
def test_a_sampler_builds_a_sound_table_on_every_path_it_claims(name: str, path: str) -> None:
    for steps in STEPS:
        table = solver_table(name, PATHS[path], SAMPLE, steps)
        assert table.sampler == name
        evaluations = sampler(name).evaluations
        assert steps * evaluations - (evaluations - 1) <= len(table) <= steps * evaluations + 1
        assert not np.any(np.triu(table.outputs))
        assert np.all(np.any(table.noises != 0, axis=0)), "a noise that is drawn is used"
        assert bool(table.num_noises) <= sampler(name).stochastic
        json.dumps(dict(table.options), allow_nan=False)
        assert table.options["num_inference_steps"] == steps


@pytest.mark.parametrize("name, path", [pair for pair in CLAIMED if pair[1] == "vp"])
def test_a_table_survives_saving(name: str, path: str) -> None:
    table = solver_table(name, PATHS[path], EPSILON, 5)
    with np.load(io.BytesIO(table.to_bytes())) as arrays:
        again = SolverTable.from_arrays(dict(arrays))
    assert again.to_bytes() == table.to_bytes()


@pytest.mark.parametrize("name, path", [pair for pair in CLAIMED if pair[0] not in ALWAYS_NOISY])
def test_without_noise_a_point_mass_is_found_exactly(name: str, path: str) -> None:
    for steps in STEPS:
        table = solver_table(name, PATHS[path], SAMPLE, steps, eta=0.0)
        x_T = np.random.default_rng(steps).normal(size=X_0.shape) * table.init_noise_sigma
        assert np.abs(sample(lambda x, t: X_0 + 0 * x, table, x_T) - X_0).max() < 1e-6


@pytest.mark.parametrize("kind", list(PredictionKind))
def test_the_table_of_a_prediction_does_what_the_table_of_another_does(kind: PredictionKind) -> None:
    path: Path = {PredictionKind.EDM: EDM(), PredictionKind.VELOCITY: Interpolant()}.get(kind, VP())
    interpolant = path if isinstance(path, Interpolant) else None
    prediction = Prediction(kind=kind, interpolant=interpolant)

    def network(x: npt.NDArray[np.float64], timestep: float) -> npt.NDArray[np.float64]:
        alpha, sigma = (float(value) for value in path.alpha_sigma(timestep))
        x = x / prediction.input_scale(alpha, sigma)
        on_sample, on_output = prediction.denoised_coefficients(alpha, sigma)
        return (np.tanh(x) - on_sample * x) / on_output

    x_T = np.random.default_rng(0).normal(size=(2, 5))
    name = default_sampler(path)
    direct, through = solver_table(name, path, SAMPLE, 8), solver_table(name, path, prediction, 8)
    expected = sample(lambda x, t: np.tanh(x), direct, x_T * direct.init_noise_sigma)
    assert np.allclose(sample(network, through, x_T * through.init_noise_sigma), expected, rtol=1e-9, atol=1e-11)


def test_a_table_of_fifty_steps_is_built_in_a_fraction_of_a_second() -> None:
    # 1 to 17 ms on one core of an AMD EPYC; the bound is loose because the machine may be busy.
    for name, one in samplers().items():
        path = next(path for path in PATHS.values() if isinstance(path, one.paths))
        best = np.inf
        for _ in range(3):
            start = time.process_time()
            solver_table(name, path, SAMPLE, 50)
            best = min(best, time.process_time() - start)
        assert best < 0.5, name


def test_every_file_says_where_it_differs_from_diffusers() -> None:
    for name in samplers():
        module = importlib.import_module(f"lehr.runtime.solvers.{name}")
        assert module.SAMPLER.name == name
        assert "\ndiffusers: " in module.__doc__, name


def test_the_documentation_has_a_row_for_every_sampler() -> None:
    text = (FilePath(__file__).parents[2] / "docs" / "samplers.md").read_text(encoding="utf-8")
    text = text.split("## The list")[1].split("\n## ")[0]
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    assert sorted(rows) == sorted(samplers())
    for name, one in samplers().items():
        cells = [cell.strip() for cell in rows[name].strip("|").split("|")]
        assert cells[1] == str(one.order), name
        assert cells[2] == str(one.evaluations), name
        assert (cells[3] != "none") == one.stochastic, name
        arxiv = [word.strip(",;") for word in one.reference.split() if word.startswith("arXiv")]
        assert all(number.removeprefix("arXiv:") in cells[5] for number in arxiv), name


# -------------------------------------------------------------------------------- methods that are one another

EQUAL = [
    ("euler", {}, "ddim", {"eta": 0.0}, "vp"),
    ("euler", {}, "flow_euler", {}, "flow"),
    ("euler", {}, "flow_euler", {}, "sit-gvp"),
    ("euler", {}, "lms", {"order": 1}, "edm"),
    ("euler", {}, "ipndm", {"order": 1}, "vp"),
    ("euler", {}, "deis", {"order": 1}, "vp-zero-snr"),
    ("euler", {}, "unipc", {"order": 1, "corrector_from": 99}, "flow"),
    ("euler", {}, "euler_maruyama", {"eta": 0.0}, "sit-vp"),
    ("euler", {}, "tcd", {"eta": 0.0}, "flow"),
    ("euler_ancestral", {}, "ddim", {"eta": 1.0}, "vp"),
    ("euler_ancestral", {}, "ddpm", {}, "flow"),
    ("euler_ancestral", {}, "predictor_corrector", {"corrector_steps": 0, "predictor": Predictor.ANCESTRAL}, "vp"),
    ("heun", {}, "edm_stochastic", {"s_churn": 0.0}, "edm"),
    ("dpm_2", {}, "dpm_2_ancestral", {"eta": 0.0}, "ve"),
    ("dpmpp_2m", {}, "dpmpp_2m_sde", {"eta": 0.0}, "vp-zero-snr"),
    ("dpmpp_2s", {}, "dpmpp_sde", {"eta": 0.0}, "vp-cosine"),
    ("lcm", {}, "multistep_consistency", {}, "flow"),
]


@pytest.mark.parametrize("name, changes, other, other_changes, path", EQUAL)
def test_two_names_of_one_method_give_one_table(
    name: str, changes: dict[str, Any], other: str, other_changes: dict[str, Any], path: str
) -> None:
    for steps in (1, 2, 12):
        first = solver_table(name, PATHS[path], SAMPLE, steps, options=options(name, **changes))
        second = solver_table(other, PATHS[path], SAMPLE, steps, options=options(other, **other_changes))
        assert same(first, second)


@pytest.mark.parametrize("name", [name for name, one in samplers().items() if one.takes_eta])
def test_eta_zero_injects_nothing_and_the_default_may(name: str) -> None:
    path: Path = VP() if VP in sampler(name).paths else LinearFlow()
    assert solver_table(name, path, SAMPLE, 6, eta=0.0).num_noises == 0
    default = sampler(name).options.eta
    assert bool(solver_table(name, path, SAMPLE, 6).num_noises) == bool(default)
    assert solver_table(name, path, SAMPLE, 6, eta=1.0).num_noises >= 5


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "unipc", "deis", "sa_solver", "tcd"])
def test_a_loop_may_end_at_the_paths_last_timestep(name: str) -> None:
    path, table = VP(), solver_table(name, VP(), SAMPLE, 10, options=options(name, final=Final.SIGMA_MIN), eta=None)
    deterministic = solver_table(
        name,
        path,
        SAMPLE,
        10,
        options=options(name, final=Final.SIGMA_MIN),
        eta=0.0 if sampler(name).takes_eta else None,
    )
    alpha, sigma = path.alpha_sigma(path.last_timestep)
    x_T = np.random.default_rng(0).normal(size=X_0.shape)
    final = sample(lambda x, t: X_0 + 0 * x, deterministic, x_T)
    # On a point mass eps is the same all along, so what is left is the starting noise at the last level.
    start_alpha, start_sigma = path.alpha_sigma(path.first_timestep)
    eps = (x_T - float(start_alpha) * X_0) / float(start_sigma)
    assert np.allclose(final, float(alpha) * X_0 + float(sigma) * eps, atol=1e-8)
    assert len(table) == 10


def test_ending_where_the_schedule_already_is_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no step is left"):
        solver_table("deis", EDM(), SAMPLE, 10, options=options("deis", final=Final.SIGMA_MIN))


def test_churn_stays_below_the_paths_noisiest_level() -> None:
    table = solver_table("edm_stochastic", VP(), SAMPLE, 20, options=options("edm_stochastic", s_max=1e9))
    assert table.timesteps.max() <= VP().first_timestep
    assert 0 < table.num_noises < 20


def test_dpmpp_2s_on_the_grid_takes_one_evaluation_a_step() -> None:
    for steps in (1, 2, 3, 10, 11):
        assert (
            len(solver_table("dpmpp_2s", VP(), SAMPLE, steps, options=options("dpmpp_2s", layout=Layout.GRID))) == steps
        )


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("name", [name for name, one in samplers().items() if one.paths == DIFFUSIONS])
def test_a_method_that_divides_by_alpha_refuses_to_start_at_pure_noise(name: str) -> None:
    for steps in STEPS:
        with pytest.raises(InvalidInput, match=f"{name}.*starts at pure noise"):
            solver_table(name, PATHS["vp-zero-snr"], SAMPLE, steps)


def test_an_unknown_sampler_is_refused_with_the_closest_name() -> None:
    with pytest.raises(UnknownName, match="dpmpp_2m"):
        solver_table("dpmp_2m", VP(), EPSILON, 10)


def test_a_path_the_sampler_is_not_defined_on_is_refused() -> None:
    with pytest.raises(InvalidInput, match="not on LinearFlow"):
        solver_table("heun", LinearFlow(), SAMPLE, 10)


def test_options_of_another_sampler_are_refused() -> None:
    with pytest.raises(InvalidInput, match="takes DDIMOptions, got UniPCOptions"):
        solver_table("ddim", VP(), EPSILON, 10, options=options("unipc"))


def test_eta_for_a_deterministic_sampler_is_refused_unless_it_is_zero() -> None:
    with pytest.raises(InvalidInput, match="takes no eta; samplers that do: ddim, "):
        solver_table("heun", VP(), EPSILON, 10, eta=0.5)
    assert len(solver_table("heun", VP(), EPSILON, 10, eta=0.0)) == 19


@pytest.mark.parametrize("prediction", [EPSILON, SCORE])
def test_a_noise_prediction_at_pure_noise_is_refused(prediction: Prediction) -> None:
    path = VP(zero_terminal_snr=True)
    with pytest.raises(InvalidInput, match="no x_0 estimate at pure noise"):
        solver_table("ddim", path, prediction, 10)
    assert len(solver_table("ddim", path, V_PREDICTION, 10)) == 10
    assert len(solver_table("ddim", path, prediction, 10, spacing=Spacing.LEADING)) == 10


def test_an_infinite_diffusion_coefficient_is_refused() -> None:
    chosen = options("euler_maruyama", diffusion=Diffusion.SBDM)
    with pytest.raises(InvalidInput, match="infinite at pure noise"):
        solver_table("euler_maruyama", LinearFlow(), SAMPLE, 10, options=chosen)
    assert solver_table("euler_maruyama", VP(), SAMPLE, 10, options=chosen).num_noises == 9


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_number_of_steps_out_of_range_is_refused(steps: int) -> None:
    with pytest.raises(InvalidInput, match="number of steps"):
        solver_table("euler", VP(), EPSILON, steps)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("ddim", {"eta": 1.5}),
        ("ddim", {"eta": float("nan")}),
        ("euler_ancestral", {"eta": -0.1}),
        ("euler_ancestral", {"s_noise": 0.0}),
        ("dpm_2_ancestral", {"s_noise": float("inf")}),
        ("dpmpp_2m_sde", {"eta": -1.0}),
        ("dpmpp_2s", {"eta": 1.0, "layout": Layout.GRID}),
        ("dpmpp_3m_sde", {"s_noise": -1.0}),
        ("dpmpp_sde", {"eta": 2.0}),
        ("edm_stochastic", {"s_churn": -1.0}),
        ("edm_stochastic", {"s_min": 2.0, "s_max": 1.0}),
        ("unipc", {"order": 0}),
        ("unipc", {"order": 6}),
        ("unipc", {"corrector_from": -1}),
        ("deis", {"order": 5}),
        ("lms", {"order": 0}),
        ("ipndm", {"order": 5}),
        ("sa_solver", {"predictor_order": 0}),
        ("sa_solver", {"tau_min": 2.0, "tau_max": 1.0}),
        ("lcm", {"timestep_scaling": 0.0}),
        ("tcd", {"eta": 1.1}),
        ("multistep_consistency", {"s_noise": 0.0}),
        ("annealed_langevin", {"step_size": 1.0}),
        ("annealed_langevin", {"steps_per_level": 0}),
        ("predictor_corrector", {"snr": 0.8}),
        ("predictor_corrector", {"corrector_steps": -1}),
        ("euler_maruyama", {"eta": -1.0}),
    ],
)
def test_options_out_of_range_are_refused(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        options(name, **changes)


def test_recorded_options_are_the_ones_given() -> None:
    chosen = options("unipc", order=3, final=Final.SIGMA_MIN)
    recorded = dict(solver_table("unipc", VP(), SAMPLE, 10, options=chosen).options)
    assert recorded.pop("num_inference_steps") == 10
    assert recorded == json.loads(json.dumps(asdict(chosen)))


def test_schedules_and_samplers_combine() -> None:
    for spacing in (Karras(rho=5), Sigmas([10.0, 3.0, 1.0, 0.1, 0.0]), Timesteps([900, 500, 100, 3])):
        assert len(solver_table("dpmpp_2m", VP(), SAMPLE, 4, spacing=spacing)) == 4
    shifted = solver_table("flow_euler", LinearFlow(), SAMPLE, 4, spacing=Flow(shift=3))
    assert shifted.sigmas == pytest.approx([1, 0.9, 0.75, 0.5])
