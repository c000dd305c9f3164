"""Models that bring their own code, loaded with leave."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import ModelSourceError, UnsafeModelError
from exporter.models.loading.model_files import save_checkpoint
from exporter.models.loading.model_source import load_model
from tests.raising import raises
from tests.tiny_models import tiny_loaded, tiny_model

pytestmark = pytest.mark.torch

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

class KidConfig(LlamaConfig):
    model_type = "new_kid"

class KidModel(LlamaModel):
    config_class = KidConfig

class KidForCausalLM(LlamaForCausalLM):
    config_class = KidConfig
"""
CAUSAL = {"AutoConfig": "code.KidConfig", "AutoModelForCausalLM": "code.KidForCausalLM"}


@pytest.fixture
def kid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of a Llama under a name that transformers doesn't know."""
    from transformers import dynamic_module_utils

    # Code from models is copied into a package of its own, and imported from there.
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    folder = tmp_path / "kid"
    save_checkpoint(tiny_loaded("llama"), folder)
    (folder / "code.py").write_text(CODE)
    return folder


def _load(folder: Path, auto_map: dict[str, str], name: str, *, trust: bool = True) -> Any:
    path = folder / "config.json"
    changes = {"model_type": "new_kid", "auto_map": auto_map, "architectures": [name]}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return load_model(str(folder), trust_remote_code=trust)


@pytest.mark.parametrize(
    ("auto_map", "saved_from", "loaded_as"),
    [
        (CAUSAL, "KidForCausalLM", "KidForCausalLM"),
        (CAUSAL | {"AutoModel": "code.KidModel"}, "KidForCausalLM", "KidForCausalLM"),
        (CAUSAL | {"AutoModel": "code.KidModel"}, "KidModel", "KidModel"),
        (CAUSAL | {"AutoModel": "code.KidModel"}, "KidForOthers", "KidForCausalLM"),
        # transformers has a class of that name, which isn't the one that is meant.
        (CAUSAL, "GPT2LMHeadModel", "KidForCausalLM"),
    ],
)
def test_the_class_is_the_one_that_the_code_brings(
    kid: Path, auto_map: dict[str, str], saved_from: str, loaded_as: str
) -> None:
    import torch

    loaded = _load(kid, auto_map, saved_from)
    assert loaded.ref.architecture == loaded_as
    ids = torch.arange(3, 13)[None]
    expected = tiny_model("llama")
    with torch.no_grad():
        if loaded_as == "KidModel":
            expected = expected.model
        assert loaded.model(ids)[0].equal(expected(ids)[0])


def test_without_leave_nothing_is_loaded(kid: Path) -> None:
    with raises(UnsafeModelError, "unread-model-type", "--trust-remote-code"):
        _load(kid, CAUSAL, "KidForCausalLM", trust=False)


def test_code_that_is_not_there(kid: Path) -> None:
    (kid / "code.py").unlink()
    with raises(ModelSourceError, "load-failed"):
        _load(kid, CAUSAL, "KidForCausalLM")


def test_a_known_model_runs_its_brought_code_with_leave_only(kid: Path) -> None:
    path = kid / "config.json"
    changes = {"auto_map": {"AutoModelForCausalLM": "code.KidForCausalLM"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert load_model(str(kid)).ref.architecture == "LlamaForCausalLM"
    assert load_model(str(kid), trust_remote_code=True).ref.architecture == "KidForCausalLM"
