"""A model without its weights is the loaded one in all but them, and its modules fill alike."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import ModelSourceError, UnknownArchitectureError, UnsafeModelError
from exporter.models.loading.meta_model import MetaModel, ShardedWeights, load_meta
from exporter.models.loading.model_class import quiet_transformers
from exporter.models.loading.model_source import load_model
from tests.raising import raises
from tests.tiny_gguf import TinyGguf
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
    meta.materialise()
    assert meta.shards.bytes_read - before == sum(p.nbytes for p in whole.model.parameters())
    _expect_same(whole.model, meta)
    meta.release()
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


def test_one_module_is_filled_and_the_others_are_not(llama: Path) -> None:
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


def test_a_failure_empties_the_module_too(llama: Path) -> None:
    meta = load_meta(str(llama))
    with pytest.raises(KeyboardInterrupt), meta.held("model.layers.0"):
        raise KeyboardInterrupt
    assert all(parameter.is_meta for parameter in meta.model.parameters())


@pytest.mark.parametrize("step", ["_load", "_share"])
def test_a_module_that_fills_in_part_is_emptied(
    llama: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    meta, kept = load_meta(str(llama)), "model.layers.0.mlp.up_proj"
    meta.materialise(kept)
    done = getattr(ShardedWeights, step)

    def interrupted(self: ShardedWeights, *args: Any) -> None:
        done(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardedWeights, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        meta.materialise("model.layers.0")
    monkeypatch.setattr(ShardedWeights, step, done)
    filled = [name for name, p in meta.model.named_parameters() if not p.is_meta]
    assert filled == [f"{kept}.weight"]
    meta.release(kept)
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
    meta.materialise("model.embed_tokens")
    read = meta.shards.bytes_read
    with meta.held("lm_head"):
        assert head.weight is embedding.weight
        assert meta.shards.bytes_read == read == embedding.weight.nbytes
    assert not embedding.weight.is_meta
    meta.release("model.embed_tokens")
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
    meta.materialise()
    _expect_same(whole.model, meta)
    tied = meta.model.lm_head.weight is meta.model.get_input_embeddings().weight
    assert tied == same


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes(tmp_path: Path, dtype: str) -> None:
    folder = str(saved(tmp_path, "gpt_oss"))  # keeps some modules in float32
    meta = load_meta(folder, dtype=dtype)
    meta.materialise()
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
    save_file(weights, path)
    with raises(ModelSourceError, "weights-missing", 1, "layers.1.mlp.up_proj"):
        load_meta(str(tmp_path))


def test_weights_of_another_shape(llama: Path, tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with raises(ModelSourceError, "load-failed", tmp_path):
        load_meta(str(tmp_path))


def test_what_can_not_be_streamed(tmp_path: Path) -> None:
    gguf = TinyGguf.llama().write(tmp_path / "m.gguf")
    with raises(ModelSourceError, "quantized", gguf):
        load_meta(str(gguf))
    saved(tmp_path, "llama")
    with raises(ModelSourceError, "unknown-dtype", "int8"):
        load_meta(str(tmp_path), dtype="int8")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "nothing"}))
    with raises(UnsafeModelError, "unread-model-type", "'nothing'"):
        load_meta(str(tmp_path))
    with raises(UnknownArchitectureError, "unknown-model-type", "'nothing'"):
        load_meta(str(tmp_path), allow_any_model_type=True)


def test_old_transformers_are_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    with raises(ModelSourceError, "old-library", "4.57.1"):
        load_meta(str(llama))
