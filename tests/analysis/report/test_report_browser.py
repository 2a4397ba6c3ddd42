"""The report in a real browser: no complaint, every figure drawn, sliders that move, values that are those of the CSV.

Skips where there is no Chromium (Debian: apt-get install chromium).
"""

import html
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest

from megatron_lccp.analysis.report.report import write_report
from megatron_lccp.text import length_text
from tests.synthetic_run import make_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium binary found on PATH")
MASS = "RetrievalHeads-needle_mass"
"""It has no file of its own: the figure of what its metric declares."""
MAPS = {"needle-cells", "difference-cells", "interference-cells", "head-cells", MASS}
VALUES = {"head-cells": "score", "difference-cells": "difference", MASS: "value"}
SMALL = dict(steps=20, lccp_from=10, lengths=(1024, 4096), depths=(0.0, 1.0), samples=2, layers=2, heads=3, skip=())
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run", "--disable-dev-shm-usage", "--enable-logging=stderr", "--v=0",
         "--virtual-time-budget=20000")  # fmt: skip
# Written into a copy of the page, less its policy, which lets no other script run. The time is virtual.
MEASURE = """<script>addEventListener("load", () => setTimeout(() => {
  const of = (figure) => [...figure.querySelectorAll(".js-plotly-plot")];
  const css = (element, name) => element && getComputedStyle(element)[name];
  const data = (plot) => plot.data.map((t) => ({ name: t.name, x: t.x, y: t.y, values: t.customdata, fill: t.fill,
                                                 type: t.type, bar: t.colorbar && t.colorbar.title.text }));
  const box = (plot, name) => [...plot.querySelectorAll(name)].map((part) => part.getBoundingClientRect());
  const saved = [], Real = Blob;  // what a click on the arrow of a panel would download
  window.Blob = class extends Real { constructor(parts, kind) { super(parts, kind); saved.push(parts[0]); } };
  HTMLAnchorElement.prototype.click = () => {};
  const found = { figures: {}, page: document.documentElement.scrollWidth,
    window: document.documentElement.clientWidth, paper: css(document.body, "backgroundColor"),
    ink: css(document.querySelector("figure .xtitle"), "fill"),
    outside: performance.getEntriesByType("resource").map((e) => e.name).filter((n) => !/^(data|blob):/.test(n)) };
  document.querySelectorAll("figure.chart").forEach((figure) => {
    of(figure).forEach((plot) => plot.querySelector('[data-title*="CSV"]').dispatchEvent(new Event("click")));
    const entry = { drawn: "drawn" in figure.dataset, plots: figure.querySelectorAll(".plot").length,
      shown: of(figure).filter((plot) => plot.getBoundingClientRect().height > 100).length,
      widths: of(figure).map((plot) => plot.getBoundingClientRect().width), stops: [],
      first: of(figure).map(data), csv: saved.splice(0),
      crossed: of(figure).some((plot) => box(plot, ".legend").some((one) => box(plot, ".annotation").some(
        (two) => one.bottom > two.top && one.top < two.bottom))),
      clear: of(figure).map((plot) => box(plot, ".cbtitle").map((one) => one.top - box(plot, ".modebar")[0].bottom)) };
    found.figures[figure.id] = entry;
  });
  document.querySelectorAll(MOVED).forEach((input) => {
    const figure = input.closest("figure");
    for (let k = 0; k <= Number(input.max); k += 1) {
      input.value = k;
      input.dispatchEvent(new Event("input"));
      const texts = of(figure).map((plot) =>
        [...plot.querySelectorAll(".heatmap-label text")].map((t) => t.textContent));
      found.figures[figure.id].stops.push({ names: [...figure.querySelectorAll(".map-name")].map((n) => n.textContent),
        maps: of(figure).map(data), said: input.getAttribute("aria-valuetext"), texts: texts,
        others: [...document.querySelectorAll("figure.chart input")].map((other) => Number(other.value)) });
    }
  });
  dispatchEvent(new Event("beforeprint"));
  found.printed = [...document.querySelectorAll(".js-plotly-plot .main-svg")].map((svg) => svg.getAttribute("width"));
  document.body.style.width = "390px";  // a window is no narrower than 500
  document.querySelector("#t-verdict-0").open = true;
  found.edge = document.querySelector("#t-verdict-0 .scroll").getBoundingClientRect().right;
  found.verdict = [...document.querySelectorAll("#t-verdict-0 tr")].map((line) =>
    [...line.cells].slice(0, 4).map((cell) => [cell.textContent, cell.getBoundingClientRect().right]));
  const result = document.createElement("pre");
  result.id = "measured";
  result.textContent = JSON.stringify(found);
  document.body.append(result);
}, 5000));</script>"""


def browse(page, tmp_path, *options):
    """(DOM after a while, console messages) of a page in a browser with an empty profile."""
    command = [CHROMIUM, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", *options, page.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


def measured(page, tmp_path, *options, moved="#none"):
    """What MEASURE found in a browser, with the sliders that the selector `moved` names at each of their stops."""
    copy = tmp_path / "measured.html"
    text = page.read_text(encoding="utf-8")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    script = MEASURE.replace("MOVED", json.dumps(moved))
    copy.write_text(text.replace("</body>", script + "</body>"), encoding="utf-8")
    dom, messages = browse(copy, tmp_path, *options)
    assert messages == []
    return json.loads(html.unescape(re.search(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL)[1]))


@pytest.fixture(scope="module")
def desk(page, tmp_path_factory):
    """What the browser shows on a desk, with benchmark scores, so that every figure of the paper is there."""
    return measured(page, tmp_path_factory.mktemp("desk"), "--window-size=1280,900", moved="figure.chart input")


@pytest.fixture(scope="module")
def files(charts):
    """The frames that the same run exports as CSV, by key of the figure (test_export holds that they are these)."""
    return {key: chart.frame for key, chart in charts.items()}


def test_under_its_policy_every_figure_is_drawn_and_no_other_script_runs(page, files, tmp_path):
    """The one complaint of the browser is about the script that was put into the page afterwards."""
    copy = tmp_path / "copy.html"
    text = page.read_text(encoding="utf-8")
    copy.write_text(text.replace("</body>", "<script>document.title = 1</script></body>"), encoding="utf-8")
    dom, messages = browse(copy, tmp_path, "--window-size=1280,900")
    assert re.findall(r'<figure class="chart" id="([\w-]+)" data-drawn=""', dom) == list(files)
    assert "<title>1</title>" not in dom
    assert len(messages) == 1 and "Content Security Policy" in messages[0] and "inline script" in messages[0]


def test_on_a_desk_every_panel_shows_and_nothing_is_fetched(desk, files):
    assert list(desk["figures"]) == list(files)
    for key, figure in desk["figures"].items():
        assert figure["drawn"] and figure["plots"] == figure["shown"] > 0, key
    assert desk["outside"] == [] and desk["page"] <= desk["window"]


def test_every_scale_of_colours_is_labelled_and_no_legend_covers_the_stages(desk):
    bars = {key: {plot[0]["bar"] for plot in desk["figures"][key]["first"]} for key in MAPS}
    assert bars == {"needle-cells": {"answer PPL"}, "interference-cells": {"answer PPL"},
                    "head-cells": {"retrieval score"}, "difference-cells": {"change of NLL (nat)"}, MASS: {"needle mass (share)"}}  # fmt: skip
    assert [key for key, figure in desk["figures"].items() if figure["crossed"]] == []
    clear = {key: desk["figures"][key]["clear"] for key in MAPS}  # px from the panel's buttons down to the label
    assert all(len(plot) == 1 and plot[0] > 0 for plots in clear.values() for plot in plots), clear


def test_what_a_panel_downloads_are_the_numbers_that_it_shows(desk, files):
    for key, figure in desk["figures"].items():
        found = [pd.read_csv(io.StringIO(text)) for text in figure["csv"]]
        assert len(found) == figure["plots"], key
        if key in MAPS:
            expected = sorted(_digits(files[key][VALUES.get(key, "mean_ppl")]))
            assert all(sorted(_digits(csv.iloc[:, 3].dropna())) == expected for csv in found)
            continue
        for csv, plot in zip(found, figure["first"], strict=True):
            shown = [trace for trace in plot if "fill" not in trace]
            assert list(csv.columns) == ["series", "x", "y"] and len(csv) == sum(len(t["x"]) for t in shown)
            for name in ("x", "y"):
                assert _digits(csv[name]) == _digits([value for trace in shown for value in trace[name]]), key


def test_curves_are_the_numbers_of_the_csv(desk, files):
    """Every line on the page is, x and y, a stretch of columns of the CSV; hidden bands aside."""
    curves = {key: figure for key, figure in desk["figures"].items() if not figure["stops"]}
    assert curves.keys() == files.keys() - MAPS
    for key, figure in curves.items():
        numeric = files[key].select_dtypes("number")
        for trace in (trace for plot in figure["first"] for trace in plot if "fill" not in trace):
            known = [set(zip(_digits(numeric[x]), _digits(numeric[y]))) for x in numeric for y in numeric if x != y]
            points = set(zip(_digits(trace["x"]), _digits(trace["y"])))
            assert points and any(points <= pairs for pairs in known), (key, trace["name"])


def _digits(values):
    return [f"{value:.6g}" for value in np.array(values, dtype=float)]


@pytest.mark.parametrize(
    ("key", "x", "y", "value"),
    [("needle-cells", "length_tok", "depth_cell", "mean_ppl"), ("head-cells", "head", "layer", "score"),
     ("interference-cells", "after_tok", "before_tok", "mean_ppl"), (MASS, "head", "layer", "value")],
)  # fmt: skip
def test_the_slider_moves_the_maps_to_the_numbers_of_each_checkpoint(desk, files, key, x, y, value):
    stops, frame = desk["figures"][key]["stops"], files[key]
    points = frame[["step", "tokens", "stage"]].drop_duplicates()
    assert len(stops) == len(points) == 13
    sorted_maps = [figure for figure in desk["figures"] if figure in MAPS]
    start = frame[frame["step"] == 100].pivot(index=y, columns=x, values=value).to_numpy()
    for stop, point in zip(stops, points.itertuples(), strict=True):
        fixed, moving = (np.array(plot[0]["values"]) for plot in stop["maps"])
        expected = frame[frame["step"] == point.step].pivot(index=y, columns=x, values=value).to_numpy()
        np.testing.assert_allclose(moving, expected, rtol=1e-5)
        np.testing.assert_allclose(fixed, start, rtol=1e-5)  # the model that the LCCP started from
        assert f"({point.stage})" in stop["names"][1] and stop["said"] in stop["names"][1]
        same = [other for name, other in zip(sorted_maps, stop["others"]) if name != "difference-cells"]
        assert len(set(same)) == 1  # all sliders go together
        if key == "head-cells":
            above = frame[(frame["step"] == point.step) & (frame["score"] > 0.1)]
            assert stop["names"][1].endswith(f": {len(above)} above 0.1")
            assert len(stop["maps"][1][1]["x"]) == len(above)  # as many dots


def test_cells_are_written_on_the_maps(desk, files):
    last = desk["figures"]["needle-cells"]["stops"][-1]
    cells = files["needle-cells"].query("step == 300").sort_values(["depth_cell", "length_tok"])
    assert sorted(map(float, last["texts"][1])) == sorted(float(f"{value:.2f}") for value in cells["mean_ppl"])
    assert last["maps"][1][0]["x"] == [length_text(n) for n in sorted(cells["length_tok"].unique())]


@pytest.fixture(scope="module")
def phone(tmp_path_factory):
    """What the browser shows on a phone in dark mode."""
    folder = tmp_path_factory.mktemp("phone")
    make_run(folder / "run", **SMALL, every=10)
    options = ("--window-size=390,844", "--blink-settings=preferredColorScheme=0")
    return measured(write_report(folder / "run"), folder, *options)


def test_on_a_phone_the_panels_stand_one_below_the_other(phone):
    widths = [width for figure in phone["figures"].values() for width in figure["widths"]]
    assert phone["page"] <= phone["window"] <= 500 and 0.85 * phone["window"] < min(widths) <= max(widths)
    assert max(widths) <= phone["window"]


def test_on_a_phone_the_verdict_of_a_signal_is_seen_without_scrolling(phone):
    """Up to the margin, on 390 px."""
    heading, *lines = phone["verdict"]
    assert 200 < lines[-1][-1][1] <= phone["edge"] < 390
    assert [text for text, _ in heading] == ["signal", "state", "+25 % tokens bring", "margin"]
    assert len(lines) > 5 and max(right for line in lines for _, right in line) <= phone["edge"]


def test_on_paper_the_panels_take_the_width_of_a_page(desk):
    assert set(desk["printed"]) == {"335", "680"}


def test_dark_mode_turns_paper_and_ink_around(desk, phone):
    assert (desk["paper"], phone["paper"]) == ("rgb(255, 255, 255)", "rgb(19, 23, 28)")
    assert (desk["ink"], phone["ink"]) == ("rgb(27, 32, 39)", "rgb(230, 233, 237)")


def test_every_figure_of_a_monitor_of_others_is_drawn(stranger, tmp_path):
    found = measured(write_report(stranger.dir, tmp_path / "page.html"), tmp_path, moved="#Stranger-tilt-zh input")
    own = {key: figure for key, figure in found["figures"].items() if key.startswith("Stranger")}
    assert len(own) == 10 and all(figure["drawn"] and figure["plots"] == figure["shown"] for figure in own.values())
    (trace,) = (trace for trace in own["Stranger-fragile"]["first"][0] if "fill" not in trace)
    assert [k for k, y in enumerate(trace["y"]) if y is None] == [5, 8]  # gaps where it is no number, and infinite
    (csv,) = (pd.read_csv(io.StringIO(text)) for text in own["Stranger-fragile"]["csv"])
    assert csv["y"].isna().tolist().index(True) == 5 and csv["y"][8] == np.inf
    tilt = stranger.truth.query("metric == 'tilt' and language == 'zh'")
    for step, stop in enumerate(own["Stranger-tilt-zh"]["stops"]):
        fixed, moving = (np.array(plot[0]["values"]) for plot in stop["maps"])
        for values, at in ((fixed, 0), (moving, step)):
            expected = tilt[tilt["step"] == at].pivot(index="lag_tok", columns="temperature", values="value")
            np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert own["Stranger-tilt-zh"]["stops"][0]["texts"][0][0] not in ("", None)  # no cell is marked: numbers instead


def test_runs_side_by_side_move_together(tmp_path):
    make_run(tmp_path / "a", name="first <&>", **SMALL, every=10)
    make_run(tmp_path / "b", name="second", **SMALL, every=5, seed=1)
    found = measured(write_report([tmp_path / "a", tmp_path / "b"]), tmp_path, moved="#head-cells input")
    stops = found["figures"]["head-cells"]["stops"]
    assert [[name.split(" (")[0] for name in stop["names"]] for stop in stops] == [
        ["first <&>: 0", "second: 0"], ["first <&>: 0", "second: 21M"], ["first <&>: 41.9M", "second: 41.9M"],
        ["first <&>: 41.9M", "second: 62.9M"], ["first <&>: 83.9M", "second: 83.9M"],
    ]  # fmt: skip
    names = [trace["name"] for plot in found["figures"]["needle-averages"]["first"] for trace in plot]
    first, second = "first &lt;&amp;&gt;", "second"  # plotly reads a little HTML
    assert names == [
        first,
        second,
        *(f"{run}: {name}" for name in ("mean_ppl", "exp_mean_nll", "content_ppl") for run in (first, second)),
        first,
        second,
    ]
    assert [set(pd.read_csv(io.StringIO(csv))["series"]) for csv in found["figures"]["needle-averages"]["csv"]] == [
        {html.unescape(name) for name in panel} for panel in (names[:2], names[2:-2], names[-2:])
    ]  # fmt: skip
