"""The measurement of operators: floors, peers, checks, going on where a file ends."""

import math
import re

import pytest
import torch
from rich.console import Console

from vitarium.benchmarks import bench_operators, print_table, record
from vitarium.benchmarks import candidates as candidates_module
from vitarium.benchmarks import neighborhood as neighborhood_suite
from vitarium.benchmarks.candidates import SUITES, build_candidates, why_not
from vitarium.benchmarks.gather import gather_attention, neighbors
from vitarium.benchmarks.suite import MODES, Peer, Setting, Suite
from vitarium.ops import OPERATORS, Case, neighborhood_attention

CPU = torch.device("cpu")
NAME = "neighborhood_attention"
SHAPE = (2, 14, 7, 2, 16)
SMALL = Case(
    "small", dict.fromkeys(("query", "key", "value"), SHAPE), {"kernel_size": 7, "dilation": 1}
)
QUICK = {"device": "cpu", "min_rounds": 1, "seconds": 0.0, "dtypes": ["float32"]}


@pytest.fixture
def small_suite(monkeypatch):
    """One small case in place of the standard ones."""
    suite = Suite(lambda batch: [SMALL], neighborhood_suite.PEERS, neighborhood_suite.floor)
    monkeypatch.setitem(SUITES, NAME, suite)


def test_standard_cases_are_dinats_layers():
    cases = neighborhood_suite.cases(4)
    assert cases[0].shapes["query"] == (4, 56, 56, 2, 32)
    assert len({case.note for case in cases}) == len(cases) == 7
    for case in cases:  # the floor's products are exact
        batch, height, width, heads, head_dim = case.shapes["query"]
        assert batch * height * width * heads % case.kwargs["kernel_size"] ** 2 == 0
        assert heads * head_dim == 64 * 56 // height


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("spatial", [(9, 14), (17,), (4, 5, 6)])
def test_gathering_is_the_same_function(spatial, dilation):
    generator = torch.Generator().manual_seed(0)
    shape = (2, *spatial, 3, 8)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    expected = neighborhood_attention(q, k, v, 2, dilation=dilation, backend="reference")
    torch.testing.assert_close(gather_attention(q, k, v, 2, dilation), expected)


def test_neighbors_of_a_corner_lie_inside():
    index = neighbors((5, 6), (3, 3), (1, 1), CPU)
    assert index.shape == (30, 9)
    assert sorted(index[0].tolist()) == [0, 1, 2, 6, 7, 8, 12, 13, 14]


SMALL_SETTINGS = [
    pytest.param(name, case, id=f"{name} {case.note}")
    for name, suite in SUITES.items()
    for case in sorted(
        suite.cases(2), key=lambda case: math.prod(next(iter(case.shapes.values())))
    )[:2]
]


@pytest.mark.parametrize(("name", "case"), SMALL_SETTINGS)
def test_peers_compute_the_operator(name, case):
    candidates, refused = build_candidates(Setting(name, case, "float32", "training"), CPU, None)
    assert refused == {}
    assert {"torch", "floor"} < candidates.keys()
    assert {peer for peer, p in SUITES[name].peers.items() if "cpu" in p.devices} <= set(candidates)
    assert len({case.note for case in SUITES[name].cases(1)}) == len(SUITES[name].cases(1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_candidate_is_checked_against_the_definition(small_suite, mode, dtype):
    setting = Setting(NAME, SMALL, dtype, mode)
    candidates, refused = build_candidates(
        setting, CPU, peers=["gather", "sdpa_masked", "sdpa_global"]
    )
    assert refused == {}
    assert {"torch", "gather", "sdpa_masked", "sdpa_global", "floor"} <= candidates.keys()
    assert "reference" not in candidates
    for name, candidate in candidates.items():
        candidate.run()
        if name in ("floor", "sdpa_global"):
            assert candidate.error is None
        else:
            assert 0 <= candidate.error < candidates_module.TOLERANCE[dtype]


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_a_wrong_result_is_not_timed(monkeypatch, mode):
    def wrong(case, device):
        def run(query, key, value):
            output = gather_attention(query, key, value, **case.kwargs).clone()
            output[0, 0, 0, 0, 0] += 0.1 if mode == "forward" else 0.0
            return output if mode == "forward" else output.detach() + 0.0 * output + query * 0.01

        return run

    def broken(case, device):
        raise NotImplementedError("not on this device")

    peers = {"wrong": Peer(wrong, ("cpu",)), "broken": Peer(broken, ("cpu",))}
    monkeypatch.setitem(SUITES, NAME, Suite(lambda batch: [SMALL], peers))
    outcome = bench_operators([NAME], modes=[mode], **QUICK)
    assert {r.implementation for r in outcome.records} == {"torch"}
    text = "\n".join(outcome.refused)
    assert f"{NAME} small float32 {mode}: wrong: wrong result: error" in text
    assert "broken: NotImplementedError: not on this device" in text


def test_the_floor_does_the_multiply_adds_of_the_definition(monkeypatch):
    products = []
    bmm = torch.bmm

    def counting(a, b, *, out):
        products.append(math.prod(a.shape) * b.shape[-1])
        return bmm(a, b, out=out)

    monkeypatch.setattr(torch, "bmm", counting)
    macs_of_one = 2 * 14 * 7 * 2 * 49 * 16
    for mode, number in (("forward", 2), ("backward", 4), ("training", 6)):
        products.clear()
        neighborhood_suite.floor(SMALL, mode, torch.float32, CPU)()
        assert products == [macs_of_one] * number


def test_a_floor_that_cannot_be_exact_is_refused():
    case = Case("odd", {"query": (1, 8, 8, 1, 16)}, {"kernel_size": 7})
    with pytest.raises(ValueError, match="windows of 49 do not divide its queries"):
        neighborhood_suite.floor(case, "forward", torch.float32, CPU)


def test_records_and_going_on(small_suite, tmp_path):
    output = tmp_path / "operators.jsonl"
    first = bench_operators([NAME], modes=["forward"], output=output, **QUICK)
    assert first.remaining == 0 and first.refused == []
    names = [r.implementation for r in first.records]
    assert names[-1] == "floor" and {"torch", "gather", "sdpa_masked"} <= set(names)
    assert record.read(output) == first.records
    r = first.records[0]
    assert (r.clock, r.machine.threads, r.macs) == ("cpu", 1, 14 * 7 * 2 * 49 * 2 * 16)
    assert r.arguments == {"kernel_size": 7, "dilation": 1} and r.peak_memory > 0

    lines = []
    both = bench_operators(
        [NAME],
        modes=["forward", "training"],
        output=output,
        progress=lines.append,
        minutes=0.0,
        **QUICK,
    )
    assert lines == [f"{NAME} small float32 forward: recorded before"]
    assert both.records == first.records and both.remaining == 1
    again = bench_operators([NAME], modes=["forward"], output=output, fresh=True, **QUICK)
    assert len(record.read(output)) == 2 * len(again.records) == 2 * len(first.records)


def test_the_table_sets_the_floor_beside_every_time(small_suite, capsys):
    outcome = bench_operators([NAME], modes=["forward"], **QUICK)
    print_table(outcome.records, Console(width=120))
    text = capsys.readouterr().out
    # A ratio, or that few samples on a busy machine show none; the legend has one "~".
    assert re.search(r" x\d", text) or text.count("~") > 1
    assert "2x14x7x2x16 float32 forward" in text and "process CPU time" in text


def test_operators_without_a_suite_are_measured_on_their_test_cases(monkeypatch):
    monkeypatch.delitem(SUITES, NAME)
    note = OPERATORS[NAME].cases[0].note
    outcome = bench_operators([NAME], modes=["training"], match=note, **QUICK)
    assert {r.implementation for r in outcome.records} == {"torch"} and outcome.refused == []


def test_backends_say_why_they_cannot_run():
    setting = Setting(NAME, SMALL, "float32", "forward")
    assert why_not(setting, "torch", CPU) is None
    wide = Case("wide", dict.fromkeys(SMALL.shapes, (1, 7, 7, 1, 512)), {"kernel_size": 3})
    setting = Setting(NAME, wide, "float32", "forward")
    assert "exceeds 256" in why_not(setting, "triton", CPU)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["neighbourhood_attention"]}, "did you mean neighborhood_attention"),
        ({"dtypes": ["float33"]}, "dtype='float33' is unknown; did you mean float32"),
        ({"modes": ["backwards"]}, "mode='backwards' is unknown; did you mean backward"),
        ({"peers": ["flash"]}, "peer='flash' is unknown"),
        ({"match": "57x57"}, "match='57x57' is in the note of no case"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"threads": 0}, "threads=0 must be at least 1"),
        ({"device": "cuda:77"}, "torch sees"),
        ({"cuda_graphs": True}, "cuda_graphs=True needs a CUDA device"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        bench_operators(**{**QUICK, **arguments})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda(small_suite):
    outcome = bench_operators([NAME], device="cuda", dtypes=["bfloat16"], min_rounds=1, seconds=0.0)
    assert {r.mode for r in outcome.records} == {"forward", "backward"}
    assert {"triton", "torch", "flex", "floor"} <= {r.implementation for r in outcome.records}


@pytest.mark.parametrize("share", [0.5, 0.75, 0.9])
def test_as_many_heads_are_active_as_a_case_says(share):
    case = next(
        case
        for case in SUITES["mixture_of_head_attention"].cases(2)
        if case.note.startswith("40x40") and case.note.endswith(f"active {share:.0%}")
    )
    active = case.draw(torch.Generator().manual_seed(0))["active"]
    heads = active.shape[-1]
    assert active.double().mean().item() == pytest.approx(share, abs=0.01)
    assert set(active.sum(-1).flatten().tolist()) <= {int(share * heads), -int(-share * heads // 1)}


def test_a_peer_that_has_no_use_for_a_tensor_is_timed():
    """Softmax attention beside focused linear attention, which has a temperature."""
    suite = SUITES["linear_attention"]
    case = next(case for case in suite.cases(1) if "temperature" in case.shapes)
    setting = Setting("linear_attention", case, "float32", "training")
    candidates, refused = build_candidates(setting, CPU, ["written", "sdpa"])
    assert refused == {} and candidates["written"].error is not None
    assert candidates["sdpa"].error is None
    *_, unused = candidates["sdpa"].run()
    assert unused is None
