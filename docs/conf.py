"""How Sphinx builds the site. In: the pages here, and those that tools/docs_reference.py generates. Out: HTML.

Why Sphinx, with MyST and Furo: all three are kept up, are pure Python, and come from PyPI with few packages of their own.
Sphinx finds links and headings that lead nowhere. Its search index is a script, so that search works from file://, where
a page may fetch no JSON. Furo has light and dark, fits a phone, and takes no font or script from elsewhere.
"""

import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

project = "megatron_lccp"
version = release = re.search(r'__version__ = "(.+)"', (HERE.parent / "megatron_lccp/__init__.py").read_text())[1]
copyright = "the authors of megatron_lccp, Apache-2.0"
language = "en"

extensions = ["myst_parser"]
myst_enable_extensions = ["attrs_inline", "deflist", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings: list[str] = []
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"megatron_lccp {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_last_updated_fmt = None
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1a5fa8", "color-brand-content": "#1a5fa8"},
    "dark_css_variables": {"color-brand-primary": "#7db4f0", "color-brand-content": "#7db4f0"},
}


def keep_units(app: Any, page: str, source: list[str]) -> None:
    """In tables a number and its unit stay on one line."""
    lines = (re.sub(r"(?<=\d) (?=(%|s|min|M|MB|GB|GiB)( |,|$))", "\u00a0", line) if line.startswith("|") else line
             for line in source[0].split("\n"))  # fmt: skip
    source[0] = "\n".join(lines)


def setup(app: Any) -> None:
    app.connect("source-read", keep_units)
