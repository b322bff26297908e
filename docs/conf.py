"""The documentation site: `make docs` builds it into build/docs, with warnings as errors."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import subspace_jax as sj  # noqa: E402

project = "subspace_jax"
author = "The subspace_jax authors"
copyright = author
version = release = sj.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "docs.site",
]
exclude_patterns = ["**/.ipynb_checkpoints"]

# Markdown and notebooks: formulas between dollars; notebooks show the outputs that are stored in them.
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_merge_streams = True

# The reference is one page for each namespace, written by docs/reference.py.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
add_module_names = False
toc_object_entries = False  # a page of the reference begins with a table of its names; these would double the time
python_maximum_signature_line_length = 100
napoleon_attr_annotations = False
# As plain sections: a colon in a sentence about what is returned does not end its type.
napoleon_custom_sections = ["Returns", "Source", ("Attributes", "params_style")]
default_role = "code"
# Formulas as drawings: no fonts are fetched beside the program.
mathjax_path = "https://cdn.jsdelivr.net/npm/mathjax@4/tex-mml-svg.js"

html_theme = "sphinx_book_theme"
html_title = "subspace_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["sort.js"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_navbar_depth": 1,
}
