"""The page of `nnprune-collect --html`: what is in it, that it asks nothing of the network, and that it works in a browser."""

import json
import re
import shutil
import subprocess

import pytest
from conftest import HANGS
from support.records import collect, config, write_record

HOSTILE = "</script><script>document.title='owned'</script><b>\"&amp;'"


@pytest.fixture
def page(tmp_path):
    """The page of a few runs, some with hostile names."""
    folder = tmp_path / "o"
    linears = [
        {"name": f"layers.{i}.fc{j}", "sparsity": 0.5, "relative_error": 0.01 * (i + j)} for i in range(3) for j in (1, 2)
    ]
    for alpha, value in ((0.5, 9.5), (2, 100.0), (10, 1597.4)):
        settings = config(0, pruner={"_target_": "nnprune.pruners.wanda.Wanda", "alpha": alpha})
        write_record(folder / f"a{alpha}", value=value, per_linear=linears, **settings)
    write_record(folder / "inf", pruner="ria", value="inf", per_linear=[{"name": "x", "relative_error": "nan"}, {"no": "name"}])
    write_record(folder / "hostile", model=HOSTILE, pruner=HOSTILE, value=20.0, per_linear=linears, **config(0, note=HOSTILE))
    path = tmp_path / "report.html"
    status, out, err = collect(folder, "--html", path)
    assert (status, out) == (0, f"{path}: written\n")
    assert "ria / 0.5: not drawn" in err
    return path


def data_of(text):
    [data] = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    return json.loads(data)


def test_what_is_in_the_page(page):
    text = page.read_text(encoding="utf-8")
    data = data_of(text)
    assert len(re.findall("<script", text)) == 2, "no markup comes from records"
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)
    assert "@data@" not in text and "@style@" not in text and "@script@" not in text
    [table] = data["tables"]
    assert (table["title"], table["head"][:2]) == ("Demo perplexity, lower is better", ["Method", "Sparsity"])
    rows = {row[0]: row[2:] for row in table["rows"]}
    assert [rows[f"Wanda (alpha={alpha})"][0] for alpha in ("0.5", "2", "10")] == ["9.50", "100.00", "1.6e3"]
    assert list(rows)[1:4] == ["Wanda (alpha=0.5)", "Wanda (alpha=2)", "Wanda (alpha=10)"], "in the order of the numbers"
    assert len(data["plots"]) == 2 and all(one["image"].startswith("data:image/svg+xml;base64,") for one in data["plots"])
    assert len(data["details"]) == len(data["runs"]["rows"]) == 5
    wanda = next(one for one in data["details"] if "alpha=10" in one["name"])
    assert data["linears"][wanda["linears"]][:2] == ["layers.0.fc1", "layers.0.fc2"]
    assert wanda["errors"][:2] == [0.01, 0.02] and wanda["record"]["config"]["pruner"]["alpha"] == 10


def test_methods_that_tune_the_whole_model_have_a_table_of_their_own(tmp_path):
    for pruner, value in {"wanda": 30.0, "alps+model": 20.0, "ria": 31.0}.items():
        write_record(tmp_path / "o" / pruner, pruner=pruner, value=value, whole_model="model" in pruner)
    assert collect(tmp_path / "o", "--html", tmp_path / "p.html")[0] == 0
    data = data_of((tmp_path / "p.html").read_text(encoding="utf-8"))
    first, second = data["tables"]
    assert [row[0] for row in first["rows"]] == ["Dense", "Wanda", "RIA"] and first["best"][1][2]
    assert [row[0] for row in second["rows"]] == ["ALPS + distillation"] and not any(second["best"][0])
    assert second["title"] == "Demo perplexity, lower is better: whole-model methods"
    assert [row[1] for row in data["runs"]["rows"]] == ["Wanda", "RIA", "ALPS + distillation"]


def test_without_matplotlib_the_page_has_no_plots(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    write_record(tmp_path / "o" / "a")
    status, _, err = collect(tmp_path / "o", "--html", tmp_path / "p.html")
    assert status == 0 and "pip install 'nnprune[plot]'" in err and err.count("\n") == 1
    assert data_of((tmp_path / "p.html").read_text())["plots"] == []


IN_THE_PAGE = """
<script>
const told = {}, first = (part) => document.querySelector(part);
const column = (part, number) => [...document.querySelectorAll(`${part} tbody tr`)].map((row) => row.cells[number].textContent);
const type = (part, text) => { const input = first(`${part} input`); input.value = text; input.dispatchEvent(new Event("input")); };
const sort = () => document.querySelectorAll("#tables th button")[2].click();
sort(); told.up = column("#tables", 2);
sort(); told.down = column("#tables", 2); told.aria = document.querySelectorAll("#tables th")[2].getAttribute("aria-sort");
type("#tables", "wanda alpha=2"); told.filtered = column("#tables", 0); told.count = first("#tables .tools span").textContent;
told.lines = document.querySelectorAll("#layers polyline").length;
told.differences = column("#differences", 0);
[...document.querySelectorAll("#runs tbody input:checked")].slice(1).forEach((box) => box.click());
told.fewer = document.querySelectorAll("#layers polyline").length;
told.images = [...document.images].map((image) => image.alt);
told.title = document.title; told.hostile = document.querySelectorAll("b").length;
document.body.append(Object.assign(document.createElement("pre"), { id: "told", textContent: JSON.stringify(told) }));
</script>
</body>
"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_in_a_browser(page, tmp_path):
    """It renders, sorts numbers as numbers, filters, compares runs, and logs no error."""
    page.write_text(page.read_text(encoding="utf-8").replace("</body>\n</html>", IN_THE_PAGE + "</html>"), encoding="utf-8")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command = ["chromium", *options, "--virtual-time-budget=5000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    [text] = re.findall(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    told = json.loads(text.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    assert told["up"] == ["9.50", "15.00", "100.00", "1.6e3", "inf", "--"]
    assert told["down"] == ["inf", "1.6e3", "100.00", "15.00", "9.50", "--"] and told["aria"] == "descending"
    assert (told["filtered"], told["count"]) == (["Wanda (alpha=2)"], "1 of 6 rows")
    assert told["lines"] == 6, "errors and sparsities of the three runs that have any"
    assert "config.pruner.alpha" in told["differences"] and "config.pruner._target_" in told["differences"]
    assert told["fewer"] in (0, 2)
    assert told["images"] == ["Demo perplexity, sparsity", "Demo perplexity, pareto"]
    assert (told["title"], told["hostile"]) == ("nnprune report", 0)
