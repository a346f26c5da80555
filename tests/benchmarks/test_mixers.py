"""Mixers beside timm's modules."""

import re

import pytest
import torch
from rich.console import Console

from vitarium.benchmarks import mixer_peers, print_table, record
from vitarium.benchmarks.mixers import OURS, Contest, bench_mixers, build_contest
from vitarium.ops import MIXERS

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "contest", mixer_peers.CONTESTS, ids=lambda contest: f"{contest.mixer} {contest.note}"
)
def test_every_peer_gives_what_the_mixer_gives(contest):
    modules, refused = build_contest(contest, "float32", CPU)
    assert refused == {}
    assert modules.keys() == {OURS, *contest.peers, *(["floor"] if contest.floor else [])}
    assert contest.peers and contest.mixer in MIXERS
    sizes = {sum(p.numel() for p in module.parameters()) for module in modules.values()}
    assert len(sizes) == 1


def test_records_and_table(tmp_path, capsys):
    output = tmp_path / "mixers.jsonl"
    outcome = bench_mixers(
        ["window"], match="7x7 C 512", batch_size=2, dtypes=["float32"], modes=["forward"],
        device="cpu", min_rounds=1, seconds=0.0, output=output,
    )  # fmt: skip
    assert outcome.refused == []
    assert record.read(output) == outcome.records
    assert [r.implementation for r in outcome.records] == [OURS, "timm_eager", "timm_sdpa"]
    r = outcome.records[0]
    assert (r.kind, r.name, r.shapes) == ("mixer", "window", {"x": [2, 7, 7, 512]})
    print_table(outcome.records, Console(width=140))
    text = capsys.readouterr().out
    # A ratio, or that few samples on a busy machine show none; the legend has one "~".
    assert re.search(r" x\d", text) or text.count("~") > 1
    assert "window 7" in text


def test_a_wrong_peer_is_not_timed(monkeypatch):
    def wrong(mixer, size):
        return torch.nn.Linear(mixer.dim, mixer.dim)

    def failing(mixer, size):
        raise RuntimeError("cannot")

    contest = Contest("x", "window", 32, (8, 8), {"num_heads": 2, "window_size": 4},
                      {"wrong": wrong, "failing": failing})  # fmt: skip
    modules, refused = build_contest(contest, "float32", CPU)
    assert modules.keys() == {OURS}
    assert "wrong result: error" in refused["wrong"]
    assert refused["failing"] == "RuntimeError: cannot"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["windows"]}, "did you mean window"),
        ({"match": "57x57"}, "no contest of any mixer matches '57x57'"),
        ({"modes": ["backward"]}, "mode='backward' is unknown"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        bench_mixers(**{"device": "cpu", **arguments})
