"""The lines that load a pruned checkpoint."""

from __future__ import annotations

from typing import Any

from exporter.artifacts.uses import PLACE, FolderUses, Use
from exporter.checkpoint.facts import CheckpointFacts
from exporter.engines.usage import HERE, auto_task, lines

_REFUSED = (
    "transformers {} does not leave out what a config says is skipped. It would fill the gaps with "
    "random numbers, so it is made to refuse this folder: one weight of each dropped module is "
    "there with the shape `[0]`. `config.json` says what was dropped as LLM-Drop has it "
    "(`drop_attn_list`, `drop_mlp_list`), where nothing stands in its place, and under `depthcut` "
    "in full."
)
_DECILM = (
    "transformers doesn't load this folder. `configuration_decilm.py` in it, which depthcut wrote, "
    "gives vLLM, SGLang and TensorRT-LLM the entries of `block_configs` as attributes; they run it "
    "only if they are told to trust it."
)
_VLLM = f"""from vllm import LLM

model = LLM({PLACE}, trust_remote_code=True)"""
_MLX = f"""from mlx_lm import load

trusted = {{"trust_remote_code": True}}  # the tokenizer's loader asks for it
model, tokenizer = load({PLACE}, tokenizer_config=trusted)"""
_SERVERS = {"vllm": ("vllm", _VLLM), "mlx": ("mlx-lm", _MLX)}
_PLAIN = "It is a plain model with fewer layers; whatever loads the base loads it."


def checkpoint_uses(facts: CheckpointFacts, *, folder: str = HERE) -> FolderUses:
    """All ways to load a checkpoint.

    Args:
        facts: What is known of it.
        folder: What the lines call its folder.
    """
    if facts.servers:
        return FolderUses(folder=folder, uses=_by_servers(facts), notes=[_DECILM])
    if not facts.plain:
        return FolderUses(
            folder=folder, uses=[_own(facts)], notes=[_REFUSED.format(facts.transformers)]
        )
    uses = [_by_transformers(facts)]
    if facts.has_modules:
        uses.append(_by_sentence_transformers())
    return FolderUses(folder=folder, uses=uses)


def _by_servers(facts: CheckpointFacts) -> list[Use]:
    known = [_SERVERS[name] for name in facts.servers if name in _SERVERS]
    return [Use(library=needs, needs=needs, text=text) for needs, text in known]


def _own(facts: CheckpointFacts) -> Use:
    return Use(
        library="depthcut",
        needs="'depthcut[torch]'",
        text=lines("pruned", **_filled(facts)),
        remark="It needs depthcut with its extra torch, and runs no code from this folder.",
    )


def _by_transformers(facts: CheckpointFacts) -> Use:
    remark = f"transformers {facts.transformers} loads it as it is."
    if facts.kept is not None:
        remark = f"{remark} {_PLAIN}"
    text = lines("transformers", **_filled(facts))
    return Use(library="transformers", needs="transformers torch", text=text, remark=remark)


def _filled(facts: CheckpointFacts) -> dict[str, Any]:
    task = auto_task(facts.architecture)
    names = [f"AutoModel{task or ''}", *["AutoTokenizer"] * facts.has_tokenizer]
    return {
        "loader": names[0],
        "names": ", ".join(sorted(names)),
        "has_tokenizer": facts.has_tokenizer,
        "task": task if facts.has_tokenizer else None,
    }


def _by_sentence_transformers() -> Use:
    name = "sentence-transformers"
    return Use(library=name, needs=name, text=lines("sentences", m=None))
