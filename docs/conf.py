"""How Sphinx builds the site; ``make docs`` calls it."""

from pathlib import Path
import sys

import rmsprop_jax

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "rmsprop_jax"
author = "the rmsprop_jax authors"
copyright = "the rmsprop_jax authors"  # noqa: A001
version = release = rmsprop_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    # Of the site itself, in _extensions:
    "docstrings",
    "gallery",
    "mathml",
    "names",
    "repository_links",
    "signatures",
]
exclude_patterns = ["navigation.md"]
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(jax|optax|np|os|collections)\..*"),
    (r"py:class", r"AbstractMesh|ArrayLike|Mesh|PathLike"),  # of jax.sharding, jax.typing, os
]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_fence_as_directive = {"math"}
myst_heading_anchors = 3
repository_url = "https://github.com/rmsprop-jax/rmsprop_jax"
pages_of_files = {
    "benchmarks/README.md": "benchmarks",
    "examples/README.md": "gallery",
    "CHANGELOG.md": "changelog",
    "CONTRIBUTING.md": "contributing",
}

autosummary_generate = False
python_maximum_signature_line_length = 70
python_display_short_literal_types = True
add_module_names = False
napoleon_attr_annotations = False
napoleon_custom_sections = [("Attributes", "params_style")]
toc_object_entries_show_parents = "hide"

html_theme = "sphinx_book_theme"
html_title = "rmsprop_jax"
html_baseurl = "https://rmsprop-jax.github.io/rmsprop_jax/"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_use_index = False
html_domain_indices = False
html_css_files = ["custom.css"]
html_context = {"default_mode": "auto"}
html_math_renderer = "mathml"
html_theme_options = {
    "repository_url": repository_url,
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_issues_button": True,
    "use_edit_page_button": True,
    "use_download_button": False,
    "show_toc_level": 2,
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
