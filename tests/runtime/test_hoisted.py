"""A network in three graphs returns what it returned in one, whoever calls it in whatever order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lehr.runtime import hoisted
from lehr.runtime.denoiser import Denoiser
from lehr.runtime.errors import InvalidInput
from lehr.runtime.guidance import classifier_free, guided
from lehr.runtime.guidance.setting import Guidance
from lehr.runtime.hoisted import HoistedNetwork, Residency, hoisted_denoiser
from lehr.runtime.loop import sample
from lehr.runtime.paths import VP
from lehr.runtime.pipeline import Pipeline
from lehr.runtime.prediction import Prediction, PredictionKind
from lehr.runtime.request import Request
from lehr.runtime.solvers import solver_table
from lehr.runtime.spec import BATCH, Dim, DType, GraphSpec, ModelSpec, TensorSpec, Varies

# A toy with every kind of input: x * (1 + m(t, text, shared)) + k(text) + p(height, width), m and k as a network's
# modulation and cross-attention are.
SIZE = 4
TEXT = TensorSpec(name="text", shape=("batch", 3), varies=Varies.PROMPT)
SHARED = TensorSpec(name="ids", shape=(2,), varies=Varies.PROMPT)
CLASSES = 5
SPEC = ModelSpec(
    name="toy",
    inputs=(
        TensorSpec(name="sample", shape=("batch", 2, "height", SIZE), varies=Varies.SAMPLE),
        TensorSpec(name="timestep", shape=("batch",), varies=Varies.TIMESTEP),
        TensorSpec(name="class_labels", dtype=DType.INT64, shape=("batch",), varies=Varies.PROMPT),
        TEXT,
        SHARED,
    ),
    outputs=(TensorSpec(name="output", shape=("batch", 2, "height", SIZE), varies=Varies.SAMPLE),),
    dims=(BATCH, Dim(name="height", default=SIZE)),
    path=VP(),
    prediction=Prediction(kind=PredictionKind.EPSILON),
    num_classes=CLASSES - 1,
    null_class=CLASSES - 1,
)
TABLE = np.random.default_rng(0).standard_normal((CLASSES, 3)).astype(np.float32)
GRAPHS = {
    "prompt": GraphSpec(
        inputs=(TEXT, TensorSpec(name="sample.shape", dtype=DType.INT64, shape=(4,), varies=Varies.CONSTANT)),
        outputs=(
            TensorSpec(name="k", shape=("batch", 3), varies=Varies.PROMPT),
            TensorSpec(name="positions", shape=("height",), varies=Varies.PROMPT),
        ),
    ),
    "schedule": GraphSpec(
        inputs=(*SPEC.inputs[1:3], SHARED, TensorSpec(name="k", shape=("batch", 3), varies=Varies.PROMPT)),
        outputs=(TensorSpec(name="m", shape=("batch", 1), varies=Varies.TIMESTEP),),
    ),
    "step": GraphSpec(
        inputs=(
            SPEC.inputs[0],
            TensorSpec(name="k", shape=("batch", 3), varies=Varies.PROMPT),
            TensorSpec(name="m", shape=("batch", 1), varies=Varies.TIMESTEP),
            TensorSpec(name="positions", shape=("height",), varies=Varies.PROMPT),
        ),
        outputs=SPEC.outputs,
    ),
}


class Part:
    """One graph in numpy, which counts its calls and rows and checks that it is fed what its signature says."""

    def __init__(self, name: str, log: list[tuple[str, int]]) -> None:
        self.name, self._log = name, log

    def run(self, feeds):
        assert set(feeds) == {tensor.name for tensor in GRAPHS[self.name].inputs}
        result = getattr(self, self.name)(**{name.replace(".", "_"): value for name, value in feeds.items()})
        self._log.append((self.name, len(next(iter(result.values())))))
        return result

    def prompt(self, text, sample_shape):
        assert sample_shape.dtype == np.int64
        assert sample_shape[0] == len(text)
        return {"k": np.tanh(text), "positions": np.sin(np.arange(sample_shape[2], dtype=np.float32))}

    def schedule(self, timestep, class_labels, ids, k):
        m = np.cos(timestep / 100) * TABLE[class_labels].sum(axis=1) + k.sum(axis=1) + ids.sum()
        return {"m": m[:, None].astype(np.float32)}

    def step(self, sample, k, m, positions):
        return {"output": sample * (1 + m[..., None, None]) + k[:, :2, None, None] + positions[:, None]}


def whole(feeds):
    log: list[tuple[str, int]] = []
    shape = np.array(feeds["sample"].shape)
    prompt = Part("prompt", log).run({"text": feeds["text"], "sample.shape": shape})
    named = {name: feeds[name] for name in ("timestep", "class_labels", "ids")}
    schedule = Part("schedule", log).run({**named, "k": prompt["k"]})
    return Part("step", log).run({"sample": feeds["sample"], **prompt, **schedule})


def network(**options) -> tuple[HoistedNetwork, list[tuple[str, int]], list[str]]:
    log: list[tuple[str, int]] = []
    loaded: list[str] = []

    def load(name: str) -> Part:
        loaded.append(name)
        return Part(name, log)

    return HoistedNetwork(SPEC, GRAPHS, load, **options), log, loaded


def feeds(rng, rows, timestep, height=SIZE, ids=(1.0, 2.0)):
    """A batch whose samples bear the conditions ``rows``, numbers of a small pool."""
    pool = np.random.default_rng(7).standard_normal((6, 3)).astype(np.float32)
    return {
        "sample": rng.standard_normal((len(rows), 2, height, SIZE)).astype(np.float32),
        "timestep": np.full(len(rows), timestep, np.float32),
        "class_labels": np.array([row % CLASSES for row in rows]),
        "text": pool[np.array(rows)],
        "ids": np.array(ids, np.float32),
    }


CALLS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 5), min_size=1, max_size=5),  # rows
        st.sampled_from([0.5, 10.0, 999.0]),
        st.sampled_from([2, 4]),  # height
        st.sampled_from([(1.0, 2.0), (3.0, 4.0)]),  # ids, shared by the batch
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=100, deadline=None)
@given(calls=CALLS, announced=st.lists(st.sampled_from([0.5, 10.0, 250.0]), max_size=3), small=st.booleans())
def test_any_sequence_of_calls_is_answered_as_by_the_unsplit_network(calls, announced, small):
    rng = np.random.default_rng(0)
    split, _, _ = network()
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(hoisted, "CACHE_BYTES", 40)
            patch.setattr(hoisted, "MAX_SHARED", 1)
        split.announce(announced)
        for rows, timestep, height, ids in calls:
            given_ = feeds(rng, rows, timestep, height, ids)
            np.testing.assert_array_equal(split(given_)["output"], whole(given_)["output"])


def test_an_announced_schedule_is_computed_at_once_and_only_once_for_each_sample():
    split, log, _ = network()
    split.announce([1.0, 2.0, 3.0])
    rng = np.random.default_rng(0)
    for timestep in (1.0, 2.0, 3.0):
        split(feeds(rng, [0, 1, 0], timestep))
    rows = {name: sum(count for graph, count in log if graph == name) for name in GRAPHS}
    assert rows == {"prompt": 2, "schedule": 6, "step": 9}


def test_conditions_changed_in_place_are_noticed():
    split, _, _ = network()
    given_ = feeds(np.random.default_rng(0), [0, 1], 5.0)
    split(given_)
    given_["text"][1] += 1.0
    np.testing.assert_array_equal(split(given_)["output"], whole(given_)["output"])


def test_only_the_graphs_of_one_phase_are_loaded_at_a_time():
    alive: set[str] = set()
    peak: list[set[str]] = []

    class Tracked(Part):
        def __init__(self, name):
            super().__init__(name, [])
            alive.add(name)
            peak.append(set(alive))

        def __del__(self):
            alive.discard(self.name)

    split = HoistedNetwork(SPEC, GRAPHS, Tracked)
    rng = np.random.default_rng(0)
    for rows in ([0], [1], [0]):  # a prompt, another, and the first again, which is known
        split(feeds(rng, rows, 1.0))
    assert {"step"} in peak
    assert all("step" not in names or len(names) == 1 for names in peak)
    peak.clear()
    stays = HoistedNetwork(SPEC, GRAPHS, Tracked, residency=Residency.ALL)
    for rows in ([0], [1]):
        stays(feeds(rng, rows, 1.0))
    assert peak[-1] == set(GRAPHS)
    assert len(peak) == 3


def test_samples_beyond_the_limit_are_forgotten_oldest_first(monkeypatch):
    monkeypatch.setattr(hoisted, "CACHE_BYTES", 3 * (3 + 1) * 4)  # three samples: k and one timestep's m
    split, log, _ = network()
    rng = np.random.default_rng(0)
    for row in (0, 1, 2, 3):
        split(feeds(rng, [row], 1.0))
    log.clear()
    split(feeds(rng, [3], 1.0))
    split(feeds(rng, [1], 1.0))
    assert [name for name, _ in log] == ["step", "step"]
    split(feeds(rng, [0], 1.0))
    assert log[-2][0] == "schedule"


def denoisers() -> tuple[Denoiser, Denoiser, list[str]]:
    loaded: list[str] = []

    def load(name: str) -> Part:
        loaded.append(name)
        return Part(name, [])

    return Denoiser(SPEC, whole), hoisted_denoiser(SPEC, GRAPHS, load), loaded


def loop(denoiser: Denoiser, guidance: Guidance | None) -> np.ndarray:
    table = solver_table("ddim", SPEC.path, SPEC.prediction, 6)
    rng = np.random.default_rng(3)
    with_ = {name: feeds(rng, [0, 1, 2], 0.0)[name] for name in ("class_labels", "text", "ids")}
    without = {"class_labels": np.full(3, CLASSES - 1), "text": np.zeros((3, 3), np.float32)}
    denoiser.prepare(table.timesteps, (2, SIZE, SIZE), [with_, {**with_, **without}])
    if guidance is None:
        run = classifier_free(denoiser, with_, without, 3.0)
    else:
        run = guided(denoiser, with_, without, table, guidance, default_scale=3.0)
    x_T = np.random.default_rng(4).standard_normal((3, 2, SIZE, SIZE)).astype(np.float32)
    return sample(run, table, x_T)


@pytest.mark.parametrize(
    "guidance",
    [None, Guidance(interval=(0.3, 3.0)), Guidance(schedule=(1.0, 2.0, 4.0, 4.0, 2.0, 1.0))],
    ids=["both halves", "interval", "schedule"],
)
def test_guided_loops_agree_with_the_unsplit_network(guidance):
    one, split, _ = denoisers()
    np.testing.assert_array_equal(loop(split, guidance), loop(one, guidance))


def test_a_pipeline_prepares_all_batches_before_the_first_step():
    _, split, loaded = denoisers()
    texts = np.random.default_rng(1).standard_normal((6, 3)).astype(np.float32)
    conditions = {"class_labels": np.arange(6) % 4, "text": texts, "ids": np.zeros(2, np.float32)}
    request = Request(num=6, batch=2, num_inference_steps=4, guidance_scale=1.0, conditions=conditions)
    Pipeline(split)(request)
    assert loaded == ["prompt", "schedule", "step"]


def test_an_input_called_constant_may_not_change():
    constant = TensorSpec(name="ids", shape=(2,), varies=Varies.CONSTANT)
    spec = ModelSpec(
        name="toy",
        inputs=(*SPEC.inputs[:2], constant),
        outputs=SPEC.outputs,
        dims=SPEC.dims,
        path=VP(),
        prediction=SPEC.prediction,
    )
    denoiser = Denoiser(spec, lambda feeds: {"output": feeds["sample"]})
    x = np.zeros((1, 2, SIZE, SIZE), np.float32)
    denoiser(x, 1.0, {"ids": np.zeros(2, np.float32)})
    denoiser(x, 2.0, {"ids": np.zeros(2, np.float32)})
    with pytest.raises(InvalidInput, match="'ids' is constant"):
        denoiser(x, 3.0, {"ids": np.ones(2, np.float32)})


@pytest.mark.parametrize(("limit", "together"), [(0, False), (1 << 30, True)])
def test_hoisted_graphs_are_released_where_they_are_large(limit, together, dit_bundle, monkeypatch):
    monkeypatch.setattr(hoisted, "RELEASED_ABOVE", limit)
    real, alive, seen = hoisted.engines.load, set(), []

    class Watched:
        def __init__(self, session, name):
            self.session, self.name = session, name
            alive.add(name)
            seen.append(set(alive))

        def run(self, feeds):
            return self.session.run(feeds)

        def __del__(self):
            alive.discard(self.name)

    monkeypatch.setattr(hoisted.engines, "load", lambda b, r, name, **_: Watched(real(b, r, name), name))
    Pipeline.open(dit_bundle)(Request(num=1, num_inference_steps=2))
    assert ({"schedule", "step"} <= seen[-1]) is together
