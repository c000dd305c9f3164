"""``python -m tests.browser REPORT.html [-o DIR]``: opens reports in a real browser."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.browser.browser_page import browser_path, check_page, missing


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.browser", description=__doc__)
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="Folder for screenshots and prints.")
    options = parser.parse_args()
    if reason := missing():
        print(reason, file=sys.stderr)
        return 2
    problems = 0
    for report in options.reports:
        findings = check_page(report, options.output)
        axe = "with axe-core" if findings.with_axe else "without axe-core, which is not installed"
        print(
            f"{report}: {report.stat().st_size / 1e6:.2f} MB, opened in {findings.opened_s:.2f} s, "
            f"{len(findings.problems)} problems ({browser_path()}, {axe})"
        )
        for line in (*findings.problems, *map(str, findings.pictures)):
            print(f"  {line}")
        problems += len(findings.problems)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
