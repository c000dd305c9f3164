"""The check as one page: limits, verdicts, and the history's plots."""

from __future__ import annotations

from exporter.report.check_page import check_document
from exporter.report.ci import Checked
from exporter.report.html import page


def render(checked: Checked) -> str:
    """The whole page."""
    return page([check_document(checked.found)])
