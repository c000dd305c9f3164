"""A checkpoint as DeciLM (Nemotron-NAS): the folder with gaps that servers load."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.plan_dialects import ORIGIN, without_drops
from exporter.artifacts.servers import CHECKPOINT_SERVERS, Server, other_arithmetic, refuse_unheld
from exporter.checkpoint.facts import Weights
from exporter.checkpoint.pruned_model import CONFIG_CODE
from exporter.checkpoint.streamed import Piece, piece_of, write_shards
from exporter.errors import PlanError, UnknownArchitectureError
from exporter.files import in_shards, telling_full_disk, write_text
from exporter.models.ablation.branch_replacements import BranchReplacement, BranchReplacements
from exporter.models.loading.model_files import save_pretrained_files, shipped_config
from exporter.models.loading.model_source import LoadedModel
from exporter.printable import json_text
from graph_passes.types import SublayerRef

if TYPE_CHECKING:
    pass

MODEL_TYPE, CLASS = "nemotron-nas", "DeciLMForCausalLM"

_SHARD_BYTES = 5 * 10**9
_LAYER = re.compile(
    r"model\.layers\.([0-9]{1,4})\.(self_attn|input_layernorm|mlp|post_attention_layernorm)\."
)
_KINDS = {
    "self_attn": "attention", "input_layernorm": "attention",
    "mlp": "mlp", "post_attention_layernorm": "mlp",
}  # fmt: skip
_NORMS = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
_MAPS: Mapping[str, Mapping[str, str]] = {
    "tensorrt-llm": {"attention": "self_attn.linear_attn", "mlp": "mlp.linear_mlp"},
    "mlx": {"attention": "self_attn.linear", "mlp": "mlp.linear"},
}
_HINT = "Write the checkpoint without --as decilm, or the ONNX graph: depthcut export."

_CONFIG_TEXT = '''"""Gives the entries of block_configs as attributes, as servers read them."""

from transformers import LlamaConfig


class Entry(dict):
    """A JSON object whose keys are attributes too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    """A Llama's config with what each layer has."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=None, **kwargs):
        super().__init__(**kwargs)
        self.block_configs = [
            Entry({part: Entry(entry) for part, entry in block.items()})
            for block in block_configs or []
        ]
'''


def check_decilm(
    loaded: LoadedModel, deletions: Sequence[PlannedDeletion], server: Server | None
) -> None:
    """Refuses what a server would compute wrongly, or not load."""
    refuse_unheld([server] if server else CHECKPOINT_SERVERS, deletions, plain=False)
    text = other_arithmetic(loaded.model.config.to_dict())
    if text:
        raise UnknownArchitectureError(
            f"{loaded.ref.architecture} is not what servers compute of {CLASS}: {text}.",
            _HINT,
            code="not-llama",
        )


def save_decilm(
    loaded: LoadedModel,
    deletions: Sequence[PlannedDeletion],
    cut: BranchReplacements,
    server: Server | None,
    stage: Path,
) -> Weights:
    """Writes the folder; all layers keep their numbers."""
    check_decilm(loaded, deletions, server)
    pieces = [*_kept(loaded.model, cut), *_maps(loaded.model, cut, server)]
    save_pretrained_files(loaded, stage)
    write_text(stage / "config.json", json_text(decilm_config(loaded, deletions, cut)))
    with telling_full_disk(stage):
        write_text(stage / CONFIG_CODE, _CONFIG_TEXT)
        write_shards(stage, in_shards(pieces, _SHARD_BYTES), lambda _: None)
    return Weights(
        parameters=sum(math.prod(piece.shape) for piece in pieces),
        bytes=sum(piece.nbytes for piece in pieces),
    )


def decilm_config(
    loaded: LoadedModel, deletions: Sequence[PlannedDeletion], cut: BranchReplacements
) -> dict[str, Any]:
    """``config.json``: the base's, with every layer's entry."""
    config = without_drops(shipped_config(loaded.model))
    layers = int(config["num_hidden_layers"])
    return {
        **config,
        "model_type": MODEL_TYPE,
        "architectures": [CLASS],
        "auto_map": {"AutoConfig": f"{Path(CONFIG_CODE).stem}.DeciLMConfig"},
        "rope_theta": _rope_theta(config),
        "rope_scaling": config.get("rope_scaling"),
        "block_configs": [_entry(config, layer, cut) for layer in range(layers)],
        ORIGIN: {
            "version": 1,
            "base_sha256": loaded.ref.sha256,
            "layers": list(range(layers)),
            "deletions": [deletion.model_dump(mode="json") for deletion in deletions],
        },
    }


def _entry(config: Mapping[str, Any], layer: int, cut: BranchReplacements) -> dict[str, Any]:
    """One layer's entry, with every key that any server reads."""
    attention, mlp = (cut.get(SublayerRef(layer, kind)) for kind in ("attention", "mlp"))
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    width = 1.5 * config["intermediate_size"] / config["hidden_size"]
    return {
        "attention": {**_told(attention), "n_heads_in_group": None if attention else group},
        "ffn": {**_told(mlp), "ffn_mult": None if mlp else width},
    }


def _told(replacement: BranchReplacement | None) -> dict[str, bool]:
    maps = replacement is not None and replacement.weight is not None
    return {"no_op": replacement is not None and not maps, "replace_with_linear": maps}


def _kept(model: Any, cut: BranchReplacements) -> Iterator[Piece]:
    """The weights that stay; the norm before a map is one of them."""
    tied = bool(model.config.tie_word_embeddings)
    for name, tensor in model.state_dict().items():
        place = _LAYER.match(name)
        ref = None if place is None else SublayerRef(int(place[1]), _KINDS[place[2]])  # type: ignore[arg-type]
        gone = ref in cut
        norm_of_map = place is not None and gone and place[2] == _NORMS[_KINDS[place[2]]]
        if norm_of_map and ref is not None and cut[ref].weight is not None:
            gone = False
        if not gone and not (tied and name == "lm_head.weight"):
            yield piece_of(name, tensor)


def _maps(model: Any, cut: BranchReplacements, server: Server | None) -> Iterator[Piece]:
    for ref, replacement in cut.items():
        if replacement.weight is None:
            continue
        if replacement.bias is not None and bool(replacement.bias.any()):
            raise PlanError(
                f"The map in place of {ref} has an intercept; {server} takes only maps without "
                "one.",
                f"Heal the plan for it: depthcut heal --for {server}.",
                code="intercept",
            )
        name = _MAPS[server or ""][ref.kind]
        weight = replacement.weight.to(model.dtype)
        yield piece_of(f"model.layers.{ref.layer}.{name}.weight", weight)


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The rotary base, without which servers take one of their own without a word."""
    rope = config.get("rope_parameters") or {}
    return float(config.get("rope_theta") or rope["rope_theta"])
