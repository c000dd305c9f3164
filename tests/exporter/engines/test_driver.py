from __future__ import annotations

from exporter.engines.build.libraries import ask_driver


def test_a_missing_library_is_a_missing_driver() -> None:
    driver = ask_driver("libno_such_driver.so.1")
    assert driver.problem == "no NVIDIA driver"
    assert driver.devices == ()


def test_a_library_of_another_kind_is_no_driver() -> None:
    assert "is no NVIDIA driver" in ask_driver("libc.so.6").problem
