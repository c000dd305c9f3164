"""Models of strangers: their code runs with leave alone, and the Hub is off while they load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import ModelSourceError, UnsafeModelError
from exporter.models.loading.model_files import save_checkpoint
from exporter.models.loading.model_source import load_model
from tests.raising import raises
from tests.tiny_models import tiny_loaded, tiny_model

KID = """
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
    (folder / "code.py").write_text(KID)
    return folder


def _load(folder: Path, auto_map: dict[str, str], name: str, *, trust: bool = True) -> Any:
    path = folder / "config.json"
    changes = {"model_type": "new_kid", "auto_map": auto_map, "architectures": [name]}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return load_model(str(folder), trust_remote_code=trust)


@pytest.mark.torch
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


@pytest.mark.torch
def test_a_known_model_runs_its_brought_code_with_leave_only(kid: Path) -> None:
    path = kid / "config.json"
    changes = {"auto_map": {"AutoModelForCausalLM": "code.KidForCausalLM"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert load_model(str(kid)).ref.architecture == "LlamaForCausalLM"
    assert load_model(str(kid), trust_remote_code=True).ref.architecture == "KidForCausalLM"
    with raises(UnsafeModelError, "", "--trust-remote-code"):
        _load(kid, CAUSAL, "KidForCausalLM", trust=False)
    (kid / "code.py").unlink()
    with raises(ModelSourceError, "load-failed"):
        _load(kid, CAUSAL, "KidForCausalLM")


HUB_OFF = """
import os, sys
calls = []
sys.addaudithook(lambda event, args: event == "socket.connect" and calls.append(event))
import huggingface_hub, huggingface_hub.constants as constants
from exporter.models.loading.model_class import hub_off
from transformers.utils import hub

def ask():
    before = len(calls)
    try:
        huggingface_hub.HfApi().model_info("owner/name", timeout=2)
    except Exception as error:
        pass
    return len(calls) - before

def state():
    flags = [constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_IMPLICIT_TOKEN]
    return [*flags, getattr(hub, "_is_offline_mode", False), "HF_HUB_OFFLINE" in os.environ]

first = state()
online = ask()
with hub_off():
    with hub_off():
        off = [ask()]
    off.append(ask())  # the inner block has not switched it on again
    inside = state()
print(online > 0, off, ask() > 0, state() == first, all(inside[:2]), inside[-1])
"""


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("5", marks=pytest.mark.torch),
        pytest.param("4.57", marks=pytest.mark.optimum),
    ],
)
def test_the_hub_is_off_in_the_block_and_only_there(line: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HUB_OFF], capture_output=True, text=True, check=True, timeout=120,
        # Nobody listens there, so asking is a connection that is refused at once.
        env={"PATH": "/usr/bin", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_x"},
    )  # fmt: skip
    assert done.stdout.split("\n")[-2] == "True [0, 0] True True True True", done.stderr
