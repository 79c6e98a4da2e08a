"""Sphinx configuration: ``make docs`` builds the site into build/docs, and warnings are errors."""

from __future__ import annotations

import importlib.metadata
import os

# The tutorials' outputs do not depend on the terminal of the machine that builds the site.
os.environ.setdefault("COLUMNS", "100")

project = "sskt"
author = "the sskt maintainers"
project_copyright = "the sskt maintainers, Apache License 2.0"
version = release = importlib.metadata.version("sskt")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "sphinx_copybutton",
    "sphinxcontrib.mermaid",
]
exclude_patterns: list[str] = []
source_suffix = {".md": "markdown"}

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_fence_as_directive = ["mermaid"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"sskt {release}"
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True
copybutton_line_continuation_character = "\\"
