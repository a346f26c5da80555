"""The clock. What is tested is what is called how often and in which order, never how fast."""

import gc

import pytest
import torch

from vitarium.benchmarks import timer


def test_candidates_take_turns_and_every_sample_is_kept(monkeypatch):
    calls = []
    monkeypatch.setattr(timer, "SAMPLE_SECONDS", 0.0)  # one call per sample...
    monkeypatch.setattr(timer, "SETTLE_SECONDS", 0.0)  # ... and none before it
    samples = timer.interleave(
        {name: lambda name=name: calls.append(name) for name in "abc"},
        min_rounds=4,
        max_rounds=4,
    )
    assert {name: (len(s["wall"]), len(s["cpu"])) for name, s in samples.items()} == dict.fromkeys(
        "abc", (4, 4)
    )
    assert "".join(calls).endswith("abcbcacababc")
    assert all(value >= 0 for s in samples.values() for clock in s.values() for value in clock)


def test_short_calls_are_repeated_within_a_sample():
    count = 0

    def call():
        nonlocal count
        count += 1

    timer.interleave({"short": call}, min_rounds=3, max_rounds=3)
    assert count > 100  # a call takes far less than the millisecond of a sample


def test_rounds_end_with_the_time_given():
    samples = timer.interleave({"a": lambda: None}, min_rounds=2, max_rounds=10**6, seconds=0.0)
    assert len(samples["a"]["wall"]) == 2


def test_warm_up_goes_on_while_runs_get_faster(monkeypatch):
    now, durations = 0.0, iter([9.0, 5.0, 1.0, 1.0, 2.0, 1.0, 0.1])

    def run():
        nonlocal now
        now += next(durations)

    monkeypatch.setattr(timer.time, "perf_counter", lambda: now)
    monkeypatch.setattr(timer, "WARM_UP_SECONDS", 100.0)
    assert timer._warm_up(run, lambda: None) == 1.0
    assert next(durations) == 0.1  # three runs in a row brought nothing, the seventh was not made


def test_threads_and_garbage_collector_are_as_before():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), timer.torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        timer.interleave({"broken": lambda: 1 // 0}, min_rounds=1, max_rounds=1)
    assert torch.get_num_threads() == before
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: timer.interleave({}), "candidates is empty"),
        (lambda: timer.interleave({"a": int}, min_rounds=3, max_rounds=2), "min_rounds=3"),
        (lambda: timer.torch_threads(0).__enter__(), "threads=0 must be at least 1"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_cuda_events(cuda_graphs):
    x = torch.randn(64, 64, device="cuda")
    samples = timer.interleave(
        {"product": lambda: x @ x, "sum": lambda: x + x},
        device="cuda",
        min_rounds=3,
        max_rounds=3,
        flush_cache=True,
        cuda_graphs=cuda_graphs,
    )
    assert all(len(s["cuda"]) == 3 and min(s["cuda"]) > 0 for s in samples.values())
