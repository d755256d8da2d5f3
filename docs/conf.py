"""Settings of Sphinx: Markdown pages (MyST) in the furo theme. Build them with `make docs`."""

from dinov3_hf import __version__

project = "dinov3_hf"
author = "The dinov3_hf contributors"
copyright = author
version = release = __version__

extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # links such as training.md#resume

exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"dinov3_hf {version}"
