"""Models of strangers: nothing of theirs runs without leave, or reads what isn't in them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import ModelSourceError, UnsafeModelError
from exporter.models.loading.model_files import save_checkpoint
from exporter.models.loading.model_source import load_model
from tests.raising import raises
from tests.reading import in_file
from tests.tiny_models import tiny_loaded, tiny_model, tiny_tokenizer

Change = Callable[[Path, Path], None]
"""Makes a good model's folder a hostile one; the second is a folder with what isn't to be read."""

DETR = {
    "model_type": "detr", "architectures": ["DetrModel"], "use_timm_backbone": False,
    "use_pretrained_backbone": False,
}  # fmt: skip
SECRET, RAN = "secret.json", "ran"
DEEP = "[" * 200_000


def outside(folder: Path) -> Path:
    """What hostile models are after: a secret, and a place where their code would leave a trace."""
    folder.mkdir()
    (folder / SECRET).write_text(json.dumps({"secret": 1}))
    (folder / "templates").mkdir()
    (folder / "empty").mkdir()
    (folder / "templates" / "more.jinja").write_text("x")
    code = folder / "evil" / "bb"
    code.mkdir(parents=True)
    (code / "config.json").write_text(
        json.dumps({"model_type": "bb", "auto_map": {"AutoConfig": "code.C"}})
    )
    (code / "code.py").write_text(f"open({str(folder / RAN)!r}, 'w').close()\n")
    return folder


def change(apply: Callable[..., None]) -> Callable[..., Change]:
    """What is to be changed is told first, in which folder later."""
    return lambda *args, **entries: lambda folder, aim: apply(folder, aim, *args, **entries)


@change
def json_file(folder: Path, aim: Path, name: str, **entries: Any) -> None:
    """Changes entries of a JSON file, which need not be there."""
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    filled = json.loads(json.dumps(entries).replace("AIM", str(aim)))
    path.write_text(json.dumps(content | filled))


def config(**entries: Any) -> Change:
    return json_file("config.json", **entries)


@change
def text(folder: Path, aim: Path, name: str, content: str | bytes) -> None:
    """Writes a file."""
    (folder / name).parent.mkdir(exist_ok=True)
    if isinstance(content, str):
        content = content.replace("AIM", str(aim)).encode()
    (folder / name).write_bytes(content)


@change
def link(folder: Path, aim: Path, name: str, target: str = f"AIM/{SECRET}") -> None:
    """Puts a link in a file's place."""
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target.replace("AIM", str(aim)))


@change
def fifo(folder: Path, _aim: Path, name: str) -> None:
    """Puts a pipe in a file's place, at which a reader would wait for ever."""
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)


@change
def grown(folder: Path, _aim: Path, name: str, size: int) -> None:
    """A file with nothing behind what it holds, which takes no room."""
    (folder / name).touch()
    os.truncate(folder / name, size)


@change
def index(folder: Path, aim: Path, **places: str) -> None:
    """Shards in places of the index's choice."""
    filled = {name: place.replace("AIM", str(aim)) for name, place in places.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": filled}))


REFUSED: dict[str, Change] = {
    # The findings of the review, as they were reported.
    "code by the arguments of a backbone": config(
        **DETR, backbone="evil/bb", backbone_kwargs={"trust_remote_code": True}
    ),
    "a request for a backbone": config(**DETR, backbone="attacker/beacon"),
    "an adapter": json_file(
        "adapter_config.json", base_model_name_or_path="attacker/base", peft_type="LORA"
    ),
    "a template that is the environment": link("chat_template.jinja", "/proc/self/environ"),
    "a config that is nested without end": text("config.json", DEEP),
    # Their kin: code and other models.
    "a backbone deep inside": config(text_config={"parts": [{"backbone": "attacker/b"}]}),
    "code allowed deep inside": config(vision_config={"x": {"trust_remote_code": True}}),
    "code allowed by the generation's config": json_file(
        "generation_config.json", trust_remote_code=True
    ),
    "code for generating": json_file("generation_config.json", custom_generate="a/b"),
    "code for generating, in a file of its own": text(
        "custom_generate/generate.py", f"open('AIM/{RAN}', 'w').close()\n"
    ),
    "code of a type that nobody knows": config(model_type="kid", auto_map={"AutoConfig": "code.C"}),
    "code at a path": config(auto_map={"AutoConfig": "../outside/evil/bb/code.C"}),
    "a kernel for the attention": config(attn_implementation="attacker/kernel"),
    "a kernel for the experts": config(_experts_implementation={"": "a/kernel@main:f"}),
    "a timm backbone": config(**DETR | {"use_timm_backbone": True}),
    "a model of two others": config(
        model_type="encoder-decoder",
        encoder={"model_type": "llama"},
        decoder={"model_type": "llama"},
    ),
    "a type deep inside": config(parts=[{"model_type": "timm_wrapper"}]),
    "a type that is no text": config(model_type=["llama"]),
    "another config in its place": config(configuration_files=["config.4.0.0.json"]),
    "code of another repository": config(auto_map={"AutoConfig": "attacker/code--code.C"}),
    "a tokenizer's code of another repository": json_file(
        "tokenizer_config.json", auto_map={"AutoTokenizer": ["a/b--c.T", None]}
    ),
    # Files elsewhere.
    "a tokenizer's file elsewhere": json_file(
        "tokenizer_config.json", tokenizer_file=f"AIM/{SECRET}"
    ),
    "a vocabulary elsewhere": json_file("tokenizer_config.json", vocab=f"AIM/{SECRET}"),
    "a vocabulary elsewhere, by the special tokens": json_file(
        "special_tokens_map.json", vocab_file=f"AIM/{SECRET}"
    ),
    "a tokenizer's arguments by order": json_file(
        "tokenizer_config.json", init_inputs=[f"AIM/{SECRET}"]
    ),
    "a sentencepiece model elsewhere": json_file(
        "tokenizer_config.json", sp_model_kwargs={"model_file": f"AIM/{SECRET}"}
    ),
    "a tokenizer of several models": json_file(
        "tokenizer_config.json", tokenizer_class="RagTokenizer"
    ),
    "a tokenizer with a program": json_file(
        "tokenizer_config.json", tokenizer_class="BertJapaneseTokenizer"
    ),
    "weights elsewhere": config(transformers_weights=f"../outside/{SECRET}"),
    "shards above": index(a=f"../outside/{SECRET}"),
    "shards at an absolute path": index(a=f"AIM/{SECRET}"),
    "a config that is a link": link("config.json"),
    "a tokenizer that is a link": link("tokenizer.json"),
    "weights that are a link": link("model.safetensors"),
    "code that is a link": link("code.py"),
    "a further template that is a link": link("additional_chat_templates/rag.jinja"),
    "a folder of templates that is a link": link("additional_chat_templates", "AIM/templates"),
    "a folder of templates that is a link to an empty one": link(
        "additional_chat_templates", "AIM/empty"
    ),
    "code for generating in a folder that is a link": link("custom_generate", "AIM/templates"),
    # No files, and files of no sane size.
    "a circle of links": link("generation_config.json", "generation_config.json"),
    "a config that is a pipe": fifo("config.json"),
    "a tokenizer that is a pipe": fifo("tokenizer.json"),
    "weights that are a pipe": fifo("model.safetensors"),
    "a config without end": link("config.json", "/dev/zero"),
    "a config of a gigabyte of nothing": grown("config.json", 1 << 30),
    "a tokenizer of a terabyte of nothing": grown("tokenizer.json", 1 << 40),
    "a tokenizer that is nested without end": text("tokenizer.json", DEEP),
    "a tokenizer's config that is nested without end": text("tokenizer_config.json", DEEP),
    "layers without end": config(num_hidden_layers=1 << 64),
    "layers without end, deep inside": config(text_config={"n_layers": 1 << 31}),
    "far more layers than weights": config(num_hidden_layers=9_000),
    "many more layers than weights": config(num_hidden_layers=600),
    "a width without end": config(hidden_size=1_000_000_000),
    "a vocabulary without end": config(vocab_size=1 << 40),
    "half a character": text("config.json", r'{"model_type": "llama", "x": "\ud800"}'),
    "a header of no sane size": text("model.safetensors", (1 << 62).to_bytes(8, "little") + b"{}"),
    "a header that is nested without end": text(
        "model.safetensors", (200_000).to_bytes(8, "little") + DEEP.encode()
    ),
    "an index that is nested without end": text("model.safetensors.index.json", DEEP),
    "a type with control characters": config(model_type="\x1b[2J\n::error::x\u202e"),
    "a shard with control characters": index(a="../\x1b]0;x\x07\n::error::y"),
}
"""Each must end with exit code 2 and one line; with the leave that it is given."""

LEAVE = {
    "code of a type that nobody knows": "allow_any_model_type: true",
    "code at a path": "--trust-remote-code",
    "code of another repository": "--trust-remote-code",
    "a tokenizer's code of another repository": "--trust-remote-code",
    "code that is a link": "--trust-remote-code",
    "code for generating in a folder that is a link": "--trust-remote-code",
}

BROKEN: dict[str, Change] = {
    "a size in words": config(vocab_size="many"),
    "an epsilon in words": config(rms_norm_eps="\x1b[2J"),
    "a model without layers": config(num_hidden_layers=0),
    "weights of a terabyte of nothing": grown("model.safetensors", 1 << 40),
    "a terabyte of nothing beside the weights": grown("extra.safetensors", 1 << 40),
    "a config that is no UTF-8": text("config.json", b'{"model_type": "\xff"}'),
    "a config that is cut off": text("config.json", '{"model_type": "lla'),
    "a config with sizes that are no numbers": config(hidden_size=float("nan")),
    "a number of a million digits": text(
        "config.json", '{"model_type": "llama", "hidden_size": 1' + "0" * 1_000_000 + "}"
    ),
    "a generation's config that is a list": text("generation_config.json", "[]"),
    "a tokenizer at which its library panics": json_file(
        "tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    ),
    "a length that is no number": json_file("tokenizer_config.json", model_max_length="x"),
    "a shard that is not there": index(a="none.safetensors"),
}
"""What is no attack and can't be loaded either: one line, and any code but 0."""


RUNNER = Path(__file__).parents[1] / "hostile_runner.py"
ROOT = Path(__file__).parents[3]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("5", marks=pytest.mark.torch),
        pytest.param("4.57", marks=pytest.mark.optimum),
    ],
)
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What came of each case, by its name; all in one process, for importing takes seconds."""
    home = tmp_path_factory.mktemp("hostile")
    good, aim = home / "good", outside(home / "outside")
    save_checkpoint(tiny_loaded("llama", tiny_tokenizer()), good)
    calls = {"good": _command(good, home / "good.json", None)}
    for number, (name, change) in enumerate((REFUSED | BROKEN).items()):
        folder = Path(shutil.copytree(good, home / str(number)))
        change(folder, aim)
        calls[name] = _command(folder, home / f"{number}.json", LEAVE.get(name))
    return dict(zip(calls, _run(home, aim, list(calls.values())), strict=True)), home, aim


def _command(folder: Path, output: Path, leave: str | None) -> list[str]:
    sizes = ("--samples", "2", "--sequence-length", "16", "--calibration", "pydoc")
    more = in_file(folder, [leave]) if leave else []
    return ["score", str(folder), "-o", str(output), "-q", *sizes, *more]


def _run(home: Path, aim: Path, calls: list[list[str]]) -> list[dict[str, Any]]:
    (home / "calls.json").write_text(json.dumps(calls))
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(home / "calls.json")],
        cwd=aim,  # relative paths of hostile models lead here
        env={"PATH": "/usr/bin", "PYTHONPATH": str(ROOT), "HOME": str(home), "HF_TOKEN": "hf_x"},
        capture_output=True, text=True, timeout=540, check=True,
    )  # fmt: skip
    results: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return results


def test_a_good_model_is_scored_without_the_network(outcomes: Any) -> None:
    result, home, _ = outcomes
    assert result["good"]["code"] == 0, result["good"]["said"]
    assert not result["good"]["network"]
    assert (home / "good.json").is_file()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_hostile_is_refused(outcomes: Any, name: str) -> None:
    result = outcomes[0][name]
    assert result["code"] == 2, result
    _is_harmless(result, outcomes)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_gives_one_line(outcomes: Any, name: str) -> None:
    result = outcomes[0][name]
    assert result["code"] in (1, 2), result
    _is_harmless(result, outcomes)


def _is_harmless(items: dict[str, Any], value: Any) -> None:
    _, _, aim = value
    assert not items["network"]
    assert not items["programs"]
    secrets = {str(aim / SECRET), "/proc/self/environ", "/dev/zero"}
    assert not {os.path.realpath(name) for name in items["opened"]} & secrets
    assert not (aim / RAN).exists()
    line = items["said"].removesuffix("\n")
    assert line.startswith("depthcut: ")
    assert line.isprintable(), line
    assert "Unexpected" not in line


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
    with raises(UnsafeModelError, "unread-model-type", "--trust-remote-code"):
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
