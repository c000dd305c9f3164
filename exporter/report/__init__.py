"""Reports for people and for CI systems, from what other rooms found.

In come a comparison, a check, a study, a sweep or a front; out go texts: Markdown, a page, tables
on the terminal, files of CI systems. Each is described once, as a document of sections with tables
and charts (:mod:`~exporter.report.sections`), which one writer a form writes down. A CI format is a
module in :mod:`~exporter.report.ci` and its line there; a chart is one in
:mod:`~exporter.report.charts`.
"""
