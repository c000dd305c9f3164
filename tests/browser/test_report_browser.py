"""The page in a real browser: silent, offline, accessible, as wide as the screen, and quick."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.report.files import write_study
from exporter.score.comparison import compare_files
from tests.browser.__main__ import check_page
from tests.made_reports import as_page, full_report, gate_accuracy, narrow
from tests.made_tables import made_depths, training

pytestmark = pytest.mark.browser


def test_a_full_page_has_no_problem(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(as_page(full_report()), encoding="utf-8")
    findings = check_page(page, tmp_path)
    assert findings.problems == []
    assert len(findings.pictures) == 5


def test_the_longest_sign_fits_a_narrow_screen(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    unclear = gate_accuracy(17.0, log_perplexity_increase=narrow(0.06, 0.1))
    text = as_page(full_report().model_copy(update={"accuracy": unclear}))
    assert "can&#39;t tell whether it is less accurate" in text
    page.write_text(text, encoding="utf-8")
    assert check_page(page).problems == []


def test_hostile_names_run_nothing(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    script = "<script>console.log('run')</script><img src=https://example.org/x>"
    page.write_text(as_page(full_report(text=script)), encoding="utf-8")
    assert check_page(page).problems == []


def test_study_pages_have_no_problem(tmp_path: Path) -> None:
    write_study(compare_files(training(tmp_path)), tmp_path / "training.json")
    write_study(made_depths(), tmp_path / "depths.json")
    for name in ("training.html", "depths.html"):
        assert check_page(tmp_path / name).problems == []


def test_a_page_that_is_wrong_is_found_out(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(
        "<title>x</title><img src='http://127.0.0.1:9/x.png'><script>console.log(1)</script>"
        "<div style='width: 3000px'>x</div>",
        encoding="utf-8",
    )
    text = "\n".join(check_page(page).problems)
    assert "asked for http://127.0.0.1:9/x.png" in text
    assert "console: 1" in text
    assert "px wide on a screen of 390" in text
