"""The Hub's model card of a pruned checkpoint: what it is, how it came about, what was measured."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from exporter.artifacts import (
    CalibrationRef,
    ComparisonReport,
    FiguresFrom,
    Healing,
    ImportanceReport,
    PruningPlan,
)
from exporter.artifacts.base import Nouns, nouns_of
from exporter.artifacts.figures import ANSWERS
from exporter.checkpoint.facts import CheckpointFacts
from exporter.engines.usage import (
    PLACE,
    FolderUses,
    Use,
    answer_lines,
    auto_task,
    sentence_lines,
    use_blocks,
)
from exporter.printable import significant
from exporter.report.markdown import code, escaped, section_markdown
from exporter.report.sections.blocks import Block, Bullets, Grid, Note, Section, parts_blocks
from exporter.report.sections.healing import healing_blocks
from exporter.report.sections.summary import HEADER, accuracy_rows, latency_rows, task_rows
from exporter.report.words import dropped_lines, weights_words

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
_SERVERS = {
    "vllm": (
        "vllm",
        f"from vllm import LLM\n\nmodel = LLM({PLACE}, trust_remote_code=True)",
    ),
    "mlx": (
        "mlx-lm",
        "from mlx_lm import load\n\n"
        'trusted = {"trust_remote_code": True}  # the tokenizer\'s loader asks for it\n'
        f"model, tokenizer = load({PLACE}, tokenizer_config=trusted)",
    ),
}
_PRUNED = f"""\
from pathlib import Path
from exporter.checkpoint.pruned_model import load_pruned, save_pruned

loaded = load_pruned(Path({PLACE}))
model, tokenizer = loaded.model, loaded.tokenizer
"""
_TRAINED = f"""\
tuned = load_pruned(Path({PLACE}), train=True)  # with gradients
# save_pruned(tuned, Path(...)) writes it again after a training.
"""


def checkpoint_uses(facts: CheckpointFacts) -> FolderUses:
    """All ways to load a checkpoint."""
    if facts.servers:
        known = [_SERVERS[name] for name in facts.servers if name in _SERVERS]
        return FolderUses([Use(needs, needs, text) for needs, text in known], [_DECILM])
    task = auto_task(facts.architecture)
    answer = answer_lines(task) if facts.has_tokenizer else ""
    if not facts.plain:
        remark = "It needs depthcut with its extra torch, and runs no code from this folder."
        own = Use("depthcut", "'depthcut[torch]'", _PRUNED + answer + _TRAINED, remark=remark)
        return FolderUses([own], [_REFUSED.format(facts.transformers)])
    remark = (
        f"transformers {facts.transformers} loads it as it is. It is a plain model with fewer "
        "layers; whatever loads the base loads it."
    )
    loaders = {"model": f"AutoModel{task or ''}"}
    loaders |= {"tokenizer": "AutoTokenizer"} if facts.has_tokenizer else {}
    lines = [f"{name} = {kind}.from_pretrained({PLACE})\n" for name, kind in loaders.items()]
    text = f"from transformers import {', '.join(loaders.values())}\n\n{''.join(lines)}{answer}"
    uses = [Use("transformers", "transformers torch", text, remark=remark)]
    if facts.has_modules:
        name = "sentence-transformers"
        uses.append(Use(name, name, sentence_lines()))
    return FolderUses(uses)


_NAMED_SOURCES = ("hf:", "pydoc", "self")
_PLAIN = re.compile(r"[A-Za-z][\w.+/-]*(://[\w.+/-]+)?")
_PAPER = "arXiv 2406.15786"
_FIGURES: dict[FiguresFrom | None, str] = {
    None: "",
    "unseen": ", on test text",
    "checked": ", on the validation text of the search",
    "searched": ", on the text of the search",
}
_COUNTS = {"attention", "mlp", "block", "joint"}
"""What a plan was asked for that takes the lowest scores; searches and budgets say more."""


@dataclass(frozen=True)
class CardSources:
    """What a card is written from, beside the facts; None for what was not done or is not known."""

    plan: PruningPlan
    importance: ImportanceReport | None = None
    healing: Healing | None = None
    report: ComparisonReport | None = None


def model_card(facts: CheckpointFacts, sources: CardSources) -> str:
    """The text of ``README.md``: a header for the Hub, and sections."""
    uses = checkpoint_uses(facts)
    blocks = [block for use in uses.uses for block in use_blocks(use, lead=f"{use.library}:")]
    here = f"The lines are run in this folder; elsewhere, let {PLACE} be its path."
    sections = [
        _dropped(facts),
        _chosen(sources, nouns_of(facts.architecture)),
        _healed(facts, sources),
        _measured(sources.report),
        Section("use", "How to load it", [Note(here), *blocks, *map(Note, uses.notes)]),
    ]
    texts = [section_markdown(section) for section in sections if section is not None]
    title = f"# {escaped(facts.base.rpartition('/')[2])}, pruned in depth"
    return "\n\n".join([_header(facts), title, *texts]) + "\n"


def _header(facts: CheckpointFacts) -> str:
    """The Hub's metadata. It knows no relation of a base to what was pruned from it."""
    lines = ["library_name: transformers"]
    if facts.on_hub:
        lines.append(f"base_model: {json.dumps(facts.base)}")
    if facts.architecture.endswith(("ForCausalLM", "LMHeadModel")):
        lines.append("pipeline_tag: text-generation")
    lines += [f"{key}: {_yaml(value)}" for key, value in facts.license.items()]
    lines += ["tags:", "- depthcut", "- pruned", "- depth-pruning"]
    return "\n".join(["---", *lines, "---"])


def _yaml(value: str) -> str:
    """A value of a stranger's card: as it is where it is a word or a URL, else as a string."""
    bare = value.strip("\"'")
    return bare if _PLAIN.fullmatch(bare) else json.dumps(bare)


def _dropped(facts: CheckpointFacts) -> Section:
    before, after = facts.before, facts.after
    sizes = (
        f"{before.parameters:,} -> {after.parameters:,} parameters, {before.bytes:,} -> "
        f"{after.bytes:,} bytes of weights in {facts.dtype}. SHA-256 of the base's files: "
        f"`{facts.base_sha256}`."
    )
    notes = [sizes]
    if facts.kept is not None:
        kept = ", ".join(map(str, facts.kept))
        notes.append(f"These layers of the base were kept, with new numbers: {kept}.")
    if not facts.license:
        notes.append("The licence of the base model applies; its card named none.")
    base = f"{code(facts.base)} ({facts.architecture}, {facts.layers} layers)"
    lines = Bullets(dropped_lines(facts.deletions))
    blocks: list[Block] = [Note(f"This is {base} without:"), lines, *map(Note, notes)]
    return Section("dropped", "What was dropped", blocks)


def _chosen(sources: CardSources, read: Nouns) -> Section:
    plan, importance = sources.plan, sources.importance
    lines = []
    if plan.budget:
        text = ", ".join(f"{key} {value}" for key, value in plan.budget.items())
        lines.append(f"Asked for: {text}.")
    if importance is not None:
        order = f", the lowest first ({_PAPER})" if plan.budget.keys() <= _COUNTS else ""
        lines.append(
            f"Importance: {importance.metric}{order}, "
            f"on {_named(importance.calibration).describe(read)}."
        )
    elif plan.importance_sha256 is not None:
        lines.append(f"By scores in a file with the SHA-256 `{plan.importance_sha256}`.")
    if not lines:
        lines.append("By a plan that came without scores.")
    lines += [
        f"Predicted in PyTorch{_FIGURES[plan.predicted_on]}: {name} {significant(value)}."
        for name, value in plan.predicted.items()
    ]
    blocks = [Bullets(lines), *parts_blocks(plan.parts, _shown, read)]
    return Section("chosen", "How it was chosen", blocks)


def _healed(facts: CheckpointFacts, sources: CardSources) -> Section:
    read, healing = nouns_of(facts.architecture), sources.healing
    weights = sources.plan.changed_weights
    blocks: list[Block] = [
        Note(
            f"The replacements of the dropped branches were fitted to calibration {read.much}."
            if facts.healed
            else "The dropped branches were not replaced."
        ),
        Note(
            f"{weights} of the kept weights were changed; no parameter was added for that."
            if weights
            else "No kept weight was changed."
        ),
    ]
    if healing is not None and (facts.healed or weights):
        named = {
            "calibration": [_named(ref) for ref in healing.calibration],
            "texts": [t.model_copy(update={"text": _named(t.text)}) for t in healing.texts],
            "warnings": [],  # which name texts by their paths
        }
        blocks += healing_blocks(healing.model_copy(update=named), read)
    return Section("healed", "Healing", blocks)


def _measured(report: ComparisonReport | None) -> Section | None:
    if report is None:
        return Section("measured", "Measured", [Note("Nothing was measured on this checkpoint.")])
    arms = (report.arms.baseline, report.arms.candidate)
    weights = " and ".join(dict.fromkeys(weights_words(arm) for arm in arms))
    where = f"{arms[1].backend} on {report.environment.processor}"
    if report.environment.gpu:
        where += f" and {report.environment.gpu}"
    rows = [*latency_rows(report), *accuracy_rows(report), *task_rows(report)]
    blocks: list[Block] = [
        Note(
            "On the ONNX files that were made of the base (baseline) and by the same plan "
            f"(candidate), {weights}, by {where}; not on this checkpoint in PyTorch."
        ),
        Grid("Measured", HEADER, rows, right=(1, 2)),
    ]
    if (accuracy := report.accuracy) is not None:
        counted = f"{accuracy.tokens:,} {ANSWERS[accuracy.compared].counted}"
        source = _shown(accuracy.text_source)
        blocks.append(Note(f"Quality was measured on {counted} of {source}."))
    return Section("measured", "Measured", blocks)


def _named(ref: CalibrationRef) -> CalibrationRef:
    source = " + ".join(_shown(text.source) for text in ref.mixture or [ref])
    return ref.model_copy(update={"source": source})


def _shown(source: str) -> str:
    """A text's name; of a path the last part, since a card is published."""
    return source if source.startswith(_NAMED_SOURCES) else Path(source).name
