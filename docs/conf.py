"""The pages as a site: `nox -s docs` has Sphinx build it from the repository's root, so that links are the same in both."""

project = "erasekit"
extensions = ["myst_parser", "sphinx_external_toc", "sphinx_copybutton", "sphinxcontrib.mermaid"]
include_patterns = ["*.md", "docs/*.md", "benchmarks/README.md", "benchmarks/*/README.md"]
external_toc_path = "docs/toc.yml"
nitpicky = True
html_theme = "furo"
html_title = "erasekit"
html_use_index = html_show_copyright = html_show_sourcelink = html_copy_source = False
myst_fence_as_directive = ["mermaid"]
myst_heading_anchors = 4
copybutton_exclude = ".linenos, .gp, .go"
