"""Opens reports in a real browser: ``python -m tests.browser REPORT.html [-o DIR]``."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
WIDTHS = (390, 1280)
SCHEMES = ("light", "dark")


@dataclass
class Findings:
    """What was seen."""

    problems: list[str] = field(default_factory=list)
    opened_s: float = 0.0
    pictures: list[Path] = field(default_factory=list)
    with_axe: bool = False


def browser_path() -> str | None:
    """The first browser found."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def check_page(report: Path, pictures: Path | None = None) -> Findings:
    """Opens the report at every width in both schemes, listens, measures, and prints it."""
    from playwright.sync_api import sync_playwright

    findings = Findings()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_path(), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        for width in WIDTHS:
            for scheme in SCHEMES:
                _look(browser, report, width, scheme, pictures, findings)
        browser.close()
    return findings


def _look(
    browser: Any, report: Path, width: int, scheme: str, pictures: Path | None, findings: Findings
) -> None:
    page = browser.new_page(
        viewport={"width": width, "height": 844}, color_scheme=scheme, bypass_csp=False
    )
    where = f"{width} px, {scheme}"
    page.on("console", lambda item: findings.problems.append(f"{where}: console: {item.text}"))
    page.on("pageerror", lambda error: findings.problems.append(f"{where}: error: {error}"))
    page.on("request", lambda request: _heard(request.url, report, where, findings))
    begin = time.perf_counter()
    page.goto(report.resolve().as_uri(), wait_until="load")
    findings.opened_s = max(findings.opened_s, time.perf_counter() - begin)
    if pictures is not None:
        _picture(page, pictures / f"{report.stem}-{width}-{scheme}.png", findings)
    _layout(page, where, findings)
    _accessibility(page, where, findings)
    if pictures is not None and (width, scheme) == (WIDTHS[-1], "dark"):
        path = pictures / f"{report.stem}.pdf"
        page.pdf(path=path, format="A4", print_background=True, prefer_css_page_size=True)
        findings.pictures.append(path)
    page.close()


def _heard(url: str, report: Path, where: str, findings: Findings) -> None:
    if url != report.resolve().as_uri() and not url.startswith("data:"):
        findings.problems.append(f"{where}: asked for {url}")


def _picture(page: Any, path: Path, findings: Findings) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=path, full_page=True)
    findings.pictures.append(path)


def _layout(page: Any, where: str, findings: Findings) -> None:
    """Nothing may make the page wider than the screen."""
    wide, screen = page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    if wide > screen:
        findings.problems.append(f"{where}: {wide} px wide on a screen of {screen}")


def _accessibility(page: Any, where: str, findings: Findings) -> None:
    """axe-core over the page with everything unfolded, in a world of its own beside the CSP."""
    if importlib.util.find_spec("axe_core_python") is None:
        return
    from axe_core_python.sync_playwright import Axe

    findings.with_axe = True
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    for violation in Axe().run(page)["violations"]:
        nodes = violation["nodes"]
        findings.problems.append(
            f"{where}: axe: {violation['id']}: {violation['help']} "
            f"({len(nodes)} x, first {nodes[0]['html'][:160]})"
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.browser", description=__doc__)
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="Folder for screenshots and prints.")
    options = parser.parse_args()
    if importlib.util.find_spec("playwright") is None or browser_path() is None:
        print(f"playwright, and one of {', '.join(BROWSERS)}, is needed", file=sys.stderr)
        return 2
    problems = 0
    for report in options.reports:
        findings = check_page(report, options.output)
        print(
            f"{report}: {report.stat().st_size / 1e6:.2f} MB, opened in {findings.opened_s:.2f} s, "
            f"{len(findings.problems)} problems, axe-core: {findings.with_axe}",
            *(f"  {line}" for line in (*findings.problems, *findings.pictures)),
            sep="\n",
        )
        problems += len(findings.problems)
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main())
