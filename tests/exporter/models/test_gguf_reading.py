"""A GGUF file whose header is parsed once gives the model that plain loading gives."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.models.loading import gguf_file
from exporter.models.loading.gguf_file import header_read_once

pytestmark = pytest.mark.torch

_WIDTH = 32
_TOKENS = ["<s>", "</s>", *"abcdefghijkl", "ab", "cd"]
_KINDS = {"attn_q": "Q4_0", "ffn_up": "Q8_0", "ffn_down": "F16"}


def _tiny_gguf(path: Path, seed: int = 0) -> Path:
    """A Llama of two layers with a vocabulary, in several types."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(16)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_WIDTH)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(_TOKENS)
    writer.add_token_types([3, 3, *[1] * (len(_TOKENS) - 2)])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, kind, values in _weights(seed):
        which = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(values, which), raw_dtype=which)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _weights(seed: int) -> list[tuple[str, str, Any]]:
    square = (_WIDTH, _WIDTH)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (len(_TOKENS), _WIDTH),
        "output_norm": (_WIDTH,),
    }
    block = dict.fromkeys(("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), square)
    block |= dict.fromkeys(("attn_k", "attn_v"), (_WIDTH // 2, _WIDTH))
    norms = dict.fromkeys(("attn_norm", "ffn_norm"), (_WIDTH,))
    for layer in range(2):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in (block | norms).items()}
    rng = np.random.default_rng(seed)
    return [
        (
            f"{name}.weight",
            _KINDS.get(name.rpartition(".")[2], "F32"),
            rng.standard_normal(shape).astype(np.float32),
        )
        for name, shape in shapes.items()
    ]


def _told(path: Path) -> dict[str, Any]:
    """All that a load brings, its weights as bytes."""
    import torch

    model, info, tokenizer = gguf_file.load_gguf(path, torch.float32)
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
        patch.setattr(gguf_file, "header_read_once", contextlib.nullcontext)
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


def test_nothing_is_kept_for_the_next_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative twin: other weights under the same name are seen, and compared as others."""
    path = _tiny_gguf(tmp_path / "a.gguf")
    first = _told(path)
    path.unlink()
    second = _told(_tiny_gguf(path, seed=1))
    assert second["weights"] != first["weights"]
    assert second == _plainly(monkeypatch, path)


def test_gguf_is_as_before_whatever_happens() -> None:
    import gguf

    kinds = (gguf.GGUFReader, gguf.TensorNameMap)
    before = [dict(vars(kind)) for kind in kinds]
    with header_read_once():
        assert [dict(vars(kind)) for kind in kinds] != before
    assert [dict(vars(kind)) for kind in kinds] == before
    with pytest.raises(ZeroDivisionError), header_read_once():
        _ = 1 // 0
    assert [dict(vars(kind)) for kind in kinds] == before


def test_what_fails_fails_each_time(tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 64)
    with header_read_once():
        for _ in range(2):
            with pytest.raises(ValueError, match="version"):
                gguf.GGUFReader(path)
