"""Writes a pruned checkpoint, in the form that the most programs load, or as a DeciLM."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifacts import PlannedDeletion, PruningPlan
from exporter.artifacts.plan_dialects import ORIGIN, without_drops
from exporter.artifacts.servers import CHECKPOINT_SERVERS, Server, other_arithmetic, refuse_unheld
from exporter.checkpoint.facts import (
    CheckpointFacts,
    CheckpointForm,
    Weights,
    license_of_base,
    name_of_base,
    weights_of,
)
from exporter.checkpoint.pruned_model import (
    CONFIG_CODE,
    LICENSE_FILES,
    answer_to,
    prune_model,
    refuse_checkpoint_folder,
    refuse_tokenless,
    save_pruned_into,
)
from exporter.checkpoint.streamed import Piece, piece_of, write_shards, write_streamed
from exporter.cut.branch_replacements import branch_replacements_of
from exporter.errors import PlanError, UnknownArchitectureError
from exporter.files import in_shards, staged_directory, telling_full_disk, write_text
from exporter.models.ablation.branch_replacements import (
    BranchReplacement,
    BranchReplacements,
    branches_replaced,
)
from exporter.models.changed_weights import change_weights
from exporter.models.loading.meta_model import MetaModel
from exporter.models.loading.model_files import save_pretrained_files, shipped_config
from exporter.models.loading.model_source import LoadedModel
from exporter.models.residual_stream import probe_inputs
from exporter.models.sentence_folder import MODULES, copy_settings
from exporter.printable import json_text
from exporter.progress import QUIET, Progress
from graph_passes.files.reading import copy_file
from graph_passes.types import SublayerRef

if TYPE_CHECKING:
    from exporter.artifacts.loaded_plan import Replacements


CARD = "README.md"
"""The Hub's name for a model's card."""


def write_checkpoint(
    loaded: LoadedModel,
    plan: PruningPlan,
    folder: Path,
    *,
    replacements: Replacements | None = None,
    card: Callable[[CheckpointFacts], str] | None = None,  # None writes none
    form: CheckpointForm = "own",
    server: Server | None = None,  # the one that a DeciLM is for; None: all of them
    progress: Progress = QUIET,
) -> CheckpointFacts:
    """Prunes a model and writes it as a Hugging Face folder, which is there whole or not.

    Args:
        loaded: The whole model, which is changed.
        plan: What is dropped.
        folder: The new folder, or an earlier checkpoint, which is replaced.
        replacements: The numbers of a healed plan, new values of kept weights among them.
        card: Makes the model card's text.
        form: ``own``, which :func:`exporter.load_model` reads with ``pruned=True``, or
            ``decilm``, which servers read.
        server: The runtime that the checkpoint is for.
        progress: Hears of each step.

    Raises:
        UnknownArchitectureError: The pruned model's answers differ from those with the branches
            skipped.
        UsageError: The folder holds something else.
    """
    refuse_checkpoint_folder(folder, [loaded.path] if folder.exists() else [])
    if replacements is not None:
        change_weights(loaded.model, replacements.weights)
    before, servers, after = weights_of(loaded.model), list[str](), None
    with staged_directory(folder) as stage:
        if isinstance(loaded, MetaModel):
            pruned, kept = write_streamed(
                loaded, plan, stage, replacements=replacements, progress=progress
            )
        else:
            cut = branch_replacements_of(plan.deletions, replacements, loaded.model)
            with progress.task(f"write {folder}"):
                if form == "decilm":
                    pruned, kept = loaded, None
                    after = save_decilm(loaded, plan.deletions, cut, server, stage)
                    servers = [server] if server else [*CHECKPOINT_SERVERS]
                else:
                    pruned, kept = _pruned(loaded, plan, cut, progress)
                    save_pruned_into(pruned, stage)
        with telling_full_disk(stage):
            for pattern in LICENSE_FILES if loaded.path.is_dir() else ():
                for path in loaded.path.glob(pattern):
                    if not path.is_dir():
                        copy_file(path, stage / path.name)
            copy_settings(loaded.path, stage)
        name, on_hub = name_of_base(loaded)
        facts = CheckpointFacts(
            base=name,
            on_hub=on_hub,
            base_sha256=loaded.ref.sha256,
            architecture=loaded.ref.architecture,
            layers=loaded.ref.num_layers,
            deletions=plan.deletions,
            kept=kept,
            plain=kept is not None,
            transformers=version("transformers"),
            dtype=str(pruned.model.dtype).removeprefix("torch."),
            before=before,
            after=after or weights_of(pruned.model),
            license=license_of_base(loaded.path),
            has_tokenizer=loaded.tokenizer is not None,
            has_modules=(stage / MODULES).is_file(),
            servers=servers,
        )
        if card is not None:
            with telling_full_disk(stage):
                write_text(stage / CARD, card(facts))
    few = "" if kept is None else f"{len(kept)} of {facts.layers} layers, "
    sizes = f"{before.bytes / 1e6:.1f} -> {facts.after.bytes / 1e6:.1f} MB of weights"
    progress.say(f"checkpoint: {few}{sizes}; {facts.loader_words}")
    return facts


def _pruned(
    loaded: LoadedModel, plan: PruningPlan, cut: BranchReplacements, progress: Progress
) -> tuple[LoadedModel, list[int] | None]:
    """The pruned model, and which layers it kept where it has fewer."""
    import torch

    from exporter.checkpoint.pruned_model import kept_layers, shallow_model

    kept = kept_layers(plan.deletions, loaded.ref.num_layers)
    if kept:
        refuse_tokenless(loaded.model)
        with branches_replaced(loaded.model, cut), torch.inference_mode():
            wanted = answer_to(loaded.model, probe_inputs(loaded.model))
        try:
            return shallow_model(loaded, plan.deletions, wanted), kept
        except UnknownArchitectureError as error:
            progress.say(f"checkpoint: not with fewer layers. {error}")
    prune_model(loaded, plan.deletions, cut)
    return loaded, None


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


def save_decilm(
    loaded: LoadedModel,
    deletions: Sequence[PlannedDeletion],
    cut: BranchReplacements,
    server: Server | None,
    stage: Path,
) -> Weights:
    """Writes the folder; all layers keep their numbers."""
    refuse_unheld([server] if server else CHECKPOINT_SERVERS, deletions, plain=False)
    text = other_arithmetic(loaded.model.config.to_dict())
    if text:  # what a server would compute wrongly, or not load
        raise UnknownArchitectureError(
            f"{loaded.ref.architecture} is not what servers compute of {CLASS}: {text}.",
            "Write the checkpoint without --as decilm, or the ONNX graph: depthcut export.",
            code="unread-architecture",
        )
    pieces = [*_kept(loaded.model, cut), *_maps(loaded.model, cut, server)]
    save_pretrained_files(loaded, stage)
    write_text(stage / "config.json", json_text(decilm_config(loaded, deletions, cut)))
    write_text(stage / CONFIG_CODE, _CONFIG_TEXT)
    write_shards(stage, in_shards(pieces, _SHARD_BYTES))
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
    rope = config.get("rope_parameters") or {}
    return {
        **config,
        "model_type": MODEL_TYPE,
        "architectures": [CLASS],
        "auto_map": {"AutoConfig": f"{Path(CONFIG_CODE).stem}.DeciLMConfig"},
        # without which servers take one of their own without a word
        "rope_theta": float(config.get("rope_theta") or rope["rope_theta"]),
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
                code="replacement-unheld",
            )
        name = _MAPS[server or ""][ref.kind]
        weight = replacement.weight.to(model.dtype)
        yield piece_of(f"model.layers.{ref.layer}.{name}.weight", weight)
