"""The lines that load and run what was written, made from what its folder holds."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import onnx_ir as ir

from exporter.artifacts.comparison import FORM_KEY, FormRecord
from exporter.engines.runners.cache_form import CacheForm, read_cache_form
from exporter.errors import ComparisonError, SurgeryError, UnsafeInputError
from exporter.files import write_text
from exporter.models.genai_config import find_config
from exporter.models.graph_facts import CACHE_INPUT
from exporter.models.model_folder import longest_sequence, read_object, token_ids
from exporter.models.sentence_folder import MEAN, MODULES, Pooling, pooling_of
from exporter.report.markdown import code, section_markdown
from exporter.report.sections.blocks import Block, Bullets, Command, Note, Section
from graph_passes.files.reading import read_text
from graph_passes.files.storage import load_model
from graph_passes.fusing.pooling import EMBEDDING, STATES

if TYPE_CHECKING:
    from jinja2 import Environment

USE_FILE, TOKENIZER = "USE.md", "tokenizer.json"
PLACE = "FOLDER"
"""What the lines call the model's folder; whoever shows them says before them what it is."""
_PROMPT, _NEW_TOKENS = "The capital of France is", 20
_LEFT_OUT = 8  # room for the prompt
_PLAIN = re.compile(r"[\w.+-]+")
_PLAIN_TARGETS = ("portable", "onnxruntime-cpu")
_OF_ITS_OWN = frozenset({"bloom", "falcon", "gpt_bigcode"})
"""Whose caches optimum expects in other shapes."""
_DTYPES = {"FLOAT": "float32", "FLOAT16": "float16"}
_STEP = {
    "input_ids": "np.array([step], np.{})",
    "attention_mask": "np.ones((1, length), np.{})",
    "position_ids": "np.arange(length - len(step), length, dtype=np.{})[None]",
}
_ENCODED = {
    "input_ids": "each.ids",
    "attention_mask": "each.attention_mask",
    "token_type_ids": "each.type_ids",
}
_TASKS = {
    "LMHeadModel": "ForCausalLM",
    **{
        f"For{task}": f"For{task}"
        for task in ("CausalLM", "MaskedLM", "SequenceClassification", "TokenClassification",
                     "QuestionAnswering")
    },
}  # fmt: skip
"""How a class's name ends, and how the classes that load it by themselves end."""
_NO_CHECKPOINT = (
    "transformers: this folder has no PyTorch weights, so `from_pretrained` does not load it. "
    "`depthcut export MODEL -o out --checkpoint` writes a checkpoint of the pruned model to "
    "`out/candidate/hf`, whose README.md says how to load it; `depthcut checkpoint MODEL plan.json "
    "-o DIR` writes it alone."
)
_NO_CONFIG = (
    "onnxruntime-genai: there is no genai_config.json here. `depthcut export --target "
    "onnxruntime-cpu` writes one where onnxruntime-genai can run the model."
)
_BUILDS_ANYWHERE = (
    "Running an engine needs an NVIDIA GPU; building one needs none with TensorRT-RTX."
)


class Use(NamedTuple):
    """One way to load and run a model."""

    library: str
    needs: str  # what to install for it, as pip takes it
    text: str  # the lines, which take the folder from the variable PLACE
    language: Literal["python", "sh"] = "python"
    remark: str = ""


class FolderUses(NamedTuple):
    """All ways to use a folder; the notes apply to it all."""

    uses: list[Use]
    notes: Sequence[str] = ()


_LINES = {
    "opened": """\
import numpy as np
import onnxruntime as ort
{% if m.has_tokenizer %}
from tokenizers import Tokenizer
{% endif %}

session = ort.InferenceSession(f"{FOLDER}/{{ m.file }}", providers=["{{ provider }}"])
{% if m.has_tokenizer %}
tokenizer = Tokenizer.from_file(f"{FOLDER}/tokenizer.json")
{% endif %}
""",
    "decoder": """\
{% include "opened" %}
{% if m.has_tokenizer %}
tokens = tokenizer.encode("{{ prompt }}").ids
{% else %}
tokens = [1, 2, 3]  # of the model's tokenizer, which is not in this folder
{% endif %}
{% if m.pasts %}
# A dropped attention has no cache: the graph itself says which layers have one.
pasts = [each for each in session.get_inputs() if each.name.startswith("past")]
caches = {each.name: np.zeros({{ m.cache[0] }}, np.{{ m.cache[1] }}) for each in pasts}
outputs = [name.replace("past_key_values", "present") for name in caches]
{% else %}
caches, outputs = {}, []
{% endif %}
step, length = tokens, 0
for _ in range({{ m.new_tokens }}):
    length += len(step)
    feed = {
{% for name in m.others %}
        "{{ name }}": {{ step[name].format(m.integer(name)) }},
{% endfor %}
    }
    logits, *presents = session.run(["logits", *outputs], {**feed, **caches})
    caches = dict(zip(caches, presents))
    step = [int(logits[0, -1].argmax())]
{% if m.ends %}
    if step[0] in {{ m.ends }}:
        break
{% endif %}
    tokens += step
print({{ "tokenizer.decode(tokens)" if m.has_tokenizer else "tokens" }})
""",
    "encoder": """\
{% include "opened" %}
tokenizer.enable_padding()
texts = ["A cat sits on the mat.", "A dog lies on the rug."]
encoded = tokenizer.encode_batch(texts)
feed = {
{% for name in m.inputs %}
    "{{ name }}": np.array([{{ encoded[name] }} for each in encoded], np.{{ m.integer(name) }}),
{% endfor %}
}
found = session.run(["{{ m.shown }}"], feed)[0]
{% set pooling = "embedding" if m.shown == embedding else m.pooling.modes | join(" ") %}
{% if m.shown not in (embedding, states) or pooling not in
      ("embedding", "mean", "cls", "lasttoken") %}
print(found.shape)
{% else %}
{% if pooling == "mean" %}
mask = feed["attention_mask"][..., None]
vectors = (found * mask).sum(1) / mask.sum(1)
{% elif pooling == "lasttoken" %}
last = feed["attention_mask"].sum(1) - 1
vectors = found[np.arange(len(found)), last]
{% else %}
vectors = found{{ "[:, 0]" if pooling == "cls" }}
{% endif %}
vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
print(vectors @ vectors.T)  # their cosines
{% endif %}
""",
    "genai": """\
import onnxruntime_genai as og
from tokenizers import Tokenizer

model = og.Model(FOLDER)
tokenizer = Tokenizer.from_file(f"{FOLDER}/tokenizer.json")
tokens = tokenizer.encode("{{ prompt }}").ids
parameters = og.GeneratorParams(model)
longest = len(tokens) + {{ m.new_tokens }}
parameters.set_search_options(max_length=longest, do_sample=False)
generator = og.Generator(model, parameters)
generator.append_tokens(tokens)
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0).tolist()))
""",
    "optimum": """\
from optimum.onnxruntime import {{ loader }}
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = {{ loader }}.from_pretrained(FOLDER
{%- if m.file != "model.onnx" %}, file_name="{{ m.file }}"{% endif %})
{% include "answer" %}
""",
    "transformers": """\
from transformers import {{ names }}

{% if has_tokenizer %}
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
{% endif %}
model = {{ loader }}.from_pretrained(FOLDER)
{% include "answer" %}
""",
    "pruned": """\
from pathlib import Path
from exporter.checkpoint.pruned_model import load_pruned, save_pruned

loaded = load_pruned(Path(FOLDER))
model, tokenizer = loaded.model, loaded.tokenizer
{% include "answer" %}
tuned = load_pruned(Path(FOLDER), train=True)  # with gradients
# save_pruned(tuned, Path(...)) writes it again after a training.
""",
    "answer": """\
{% if task == "ForCausalLM" %}
inputs = tokenizer("{{ prompt }}", return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens={{ new_tokens }}, do_sample=False)[0]
print(tokenizer.decode(tokens, skip_special_tokens=True))
{% elif task is not none %}
inputs = tokenizer("A cat sits on the mat.", return_tensors="pt")
print(model(**inputs).{{ "start_logits" if task == "ForQuestionAnswering"
  else "logits" if task else "last_hidden_state" }}.shape)
{% endif %}
""",
    "sentences": """\
from sentence_transformers import SentenceTransformer

{% if m %}
settings = {"file_name": "{{ m.file }}", "provider": "CPUExecutionProvider"}
model = SentenceTransformer(FOLDER, backend="onnx", model_kwargs=settings)
{% else %}
model = SentenceTransformer(FOLDER)
{% endif %}
vectors = model.encode(["A cat sits on the mat.", "A dog lies on the rug."])
print(model.similarity(vectors, vectors))
""",
    "generate": """\
depthcut generate "$FOLDER/{{ m.file }}" "{{ prompt }}" -n {{ m.new_tokens }}
{%- if m.target == "onnxruntime-cuda" %} --provider cuda{% endif %}""",
    "build": """\
depthcut build "$FOLDER/{{ m.file }}" -o engines --engine {{ m.target }}
{% if m.pasts and m.has_tokenizer %}
depthcut generate engines "{{ prompt }}" --tokenizer "$FOLDER"
{% endif %}
""",
}  # fmt: skip
"""By way, the lines; the folder is the variable FOLDER."""


@functools.cache
def _environment() -> Environment:
    from jinja2 import DictLoader, Environment, StrictUndefined

    return Environment(  # noqa: S701  # Python, not HTML; names in it are plain
        loader=DictLoader(_LINES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def lines(way: str, **facts: Any) -> str:
    """The lines of a way, filled in."""
    facts = {"prompt": _PROMPT, "new_tokens": _NEW_TOKENS, **facts}
    return _environment().get_template(way).render(facts).rstrip("\n")


@dataclass(frozen=True)
class UsedModel:
    """A graph and what lies beside it; ``ends`` are the tokens that end a text."""

    file: str
    inputs: Mapping[str, ir.Value]
    outputs: Sequence[str]
    form: CacheForm
    target: str
    config: Mapping[str, Any]
    ends: tuple[int, ...]
    has_tokenizer: bool
    has_modules: bool
    pooling: Pooling
    for_genai: bool

    @classmethod
    def read(cls, graph: Path, beside: Sequence[Path]) -> UsedModel:
        """Looks at a graph; of the folders beside it the first that has a file counts."""
        model = load_model(graph)
        given = (v for v in model.graph.inputs if v.name not in model.graph.initializers)
        config, listed = _object(beside, "config.json"), _first(beside, MODULES)
        ends = _object(beside, "generation_config.json").get("eos_token_id")
        return cls(
            file=graph.name,
            inputs={value.name or "": value for value in given},
            outputs=[value.name or "" for value in model.graph.outputs],
            form=read_cache_form(graph),
            target=_target(model.metadata_props.get(FORM_KEY)),
            config=config,
            ends=tuple(token_ids(config.get("eos_token_id") if ends is None else ends)),
            has_tokenizer=_first(beside, TOKENIZER) is not None,
            has_modules=listed is not None,
            pooling=MEAN if listed is None else pooling_of(listed.parent),
            for_genai=any(find_config(folder / graph.name) is not None for folder in beside),
        )

    @property
    def pasts(self) -> list[str]:
        """The inputs that are caches."""
        return [name for name in self.inputs if CACHE_INPUT.fullmatch(name)]

    @property
    def others(self) -> list[str]:
        """The inputs that are none."""
        return [name for name in self.inputs if name not in self.pasts]

    @property
    def new_tokens(self) -> int:
        """How many tokens the lines generate; fewer where a text can't be long."""
        known = [longest_sequence(dict(self.config)), self.form.longest]
        longest = min((number for number in known if number is not None), default=None)
        return _NEW_TOKENS if longest is None else max(1, min(_NEW_TOKENS, longest - _LEFT_OUT))

    @property
    def architecture(self) -> str:
        """The class that the config names; empty where it names none."""
        names = self.config.get("architectures")
        return str([*names, ""][0]) if isinstance(names, list) else ""

    @property
    def generates(self) -> bool:
        """Whether it gives logits and keeps what it has seen in caches, or no attention is left."""
        causal = self.architecture.endswith(("ForCausalLM", "LMHeadModel"))
        return "logits" in self.outputs and (bool(self.pasts) or causal)

    @property
    def shown(self) -> str:
        """The output that is printed of an encoder."""
        return EMBEDDING if EMBEDDING in self.outputs else self.outputs[0]

    @property
    def cache(self) -> tuple[str, str] | None:
        """Shape and type of empty caches; None for a fixed length, or where these can't be told."""
        form = self.form
        if form.buffer is not None or form.mask is not None or any(form.windows.values()):
            return None
        dtypes = {getattr(self.inputs[past].dtype, "name", "") for past in self.pasts}
        sizes = {form.heads.get(past, (None, None)) for past in self.pasts}
        if not self.pasts:
            return "", ""
        if len(dtypes) != 1 or not dtypes <= _DTYPES.keys() or any(None in pair for pair in sizes):
            return None
        heads, size = next(iter(sizes)) if len(sizes) == 1 else ("each.shape[1]", "each.shape[3]")
        return f"(1, {heads}, 0, {size})", _DTYPES[dtypes.pop()]

    def integer(self, name: str) -> str:
        """The type of an input of tokens."""
        return "int32" if self.inputs[name].dtype == ir.DataType.INT32 else "int64"

    def uses(self) -> list[Use]:
        """The ways to run it that hold for what lies there."""
        cuda, task = self.target == "onnxruntime-cuda", auto_task(self.architecture)
        runtime = f"onnxruntime{'-gpu' if cuda else ''} numpy"
        others, given = set(self.others), set(self.inputs)
        decodes = self.cache is not None and others <= _STEP.keys() and "input_ids" in others
        encodes = self.has_tokenizer and bool(given) and given <= _ENCODED.keys()
        own = ("decoder", decodes) if self.generates else ("encoder", encodes)
        is_plain, known = self.target in _PLAIN_TARGETS, {*_STEP, *_ENCODED, *self.pasts}
        result = bool(self.pasts and self.has_tokenizer) and set(self.inputs) <= known
        sentences = is_plain and self.has_modules and not self.pasts
        optimum = is_plain and self.has_tokenizer and task is not None
        optimum = optimum and (task != "ForCausalLM" or self._has_usual_caches)
        built = self.target in ("tensorrt", "tensorrt-rtx")
        ways = (
            (own[1], own[0], "ONNX Runtime", runtime + " tokenizers" * self.has_tokenizer),
            (result, "generate", "depthcut", ""),
            (
                self.for_genai and self.has_tokenizer,
                *("genai", "onnxruntime-genai"),
                f"onnxruntime-genai{'-cuda' if cuda else ''} tokenizers",
            ),
            (optimum, "optimum", "optimum", "'optimum-onnx[onnxruntime]'"),
            (sentences, "sentences", "sentence-transformers", "'sentence-transformers[onnx]'"),
            (built, "build", self.target, ""),
        )
        facts = {
            "m": self, "task": task, "loader": f"ORTModel{task or 'ForFeatureExtraction'}",
            "provider": f"{'CUDA' if cuda else 'CPU'}ExecutionProvider", "step": _STEP,
            "encoded": _ENCODED, "embedding": EMBEDDING, "states": STATES,
            "new_tokens": self.new_tokens,
        }  # fmt: skip
        return [
            Use(
                library=library,
                needs=needs,
                text=lines(way, **facts),
                language="sh" if way in ("generate", "build") else "python",
                remark=_BUILDS_ANYWHERE if way == "build" else "",
            )
            for holds, way, library, needs in ways
            if holds
        ]

    @property
    def _has_usual_caches(self) -> bool:
        """Whether every cache has the heads and the head size that the config tells."""
        config = self.config
        heads = config.get("num_attention_heads") or config.get("n_head")
        width = config.get("hidden_size") or config.get("n_embd")
        if not isinstance(heads, int) or not isinstance(width, int) or not self.pasts:
            return False
        own_heads = config.get("num_key_value_heads") or heads
        expected = own_heads, config.get("head_dim") or width // heads
        usual = all(self.form.heads.get(past) == expected for past in self.pasts)
        own = str(config.get("model_type")) in _OF_ITS_OWN
        return usual and not own and self.form.buffer is None


def _first(folders: Sequence[Path], name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _object(folders: Sequence[Path], name: str) -> dict[str, Any]:
    path = _first(folders, name)
    return {} if path is None else read_object(path)


def _target(note: str | None) -> str:
    try:
        return "portable" if note is None else FormRecord.model_validate_json(note).target
    except ValueError:  # of another version: whoever reads it tells
        return "portable"


def auto_task(architecture: str) -> str | None:
    """How the class that loads a model ends; empty without a head, None where it isn't known."""
    task = next((task for end, task in _TASKS.items() if architecture.endswith(end)), None)
    return "" if task is None and architecture.endswith("Model") else task


def graph_uses(graph: Path, beside: Sequence[Path] = ()) -> FolderUses:
    """All ways to use a graph; empty where its names could not stand in code."""
    model = UsedModel.read(graph, beside or [graph.parent])
    if not all(map(_PLAIN.fullmatch, [model.file, *model.outputs])):
        return FolderUses([])
    notes = [_NO_CHECKPOINT] * bool(model.config)
    notes += [_NO_CONFIG] * bool(model.pasts and not model.for_genai)
    return FolderUses(model.uses(), notes)


def stage_graph_use(output: Path, stage: Path) -> list[tuple[Path, Path]]:
    """Writes that file for a graph that is staged under its final name; gives it and its place.

    Nothing where no way is known, or a file beside the graph can't be read: that hinders nothing
    else.
    """
    try:
        uses = graph_uses(stage / output.name, [stage, output.parent])
    except (ComparisonError, SurgeryError, UnsafeInputError):  # the second of onnxruntime-genai's
        return []
    write_use(output.name, uses, stage)
    return [(stage / USE_FILE, use_place(output.parent, output.name))] if uses.uses else []


def write_graph_use(graph: Path) -> None:
    """Writes that file beside a graph, in a folder that the caller stages."""
    write_use(graph.name, graph_uses(graph), graph.parent)


def write_use(name: str, uses: FolderUses, folder: Path) -> None:
    """Writes that file into a folder, where a way is known."""
    if uses.uses:
        place = f"The lines are run in this folder; elsewhere, let {PLACE} be its path."
        parts = [Section(use.library, use.library, [*use_blocks(use)]) for use in uses.uses]
        if uses.notes:
            parts.append(Section("notes", "Not with this folder", [Bullets(uses.notes)]))
        sections = map(section_markdown, parts)
        write_text(folder / USE_FILE, "\n\n".join([_title(name), place, *sections]) + "\n")


def use_blocks(use: Use, lead: str = "") -> Iterator[Block]:
    """What to install and the lines, the first of which says where the folder is."""
    text = f"`pip install {use.needs}`." if use.needs else ""
    words = " ".join(filter(None, (text, use.remark)))
    if lead or words:
        yield Note(words, lead=lead)
    place = f"{PLACE}=." if use.language == "sh" else f'{PLACE} = "."'
    yield Command(f"{place}\n{use.text}", use.language)


def use_place(folder: Path, name: str) -> Path:
    """The place for a file's lines in a folder: its own name where others' have the usual one."""
    usual = folder / USE_FILE
    try:
        taken = usual.exists() and not read_text(usual).startswith(f"{_title(name)}\n")
    except (ValueError, UnsafeInputError):  # no text, or not to be read
        taken = True
    return folder / f"{name}.{USE_FILE}" if taken else usual


def _title(name: str) -> str:
    return f"# How to use {code(name)}"
