"""The lines that load and run what was written, made from what its folder holds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, Literal, NamedTuple

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

USE_FILE, TOKENIZER = "USE.md", "tokenizer.json"
PLACE = "FOLDER"
"""What the lines call the model's folder; whoever shows them says before them what it is."""
_PROMPT, _NEW_TOKENS = "The capital of France is", 20
_LEFT_OUT = 8  # room for the prompt
_PLAIN = re.compile(r"[\w.+-]+")
_PLAIN_TARGETS = ("portable", "onnxruntime-cpu")
_OF_ITS_OWN = frozenset({"bloom", "falcon", "gpt_bigcode"})
"""Whose caches optimum expects in other shapes."""
_STEP = {"input_ids", "attention_mask", "position_ids"}
_ENCODED = {"input_ids", "attention_mask", "token_type_ids"}
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
    "`out/checkpoint`, whose README.md says how to load it; `depthcut checkpoint MODEL plan.json "
    "-o DIR` writes it alone."
)
_NO_CONFIG = (
    "onnxruntime-genai: there is no genai_config.json here. `depthcut export --target "
    "onnxruntime-cpu` writes one where onnxruntime-genai can run the model."
)
_BUILDS_ANYWHERE = (
    "Running an engine needs an NVIDIA GPU; building one needs none with TensorRT-RTX."
)

_TOKENIZER = f"""\
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file(f"{{{PLACE}}}/{TOKENIZER}")
"""
_OPENED = """\
import numpy as np
import onnxruntime as ort
$tokenizer
session = ort.InferenceSession(f"{FOLDER}/$file", providers=["$provider"])
inputs = {each.name: each for each in session.get_inputs()}
types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int32)": np.int32}
"""
_DECODER = Template(f"""{_OPENED}\
tokens = $tokens
# A dropped attention has no cache: the graph itself says which layers have one.
pasts = [each for each in inputs.values() if each.name.startswith("past")]
caches = {{p.name: np.zeros((1, $heads, 0, $size), types[p.type]) for p in pasts}}
outputs = [name.replace("past_key_values", "present") for name in caches]
step, length = tokens, 0
for _ in range($new_tokens):
    length += len(step)
    known = {{
        "input_ids": [step],
        "attention_mask": np.ones((1, length)),
        "position_ids": np.arange(length - len(step), length)[None],
    }}
    feed = {{
        name: np.array(known[name], types.get(inputs[name].type, np.int64))
        for name in known.keys() & inputs.keys()
    }}
    logits, *presents = session.run(["logits", *outputs], {{**feed, **caches}})
    caches = dict(zip(caches, presents))
    step = [int(logits[0, -1].argmax())]
    if step[0] in $ends:  # what ends a text
        break
    tokens += step
print($shown)
""")
_ENCODER = Template(f"""{_OPENED}\
tokenizer.enable_padding()
texts = ["A cat sits on the mat.", "A dog lies on the rug."]
parts = {{"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}}
encoded = tokenizer.encode_batch(texts)
feed = {{
    name: np.array([getattr(text, parts[name]) for text in encoded], types.get(each.type, np.int64))
    for name, each in inputs.items()
}}
found = session.run(["$shown"], feed)[0]
""")
_POOLED = {
    EMBEDDING: "vectors = found\n",
    "cls": "vectors = found[:, 0]\n",
    "mean": 'mask = feed["attention_mask"][..., None]\n'
    "vectors = (found * mask).sum(1) / mask.sum(1)\n",
    "lasttoken": 'last = feed["attention_mask"].sum(1) - 1\n'
    "vectors = found[np.arange(len(found)), last]\n",
}
_COSINES = (
    "vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)\n"
    "print(vectors @ vectors.T)  # their cosines\n"
)
_GENAI = Template(f"""\
import onnxruntime_genai as og
{_TOKENIZER}\
model = og.Model({PLACE})
tokens = tokenizer.encode("{_PROMPT}").ids
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=len(tokens) + $new_tokens, do_sample=False)
generator = og.Generator(model, parameters)
generator.append_tokens(tokens)
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0).tolist()))
""")
_OPTIMUM = f"""\
from optimum.onnxruntime import {{0}}
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({PLACE})
model = {{0}}.from_pretrained({PLACE}, file_name="{{1}}")
"""
_GENERATED = f"""\
inputs = tokenizer("{_PROMPT}", return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens={{}}, do_sample=False)[0]
print(tokenizer.decode(tokens, skip_special_tokens=True))
"""
_ANSWERED = """\
inputs = tokenizer("A cat sits on the mat.", return_tensors="pt")
print(model(**inputs).{}.shape)
"""
_SENTENCES = f"""\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({PLACE}{{}})
vectors = model.encode(["A cat sits on the mat.", "A dog lies on the rug."])
print(model.similarity(vectors, vectors))
"""


def answer_lines(task: str | None, new_tokens: int = _NEW_TOKENS) -> str:
    """What asks a model of transformers; nothing where it isn't known how."""
    if task == "ForCausalLM":
        return _GENERATED.format(new_tokens)
    outputs = {"": "last_hidden_state", "ForQuestionAnswering": "start_logits"}
    return "" if task is None else _ANSWERED.format(outputs.get(task, "logits"))


def sentence_lines(onnx: str = "") -> str:
    """For sentence-transformers; of a graph by its file."""
    kwargs = f'{{"file_name": "{onnx}", "provider": "CPUExecutionProvider"}}'
    return _SENTENCES.format(onnx and f', backend="onnx", model_kwargs={kwargs}')


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

    def uses(self) -> list[Use]:
        """The ways to run it that hold for what lies there."""
        cuda, task = self.target == "onnxruntime-cuda", auto_task(self.architecture)
        uses = [*self._by_runtime(f"onnxruntime{'-gpu' if cuda else ''}", cuda)]
        known = {*_STEP, *_ENCODED, *self.pasts}
        if self.pasts and self.has_tokenizer and set(self.inputs) <= known:
            provider = " --provider cuda" if cuda else ""
            text = f'depthcut generate "${PLACE}/{self.file}" "{_PROMPT}" -n {self.new_tokens}'
            uses.append(Use("depthcut", "", text + provider, "sh"))
        if self.for_genai and self.has_tokenizer:
            needs = f"onnxruntime-genai{'-cuda' if cuda else ''} tokenizers"
            text = _GENAI.substitute(new_tokens=self.new_tokens)
            uses.append(Use("onnxruntime-genai", needs, text))
        is_plain = self.target in _PLAIN_TARGETS
        usual = task is not None and (task != "ForCausalLM" or self._has_usual_caches)
        if is_plain and self.has_tokenizer and usual:
            text = _OPTIMUM.format(f"ORTModel{task or 'ForFeatureExtraction'}", self.file)
            text += answer_lines(task, self.new_tokens)
            uses.append(Use("optimum", "'optimum-onnx[onnxruntime]'", text))
        if is_plain and self.has_modules and not self.pasts:
            name = "sentence-transformers"
            uses.append(Use(name, f"'{name}[onnx]'", sentence_lines(self.file)))
        if self.target in ("tensorrt", "tensorrt-rtx"):
            text = f'depthcut build "${PLACE}/{self.file}" -o engines --engine {self.target}'
            if self.pasts and self.has_tokenizer:
                text += f'\ndepthcut generate engines "{_PROMPT}" --tokenizer "${PLACE}"'
            uses.append(Use(self.target, "", text, "sh", _BUILDS_ANYWHERE))
        return uses

    def _by_runtime(self, package: str, cuda: bool) -> Iterator[Use]:
        """ONNX Runtime's own lines: a decoder's loop, or an encoder's vectors."""
        causal = self.architecture.endswith(("ForCausalLM", "LMHeadModel"))
        others, needs = set(self.inputs) - set(self.pasts), f"{package} numpy"
        facts = {"file": self.file, "provider": f"{'CUDA' if cuda else 'CPU'}ExecutionProvider"}
        facts["tokenizer"] = _TOKENIZER if self.has_tokenizer else ""
        needs += " tokenizers" if self.has_tokenizer else ""
        if "logits" in self.outputs and (self.pasts or causal):
            if self._has_growing_caches and others <= _STEP and "input_ids" in others:
                tokens, shown = f'tokenizer.encode("{_PROMPT}").ids', "tokenizer.decode(tokens)"
                if not self.has_tokenizer:
                    tokens = "[1, 2, 3]  # of the model's tokenizer, which is not in this folder"
                    shown = "tokens"
                sizes = {self.form.heads[past] for past in self.pasts}
                alike = len(sizes) == 1
                heads, size = next(iter(sizes)) if alike else ("p.shape[1]", "p.shape[3]")
                facts |= {"tokens": tokens, "shown": shown, "ends": str(list(self.ends))}
                facts |= {"heads": str(heads), "size": str(size)}
                text = _DECODER.substitute(facts, new_tokens=self.new_tokens)
                yield Use("ONNX Runtime", needs, text)
        elif self.has_tokenizer and others and set(self.inputs) <= _ENCODED:
            shown = EMBEDDING if EMBEDDING in self.outputs else self.outputs[0]
            pooled = _POOLED.get(EMBEDDING if shown == EMBEDDING else " ".join(self.pooling.modes))
            is_pooled = pooled is not None and shown in (EMBEDDING, STATES)
            end = f"{pooled}{_COSINES}" if is_pooled else "print(found.shape)\n"
            yield Use("ONNX Runtime", needs, _ENCODER.substitute(facts, shown=shown) + end)

    @property
    def _has_growing_caches(self) -> bool:
        """Whether empty caches can be made by the graph's own shapes and types."""
        form = self.form
        sizes = [size for past in self.pasts for size in form.heads.get(past, (None, None))]
        types = {self.inputs[past].dtype for past in self.pasts}
        fixed = form.buffer is not None or form.mask is not None or any(form.windows.values())
        floats = {ir.DataType.FLOAT, ir.DataType.FLOAT16}
        return not fixed and None not in sizes and types <= floats

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
    _write_use(output.name, uses, stage)
    return [(stage / USE_FILE, use_place(output.parent, output.name))] if uses.uses else []


def write_graph_use(graph: Path) -> None:
    """Writes that file beside a graph, in a folder that the caller stages."""
    _write_use(graph.name, graph_uses(graph), graph.parent)


def _write_use(name: str, uses: FolderUses, folder: Path) -> None:
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
    yield Command(f"{place}\n{use.text.rstrip()}", use.language)


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
