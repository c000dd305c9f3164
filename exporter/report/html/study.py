"""A study's page: a sentence, then sections with drawings and tables."""

from __future__ import annotations

from collections.abc import Sequence

from exporter.report.html.page import page_environment, page_style
from exporter.report.html.view import Section


def render_study(
    *,
    command: str,
    title: str,
    subject: str,
    lead: str,
    sections: Sequence[Section],
    version: str,
) -> str:
    """The page; it runs no script and asks the network for nothing.

    Args:
        command: Which of depthcut's commands made it.
        title: What was studied.
        subject: Of what: the model, the text.
        lead: The result in a sentence or two.
        sections: In their order.
        version: Of depthcut, as the study's data tell it.
    """
    style, style_hash = page_style()
    return (
        page_environment()
        .get_template("study.html.j2")
        .render(
            command=command,
            title=title,
            subject=subject,
            lead=lead,
            sections=sections,
            style=style,
            style_hash=style_hash,
            version=version,
        )
    )
