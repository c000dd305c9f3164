"""The lines that load a pruned checkpoint."""

from __future__ import annotations

from exporter.artifacts.uses import PLACE, FolderUses, Use
from exporter.checkpoint.facts import CheckpointFacts
from exporter.engines.usage.folder import HERE
from exporter.engines.usage.library_lines import auto_task, sentence_answer, torch_answer

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
    lines = [
        "from pathlib import Path",
        "from exporter.checkpoint.pruned_model import load_pruned, save_pruned",
        "",
        f"loaded = load_pruned(Path({PLACE}))",
        "model, tokenizer = loaded.model, loaded.tokenizer",
        *_answer(facts),
        f"tuned = load_pruned(Path({PLACE}), train=True)  # with gradients",
        "# save_pruned(tuned, Path(...)) writes it again after a training.",
    ]
    remark = "It needs depthcut with its extra torch, and runs no code from this folder."
    return Use(library="depthcut", needs="'depthcut[torch]'", text="\n".join(lines), remark=remark)


def _by_transformers(facts: CheckpointFacts) -> Use:
    task = auto_task(facts.architecture)
    name = f"AutoModel{'' if task is None else task}"
    names = ", ".join(sorted([name, *(["AutoTokenizer"] if facts.has_tokenizer else [])]))
    lines = [f"from transformers import {names}", ""]
    if facts.has_tokenizer:
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({PLACE})")
    lines += [f"model = {name}.from_pretrained({PLACE})", *_answer(facts)]
    remark = f"transformers {facts.transformers} loads it as it is."
    if facts.kept is not None:
        remark = f"{remark} {_PLAIN}"
    return Use(
        library="transformers", needs="transformers torch", text="\n".join(lines), remark=remark
    )


def _answer(facts: CheckpointFacts) -> list[str]:
    task = auto_task(facts.architecture)
    return torch_answer(task) if facts.has_tokenizer and task is not None else []


def _by_sentence_transformers() -> Use:
    lines = [
        "from sentence_transformers import SentenceTransformer",
        "",
        f"model = SentenceTransformer({PLACE})",
        *sentence_answer(),
    ]
    return Use(
        library="sentence-transformers", needs="sentence-transformers", text="\n".join(lines)
    )
