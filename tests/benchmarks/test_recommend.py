"""The selector: what is measured, what predicted, and what is refused."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from vitarium.benchmarks import recommend
from vitarium.benchmarks.recommend import Budget, Choice
from vitarium.cli.main import main
from vitarium.cli.recommend import recipe_of

# By name: accuracy, millions of parameters, GFLOPs, milliseconds, MiB at the peak.
WORLD = {
    "nat_base": (84.3, 90, 14, 140, 900),
    "nat_small": (83.7, 51, 8, 85, 600),
    "nat_tiny": (83.2, 28, 4, 45, 300),
    "swin_slow": (83.0, 30, 4, 90, 300),  # much slower than its operations say
    "nat_mini": (81.8, 20, 2.5, 26, 200),
    "deit_small": (80.5, 6, 1.2, 12, 100),
    "deit_tiny": (74.9, 5, 1.1, 11, 90),
}


@pytest.fixture
def world(monkeypatch):
    """Models whose figures are those of `WORLD`; gives the names that were measured."""
    measured = []

    def bench_models(names, **arguments):
        (name,) = names
        measured.append(name)
        if name == "nat_tiny" and arguments["seconds"] == 7:
            raise RuntimeError("out of memory")
        *_, milliseconds, mebibytes = WORLD[name]
        machine = SimpleNamespace(processor="a processor", threads=1, device="cpu")
        return [SimpleNamespace(median=milliseconds / 1e3, peak_memory=mebibytes * 2**20,
                                machine=machine, clock="wall")]  # fmt: skip

    monkeypatch.setattr(recommend, "bench_models", bench_models)
    monkeypatch.setattr(recommend.flops, "on_meta", lambda name, resolution: name)
    monkeypatch.setattr(
        recommend.flops, "count",
        lambda name, resolution: SimpleNamespace(
            params=WORLD[name][1] * 10**6, macs=int(WORLD[name][2] * 1e9)
        ),
    )  # fmt: skip
    choices = [Choice(name, values[0], 224) for name, values in WORLD.items()]
    monkeypatch.setattr(recommend, "published_choices", lambda path=None: choices)
    return SimpleNamespace(measured=measured, choices=choices)


def _fitting(found, budget):
    return [choice.name for choice in found if choice.fits(budget)]


def test_the_most_accurate_within_the_latency(world):
    budget = Budget(latency=0.05)
    found = recommend.recommend(world.choices, budget, device="cpu", count=2)
    assert _fitting(found, budget)[:2] == ["nat_tiny", "nat_mini"]
    by_name = {choice.name: choice for choice in found}
    # The largest is far over by what was measured; what is near is measured; enough is enough.
    assert "nat_base" not in world.measured and by_name["nat_base"].predicted > 0.1
    assert by_name["swin_slow"].measured and not by_name["swin_slow"].fits(budget)
    assert len(world.measured) == len(set(world.measured))
    assert by_name["deit_small"].measured is None  # less accurate than what was enough


def test_other_budgets(world):
    budget = Budget(memory=350 * 2**20, params=29e6)
    found = recommend.recommend(world.choices, budget, device="cpu", count=1)
    assert _fitting(found, budget) == ["nat_tiny"] and world.measured == ["nat_tiny"]
    assert {"nat_base", "nat_small", "swin_slow"}.isdisjoint(choice.name for choice in found)


def test_a_model_that_fails_does_not_end_the_search(world):
    budget, lines = Budget(latency=0.05), []
    found = recommend.recommend(
        world.choices, budget, device="cpu", count=1, seconds=7, progress=lines.append
    )
    assert _fitting(found, budget)[0] == "nat_mini"
    (failed,) = [choice for choice in found if choice.failure]
    assert failed.name == "nat_tiny" and "RuntimeError: out of memory" in failed.failure
    assert any("out of memory" in line for line in lines)


def test_predictions_follow_a_line_through_logarithms():
    def choice(gflops, milliseconds):
        r = SimpleNamespace(median=milliseconds / 1e3)
        return replace(Choice("x", 80.0, 224), macs=int(gflops * 1e9), measured=r)

    assert recommend.predict([], 10**9) is None
    assert recommend.predict([choice(1, 10)], 4 * 10**9) == pytest.approx(0.04)
    assert recommend.predict([choice(1, 10), choice(4, 30)], 16 * 10**9) == pytest.approx(0.09)
    wild = recommend.predict([choice(1, 10), choice(1.1, 99)], 4 * 10**9)
    assert wild < 1  # a slope of 1.3 at most


def test_ours_and_timms(tmp_path):
    ours = recommend.published_choices()
    assert ours[0].top1 == max(choice.top1 for choice in ours) and len(ours) > 80
    assert all(choice.name != "dinat_nano" for choice in ours)  # has no published accuracy
    results = tmp_path / "results.csv"
    results.write_text(
        "model,top1,top1_err,param_count,img_size\n"
        'resnet50.a1_in1k,81.2,18.8,"25.56",288\nresnet50.tv_in1k,76.1,23.9,25.56,224\n'
        "of_no_registry.in1k,99.0,1.0,1.0,224\n"
    )
    found = {choice.name: choice for choice in recommend.published_choices(results)}
    assert found["resnet50.a1_in1k"] == Choice("resnet50.a1_in1k", 81.2, 288)
    assert len(found) == len(ours) + 1
    results.write_text("name,accuracy\nresnet50,80\n")
    with pytest.raises(ValueError, match="lacks model, top1 or img_size"):
        recommend.published_choices(results)


def test_features_and_sizes_that_a_model_refuses(monkeypatch):
    def refuse(*_, **arguments):
        raise RuntimeError("features_only not implemented")

    choice = Choice("nat_mini", 81.8, 224)
    assert recommend._counted(choice, 64, Budget(), False).macs > 1e8
    monkeypatch.setattr(recommend.timm, "create_model", refuse)
    assert recommend._counted(choice, 64, Budget(), True) is None


def test_recipes_of_families():
    assert recipe_of("nat_mini") == "nat"
    assert recipe_of("agent_swin_base_384") == "agent_swin_384"
    assert recipe_of("resnet50.a1_in1k") == "finetune"


def test_command(world, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    command = ["recommend", "--latency", "50ms", "--resolution", "512", "--count", "2"]
    assert main([*command, "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    rows = [line for line in lines if line and line[-1] in ("fits", "over")]
    assert [row[0] for row in rows[:2]] == ["nat_tiny", "nat_mini"]
    assert any(row[5].startswith("~") for row in rows if row[0].endswith(("base", "small")))
    assert "vitarium train --config nat --model nat_tiny" in text
    assert main(["recommend", "--latency", "1ms", "--device", "cpu"]) == 1
    assert "no model was measured to be within the budget" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a budget is needed: --latency, --memory or --params"),
        (["--latency", "20"], "--latency 20: must be a number above 0 with a unit (us, ms, s)"),
        (["--memory", "2GX"], "--memory 2GX: must be a number above 0 with a unit (KiB, MiB"),
        (["--params", "0M"], "--params 0M: must be"),
        (["--latency", "1ms", "--resolution", "0"], "resolution"),
    ],
)
def test_wrong_budgets_are_refused(arguments, message, capsys):
    assert main(["recommend", *arguments]) == 2
    assert message in capsys.readouterr().err
