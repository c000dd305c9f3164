"""Sphinx's settings for `make docs`: the Markdown files of the repository, from where they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from exporter import __version__

project = "depthcut"
release = __version__
extensions = ["myst_parser"]
root_doc = "README"
include_patterns = [
    "*.md",
    *(f"{folder}/**.md" for folder in ("exporter", "graph_passes", "samples")),
]
include_patterns += ["docker/README.md", "tests/README.md"]
exclude_patterns = [".*", "out"]
nitpicky = True
highlight_language = "none"
smartquotes = False  # -- is an option's, not a dash
myst_heading_anchors = 4
html_theme = "furo"
html_title = f"depthcut {release}"
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False

PAGES = "exporter/docs"
NAVIGATION = {
    "Begin": ["start", "installing", "exporting", "python", "using", "serving", "shipping"],
    "Cut a model": [
        *("scoring", "planning", "healing", "pruning", "checkpoints", "large-models"),
        *("studies", "sweeps", "cluster", "costs"),
    ],
    "Make it run fast": ["forms", "quantising", "engines"],
    "Judge it": ["comparing", "reports", "gate", "first-gate", "measurements", "rivals"],
    "Look it up": [
        *("words", "files", "fusers", "/graph_passes/docs/architectures"),
        *("/graph_passes/docs/dialects", "/exporter/engines/build/docs/builds"),
    ],
    "Examples": ["/samples/README", "/docker/README"],
    "The code": ["developing", "/exporter/README", "/graph_passes/README", "/tests/README"],
    "The project": ["/SECURITY", "/CHANGELOG"],
}
"""The pages under their headings, in the order of the site."""

NAMED = {name for names in NAVIGATION.values() for name in names}
NAVIGATION["Further pages"] = sorted(
    page.stem for page in Path(__file__).parents[1].glob("*.md") if page.stem not in NAMED
)


def _tree(names: list[str], *, caption: str = "", pattern: str = "") -> str:
    rows = [f":caption: {caption}"] if caption else []
    rows += [":glob:"] if pattern else []
    pages = [name if name.startswith("/") else f"/{PAGES}/{name}" for name in names]
    return "\n".join(["", "```{toctree}", ":hidden:", *rows, "", *pages, pattern, "```", ""])


def complete(_app: Any, page: str, source: list[str]) -> None:
    """Adds the navigation, which the repository's files don't hold."""
    if page == root_doc:
        source[0] += "".join(
            _tree(names, caption=title) for title, names in NAVIGATION.items() if names
        )
    elif page == "samples/README":
        source[0] += _tree([], pattern="*/README")


def finish(app: Any, error: Exception | None) -> None:
    """Writes index.html, which leads to the first page, and the pages as Markdown, for programs."""
    if error is not None or app.builder.format != "html":
        return
    out, begin = Path(app.outdir), f"{PAGES}/start.html"
    target = f'<meta http-equiv="refresh" content="0; url={begin}">'
    out.joinpath("index.html").write_text(f"<!doctype html>{target}\n", encoding="utf-8")
    lines = [
        f"# {project}",
        "",
        "> Cuts layers out of trained Transformers and measures the result.",
    ]
    lines += ["", "## Pages", ""]
    for page in sorted(app.env.all_docs):
        shutil.copyfile(app.env.doc2path(page), out / f"{page}.md")
        lines.append(f"- [{app.env.titles[page].astext()}]({page}.md)")
    out.joinpath("llms.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", complete)
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
