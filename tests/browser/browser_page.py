"""Opens a report in a real browser and says what is wrong with it."""

from __future__ import annotations

import importlib.util
import shutil
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


def missing() -> str | None:
    """What keeps a browser from being started here; None when nothing does."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed"
    return None if browser_path() else f"none of {', '.join(BROWSERS)} is installed"


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
