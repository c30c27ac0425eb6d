"""How the pages of this folder become a site: `sphinx-build -W docs out/site`."""

import importlib.metadata
import re
import textwrap

project = "hk_stack"
author = "The hk_stack authors"
release = version = importlib.metadata.version("hk_stack")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"hk_stack {release}"
html_show_sphinx = html_show_copyright = False

myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # Tables are written for READMEs, too.
exclude_patterns = ["results"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # Docstrings say what arguments are.
napoleon_use_ivar = True


def as_rst(app, what, name, obj, options, lines):
    """Docstrings are Markdown, in which code is as in these pages."""
    del app, what, name, obj, options
    prose, *rest = re.split(r"^ *```$", "\n".join(lines), flags=re.MULTILINE)
    made = [_inline(prose)]
    for code, prose in zip(rest[::2], rest[1::2], strict=True):
        made += ["::\n", textwrap.indent(code, "   "), "", _inline(prose)]
    lines[:] = "\n".join(made).splitlines()


def _inline(prose):
    def code(found):
        end = "\\ " if found[2] else ""  # As in `Array`s.
        return f"``{found[1]}``{end}"

    paragraphs = re.split(r"(\n *\n)", prose)
    return "".join(
        text
        if text.lstrip().startswith(">>>")
        else re.sub(r"(?<!`)`([^`]+)`(?!`)(?=(\w?))", code, text)
        for text in paragraphs
    )


def setup(app):
    """Before napoleon reads them."""
    app.connect("autodoc-process-docstring", as_rst, priority=100)
