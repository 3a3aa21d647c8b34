"""A loop on the device draws the samples of the loop on the host, bit by bit, and leaves nothing behind."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
from device_toy import SPEC, Machine, device_denoiser, engine, host_denoiser, machine
from fake_device import Misuse, collecting
from fake_tensorrt_runtime import NumpyEngine
from hypothesis import given, settings
from hypothesis import strategies as st

from lehr.runtime import engine as engines
from lehr.runtime import loop as host_loop
from lehr.runtime.bundle import Bundle
from lehr.runtime.device_loop import Capture, DeviceLoop, LoopFeeds
from lehr.runtime.errors import InvalidInput, RunFailed
from lehr.runtime.golden import Trajectory
from lehr.runtime.guidance.setting import Guidance, Projection
from lehr.runtime.hoisted import Residency, hoisted_denoiser, load_denoiser
from lehr.runtime.paths import VP, LinearFlow
from lehr.runtime.pipeline import Pipeline
from lehr.runtime.prediction import Prediction, PredictionKind
from lehr.runtime.request import Request
from lehr.runtime.solver_table import SolverTable
from lehr.runtime.solvers import samplers, solver_table
from lehr.runtime.table_ops import Clip, DynamicThreshold, LearnedVariance
from lehr.runtime.table_program import obstacle, table_program
from lehr.runtime.verify import replay

EPSILON = Prediction(kind=PredictionKind.EPSILON)
SHAPE = (2, 2, 3, 3)


def network(feeds):
    scale = np.cos(feeds["t"] / 300).reshape(-1, 1, 1, 1)
    return {"y": (np.tanh(feeds["x"]) * scale + 0.1 * feeds["x"]).astype(np.float32)}


def toy(**options) -> NumpyEngine:
    shape = (-1, *SHAPE[1:])
    fixed = {"inputs": {"x": ("float32", shape), "t": ("float32", (-1,))}, "outputs": {"y": ("float32", shape)}}
    return NumpyEngine(**{**fixed, "function": network, **options})


@pytest.fixture
def on():
    with collecting():
        made = Machine(e=toy())
        yield made
    made.close()


def noise(j: int) -> np.ndarray:
    return np.random.default_rng(100 + j).standard_normal(SHAPE).astype(np.float32)


def start(table: SolverTable) -> np.ndarray:
    x_T = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    return x_T * np.float32(table.init_noise_sigma)


def on_host(table: SolverTable) -> np.ndarray:
    def evaluate(sample, timestep):
        return network({"x": sample, "t": np.full(len(sample), timestep, np.float32)})["y"]

    return host_loop.sample(evaluate, table, start(table), injected=noise)


def timesteps(on: Machine, table: SolverTable) -> LoopFeeds:
    rows = on.stream.put(np.repeat(table.timesteps[:, None], SHAPE[0], axis=1).astype(np.float32))
    return LoopFeeds(gathered={"t": [[rows.row(i)] for i in range(len(table))]}, fixed={})


def on_device(on: Machine, table: SolverTable, *, runs: int = 1, capture: Capture = Capture.AUTO) -> list[np.ndarray]:
    loop = DeviceLoop(on.session("e"), table, SHAPE, sample="x", output="y", capture=capture)
    feeds = {False: timesteps(on, table)}
    return [loop.run(start(table), feeds, injected=noise) for _ in range(runs)]


# --------------------------------------------------------------------------------------------------- any table


@pytest.mark.parametrize("capture", Capture)
@pytest.mark.parametrize("sampler", samplers())
def test_every_sampler_draws_what_it_draws_on_the_host(on, sampler, capture):
    path, kind = (LinearFlow(), PredictionKind.FLOW_PREDICTION) if "flow" in sampler else (VP(), EPSILON.kind)
    table = solver_table(sampler, path, Prediction(kind=kind), 6)
    expected = on_host(table)
    for drawn in on_device(on, table, runs=3, capture=capture):
        np.testing.assert_array_equal(drawn, expected)


@st.composite
def tables(draw) -> SolverTable:
    """Any table without what needs the host: as a rule dense, clipped or not, with noises used in several rows."""
    n, m = draw(st.integers(1, 7)), draw(st.integers(0, 4))
    values = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def bank(rows: int, columns: int, diagonal: int) -> np.ndarray:
        kept = values.random((rows, columns)) < draw(st.sampled_from([0.4, 1.0]))
        return np.tril(values.standard_normal((rows, columns)) * kept, diagonal)

    clipped = bank(n + 1, n, -1) if draw(st.booleans()) else None
    return SolverTable(
        sampler="any",
        prediction=EPSILON,
        timesteps=np.linspace(900, 1, n),
        alphas=np.linspace(0.1, 1, n),
        sigmas=np.linspace(1, 0.1, n),
        start=values.standard_normal(n + 1),
        outputs=bank(n + 1, n, -1),
        noises=values.standard_normal((n + 1, m)) * (values.random((n + 1, m)) < 0.5),
        clipped=clipped,
        clip=None if clipped is None else Clip(limit=0.7),
        variance=draw(st.sampled_from([None, LearnedVariance.UNUSED])),
        denoised_from_input=values.standard_normal(n) * (values.random(n) < 0.8),
        denoised_from_output=values.standard_normal(n) * (values.random(n) < 0.8),
    )


@given(table=tables(), capture=st.sampled_from(list(Capture)))
@settings(max_examples=60)
def test_any_table_draws_what_it_draws_on_the_host(table, capture):
    wide = table.variance is not None

    def doubled(feeds):
        y = network(feeds)["y"]
        return {"y": np.concatenate([y, y + 5], axis=1) if wide else y}

    shape = (-1, SHAPE[1] * (1 + wide), *SHAPE[2:])
    on = Machine(e=toy(function=doubled, outputs={"y": ("float32", shape)}))

    def evaluate(sample, timestep):
        return doubled({"x": sample, "t": np.full(len(sample), timestep, np.float32)})["y"]

    expected = host_loop.sample(evaluate, table, start(table), injected=noise)
    for drawn in on_device(on, table, runs=2, capture=capture):
        np.testing.assert_array_equal(drawn, expected)
    on.close()


@pytest.mark.parametrize("steps", [4, 40])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "unipc", "pndm", "ddpm"])
def test_a_program_needs_no_more_places_than_the_loop_keeps_latents(sampler, steps):
    table = solver_table(sampler, VP(), EPSILON, steps)
    program, form = table_program(table), table.recurrence()
    assert form is not None
    assert program.slots <= form.depth + 3  # x_T, and what a row makes beside what it reads
    assert program.ring <= 1


def test_what_is_not_linear_is_left_to_the_host():
    table = solver_table("ddpm", VP(), EPSILON, 4)
    banks = {name: np.zeros_like(table.outputs) for name in ("clipped",)}
    threshold = {**vars_of(table), **banks, "clip": DynamicThreshold()}
    learned = {**vars_of(table), "variance": LearnedVariance.LOG_RANGE, "variance_slopes": np.ones(table.num_noises)}
    learned["noises"] = np.array(table.noises)
    assert obstacle(table) is None
    assert "threshold" in str(obstacle(SolverTable(**threshold)))
    assert "variance" in str(obstacle(SolverTable(**learned)))


def vars_of(table: SolverTable) -> dict:
    from dataclasses import fields

    return {item.name: getattr(table, item.name) for item in fields(table)}


# ------------------------------------------------------------------------------------------------------ graphs


def test_after_two_evaluations_every_step_is_one_graph_and_nothing_waits(on):
    table = solver_table("ddim", VP(), EPSILON, 20)
    loop = DeviceLoop(on.session("e"), table, SHAPE, sample="x", output="y")
    feeds = {False: timesteps(on, table)}
    loop.run(start(table), feeds)
    on.device.log.clear()
    loop.run(start(table), feeds)
    graphs = [k for k, line in enumerate(on.device.log) if line.startswith("graph")]
    assert len(graphs) == 20
    assert not [line for line in on.device.log[graphs[0] : graphs[-1] + 1] if not line.startswith("graph")]
    assert on.device.log.count("synchronize") == 1


def test_a_short_loop_becomes_one_graph_as_a_whole(on):
    table = solver_table("ddim", VP(), EPSILON, 4)
    loop = DeviceLoop(on.session("e"), table, SHAPE, sample="x", output="y")
    feeds = {False: timesteps(on, table)}
    for _ in range(2):
        loop.run(start(table), feeds)
    on.device.log.clear()
    drawn = loop.run(start(table), feeds)
    assert [line for line in on.device.log if line.startswith("graph")] == ["graph of 21"]
    np.testing.assert_array_equal(drawn, on_host(table))


def test_noise_is_uploaded_between_the_steps_without_waiting_for_the_device(on):
    table = solver_table("ddpm", VP(), EPSILON, 12)
    loop = DeviceLoop(on.session("e"), table, SHAPE, sample="x", output="y")
    feeds = {False: timesteps(on, table)}
    loop.run(start(table), feeds, injected=noise)
    on.device.log.clear()
    loop.run(start(table), feeds, injected=noise)
    assert on.device.log.count("synchronize") == 1
    assert sum(line.startswith("graph") for line in on.device.log) == 12


def test_a_device_that_cannot_capture_runs_without_graphs_and_says_so(on):
    on.device.refuses_capture = True
    table = solver_table("ddim", VP(), EPSILON, 4)
    with pytest.warns(RuntimeWarning, match="without a CUDA graph.*not permitted"):
        drawn = on_device(on, table, runs=2)
    np.testing.assert_array_equal(drawn, [on_host(table)] * 2)
    assert not on.device.graphs


def test_an_engine_that_cannot_be_captured_runs_without_graphs_and_says_so():
    on = Machine("tensorrt_rtx 1.7.1", e=toy(capturable=False))
    table = solver_table("ddim", VP(), EPSILON, 4)
    with pytest.warns(RuntimeWarning, match="cannot be captured"):
        (drawn,) = on_device(on, table)
    np.testing.assert_array_equal(drawn, on_host(table))
    on.close()


def test_a_replay_that_computes_something_else_is_an_error():
    calls = []

    def drifting(feeds):
        calls.append(1)
        return {"y": network(feeds)["y"] * len(calls)}

    on = Machine(e=toy(function=drifting))
    with pytest.raises(RunFailed, match="another result when its CUDA graph is replayed"):
        on_device(on, solver_table("ddim", VP(), EPSILON, 4))
    on.close()


def test_a_replay_that_computes_nothing_is_an_error(on, monkeypatch):
    monkeypatch.setattr(on.device, "launch_graph", lambda graph, stream: None)
    with pytest.raises(RunFailed, match="another result"):
        on_device(on, solver_table("ddim", VP(), EPSILON, 4))


def test_a_graph_whose_memory_is_gone_is_seen_by_the_fake_device(on):
    array, other = on.stream.put(np.ones(4, np.float32)), on.stream.empty((4,), np.float32)
    with on.stream.capture() as graph:
        on.stream.copy(other, array)
    del array
    graph.launch()
    with pytest.raises(Misuse, match="after it was given back"):
        on.stream.synchronize()
    on.device.queues[on.stream.handle].clear()


# ---------------------------------------------------------------------------------------------------- pipelines


def draw(denoiser, request: Request, **options) -> np.ndarray:
    return Pipeline(denoiser)(request, **options)


REQUESTS = {
    "plain": Request(num=5, batch=2, class_labels=[1, 3], num_inference_steps=5),
    "guided": Request(num=4, batch=2, class_labels=[1, 3], num_inference_steps=5, guidance_scale=3.0),
    "noisy": Request(num=3, sampler="ddpm", class_labels=[2], num_inference_steps=9, guidance_scale=1.5, seed=4),
    "multistep": Request(num=3, sampler="dpmpp_2m", class_labels=[2, 0], num_inference_steps=9, guidance_scale=2.0),
    "interval": Request(num=2, num_inference_steps=8, guidance_scale=3.0, guidance=Guidance(interval=(0.2, 3.0))),
    "schedule": Request(num=2, num_inference_steps=4, guidance=Guidance(schedule=(1.0, 2.0, 3.0, 1.0))),
    "taller": Request(num=2, num_inference_steps=3, sizes={"height": 7}, guidance_scale=2.0),
    "img2img": Request(num=2, num_inference_steps=6, init=np.full((2, 4, 3), 0.2, np.float32), strength=0.5),
}
ON_HOST = {
    "rescale": Request(num=2, num_inference_steps=4, guidance_scale=3.0, guidance=Guidance(rescale=0.7)),
    "projection": Request(num=2, num_inference_steps=4, guidance_scale=3.0, guidance=Guidance(projection=Projection())),
    "inpainting": Request(
        num=2, num_inference_steps=6, init=np.full((2, 4, 3), 0.2, np.float32), mask=np.eye(4, 3), strength=0.8
    ),
}


@pytest.mark.parametrize("residency", Residency)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", REQUESTS)
def test_a_pipeline_draws_on_the_device_what_it_draws_on_the_host(name, split, residency):
    request = REQUESTS[name]
    expected = draw(host_denoiser(split=split), request)
    on = machine(split=split)
    denoiser = device_denoiser(on, split=split, residency=residency)
    for _ in range(2):
        np.testing.assert_array_equal(draw(denoiser, request), expected)
    assert any(line.startswith("graph") for line in on.device.log)
    del denoiser
    on.close()


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", ON_HOST)
def test_what_needs_the_host_keeps_the_network_and_its_hoisted_tensors_on_the_device(name, split):
    request = ON_HOST[name]
    expected = draw(host_denoiser(split=split), request)
    on = machine(split=split)
    denoiser = device_denoiser(on, split=split)
    np.testing.assert_array_equal(draw(denoiser, request), expected)
    assert not any(line.startswith("graph") for line in on.device.log)
    size = expected.nbytes
    assert {line for line in on.device.log if line.startswith("download")} <= {
        f"download {size}",
        f"download {2 * size}",
    }
    del denoiser
    on.close()


def test_whoever_watches_every_latent_gets_them_from_a_loop_on_the_host():
    on = machine(split=True)
    denoiser = device_denoiser(on, split=True)
    seen, expected = [], []
    request = REQUESTS["guided"]
    draw(host_denoiser(split=True), request, on_step=lambda first, step: expected.append(step.denoised))
    draw(denoiser, request, on_step=lambda first, step: seen.append(step.denoised))
    np.testing.assert_array_equal(seen, expected)
    del denoiser
    on.close()


@pytest.mark.parametrize("on_a_device", [False, True])
def test_progress_counts_every_evaluation_of_every_batch(on_a_device):
    on = machine(split=True)
    denoiser = device_denoiser(on, split=True) if on_a_device else host_denoiser(split=True)
    seen = []
    draw(denoiser, REQUESTS["plain"], on_progress=lambda first, k: seen.append((first, k)))
    assert seen == [(first, k) for first in (0, 2, 4) for k in range(5)]
    del denoiser
    on.close()


def test_other_prompts_reuse_the_graphs_and_are_not_mixed_up():
    on = machine(split=True)
    denoiser, reference = device_denoiser(on, split=True), host_denoiser(split=True)
    for labels in ([0, 1], [2, 3], [1, 1], [0, 1]):
        request = Request(num=2, class_labels=labels, num_inference_steps=12, guidance_scale=2.0)
        np.testing.assert_array_equal(draw(denoiser, request), draw(reference, request))
    assert len(on.device.graphs) == 1
    del denoiser
    on.close()


def test_a_loop_is_reused_for_the_same_table_only():
    on = machine(split=True)
    denoiser, reference = device_denoiser(on, split=True), host_denoiser(split=True)
    plain = solver_table("ddim", VP(), EPSILON, 6)

    def clipped(limit: float) -> SolverTable:
        return replace(plain, clipped=plain.outputs / 2, clip=Clip(limit=limit))

    tables = [plain, solver_table("dpmpp_2m", VP(), EPSILON, 6), clipped(0.3), clipped(0.6), plain]
    drawn = [draw(denoiser, Request(num=1, class_labels=[1], table=table)) for table in tables]
    for table, samples in zip(tables, drawn, strict=True):
        np.testing.assert_array_equal(samples, draw(reference, Request(num=1, class_labels=[1], table=table)))
    assert len({samples.tobytes() for samples in drawn}) == 4
    del denoiser
    on.close()


def test_hoisted_tensors_stay_on_the_device():
    on = machine(split=True)
    denoiser = device_denoiser(on, split=True)
    request = Request(num=2, class_labels=[0, 1], num_inference_steps=12, guidance_scale=2.0)
    draw(denoiser, request)
    on.device.log.clear()
    drawn = draw(denoiser, request)
    assert [line for line in on.device.log if line.startswith("download")] == [f"download {drawn.nbytes}"]
    del denoiser
    on.close()


def test_graphs_of_one_phase_are_in_memory_at_a_time_where_they_are_to_be():
    on = machine(split=True)
    denoiser = device_denoiser(on, split=True, residency=Residency.PHASES)
    for labels in ([0], [1]):
        draw(denoiser, Request(num=1, class_labels=labels, num_inference_steps=3))
    assert on.alive == [("prompt", []), ("schedule", ["prompt"]), ("step", [])] * 2
    del denoiser
    on.close()


def test_cancelling_a_loop_leaves_the_next_one_right():
    class Cancelled(Exception):
        pass

    def cancel(first: int, evaluation: int) -> None:
        if evaluation == 3:
            raise Cancelled

    on = machine(split=True)
    with collecting():
        denoiser, request = device_denoiser(on, split=True), REQUESTS["noisy"]
        with pytest.raises(Cancelled):
            draw(denoiser, request, on_progress=cancel)
        np.testing.assert_array_equal(draw(denoiser, request), draw(host_denoiser(split=True), request))
        del denoiser
    on.close()


def test_a_pipeline_that_is_dropped_gives_its_memory_back_at_once():
    on = machine(split=True)
    before = on.device.in_use
    denoiser = device_denoiser(on, split=True)
    dropped = weakref.ref(denoiser)
    gc.disable()
    try:
        draw(denoiser, REQUESTS["guided"])
        assert on.device.in_use > before
        del denoiser
        assert dropped() is None
        assert on.device.in_use <= before + on.stream.workspace(1).size
    finally:
        gc.enable()
    on.close()


def test_wrong_conditions_are_refused_as_they_are_on_the_host():
    on = machine(split=True)
    denoiser = device_denoiser(on, split=True)
    with pytest.raises(InvalidInput, match="height is 9999"):
        draw(denoiser, Request(num=1, sizes={"height": 9999}))
    assert SPEC.num_classes is not None
    with pytest.raises(InvalidInput, match="out of range"):
        draw(denoiser, Request(num=1, class_labels=[SPEC.num_classes + 5]))
    del denoiser
    on.close()


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_verify_judges_the_loop_on_the_device_and_not_only_the_network(scale, monkeypatch):
    on = machine(split=True)
    denoiser, table = device_denoiser(on, split=True), solver_table("ddpm", VP(), EPSILON, 5)
    labels = {"class_labels": np.array([1, 2])}
    x_T = np.random.default_rng(0).standard_normal((2, 2, 4, 3)).astype(np.float32)
    recorded = Trajectory(
        name="case",
        table=table,
        guidance_scale=scale,
        conditions=labels,
        unconditional={} if scale == 1.0 else {"class_labels": np.full(2, SPEC.null_class)},
        x_T=x_T,
        inputs=np.ones((5, *x_T.shape), np.float32),
        final=x_T,
    )
    expected, drift = replay(host_denoiser(split=True), recorded)
    final, same = replay(denoiser, recorded)
    np.testing.assert_array_equal(final, expected)
    assert same == drift
    monkeypatch.setattr(on.device, "_advance", lambda row: None)  # a loop that stays at its first row
    denoiser.resident.capture = Capture.NONE
    assert not np.allclose(replay(denoiser, recorded)[0], expected)
    del denoiser
    on.close()


# ------------------------------------------------------------------------------------------------ a trained model


def test_a_trained_model_draws_on_the_device_what_its_cpu_engine_draws(dit_bundle):
    bundle = Bundle.open(dit_bundle)
    record, graphs = engines.find(bundle, "cpu", "fp32"), bundle.manifest.graphs
    parts = {name: engine(graphs[name].signature, engines.load(bundle, record, name).run) for name in graphs}
    on, spec = Machine("tensorrt 11.4.0", **parts), bundle.manifest.model
    signatures = {name: graph.signature for name, graph in graphs.items()}
    denoiser = hoisted_denoiser(spec, signatures, on.session, residency=Residency.ALL)
    for sampler in ("dpmpp_2m", "ddpm"):
        request = Request(
            num=3, batch=2, class_labels=[1, 7], sampler=sampler, num_inference_steps=4, guidance_scale=2.0
        )
        expected = draw(load_denoiser(bundle, record), request)
        np.testing.assert_array_equal(draw(denoiser, request), expected)
    assert any(line.startswith("graph") for line in on.device.log)
    del denoiser
    on.close()
