"""Ratios on made-up samples: how often intervals hold, and what is found."""

import dataclasses

import numpy as np
import pytest
from rich.console import Console

from vitarium.benchmarks import compare, record
from vitarium.benchmarks.compare import Ratio, independent_ratio, paired_ratio
from vitarium.benchmarks.record import Machine
from vitarium.benchmarks.report import compared_table, comparison_table

MACHINE = Machine("cpu", "Example CPU", 4, 1, "Linux x86_64")
TRIALS = 30


def _run(draw, median=1.0, rounds=60, noise=0.03, drift=0.0, wander=0.002):
    """Times of a run and its pace: a speed that wanders, noise of its own, a few outliers."""
    speed = np.exp(drift + np.cumsum(draw.normal(scale=wander, size=rounds)))
    samples = median * speed * np.exp(draw.normal(scale=noise, size=rounds))
    samples[draw.random(rounds) < 0.05] *= 3
    pace = 0.02 * speed * np.exp(draw.normal(scale=noise, size=rounds))
    return samples, pace


def _verdicts(slowdown, drift=0.0, paired=False):
    found = []
    for trial in range(TRIALS):
        draw = np.random.default_rng(trial)
        if paired:
            a, b = (_run(draw, median, wander=0.0)[0] for median in (1.0, slowdown))
            common = np.exp(np.cumsum(draw.normal(scale=0.05, size=len(a))))
            found.append(paired_ratio(a * common, b * common).verdict)
        else:
            a, a_pace = _run(draw)
            b, b_pace = _run(draw, slowdown, drift=drift * draw.normal())
            found.append(independent_ratio(a, b, a_pace=a_pace, b_pace=b_pace).verdict)
    return {verdict: found.count(verdict) / TRIALS for verdict in set(found)}


@pytest.mark.parametrize("paired", [False, True])
def test_nothing_is_reported_of_what_did_not_change(paired):
    assert _verdicts(1.0, paired=paired)["no difference shown"] >= 0.95


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(("change", "verdict"), [(1.1, "slower"), (1 / 1.1, "faster")])
def test_ten_per_cent_are_found(paired, change, verdict):
    assert _verdicts(change, paired=paired)[verdict] >= 0.9


def test_a_machine_that_changes_its_pace_between_runs_does_not_mislead():
    assert _verdicts(1.0, drift=0.2)["no difference shown"] >= 0.95


def test_without_a_pace_intervals_are_wider():
    draw = np.random.default_rng(0)
    (a, a_pace), (b, b_pace) = _run(draw), _run(draw)
    known = independent_ratio(a, b, a_pace=a_pace, b_pace=b_pace)
    unknown = independent_ratio(a, b)
    assert known.value == unknown.value == pytest.approx(np.median(b) / np.median(a))
    assert unknown.low < known.low < 1 < known.high < unknown.high


def test_neighbouring_samples_that_are_alike_widen_the_interval():
    draw = np.random.default_rng(0)
    values = np.exp(draw.normal(scale=0.2, size=60))
    alike = np.repeat(values[::4], 4)
    shuffled = draw.permutation(alike)
    flat = np.ones(60)
    wide, narrow = (independent_ratio(x, flat) for x in (alike, shuffled))
    assert wide.high / wide.low > narrow.high / narrow.low


def test_verdicts():
    assert Ratio(1.2, 1.1, 1.3).verdict == "slower"
    assert Ratio(0.8, 0.7, 0.9).verdict == "faster"
    assert Ratio(1.2, 0.9, 1.5).verdict == "no difference shown"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_ratio([1.0], [1.0, 2.0]), "a has 1 samples and b 2"),
        (lambda: paired_ratio([], []), "a must be at least one number"),
        (lambda: independent_ratio([1.0], [0.0]), "b must be at least one number, all above 0"),
        (
            lambda: independent_ratio([1.0], [1.0], a_pace=[1.0, 1.0], b_pace=[1.0]),
            "a_pace has 2 rounds and a 1",
        ),
    ],
)
def test_bad_samples(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def _record(samples, pace=(), **changes):
    fields = {
        "kind": "model",
        "name": "vit",
        "implementation": "eager",
        "mode": "forward",
        "dtype": "float32",
        "shapes": {"input": [1, 3, 64, 64]},
        "arguments": {},
        "series": None,
        **changes,
    }
    samples = {"wall": [2 * s for s in samples], "cpu": list(samples)}
    pace = {"cpu": list(pace)} if len(pace) else {}
    return record.measured(samples=samples, clock="wall", machine=MACHINE, pace=pace, **fields)


def test_records_are_paired_by_setting_and_the_last_counts(capsys):
    draw = np.random.default_rng(0)
    a = [_record(*_run(draw)), _record(*_run(draw), name="old")]
    b = [
        _record(*_run(draw, 9.0)),
        _record(*_run(draw, 1.2)),
        _record(*_run(draw), dtype="bfloat16"),
    ]
    found = compare.compare(a, b)
    ((pair,), only_a, only_b) = (found.pairs, found.only_a, found.only_b)
    assert (pair.a, pair.b) == (a[0], b[1])
    assert pair.ratio.verdict == "slower" and 1.1 < pair.ratio.value < 1.3
    assert (only_a, only_b) == (["old forward"], ["vit forward"])
    Console(width=120).print(comparison_table(found))
    text = capsys.readouterr().out
    assert "slower" in text and f"{pair.ratio.value:.3f}" in text and "only in A: old" in text


def test_what_failed_has_no_ratio(capsys):
    good = _record([1.0, 1.1, 1.2])
    bad = dataclasses.replace(good, samples={}, median=None, p10=None, p90=None, failure="boom")
    (pair,) = compare.compare([good], [bad]).pairs
    assert pair.ratio is None
    Console(width=120).print(comparison_table(compare.compare([good], [bad])))
    assert "failed" in capsys.readouterr().out


def test_records_of_one_series_are_paired_by_round():
    """A common disturbance that dwarfs the difference."""
    draw = np.random.default_rng(0)
    common = np.exp(draw.normal(scale=0.5, size=40))
    a, b = (_record(common * factor, series="one") for factor in (1.0, 1.05))
    assert compare.ratio(a, b).verdict == "slower"
    apart = dataclasses.replace(b, series="other")
    assert compare.ratio(a, apart).verdict == "no difference shown"


def test_a_table_has_no_ratio_where_the_spread_exceeds_the_difference(capsys):
    draw = np.random.default_rng(0)
    noise = [np.exp(draw.normal(scale=0.2, size=20)) for _ in range(3)]
    peers = {"vitarium": 1.0, "alike": 1.02, "apart": 4.0}
    records = [
        _record(factor * noise[i], kind="mixer", implementation=name, case="7x7", series="one")
        for i, (name, factor) in enumerate(peers.items())
    ]
    Console(width=120).print(compared_table(records))
    text = capsys.readouterr().out
    assert " ~" in text and "~: no difference shown" in text
    assert "x0.2" in text


def test_outliers_are_counted():
    calm = [1.0, 1.1, 1.2, 1.1, 1.0, 1.2, 1.1, 1.0, 1.1, 1.2, 1.1, 1.15]
    assert compare.outliers(calm) == 0
    assert compare.outliers([*calm, 9.0]) == 1
