"""Configuration of the documentation; ``make docs`` builds it, and a warning is an error there."""

import shutil
from pathlib import Path

import sb3_offline_ft

DOCS = Path(__file__).parent

project = "sb3_offline_ft"
author = "sb3_offline_ft contributors"
copyright = author
version = release = sb3_offline_ft.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "myst_nb", "sphinx_copybutton"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3

# Notebooks are shown with the outputs that are stored in them
nb_execution_mode = "off"
nb_merge_streams = True
# Sphinx reads files below this folder only
shutil.copyfile(DOCS.parent / "examples" / "pretrain_finetune.ipynb", DOCS / "pretrain_finetune.ipynb")

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autosummary_generate = False
maximum_signature_line_length = 100

# Prompts and outputs are not copied
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_title = f"sb3_offline_ft {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
