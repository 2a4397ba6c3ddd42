"""The report in a real browser: it loads without a complaint, shows every figure once, and fits a phone.

Skips where there is no Chromium (Debian: apt-get install chromium).
"""

import json
import re
import shutil
import subprocess

import pytest

from megatron_lccp.analysis.report import FIGURES

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium binary found on PATH")
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run", "--disable-dev-shm-usage", "--enable-logging=stderr", "--v=0")  # fmt: skip
# Written into a copy of the page: sizes can only be measured by the browser itself, and the report has no scripts.
MEASURE = """<script>
const shown = [...document.querySelectorAll("figure svg")].filter(svg => svg.getBoundingClientRect().width > 0);
document.title = JSON.stringify({
  figures: document.querySelectorAll("figure").length, shown: shown.length,
  images: document.querySelectorAll("svg image").length,
  page: document.documentElement.scrollWidth, window: document.documentElement.clientWidth,
  widths: shown.map(svg => Math.round(svg.getBoundingClientRect().width)),
  ink: getComputedStyle(document.querySelector("figure svg text[style*='--ink']")).fill,
  paper: getComputedStyle(document.body).backgroundColor,
  outside: performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !name.startsWith("data:")),
});
</script>"""


def browse(page, tmp_path, *options):
    """(DOM after loading, console messages) of a page in a browser with an empty profile."""
    command = [CHROMIUM, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", *options, page.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


def measured(page, tmp_path, *options):
    copy = tmp_path / "measured.html"
    html = page.read_text(encoding="utf-8")
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    copy.write_text(html.replace("</body>", MEASURE + "</body>"), encoding="utf-8")
    dom, messages = browse(copy, tmp_path, *options)
    assert messages == []
    return json.loads(re.search(r"<title>(.*?)</title>", dom)[1])


def test_it_loads_without_a_complaint_and_whole(page, tmp_path):
    dom, messages = browse(page, tmp_path, "--window-size=1280,900")
    assert messages == []
    assert dom.count("<figure") == len(FIGURES) and dom.count("<svg") == 2 * len(FIGURES)


def test_a_script_in_the_page_would_be_refused(page, tmp_path):
    """The browser's own word that nothing can be loaded or run: the policy is in force."""
    copy = tmp_path / "copy.html"
    copy.write_text(
        page.read_text(encoding="utf-8").replace("</body>", "<script>document.title = 1</script></body>"),
        encoding="utf-8",
    )
    dom, messages = browse(copy, tmp_path)
    assert "<title>1</title>" not in dom
    assert any("Content Security Policy" in message for message in messages)


def test_on_a_desk_every_figure_shows_once_and_nothing_is_fetched(page, tmp_path):
    found = measured(page, tmp_path, "--window-size=1280,900")
    assert found["figures"] == found["shown"] == len(FIGURES)
    assert found["outside"] == [] and found["images"] > 0
    assert found["page"] <= found["window"] and min(found["widths"]) > 900


def test_on_a_phone_the_narrow_drawings_fit_the_screen(page, tmp_path):
    found = measured(page, tmp_path, "--window-size=390,844")
    assert found["shown"] == len(FIGURES)
    assert found["page"] <= found["window"] <= 500 and max(found["widths"]) <= found["window"]


def test_dark_mode_turns_paper_and_ink_around(page, tmp_path):
    light = measured(page, tmp_path, "--blink-settings=preferredColorScheme=1")
    dark = measured(page, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert (light["paper"], dark["paper"]) == ("rgb(255, 255, 255)", "rgb(18, 22, 27)")
    assert (light["ink"], dark["ink"]) == ("rgb(26, 32, 40)", "rgb(228, 232, 236)")
