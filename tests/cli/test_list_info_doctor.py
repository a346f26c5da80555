"""`vitarium list`, `vitarium info` and `vitarium doctor`."""

import pytest
import torch

from vitarium import zoo
from vitarium.cli.main import main
from vitarium.ops import MIXERS, OPERATORS


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def test_list_has_every_model_with_its_figures(capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for name in zoo.list_models():
        assert name in text
    (line,) = [
        line for line in text.splitlines() if "nat_mini.in1k" in line and "dinat" not in line
    ]
    assert line.split() == ["nat_mini.in1k", "20", "2.7", "224", "81.8", "mit"]


def test_info_says_why_there_is_nothing_to_download(capsys):
    assert main(["info", "agent_deit_tiny"]) == 0
    text = capsys.readouterr().out
    for expected in ("licence none stated", "cloud.tsinghua.edu.cn", "load from a file"):
        assert expected in text


def test_list_takes_a_pattern(capsys):
    assert main(["list", "dinat_s_*"]) == 0
    text = capsys.readouterr().out
    assert "dinat_s_tiny.in1k" in text and "nat_mini" not in text
    assert main(["list", "swin_*"]) == 1
    assert "pattern='swin_*' matches none of our models" in capsys.readouterr().err


def test_list_of_mixers(capsys):
    assert main(["list", "--mixers"]) == 0
    text = capsys.readouterr().out
    for name, mixer in MIXERS.items():
        assert name in text and mixer.operator[:12] in text
    assert main(["list", "neigh*", "--mixers"]) == 0
    text = capsys.readouterr().out
    assert "neighborhood" in text and "global" not in text
    assert main(["list", "swin_*", "--mixers"]) == 1
    assert "pattern='swin_*' matches none of our mixers" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["dinat_mini", "dinat_mini.in1k"])
def test_info_of_one_of_ours(name, capsys):
    assert main(["info", name]) == 0
    text = capsys.readouterr().out
    for expected in (
        "19,984,174",
        "2.695",
        "top-1 81.8 %",
        "stages.3",
        "dilation=8",
        "licence mit",
        "arXiv:2209.15001",
        "dinat_mini_in1k_224.pth",
    ):
        assert expected in text


def test_info_of_one_of_timms(capsys):
    assert main(["info", "resnet18"]) == 0
    text = capsys.readouterr().out
    assert "11,689,512" in text and "layer4" in text and "a1_in1k" in text


def test_info_of_an_unknown_model_offers_the_nearest(capsys):
    assert main(["info", "dinat_minni"]) == 1
    error = capsys.readouterr().err
    assert "model 'dinat_minni' is not registered; did you mean dinat_mini" in error


def test_doctor_tries_every_backend(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__.partition("+")[0] in text
    for name, operator in OPERATORS.items():
        for backend in operator.implementations:
            lines = [line for line in text.splitlines() if name in line and backend in line]
            assert lines
            for line in lines:
                assert " yes" in line or " no: " in line
                assert " yes" in line or backend not in ("reference", "torch")
