"""Weights apart from their model: filled in by module, and a GGUF header that is read once."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.errors import ModelSourceError, UnknownArchitectureError, UnsafeModelError
from exporter.models.loading import model_source
from exporter.models.loading.meta_model import MetaModel, ShardedWeights, load_meta
from exporter.models.loading.model_class import quiet_transformers
from exporter.models.loading.model_source import load_model
from tests.raising import raises
from tests.tiny_gguf import VOCABULARY, TinyGguf
from tests.tiny_models import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.torch


# Ties, fused experts, norms in odd places, positions in buffers, renamed parts.
FAMILIES = ("llama", "gpt2", "mixtral", "gemma3_text", "gpt_neox", "deepseek_v3", "opt", "bert")


def saved(folder: Path, family: str, **changes: Any) -> Path:
    model = tiny_model(family, **changes)
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size="30KB")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = saved(tmp_path_factory.mktemp("llama"), "llama")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_filled_it_is_the_loaded_model(tmp_path: Path, family: str) -> None:
    import torch

    whole, meta = load_model(str(saved(tmp_path, family))), load_meta(str(tmp_path))
    assert meta.ref == whole.ref
    assert all(parameter.is_meta for parameter in meta.model.parameters())
    buffers = dict(meta.model.named_buffers())
    for name, buffer in whole.model.named_buffers():
        assert buffers[name].dtype == buffer.dtype
        assert torch.equal(buffers[name], buffer), name
    before = meta.shards.bytes_read
    meta.weights.materialise()
    assert meta.shards.bytes_read - before == sum(p.nbytes for p in whole.model.parameters())
    _expect_same(whole.model, meta)
    meta.weights.release()
    assert all(parameter.is_meta for parameter in meta.model.parameters())


def _expect_same(whole: Any, meta: MetaModel) -> None:
    import torch

    expected = dict(whole.named_parameters(remove_duplicate=False))
    result = dict(meta.model.named_parameters(remove_duplicate=False))
    assert expected.keys() == result.keys()
    for name, parameter in result.items():
        assert not parameter.requires_grad
        assert parameter.dtype == expected[name].dtype
        assert torch.equal(parameter, expected[name]), name
    ties = [len({id(p) for p in some.values()}) for some in (expected, result)]
    assert ties[0] == ties[1]


def test_a_failure_empties_the_module_too(llama: Path) -> None:
    meta = load_meta(str(llama))
    prefix = "model.layers.1"
    expected = load_model(str(llama)).model.get_submodule(prefix).state_dict()
    with meta.held(prefix, meta.weights.fetch(prefix)):
        filled = {name for name, p in meta.model.named_parameters() if not p.is_meta}
        assert filled == {f"{prefix}.{name}" for name in expected}
        assert filled == set(meta.weights.names(prefix))
        assert meta.shards.bytes_read == meta.weights.nbytes(prefix)
        for name, tensor in meta.model.get_submodule(prefix).state_dict().items():
            assert tensor.equal(expected[name])
    assert all(parameter.is_meta for parameter in meta.model.parameters())
    assert not meta.weights.names("model.layer")  # a part of a name is no prefix
    with pytest.raises(KeyboardInterrupt), meta.held("model.layers.0"):
        raise KeyboardInterrupt
    assert all(parameter.is_meta for parameter in meta.model.parameters())


@pytest.mark.parametrize("step", ["_load", "_share"])
def test_a_module_that_fills_in_part_is_emptied(
    llama: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    meta, kept = load_meta(str(llama)), "model.layers.0.mlp.up_proj"
    meta.weights.materialise(kept)
    done = getattr(ShardedWeights, step)

    def interrupted(self: ShardedWeights, *args: Any) -> None:
        done(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardedWeights, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        meta.weights.materialise("model.layers.0")
    monkeypatch.setattr(ShardedWeights, step, done)
    filled = [name for name, p in meta.model.named_parameters() if not p.is_meta]
    assert filled == [f"{kept}.weight"]
    meta.weights.release(kept)
    with meta.held("model.layers.0"):
        pass
    assert all(parameter.is_meta for parameter in meta.model.parameters())


def test_what_a_shared_module_lost_since_the_fetch_is_read(llama: Path) -> None:
    loaded = load_meta(str(llama))
    layers = loaded.model.model.layers
    layers[2].mlp = layers[1].mlp
    meta = dataclasses.replace(loaded, weights=ShardedWeights(loaded.model, loaded.shards))
    with meta.held("model.layers.1"):
        fetched = meta.weights.fetch("model.layers.2")
        assert not any("mlp" in name for name in fetched)
    with meta.held("model.layers.2", fetched):
        assert not any(parameter.is_meta for parameter in layers[2].parameters())
    assert all(parameter.is_meta for parameter in meta.model.parameters())


def test_a_tie_is_read_once_and_stays_while_one_side_is_filled(tmp_path: Path) -> None:
    meta = load_meta(str(saved(tmp_path, "llama", tie_word_embeddings=True)))
    embedding, head = meta.model.get_input_embeddings(), meta.model.get_output_embeddings()
    meta.weights.materialise("model.embed_tokens")
    read = meta.shards.bytes_read
    with meta.held("lm_head"):
        assert head.weight is embedding.weight
        assert meta.shards.bytes_read == read == embedding.weight.nbytes
    assert not embedding.weight.is_meta
    meta.weights.release("model.embed_tokens")
    assert embedding.weight.is_meta
    assert head.weight is embedding.weight
    with meta.held("lm_head"):
        assert not embedding.weight.is_meta
    assert embedding.weight.is_meta


@pytest.mark.parametrize("same", [True, False])
def test_a_tie_that_the_shards_hold_twice(tmp_path: Path, same: bool) -> None:
    from safetensors.torch import load_file, save_file

    with quiet_transformers():
        tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    head = weights["model.embed_tokens.weight"].clone()
    save_file(weights | {"lm_head.weight": head if same else head + 1}, path)
    whole, meta = load_model(str(tmp_path)), load_meta(str(tmp_path))
    meta.weights.materialise()
    _expect_same(whole.model, meta)
    tied = meta.model.lm_head.weight is meta.model.get_input_embeddings().weight
    assert tied == same


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes(tmp_path: Path, dtype: str) -> None:
    folder = str(saved(tmp_path, "gpt_oss"))  # keeps some modules in float32
    meta = load_meta(folder, dtype=dtype)
    meta.weights.materialise()
    _expect_same(load_model(folder, dtype=dtype).model, meta)


def test_tokenizer_and_generation_config_come_along(llama: Path) -> None:
    meta = load_meta(str(llama))
    assert meta.tokenizer is not None
    path = llama / "generation_config.json"
    assert meta.model.generation_config.eos_token_id == json.loads(path.read_text())["eos_token_id"]
    assert meta.model.config.name_or_path == str(llama)


def test_weights_that_are_missing(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with quiet_transformers():
        tiny_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    for load in (load_meta, load_model):  # whole, they are not made up either
        with raises(ModelSourceError, "unreadable", 1, "layers.1.mlp.up_proj"):
            load(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "options", "kind", "code", "named"),
    [
        ({"intermediate_size": 40}, {}, ModelSourceError, "load-failed", ""),
        ({"model_type": "nothing"}, {}, UnsafeModelError, "", "'nothing'"),
        ({"model_type": "nothing"}, {"allow_any_model_type": True}, ModelSourceError,
         "load-failed", "nothing"),
        ({"model_type": None}, {}, UnknownArchitectureError, "unknown-family", "config.json"),
        ({}, {"gguf": True}, ModelSourceError, "quantized", "m.gguf"),
        ({}, {"old": "4.57.1"}, ModelSourceError, "", "4.57.1"),
        *[({}, {"dtype": name}, ModelSourceError, "option-value", name)
          for name in ("auto", "float64", "int8", "foo")],
    ],
)  # fmt: skip
def test_what_can_not_be_streamed(
    tmp_path: Path, monkeypatch: Any, changes: Any, options: Any, kind: Any, code: str, named: str
) -> None:
    path = saved(tmp_path, "llama")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    if options.pop("gguf", False):
        path = TinyGguf.llama().write(tmp_path / "m.gguf")
    if old := options.pop("old", ""):
        monkeypatch.setattr("transformers.__version__", old)
    for load in (load_meta, load_model) if "dtype" in options else (load_meta,):
        with raises(kind, code, named):
            load(str(path), **options)


_TOKENS = ["<s>", "</s>", *"abcdefghijkl", "ab", "cd"]
_KINDS = {"attn_q": "Q4_0", "ffn_up": "Q8_0", "ffn_down": "F16"}


def _tiny_gguf(path: Path, seed: int = 0) -> Path:
    """A Llama of two layers with a vocabulary, in several types."""
    import gguf

    tiny = TinyGguf.llama(2, seed=seed)
    rest = [f"<{number}>" for number in range(VOCABULARY - len(_TOKENS))]
    tiny.entries |= {
        "tokenizer.ggml.tokens": [*_TOKENS, *rest],
        "tokenizer.ggml.token_type": ("i", [3, 3, *[1] * (VOCABULARY - 2)]),
        "tokenizer.ggml.merges": ["a b", "c d"],
        "tokenizer.ggml.bos_token_id": ("I", 0),
        "tokenizer.ggml.eos_token_id": ("I", 1),
    }
    for name, (shape, _, content) in tiny.tensors.items():
        kind = gguf.GGMLQuantizationType[_KINDS.get(name.split(".")[-2], "F32")]
        values = np.frombuffer(content, np.float32).reshape(shape[::-1])
        tiny.tensors[name] = (shape, int(kind), gguf.quants.quantize(values, kind).tobytes())
    return tiny.write(path)


def _told(path: Path) -> dict[str, Any]:
    """All that a load brings, its weights as bytes."""
    import torch

    model, info, tokenizer = model_source.load_gguf(path, torch.float32)
    weights = {
        name: (tensor.dtype, tuple(tensor.shape), tensor.numpy().tobytes())
        for name, tensor in model.state_dict().items()
    }
    return {
        "weights": weights,
        "config": model.config.to_dict(),
        "info": {name: sorted(keys) for name, keys in info.items()},
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
    }


def _plainly(monkeypatch: pytest.MonkeyPatch, path: Path) -> dict[str, Any]:
    with monkeypatch.context() as patch:
        patch.setattr(model_source, "header_read_once", contextlib.nullcontext)
        return _told(path)


def _count(monkeypatch: pytest.MonkeyPatch, kind: Any, name: str) -> list[str]:
    calls: list[str] = []
    real = getattr(kind, name)

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(kind, name, counted)
    return calls


def test_a_load_is_bit_equal_to_a_plain_one_and_parses_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    path = _tiny_gguf(tmp_path / "a.gguf")
    headers = _count(monkeypatch, gguf.GGUFReader, "__init__")
    tables = _count(monkeypatch, gguf.TensorNameMap, "__init__")
    plain = _plainly(monkeypatch, path)
    assert len(headers) > 1
    assert len(tables) > 1
    headers.clear()
    tables.clear()
    assert _told(path) == plain
    assert (len(headers), len(tables)) == (1, 1)


@pytest.mark.parametrize("name", ["m.gguf", "generation_config.json"])
def test_a_gguf_file_s_type_is_looked_at_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("exporter.models.loading.checked_folder.REVIEWED", {"qwen2"})
    (tmp_path / "linked.gguf").symlink_to(_tiny_gguf(tmp_path / name))
    for path in (tmp_path / name, tmp_path / "linked.gguf"):
        with raises(UnsafeModelError, "", path, "llama"):
            model_source.load_gguf(path, "float32")


def test_nothing_is_kept_for_the_next_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative twin: other weights under the same name are seen, and compared as others."""
    path = _tiny_gguf(tmp_path / "a.gguf")
    first = _told(path)
    path.unlink()
    second = _told(_tiny_gguf(path, seed=1))
    assert second["weights"] != first["weights"]
    assert second == _plainly(monkeypatch, path)
