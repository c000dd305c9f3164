"""The lines that run a folder by a library that takes it as a whole."""

from __future__ import annotations

from exporter.artifacts.uses import PLACE, Use
from exporter.engines.usage.model import NEW_TOKENS, TOKENIZER, UsedModel
from exporter.engines.usage.onnxruntime_lines import PROMPT
from exporter.models.graph_facts import CACHE_INPUT

OPTIMUM = "'optimum-onnx[onnxruntime]'"
TASKS = {
    "ForCausalLM": "ForCausalLM",
    "LMHeadModel": "ForCausalLM",
    "ForMaskedLM": "ForMaskedLM",
    "ForSequenceClassification": "ForSequenceClassification",
    "ForTokenClassification": "ForTokenClassification",
    "ForQuestionAnswering": "ForQuestionAnswering",
}
"""How a class's name ends, and how the classes that load it by themselves end."""
_TEXT = "A cat sits on the mat."
_OPTIMUM_TARGETS = ("portable", "onnxruntime-cpu")
_ENGINES = ("tensorrt", "tensorrt-rtx")
_OF_ITS_OWN = frozenset({"bloom", "falcon", "gpt_bigcode"})
"""Whose caches optimum expects in other shapes."""


def genai_lines(model: UsedModel) -> Use | None:
    """onnxruntime-genai, where its config names this graph."""
    if not (model.for_genai and model.has_tokenizer):
        return None
    cuda = "-cuda" if model.target == "onnxruntime-cuda" else ""
    lines = [
        "import onnxruntime_genai as og",
        "from tokenizers import Tokenizer",
        "",
        f"model = og.Model({PLACE})",
        f'tokenizer = Tokenizer.from_file(f"{{{PLACE}}}/{TOKENIZER}")',
        f'tokens = tokenizer.encode("{PROMPT}").ids',
        "parameters = og.GeneratorParams(model)",
        f"longest = len(tokens) + {model.new_tokens}",
        "parameters.set_search_options(max_length=longest, do_sample=False)",
        "generator = og.Generator(model, parameters)",
        "generator.append_tokens(tokens)",
        "while not generator.is_done():",
        "    generator.generate_next_token()",
        "print(tokenizer.decode(generator.get_sequence(0).tolist()))",
    ]
    needs = f"onnxruntime-genai{cuda} tokenizers"
    return Use(library="onnxruntime-genai", needs=needs, text="\n".join(lines))


def optimum_lines(model: UsedModel) -> Use | None:
    """Optimum's runtime, where it knows the model's task and finds the caches that it expects."""
    task = auto_task(model.architecture)
    if task is None or not model.has_tokenizer or model.target not in _OPTIMUM_TARGETS:
        return None
    if task == "ForCausalLM" and not _has_usual_caches(model):
        return None
    name = f"ORTModel{task or 'ForFeatureExtraction'}"
    file = "" if model.file == "model.onnx" else f', file_name="{model.file}"'
    lines = [
        f"from optimum.onnxruntime import {name}",
        "from transformers import AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({PLACE})",
        f"model = {name}.from_pretrained({PLACE}{file})",
        *torch_answer(task, model.new_tokens),
    ]
    return Use(library="optimum", needs=OPTIMUM, text="\n".join(lines))


def auto_task(architecture: str) -> str | None:
    """How the class that loads a model by itself ends; empty for one without a head.

    Returns:
        None where that isn't known.
    """
    found = next((task for end, task in TASKS.items() if architecture.endswith(end)), None)
    return "" if found is None and architecture.endswith("Model") else found


def torch_answer(task: str, new_tokens: int = NEW_TOKENS) -> list[str]:
    """What is done with ``tokenizer`` and ``model`` of transformers or optimum."""
    if task != "ForCausalLM":
        shown = "logits" if task else "last_hidden_state"
        shown = "start_logits" if task == "ForQuestionAnswering" else shown
        return [
            f'inputs = tokenizer("{_TEXT}", return_tensors="pt")',
            f"print(model(**inputs).{shown}.shape)",
        ]
    return [
        f'inputs = tokenizer("{PROMPT}", return_tensors="pt")',
        f"tokens = model.generate(**inputs, max_new_tokens={new_tokens}, do_sample=False)[0]",
        "print(tokenizer.decode(tokens, skip_special_tokens=True))",
    ]


def _has_usual_caches(model: UsedModel) -> bool:
    """Whether every cache has the heads and the head size that the config tells."""
    config = model.config
    heads = config.get("num_attention_heads") or config.get("n_head")
    width = config.get("hidden_size") or config.get("n_embd")
    if not isinstance(heads, int) or not isinstance(width, int) or not model.pasts:
        return False
    expected = (
        config.get("num_key_value_heads") or heads,
        config.get("head_dim") or width // heads,
    )
    usual = all(model.form.heads.get(past) == expected for past in model.pasts)
    return usual and str(config.get("model_type")) not in _OF_ITS_OWN and model.form.buffer is None


def sentence_lines(model: UsedModel) -> Use | None:
    """sentence-transformers on ONNX Runtime, where its files are there."""
    if not model.has_modules or model.pasts or model.target not in _OPTIMUM_TARGETS:
        return None
    lines = [
        "from sentence_transformers import SentenceTransformer",
        "",
        f'settings = {{"file_name": "{model.file}", "provider": "CPUExecutionProvider"}}',
        f'model = SentenceTransformer({PLACE}, backend="onnx", model_kwargs=settings)',
        *sentence_answer(),
    ]
    needs = "'sentence-transformers[onnx]'"
    return Use(library="sentence-transformers", needs=needs, text="\n".join(lines))


def sentence_answer() -> list[str]:
    """What is done with a ``model`` of sentence-transformers."""
    return [
        f'vectors = model.encode(["{_TEXT}", "A dog lies on the rug."])',
        "print(model.similarity(vectors, vectors))",
    ]


def depthcut_lines(model: UsedModel) -> Use | None:
    """Depthcut's own command, for what generates and has its tokenizer beside it."""
    known = {"input_ids", "attention_mask", "position_ids", "token_type_ids", *model.pasts}
    if not (model.pasts and model.has_tokenizer and set(model.inputs) <= known):
        return None
    provider = " --provider cuda" if model.target == "onnxruntime-cuda" else ""
    text = f'depthcut generate "${PLACE}/{model.file}" "{PROMPT}" -n {model.new_tokens}{provider}'
    return Use(library="depthcut", needs="", text=text, language="sh")


def build_lines(model: UsedModel) -> Use | None:
    """An engine, for a graph that was written for TensorRT."""
    if model.target not in _ENGINES:
        return None
    lines = [f'depthcut build "${PLACE}/{model.file}" -o engines --engine {model.target}']
    if any(CACHE_INPUT.fullmatch(name) for name in model.inputs) and model.has_tokenizer:
        lines.append(f'depthcut generate engines "{PROMPT}" --tokenizer "${PLACE}"')
    return Use(
        library=model.target,
        needs="",
        text="\n".join(lines),
        language="sh",
        remark="Running an engine needs an NVIDIA GPU; building one needs none with TensorRT-RTX.",
    )
