"""Who owns device memory, and in which order work is done: what the fake device forgives nobody."""

from __future__ import annotations

import numpy as np
import pytest
from fake_device import FakeDevice, Misuse, collecting
from hypothesis import given
from hypothesis import strategies as st

from lehr.runtime.device import CaptureImpossible, Staging, Stream, stacked
from lehr.runtime.errors import RunFailed


@pytest.fixture
def stream():
    with collecting():
        made = Stream(FakeDevice())
        yield made
    made.close()
    made.device.close()


@given(st.lists(st.integers(0, 5), max_size=4), st.sampled_from(["float32", "float64", "int64", "float16", "bool"]))
def test_an_array_comes_back_as_it_was_put(shape, kind):
    stream = Stream(FakeDevice())
    array = np.random.default_rng(0).standard_normal(shape).astype(kind)
    np.testing.assert_array_equal(stream.download(stream.put(array)), array)
    stream.close()
    stream.device.close()


def test_memory_is_given_back_when_the_last_array_in_it_goes(stream):
    whole = stream.put(np.arange(12, dtype=np.float32).reshape(3, 4))
    row = whole.row(1)
    del whole
    np.testing.assert_array_equal(stream.download(row), [4, 5, 6, 7])
    assert stream.device.memory
    del row
    assert not stream.device.memory


def test_a_host_array_may_be_forgotten_before_it_was_copied(stream):
    array = stream.put(np.arange(1000, dtype=np.float32) * 2)
    np.testing.assert_array_equal(stream.download(array), np.arange(1000) * 2)


def test_rows_are_stacked_on_the_device_without_waiting(stream):
    rows = [stream.put(np.full(3, k, np.float16)) for k in range(4)]
    whole = stacked([rows[2], rows[0], rows[2]])
    assert "synchronize" not in stream.device.log
    np.testing.assert_array_equal(stream.download(whole), np.array([2, 0, 2])[:, None].repeat(3, 1))
    assert stacked(rows[1:2]).address == rows[1].address


def test_an_array_of_another_size_is_refused(stream):
    target = stream.empty((4,), np.float32)
    for action in (
        lambda: stream.upload(target, np.zeros(5, np.float32)),
        lambda: stream.copy(target, stream.empty((5,), np.float32)),
        lambda: Staging(stream, 16).upload(target, np.zeros(5, np.float32)),
    ):
        with pytest.raises(RunFailed, match="does not fit"):
            action()


def test_scratch_memory_is_shared_and_grows_while_who_uses_the_smaller_one_keeps_it(stream):
    small = stream.workspace(100)
    assert stream.workspace(50) is small
    large = stream.workspace(200)
    assert large.size == 200
    assert {small.address, large.address} <= set(stream.device.memory)
    del small
    assert len(stream.device.memory) == 1


def test_a_staged_array_is_the_callers_at_once_and_a_place_is_used_again_only_when_its_copy_is_done(stream):
    staging, targets = Staging(stream, 16), [stream.empty((4,), np.float32) for _ in range(9)]
    array = np.zeros(4, np.float32)
    for k, target in enumerate(targets):
        array[:] = k
        staging.upload(target, array)
    assert "synchronize" not in stream.device.log
    assert [float(stream.download(target)[0]) for target in targets] == list(range(9))


def test_a_graph_does_its_work_at_every_launch_and_none_when_it_is_captured(stream):
    source, target = stream.put(np.ones(3, np.float32)), stream.put(np.zeros(3, np.float32))
    with stream.capture() as graph:
        stream.copy(target, source)
    np.testing.assert_array_equal(stream.download(target), 0)
    graph.launch()
    np.testing.assert_array_equal(stream.download(target), 1)


def test_memory_that_goes_out_of_use_during_a_capture_is_given_back_after_it(stream):
    array, target = stream.put(np.ones(3, np.float32)), stream.put(np.zeros(3, np.float32))
    stray = stream.empty((3,), np.float32)
    with stream.capture() as graph:
        del stray
        stream.copy(target, array)
        assert len(stream.device.memory) == 3
    assert len(stream.device.memory) == 2
    graph.launch()


def test_a_capture_that_fails_leaves_a_stream_that_works(stream):
    class Stop(Exception):
        pass

    with pytest.raises(Stop), stream.capture():
        raise Stop
    assert not stream.device.graphs
    stream.device.refuses_capture = True
    with pytest.raises(CaptureImpossible), stream.capture():
        pass
    with pytest.raises(Stop), stream.capture():
        raise Stop
    np.testing.assert_array_equal(stream.download(stream.put(np.ones(2))), 1)


def test_a_graph_is_not_launched_before_it_is_captured(stream):
    with pytest.raises(RunFailed, match="before its capture has ended"), stream.capture() as graph:
        graph.launch()


# ------------------------------------------------------------------------------------------- the fake's own rules


def test_the_fake_device_sees_what_a_real_one_would_not(stream):
    device = stream.device
    address = device.allocate(8)
    for misuse, words in (
        (lambda: device.view(address, 2, np.float32, writes=False), "nobody has written"),
        (lambda: device.view(address, 3, np.float32, writes=True), "bytes are touched"),
        (lambda: device.view(17, 1, np.float32, writes=False), "belongs to nothing"),
        (device.close, "never given back"),
    ):
        with pytest.raises(Misuse, match=words):
            misuse()
    device.free(address)
    with pytest.raises(Misuse, match="after it was given back"):
        device.view(address, 1, np.float32, writes=False)
    with pytest.raises(Misuse, match="twice"):
        device.free(address)
    with stream.capture():
        for forbidden in (lambda: device.allocate(1), lambda: device.synchronize(stream.handle)):
            with pytest.raises(Misuse, match="during a capture"):
                forbidden()
