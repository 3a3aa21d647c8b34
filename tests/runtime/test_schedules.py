"""Schedules: decreasing, of the right length, inside the path, and the formulas of their sources."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lehr.runtime.beta_quantile import beta_quantile
from lehr.runtime.errors import InvalidInput
from lehr.runtime.paths import EDM, VE, VP, BetaSchedule, Curve, Interpolant, LinearFlow, Path, path_from_json
from lehr.runtime.schedules import (
    MAX_STEPS,
    AlignYourSteps,
    Beta,
    Distilled,
    Flow,
    Karras,
    Leading,
    Linspace,
    Polyexponential,
    Schedule,
    Sigmas,
    Simple,
    Spacing,
    Timesteps,
    Trailing,
    level_range,
    noise_levels,
    timesteps,
)

stats = pytest.importorskip("scipy.stats")

DISCRETE = st.builds(
    VP,
    schedule=st.sampled_from(BetaSchedule),
    num_train_timesteps=st.integers(10, 1000),
    zero_terminal_snr=st.booleans(),
)
RANGED = st.one_of(
    st.builds(VP, schedule=st.sampled_from([BetaSchedule.LINEAR, BetaSchedule.SCALED_LINEAR])),
    st.builds(EDM, sigma_min=st.floats(1e-3, 0.1), sigma_max=st.floats(1, 200)),
    st.builds(VE, sigma_min=st.floats(1e-3, 0.1), sigma_max=st.floats(1, 500)),
    st.builds(LinearFlow, num_train_timesteps=st.sampled_from([1, 100, 1000])).filter(
        lambda p: p.num_train_timesteps > 1
    ),
    st.builds(Interpolant, curve=st.sampled_from(Curve)),
)
FORMULAS = st.one_of(
    st.builds(Karras, rho=st.floats(1, 12)),
    st.builds(Polyexponential, rho=st.floats(0.5, 3)),
    st.builds(Beta, alpha=st.floats(0.3, 3), beta=st.floats(0.3, 3)),
)
COUNTS = st.integers(1, 200)


def check(path: Path, schedule: Spacing | Schedule, steps: int) -> np.ndarray:
    """What every schedule promises; returns the noise levels."""
    visited = timesteps(path, steps, schedule)
    assert visited.shape == (steps,)
    assert visited.dtype == np.float64
    levels = noise_levels(path, visited)
    low, high = level_range(path)
    assert np.all(np.diff(levels) < 0)
    assert levels[-1] >= low * (1 - 1e-9)
    assert levels[0] <= high * (1 + 1e-9)
    return levels


# ---------------------------------------------------------------------------------------------------- properties


@settings(max_examples=40)
@given(path=DISCRETE, steps=COUNTS, spacing=st.sampled_from(["trailing", "leading", "linspace", "simple"]))
def test_discrete_spacings_visit_distinct_training_timesteps(path: VP, steps: int, spacing: str) -> None:
    assume(steps <= path.num_train_timesteps)
    visited = timesteps(path, steps, Spacing(spacing))
    check(path, Spacing(spacing), steps)
    assert np.array_equal(visited, np.round(visited))
    assert 0 <= visited[-1] <= visited[0] <= path.num_train_timesteps - 1


@settings(max_examples=40)
@given(path=RANGED, steps=COUNTS, schedule=FORMULAS)
def test_formulas_in_the_noise_level_decrease_from_the_noisiest_to_the_cleanest(
    path: Path, steps: int, schedule: Schedule
) -> None:
    levels = check(path, schedule, steps)
    low, high = level_range(path)
    assert levels[0] == pytest.approx(high, rel=1e-9)
    if steps > 1:
        assert levels[-1] == pytest.approx(low, rel=1e-6)


@settings(max_examples=40)
@given(steps=COUNTS, shift=st.floats(0.1, 20), curve=st.sampled_from(Curve), end=st.none() | st.floats(1e-3, 0.5))
def test_flows_start_at_noise_and_shift_towards_it(steps: int, shift: float, curve: Curve, end: float | None) -> None:
    for path in (LinearFlow(), Interpolant(curve=curve)):
        visited = timesteps(path, steps, Flow(shift=shift, end=end))
        assert visited[0] == path.first_timestep
        levels = noise_levels(path, visited)
        assert np.all(np.diff(levels) < 0)
        assert levels[-1] > 0
        if shift >= 1:
            assert np.all(levels >= noise_levels(path, timesteps(path, steps, Flow(end=end))) - 1e-12)


@settings(max_examples=40)
@given(path=RANGED, steps=COUNTS)
def test_auto_fits_every_path(path: Path, steps: int) -> None:
    levels = noise_levels(path, timesteps(path, steps))
    assert np.all(np.diff(levels) < 0)
    assert levels[0] == pytest.approx(level_range(path)[1], rel=1e-12)


@settings(max_examples=40)
@given(path=RANGED, levels=st.lists(st.floats(0.03, 0.9), min_size=1, max_size=30, unique=True))
def test_sigmas_of_ones_own_are_the_levels_visited(path: Path, levels: list[float]) -> None:
    low, high = level_range(path)
    wanted = sorted((low + (high - low) * level for level in levels), reverse=True)
    assume(np.all(np.diff(wanted) < -1e-9))
    for given_sigmas in (wanted, [*wanted, 0.0]):
        visited = noise_levels(path, timesteps(path, len(wanted), Sigmas(given_sigmas)))
        assert np.allclose(visited, wanted, rtol=1e-9)


@settings(max_examples=40)
@given(steps=st.integers(1, 50), trained=st.sampled_from([50, 100]))
def test_distilled_timesteps_belong_to_the_teachers_grid(steps: int, trained: int) -> None:
    visited = timesteps(VP(), steps, Distilled(original_inference_steps=trained))
    assert visited[0] == 999
    assert set(visited) <= set(np.arange(1, trained + 1) * (1000 // trained) - 1.0)


@settings(max_examples=15)
@given(
    p=st.lists(st.sampled_from([0.0, 1.0]) | st.floats(1e-9, 1 - 1e-9), min_size=1, max_size=10),
    a=st.floats(0.1, 20),
    b=st.floats(0.1, 20),
)
def test_the_beta_quantile_is_scipys(p: list[float], a: float, b: float) -> None:
    x = beta_quantile(p, a, b)
    expected = stats.beta.ppf(p, a, b)
    # Where the distribution is steep, x is as good as the probability it stands for.
    close = np.abs(x - expected) < 1e-8
    assert np.all(close | (np.abs(stats.beta.cdf(x, a, b) - np.asarray(p)) < 1e-12))


# ------------------------------------------------------------------------------------------------ known numbers


def test_spacings_are_those_of_the_table_they_are_named_after() -> None:
    # Lin et al. 2024, arXiv:2305.08891, table 2, for T = 1000 and N = 10, timesteps counted from 0.
    assert timesteps(VP(), 10, Trailing()).tolist() == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert timesteps(VP(), 10, Leading()).tolist() == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert timesteps(VP(), 10, Leading(steps_offset=1)).tolist() == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert timesteps(VP(), 10, Linspace()).tolist() == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert timesteps(VP(), 4, Simple()).tolist() == [999, 749, 499, 249]
    assert timesteps(LinearFlow(), 4, Simple()).tolist() == [1000, 750, 500, 250]
    assert timesteps(VP(), 4, Distilled()).tolist() == [999, 759, 499, 259]


def test_a_flow_that_is_told_s_itself_visits_the_same_noise_as_one_that_counts_to_1000() -> None:
    counted, told = (timesteps(LinearFlow(num_train_timesteps=n), 8, Karras()) for n in (1000, 1))
    assert told == pytest.approx(counted / 1000)
    assert counted[0] > counted[-1]


def test_karras_is_equation_five() -> None:
    levels = noise_levels(EDM(), timesteps(EDM(), 18, Karras()))
    assert levels[:3] == pytest.approx([80.0, 57.5860, 40.7856], rel=1e-5)  # Karras et al. 2022, N = 18
    narrowed = noise_levels(EDM(), timesteps(EDM(), 5, Karras(sigma_min=0.03, sigma_max=10, rho=3)))
    assert narrowed[[0, -1]] == pytest.approx([10, 0.03])
    assert np.allclose(np.diff(narrowed ** (1 / 3), 2), 0, atol=1e-12)


def test_exponential_has_equal_steps_in_log_snr() -> None:
    levels = noise_levels(VP(), timesteps(VP(), 12, Spacing.EXPONENTIAL))
    assert np.allclose(np.diff(np.log(levels), 2), 0, atol=1e-9)
    squared = np.log(noise_levels(VP(), timesteps(VP(), 12, Polyexponential(rho=2))))
    assert np.allclose(np.diff(squared, 3), 0, atol=1e-9)


def test_flow_shift_is_esser_equation_23() -> None:
    assert timesteps(LinearFlow(), 4, Flow(shift=3)) / 1000 == pytest.approx([1, 0.9, 0.75, 0.5])
    assert 1 - timesteps(Interpolant(), 4, Flow(shift=3)) == pytest.approx([1, 0.9, 0.75, 0.5])


def test_dynamic_shift_is_flux_s_line_between_two_resolutions() -> None:
    assert Flow.dynamic(256).shift == pytest.approx(math.exp(0.5))
    assert Flow.dynamic(4096).shift == pytest.approx(math.exp(1.15))
    assert Flow.dynamic((256 + 4096) // 2).shift == pytest.approx(math.exp(0.825))


def test_align_your_steps_keeps_its_list_and_interpolates_it() -> None:
    listed = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029]
    path = VP(schedule=BetaSchedule.SCALED_LINEAR, beta_start=0.00085, beta_end=0.012)
    ten = noise_levels(path, timesteps(path, 10, AlignYourSteps(listed)))
    assert ten == pytest.approx(listed[:-1], rel=1e-4)
    twenty = noise_levels(path, timesteps(path, 20, AlignYourSteps(listed)))
    assert twenty[::2] == pytest.approx(ten, rel=1e-9)
    assert twenty[3] == pytest.approx(math.sqrt(ten[1] * ten[2]), rel=1e-9)


def test_timesteps_of_ones_own_are_visited_as_they_are() -> None:
    assert timesteps(VP(), 3, Timesteps([998.5, 400, 0])).tolist() == [998.5, 400, 0]
    assert timesteps(Interpolant(), 2, Timesteps([0.0, 0.7])).tolist() == [0.0, 0.7]


# ---------------------------------------------------------------------------------------------- zero terminal SNR


@settings(max_examples=40)
@given(schedule=st.sampled_from(BetaSchedule), total=st.integers(3, 1000))
def test_zero_terminal_snr_ends_in_pure_noise_and_leaves_the_first_timestep(schedule: BetaSchedule, total: int) -> None:
    plain = VP(schedule=schedule, num_train_timesteps=total)
    path = VP(schedule=schedule, num_train_timesteps=total, zero_terminal_snr=True)
    every = np.arange(total)
    alpha, sigma = path.alpha_sigma(every)
    assert (alpha[-1], sigma[-1]) == (0, 1)
    assert alpha[0] == pytest.approx(plain.alpha_sigma(0)[0], rel=1e-12)
    assert np.allclose(alpha**2, path.alphas_cumprod, atol=1e-14)
    assert np.allclose(alpha**2 + sigma**2, 1)
    assert np.all(np.diff(alpha) < 0)
    assert path_from_json(path.to_json()) == path


@settings(max_examples=40)
@given(
    schedule=st.sampled_from(BetaSchedule),
    zero=st.booleans(),
    at=st.lists(st.floats(0, 999), min_size=1, max_size=20),
)
def test_a_discrete_path_is_inverted_between_its_timesteps_too(
    schedule: BetaSchedule, zero: bool, at: list[float]
) -> None:
    path = VP(schedule=schedule, zero_terminal_snr=zero)
    alpha, sigma = path.alpha_sigma(at)
    with np.errstate(divide="ignore"):
        assert np.allclose(path.timestep_of(sigma / alpha), at, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "path, schedule, steps, message",
    [
        (VP(), Trailing(), 0, "number of steps"),
        (VP(), Trailing(), -3, "number of steps"),
        (VP(), Trailing(), MAX_STEPS + 1, "number of steps"),
        (VP(num_train_timesteps=10), Trailing(), 11, "at most 10"),
        (VP(), Spacing.LINEAR, 10, "use 'trailing'"),
        (EDM(), Trailing(), 10, "use 'karras'"),
        (LinearFlow(), Leading(), 10, "use 'linear'"),
        (VP(), Leading(steps_offset=-1), 10, "steps_offset"),
        (VP(), Leading(steps_offset=101), 10, "steps_offset"),
        (VP(), Distilled(), 51, "too few"),
        (VP(zero_terminal_snr=True), Karras(), 10, "infinite"),
        (EDM(), Karras(sigma_min=3, sigma_max=2), 10, "sigma_min < sigma_max"),
        (EDM(), Sigmas([1.0, 2.0]), 2, "strictly decreasing"),
        (EDM(), Sigmas([2.0, 2.0]), 2, "strictly decreasing"),
        (EDM(), Sigmas([2.0, 1.0]), 3, "expected 3"),
        (EDM(), Sigmas([100.0, 1.0]), 2, r"must lie in \(0, 80\]"),
        (EDM(), Sigmas([1.0, -1.0]), 2, "must lie in"),
        (EDM(), Sigmas([1.0, float("nan")]), 2, "must lie in"),
        (EDM(), Sigmas([1.0, 0.0, 0.0]), 2, "must lie in"),
        (VP(), Sigmas([10.0, 0.001]), 2, "noise levels end at"),
        (VP(), Timesteps([1200, 100]), 2, "between 999 and 0"),
        (VP(), Timesteps([100, -1]), 2, "between 999 and 0"),
        (VP(), Timesteps([100, 200]), 2, "strictly decreasing"),
        (Interpolant(), Timesteps([0.5, 0.2]), 2, "strictly decreasing"),
        (EDM(), AlignYourSteps([1.0]), 2, "at least two"),
        (EDM(), AlignYourSteps([1.0, 3.0]), 2, "strictly decreasing"),
        (VP(), Beta(alpha=0.0), 10, "Beta distribution"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(
    path: Path, schedule: Spacing | Schedule, steps: int, message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        timesteps(path, steps, schedule)


@pytest.mark.parametrize("shift", [0.0, -1.0, float("inf"), float("nan")])
def test_a_shift_that_is_not_positive_is_refused(shift: float) -> None:
    with pytest.raises(InvalidInput, match="shift must be positive"):
        Flow(shift=shift)


def test_a_flow_that_ends_nowhere_is_refused() -> None:
    with pytest.raises(InvalidInput, match="end must lie"):
        Flow(end=1.0)
    with pytest.raises(InvalidInput, match="sequence_length"):
        Flow.dynamic(0)


def test_zero_terminal_snr_needs_timesteps_to_stretch() -> None:
    with pytest.raises(InvalidInput, match="at least 3"):
        VP(num_train_timesteps=2, zero_terminal_snr=True)
