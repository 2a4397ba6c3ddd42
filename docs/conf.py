"""How Sphinx builds the site. In: the pages here, and those that tools/docs_reference.py generates. Out: HTML.

The site is read from file:// as well: nothing on a page is fetched from elsewhere, and the search index is a script.
"""

import re
from pathlib import Path

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
