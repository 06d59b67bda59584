"""How Sphinx makes the site: `make docs`."""

import re

from sphinx.application import Sphinx

from docs import reference_text

project = "train-export"
html_title = project
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"  # brings all that its pages load
html_static_path = ["stylesheets"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
smartquotes = False  # would make one dash of the two before an option
highlight_language = "none"  # most blocks are a shell's, or what a command prints
myst_heading_anchors = 3
autoclass_content = "both"  # constructors are described in theirs
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
MARK = re.compile(r"^<!-- generated: (.+) -->$", re.MULTILINE)


def setup(app: Sphinx) -> None:
    """Have what is generated stand where a page asks for it."""
    app.connect("source-read", _generate)


def _generate(_: Sphinx, page: str, source: list[str]) -> None:
    if page.startswith("reference/"):
        source[0] = MARK.sub(lambda found: reference_text.text(*found[1].split()), source[0])
