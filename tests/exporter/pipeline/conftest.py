"""What the whole road begins with: a tiny random Llama as a folder, and a cache of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.text_graphs import write_llama_folder


@pytest.fixture(scope="module")
def checkpoint(exports_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_llama_folder(folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
