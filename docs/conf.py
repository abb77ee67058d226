"""Sphinx: `uv run sphinx-build -W docs docs/_build`."""

import re
from importlib.metadata import version as installed
from itertools import takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "todo_db"
author = "the todo_db team"
project_copyright = "2026, the todo_db team"
version = release = installed("todo-db")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = "todo_db"
html_static_path = ["_static"]
html_css_files = ["pages.css"]

myst_enable_extensions = ["attrs_block", "colon_fence"]
myst_heading_anchors = 3

# Single backticks in docstrings are code, and a link where they name something on these pages.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", ".*"),
    # What other packages define, and aliases, which are explained in place.
    ("py:.*", r"(collections|contextlib|datetime|fastapi|opentelemetry|pathlib|pydantic)\..*"),
    ("py:.*", r"(re|sqlalchemy|starlette)\..*"),
    ("py:.*", r"FastAPI|CommandError|datetime|[A-Z]"),
    ("py:.*", r"todo_db\.\w+\.(\w+\.)?(Headers|Include|Key|Make|MakeId|Scope)"),
]

add_module_names = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 76
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def as_directives(  # Sphinx calls it
    _app: object, _kind: str, _name: str, _of: object, _options: object, lines: list[str]
) -> None:
    """Turn the fenced code of docstrings, which editors show, into directives of Sphinx."""
    old = iter(list(lines))
    lines.clear()
    for line in old:
        fence = re.fullmatch(r"( *)```(\w*)", line)
        if fence is None:
            # The role would take a leading dot for a part of Python's names.
            line = re.sub(r"(?<!`)`(\.\w+)`(?!`)", r"``\1``", line)  # noqa: PLW2901
            # With one, a class is found in every module.
            lines.append(re.sub(r"(?<!`)`([A-Z]\w+(?:\.\w+)?)`(?!`)", r"`.\1`", line))
            continue
        indent, language = fence.groups()
        code = takewhile(lambda line: line.strip() != "```", old)
        lines += [f"{indent}.. code-block:: {language or 'text'}", ""]
        lines += [f"    {line}" if line else "" for line in code]
        lines.append("")


def setup(app: "Sphinx") -> None:
    """Read the docstrings before napoleon does."""
    app.connect("autodoc-process-docstring", as_directives, priority=400)
