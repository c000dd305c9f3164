"""JUnit XML, as Jenkins, GitLab, GitHub actions and others read it: a test case for each check.

A regression is a ``failure``. A check without a verdict is ``skipped``: nothing was found to be
wrong; where the caller takes it for a failure, it is one here too. ``time`` is the candidate's
median time in seconds, where a time was checked.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree as Xml  # only written here, never read

from exporter.artifacts import Check, CheckReport
from exporter.report.checks import check_name, check_sentence, remarks
from exporter.report.ci import Checked

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(checked: Checked) -> str:
    """The whole file."""
    found = checked.found
    failing = {"regressed", *(["inconclusive"] if checked.inconclusive_fails else [])}
    failures = sum(check.verdict in failing for check in found.checks)
    unsure = sum(check.verdict == "inconclusive" for check in found.checks)
    counts = {"tests": str(len(found.checks)), "failures": str(failures), "errors": "0"}
    skipped = "0" if checked.inconclusive_fails else str(unsure)
    root = Xml.Element("testsuites", {"name": "depthcut", **counts})
    suite = Xml.SubElement(
        root, "testsuite", {"name": "depthcut check", **counts, "skipped": skipped}
    )
    properties = Xml.SubElement(suite, "properties")
    for name, value in _properties(found).items():
        Xml.SubElement(properties, "property", {"name": name, "value": _clean(value)})
    for check in found.checks:
        _case(suite, found, check, fails=check.verdict in failing)
    Xml.SubElement(suite, "system-out").text = _clean("\n".join(remarks(found)))
    Xml.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + Xml.tostring(root, "unicode") + "\n"


def _case(suite: Xml.Element, found: CheckReport, check: Check, *, fails: bool) -> None:
    seconds = check.after / 1000 if check.unit == "ms" else 0
    case = Xml.SubElement(
        suite,
        "testcase",
        {
            "classname": _clean(f"depthcut.{found.key.backend}.{check.quantity}"),
            "name": _clean(check_name(check)),
            "time": f"{seconds:.6f}",
        },
    )
    told = _clean(check_sentence(check))
    if fails:
        failure = Xml.SubElement(case, "failure", {"message": told, "type": check.verdict})
        failure.text = told
    elif check.verdict == "inconclusive":
        Xml.SubElement(case, "skipped", {"message": told})
    Xml.SubElement(case, "system-out").text = told


def _properties(found: CheckReport) -> dict[str, str]:
    key = found.key
    return {
        "verdict": found.verdict,
        "against": found.against,
        "model": key.model,
        "provider": key.provider,
        "precision": key.precision,
        "device": key.device,
        "threads": str(key.threads),
    }


def _clean(text: str) -> str:
    """Without characters that XML 1.0 has no way of writing."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
