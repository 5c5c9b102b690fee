"""Configuration of the documentation; ``make docs`` builds it, and a warning is an error there."""

import sb3_offline_ft

project = "sb3_offline_ft"
author = "sb3_offline_ft contributors"
copyright = author
version = release = sb3_offline_ft.__version__

extensions = ["sphinx.ext.autodoc", "myst_parser"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"sb3_offline_ft {version}"
