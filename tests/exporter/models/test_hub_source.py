"""What is fetched for a hub id, from a repository that stands on this disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from exporter.models.loading.sources import resolve_source, source_sha256

pytestmark = pytest.mark.torch


FILES = {
    "config.json": json.dumps({"model_type": "llama"}),
    "model.safetensors": "\x02" + "\0" * 7 + "{}",
    "modeling.py": "code",
    "README.md": "words",
    "onnx/model.safetensors": "others",
    "original/tokenizer.model": "others",
    "nested/modeling.py": "others",
    "additional_chat_templates/rag.jinja": "template",
    "additional_chat_templates/config.json": "others",
}
WANTED = {"config.json", "model.safetensors", "additional_chat_templates/rag.jinja"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot that each fetch adds its files to, chosen as the hub's client chooses them."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    remote, local = tmp_path / "remote", tmp_path / "local"
    for name, content in FILES.items():
        path = remote / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    def snapshot_download(
        name: str, *, revision: Any, allow_patterns: Any, ignore_patterns: Any
    ) -> str:
        present = [p.relative_to(remote).as_posix() for p in remote.rglob("*") if p.is_file()]
        for kept in filter_repo_objects(
            present, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (local / kept).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(remote / kept, local / kept)
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    # As in a fresh process: not all that is imported sets it.
    monkeypatch.delattr(huggingface_hub, "constants", raising=False)
    return local


def _names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_only_what_the_model_is_made_of_is_fetched(cache: Path) -> None:
    assert resolve_source("owner/name") == cache
    assert _names(cache) == WANTED


def test_code_is_fetched_and_hashed_with_leave_only(cache: Path) -> None:
    plain = source_sha256("owner/name")
    assert "modeling.py" not in _names(cache)
    first = source_sha256("owner/name", trust_remote_code=True)
    assert _names(cache) == WANTED | {"modeling.py"}
    resolve_source("owner/name", trust_remote_code=True)
    assert source_sha256("owner/name", trust_remote_code=True) == first != plain
