"""Plots: that they are drawn, and how they name what they show."""

import struct
import sys

import pytest
from matplotlib.figure import Figure
from support.records import collect, config, write_record, write_runs


@pytest.fixture
def runs(tmp_path):
    return write_runs(tmp_path / "outputs")


@pytest.mark.parametrize("content", ["runs", "nothing but the dense line", "seeds"])
def test_plot(runs, tmp_path, content):
    folder = runs if content == "runs" else tmp_path / "o"
    if content == "seeds":
        for seed, value in enumerate((1.0, 20.0, 90.0)):  # a spread below zero, which a logarithmic axis lacks
            write_record(folder / f"s{seed}", value=value, **config(seed))
            write_record(folder / f"p{seed}", sparsity="2:4", value=value + 5, **config(seed))
    elif content != "runs":
        write_record(folder / "a", pruner="dense", sparsity="dense", value=15.0)
    path = tmp_path / "figure.png"
    assert collect(folder, "--plot", path)[0] == 0
    content = path.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    assert 600 < width < 3000 and 400 < height < 3000 and len(content) > 10_000


def test_plot_without_matplotlib(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, err = collect(runs, "--plot", tmp_path / "figure.png")
    assert status == 2 and "pip install 'nnprune[plot]'" in err and err.count("\n") == 1


ODD = ["_hidden", "a$b$c", r"$\frac{$", "x_$1", "two\nlines", "2:4", "long" * 100]


def test_legend_and_titles_show_names_as_they_are(tmp_path, monkeypatch):
    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: figures.append(self) or savefig(self, *args, **options)
    )
    for number, name in enumerate(ODD):
        write_record(tmp_path / "o" / f"{number}", model="$m_{$", pruner=name, value=20.0 + number)
    write_record(tmp_path / "o" / "nm", model="$m_{$", pruner="sparsegpt", sparsity="2:4")
    write_record(tmp_path / "o" / "nm2", model="$m_{$", pruner="SparseGPT", sparsity="2:4")
    status, _, err = collect(tmp_path / "o", "--plot", tmp_path / "figure.png")
    assert (status, err) == (0, "")
    [figure] = figures
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    odd = ["_hidden", "a$b$c", r"$\frac{$", "x_$1", "two lines", "2:4", "long" * 14 + "l..."]
    assert sorted(texts) == sorted([*odd, "sparsegpt", "SparseGPT", "Dense"])
    assert figure.axes[0].get_title() == "$m_{$"
    assert not any(text.get_parse_math() for text in figure.legends[0].get_texts())


def test_what_a_logarithmic_axis_cannot_show_is_said(tmp_path):
    for name, value in {"ria": "inf", "alps": -1.0, "admm": 1e300, "swaps": 5e-324, "dsnot": "nan", "wanda": 20.0}.items():
        write_record(tmp_path / "o" / name, pruner=name, value=value)
    status, _, err = collect(tmp_path / "o", "--plot", tmp_path / "figure.svg")
    lines = [line.partition(": not drawn, a logarithmic axis cannot show demo_perplexity ")[::2] for line in err.splitlines()]
    assert status == 0
    assert dict(lines) == {
        f"warning: demo / {name} / 0.5": value
        for name, value in {"ria": "inf", "alps": "-1", "admm": "1e+300", "swaps": "4.94066e-324", "dsnot": "nan"}.items()
    }


def test_a_plot_that_cannot_be_written(runs, tmp_path):
    (tmp_path / "folder.png").mkdir()
    status, out, err = collect(runs, "--plot", tmp_path / "folder.png")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "folder.png: cannot be written (Is a directory); name another file" in err
