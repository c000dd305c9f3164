"""Tiny GGUF files, written by hand, and what llama.cpp's graphs compute of them, in numpy."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.models.gguf_header import GgufFile, Tensor, read_header

Floats = NDArray[np.float64]
HIDDEN, HEADS, KV_HEADS, WIDTH, VOCABULARY = 64, 4, 2, 96, 40
HEAD = HIDDEN // HEADS
_EPS, _BASE = 1e-5, 10_000.0
_KINDS = {"B": 0, "b": 1, "H": 2, "h": 3, "I": 4, "i": 5, "f": 6, "?": 7, "Q": 10, "q": 11, "d": 12}


def text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def value_of(value: Any) -> bytes:
    """A value with its type before it: ``("I", 3)``, ``"text"``, ``("I", [1, 2])``, ``["a"]``."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
    form, number = value
    if isinstance(number, list):
        packed = struct.pack(f"<{len(number)}{form}", *number)
        return struct.pack("<IIQ", 9, _KINDS[form], len(number)) + packed
    return struct.pack(f"<I{form}", _KINDS[form], number)


def tiny_entries(layers: int, architecture: str = "llama") -> dict[str, Any]:
    own = {
        "block_count": ("I", layers),
        "context_length": ("I", 64),
        "embedding_length": ("I", HIDDEN),
        "feed_forward_length": ("I", WIDTH),
        "attention.head_count": ("I", HEADS),
        "attention.head_count_kv": ("I", KV_HEADS),
        "attention.layer_norm_rms_epsilon": ("f", _EPS),
        "rope.freq_base": ("f", _BASE),
        "rope.dimension_count": ("I", HEAD),
    }
    return {
        "general.architecture": architecture,
        "general.name": "tiny",
        **{f"{architecture}.{key}": value for key, value in own.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [f"t{number}" for number in range(VOCABULARY)],
        "tokenizer.ggml.scores": ("f", [0.5] * VOCABULARY),
        "tokenizer.ggml.add_bos_token": ("?", False),
        "tokenizer.chat_template": "{{ messages }} \u00e9",
    }


def tiny_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (HIDDEN, VOCABULARY)}
    for layer in range(layers):
        own = {
            "attn_norm": (HIDDEN,),
            "ffn_down": (WIDTH, HIDDEN),
            "ffn_gate": (HIDDEN, WIDTH),
            "ffn_up": (HIDDEN, WIDTH),
            "ffn_norm": (HIDDEN,),
            "attn_k": (HIDDEN, KV_HEADS * HEAD),
            "attn_output": (HIDDEN, HIDDEN),
            "attn_q": (HIDDEN, HIDDEN),
            "attn_v": (HIDDEN, KV_HEADS * HEAD),
        }
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in own.items()}
    return {**shapes, "output_norm.weight": (HIDDEN,)}


@dataclass
class TinyGguf:
    """A file to be written; tests change what they like first.

    ``tensors`` has a shape (the row's length first), a type's number and bytes for each name;
    ``offsets`` those that are not where they belong.
    """

    entries: dict[str, Any]
    tensors: dict[str, tuple[tuple[int, ...], int, bytes]]
    version: int = 3
    offsets: dict[str, int] = field(default_factory=dict)
    tensor_count: int | None = None
    entry_count: int | None = None

    @classmethod
    def llama(cls, layers: int = 4, architecture: str = "llama", seed: int = 0) -> TinyGguf:
        rng = np.random.default_rng(seed)
        tensors = {}
        for name, shape in tiny_shapes(layers).items():
            numbers = rng.standard_normal(shape[::-1]) * (0.2 if len(shape) > 1 else 0.1)
            numbers = numbers + (len(shape) == 1)
            tensors[name] = (shape, 0, numbers.astype(np.float32).tobytes())
        return cls(tiny_entries(layers, architecture), tensors)

    @property
    def alignment(self) -> int:
        value = self.entries.get("general.alignment", ("I", 32))
        return int(value[1]) if value[1] in (8, 16, 32, 64, 128) else 32

    def data(self) -> bytes:
        head = [
            b"GGUF",
            struct.pack(
                "<IQQ",
                self.version,
                len(self.tensors) if self.tensor_count is None else self.tensor_count,
                len(self.entries) if self.entry_count is None else self.entry_count,
            ),
        ]
        head += [text(key) + value_of(value) for key, value in self.entries.items()]
        body, offset = [], 0
        for name, (shape, kind, content) in self.tensors.items():
            result = self.offsets.get(name, offset)
            head.append(
                text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, result)
            )
            padding = b"\0" * (-len(content) % self.alignment)
            body.append(content + padding)
            offset += len(content) + len(padding)
        header = b"".join(head)
        return header + b"\0" * (-len(header) % self.alignment) + b"".join(body)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.data())
        return path

    def write_shards(self, folder: Path, count: int, stem: str = "tiny") -> list[Path]:
        """In shards of about as many tensors, as llama-gguf-split writes them."""
        names = list(self.tensors)
        paths = []
        for number in range(count):
            own = names[number * len(names) // count : (number + 1) * len(names) // count]
            result = {
                "split.no": ("H", number),
                "split.count": ("H", count),
                "split.tensors.count": ("i", len(names)),
            }
            entries = {**(self.entries if number == 0 else {}), **result}
            part = TinyGguf(entries, {name: self.tensors[name] for name in own})
            paths.append(part.write(folder / f"{stem}-{number + 1:05}-of-{count:05}.gguf"))
        return paths


def bytes_of(tensor: Tensor) -> bytes:
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        return file.read(tensor.nbytes)


def tensors_of(path: Path) -> dict[str, bytes]:
    return {tensor.name: bytes_of(tensor) for tensor in read_header(path).tensors}


def _numbers(file: GgufFile) -> dict[str, Floats]:
    floats = {}
    for tensor in file.tensors:
        if tensor.kind == 8:  # Q8_0: a scale and 32 steps of it
            blocks = np.frombuffer(bytes_of(tensor), np.uint8).reshape(-1, 34)
            scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
            flat = (scales * blocks[:, 2:].view(np.int8)).reshape(-1)
        else:
            dtype = {0: np.float32, 1: np.float16}[tensor.kind]
            flat = np.frombuffer(bytes_of(tensor), dtype)
        floats[tensor.name] = flat.reshape(tensor.shape[::-1]).astype(np.float64)
    return floats


def llama_cpp_logits(
    path: Path, tokens: list[int], masked: Mapping[tuple[int, str], Any] | None = None
) -> Floats:
    """What llama.cpp's graphs of ``llama`` and ``deci`` compute, ``[tokens, vocabulary]``."""
    file = read_header(path)
    entries, weights = file.entries, _numbers(file)
    prefix = entries["general.architecture"].text
    assert prefix in ("llama", "deci")
    count = entries[f"{prefix}.block_count"].whole
    assert count is not None

    def each(name: str) -> list[int]:
        entry = entries[f"{prefix}.{name}"]
        return entry.wholes or [entry.whole or 0] * count

    heads, kv_heads, widths = map(
        each, ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    )
    key = entries.get(f"{prefix}.attention.key_length")
    head = (key.whole if key is not None else HIDDEN // heads[0]) if heads[0] else 0
    stream = weights["token_embd.weight"][tokens]
    for layer in range(count):
        own = {k.removeprefix(f"blk.{layer}."): v for k, v in weights.items()}
        started = stream
        if heads[layer]:
            normed = _normed(stream, own["attn_norm.weight"])
            if (layer, "attention") in (masked or {}):
                added = normed @ masked[layer, "attention"] if masked else normed
            elif kv_heads[layer] == 0:
                added = normed @ own["attn_output.weight"].T
            else:
                added = _attention(normed, own, heads[layer], kv_heads[layer], head or 0)
            started = stream + added
        if widths[layer] == 0:
            continue
        normed = _normed(started, own["ffn_norm.weight"])
        gate = normed @ own["ffn_gate.weight"].T
        inner = gate / (1 + np.exp(-gate)) * (normed @ own["ffn_up.weight"].T)
        assert inner.shape[1] == widths[layer]
        gone = (layer, "mlp") in (masked or {})
        stream = started if gone else started + inner @ own["ffn_down.weight"].T
    last = _normed(stream, weights["output_norm.weight"])
    return last @ weights.get("output.weight", weights["token_embd.weight"]).T


def _normed(stream: Floats, weight: Floats) -> Floats:
    return stream / np.sqrt((stream**2).mean(-1, keepdims=True) + _EPS) * weight


def _attention(
    normed: Floats, own: Mapping[str, Floats], heads: int, kv_heads: int, head: int
) -> Floats:
    length = len(normed)
    q = _rotated((normed @ own["attn_q.weight"].T).reshape(length, heads, head))
    k = _rotated((normed @ own["attn_k.weight"].T).reshape(length, kv_heads, head))
    v = (normed @ own["attn_v.weight"].T).reshape(length, kv_heads, head)
    k, v = (np.repeat(part, heads // kv_heads, axis=1) for part in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(head)
    scores += np.triu(np.full((length, length), -np.inf), 1)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", shares, v).reshape(length, -1) @ own["attn_output.weight"].T


def _rotated(part: Floats) -> Floats:
    """Pairs that lie beside each other, as llama.cpp has them for these architectures."""
    length, _, head = part.shape
    angles = np.outer(np.arange(length), _BASE ** (-np.arange(0, head, 2) / head))[:, None]
    even, odd = part[..., 0::2], part[..., 1::2]
    turned = np.empty_like(part)
    turned[..., 0::2] = even * np.cos(angles) - odd * np.sin(angles)
    turned[..., 1::2] = even * np.sin(angles) + odd * np.cos(angles)
    return turned


SUPER = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where a K type's block has its float16 numbers."""


def random_rows(kind: str, rows: int, columns: int, seed: int = 0) -> NDArray[np.uint8]:
    """Bytes of one type, as a file has them; the scales are small and finite."""
    import gguf

    rng = np.random.default_rng(seed)
    which = gguf.GGMLQuantizationType[kind]
    if kind not in SUPER:
        noise = rng.standard_normal((rows, columns)).astype(np.float32) + np.float32(0.3)
        quantised: NDArray[np.uint8] = gguf.quants.quantize(noise, which)
        return quantised
    block, size = gguf.GGML_QUANT_SIZES[which]
    made = rng.integers(0, 256, (rows * columns // block, size)).astype(np.uint8)
    for place in SUPER[kind]:
        scales = rng.uniform(0.001, 0.002, len(made)).astype(np.float16)
        made[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return made.reshape(rows, -1)


def numbers(rows: NDArray[np.uint8], kind: str) -> NDArray[np.float32]:
    """What the package itself makes of them, ``[rows, columns]``."""
    import gguf

    values: NDArray[np.float32] = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    return values


def write_gguf(path: Path, tensors: dict[str, tuple[str, NDArray[np.uint8]]]) -> Path:
    """Writes a file of tensors by name: the type, and the bytes."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for name, (kind, rows) in tensors.items():
        writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
