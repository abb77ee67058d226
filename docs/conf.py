"""Sphinx: `uv run sphinx-build -W docs docs/_build`."""

from importlib.metadata import version as installed

project = "todo_db"
author = "the todo_db team"
version = release = installed("todo-db")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "todo_db"

myst_enable_extensions = ["attrs_block", "colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# Long unions read better by their name.
autodoc_type_aliases = {"Filters": "Filters"}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
