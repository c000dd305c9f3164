"""Random PyTorch models of a few thousand weights, their folders, texts, images and sounds."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from exporter.artifacts import ModelRef, ParityCheck, PlannedDeletion
from exporter.artifacts.loaded_plan import Replacements
from exporter.models.loading.model_source import LoadedModel
from exporter.models.texts.calibration import CalibrationText
from graph_passes import ReplacementTensors, SublayerRef
from tests.text_graphs import WORDS, write_tokenizer

# What any config may be asked for; each takes the entries that it knows.
_SIZES: dict[str, Any] = {
    "vocab_size": 64, "num_hidden_layers": 3, "n_layer": 3, "n_layers": 3, "num_layers": 3,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32, "word_embed_proj_dim": 32,
    "embedding_size": 32, "intermediate_size": 48, "ffn_dim": 48, "hidden_dim": 48,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "rotary_dim": 4, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64,
    "max_seq_len": 64, "sliding_window": 16, "image_size": 16, "patch_size": 8,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "residual_multiplier": 0.3,
    "encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_decoder_layers": 3,
    "d_ff": 48, "d_kv": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "deepseek_v3": {
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8,
        "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
        "first_k_dense_replace": 1, "num_key_value_heads": 4,
    },
    "mpt": {"hidden_size": None},
    "esm": {
        "emb_layer_norm_before": False, "position_embedding_type": "rotary", "mask_token_id": 5,
    },
    "swin": {"hidden_size": None, "num_layers": None, "num_attention_heads": None},
}  # fmt: skip
_ENCODERS = {"bert", "roberta", "electra", "camembert", "xlm-roberta", "esm", "mpnet"}


def enlarged(model: Any) -> Any:
    """A model in eval mode, its weights large enough that every branch counts."""
    import torch

    for parameter in model.eval().requires_grad_(False).parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def as_loaded(model: Any, name: str, tokenizer: Any = None, **more: Any) -> Any:
    """A model of PyTorch as the loader would give it."""
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    ref = ModelRef(**{
        "source": name, "architecture": type(model).__name__, "num_layers": layers,
        "sha256": "0" * 64, **more,
    })  # fmt: skip
    return LoadedModel(model.eval().requires_grad_(False), tokenizer, ref, Path(name))


def tiny_model(model_type: str, *, head: str = "", **changes: Any) -> Any:
    """A random model of a family."""
    import torch
    import transformers

    config = tiny_config(model_type, **changes)
    generates = type(config) in transformers.AutoModelForCausalLM._model_mapping
    auto = transformers.AutoModel
    if generates and model_type not in _ENCODERS:
        auto = transformers.AutoModelForCausalLM
    if head:
        auto = getattr(transformers, f"AutoModelFor{head}")
    torch.manual_seed(0)
    return enlarged(auto.from_config(config))


def tiny_loaded(model_type: str, tokenizer: Any = None, **changes: Any) -> Any:
    """The same as the loader would give it."""
    return as_loaded(tiny_model(model_type, **changes), model_type, tokenizer)


def tiny_tokenizer(*, special_ends: bool = False) -> Any:
    """A tokenizer of 64 words, ``w0`` to ``w59`` behind four special ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    words = {name: n for n, name in enumerate(specials + [f"w{n}" for n in range(60)])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special_ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip


def write_words(
    path: Path, count: int, *, seed: int | None = None, each: tuple[int, int] | None = None
) -> str:
    """Words that the tokenizer knows, in turn or drawn; in paragraphs of ``each`` from, up to."""
    rng = np.random.default_rng(seed)
    numbers = np.arange(count) % 60 if seed is None else rng.integers(0, 60, count)
    words = [f"w{number}" for number in numbers]
    paragraphs = []
    while words:
        length = int(rng.integers(*each)) if each else count
        paragraphs.append(" ".join(words[:length]))
        words = words[length:]
    path.write_text("\n\n".join(paragraphs))
    return str(path)


@contextlib.contextmanager
def skipped(model: Any, deletions: Iterable[Any]) -> Iterator[None]:
    """Makes the named branches contribute nothing while the block runs: what deleting means."""
    from exporter.models.architectures import named_in, sublayers
    from exporter.models.residual_stream import silenced

    modules = {part.ref: part.contribution for part in sublayers(model)}
    with silenced([modules[name] for name in named_in(model, deletions)]):
        yield


def hook_count(model: Any) -> int:
    """How many hooks hang on a model."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A config of the usual sizes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    names = set(vars(kind())) | set(kind.attribute_map.values())
    sizes = {name: value for name, value in _SIZES.items() if name in names}
    special = _SPECIAL.get(model_type, {})
    sizes |= {"layer_types": None} if vars(kind()).get("layer_types") else {}
    if model_type == "deepseek_v3":
        sizes.pop("head_dim", None)
    wanted = sizes | special | changes
    derived = {name for name, value in special.items() if value is None}
    return kind(**{name: value for name, value in wanted.items() if name not in derived})


SMALL = {
    "vocab_size": 128,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
DECODER = {**SMALL, "num_key_value_heads": 2}
# GPT-2 and bloom have names of their own.
GPT2 = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
BLOOM = {"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4}
T5 = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", DECODER),
    "llama_tied": ("LlamaConfig", "LlamaForCausalLM", DECODER | {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", DECODER | {"head_dim": 24}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SMALL),
    "bloom": ("BloomConfig", "BloomForCausalLM", BLOOM),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", DECODER | {"num_local_experts": 4}),
    "bert": ("BertConfig", "BertModel", SMALL),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5),
    "mamba": ("MambaConfig", "MambaForCausalLM", {"vocab_size": 128, "hidden_size": 32}),
}


def made_of(config: str, model: str, settings: dict[str, Any], seed: int = 0) -> Any:
    """A model of these classes of transformers."""
    import torch
    import transformers

    torch.manual_seed(seed)
    return getattr(transformers, model)(getattr(transformers, config)(**settings))


def family_loaded(family: str, *, dtype: str = "float32", seed: int = 0, **changes: Any) -> Any:
    """A ``LoadedModel`` with random weights and no tokenizer; ``changes`` go into the config."""
    import torch

    config, name, settings = FAMILIES[family]
    return as_loaded(
        made_of(config, name, settings | changes, seed).to(getattr(torch, dtype)), family
    )


def export_onnx(loaded: Any, folder: Path, **options: Any) -> Path:
    """The file that PyTorch's exporter writes of a model."""
    from exporter.export import torch_export

    return torch_export.export_onnx(loaded, folder, **options)


def check_export(loaded: Any, onnx: Path, **options: Any) -> list[ParityCheck]:
    """How a file's answers compare with the model's; an error where they differ too much."""
    from exporter.export import parity

    return parity.check_export(loaded, onnx, **options)


def planned(*entries: tuple[Any, int, Any]) -> list[PlannedDeletion]:
    """Deletions by kind, layer and replacement."""
    return [PlannedDeletion(kind=k, layer=n, replacement=r) for k, n, r in entries]


def random_replacements(
    hidden: int, deletions: Sequence[PlannedDeletion], *, seed: int = 0
) -> Replacements:
    """Numbers for everything that is replaced."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0) -> Any:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    result = {}
    for deletion in deletions:
        kinds = ("attention", "mlp") if deletion.kind == "block" else (deletion.kind,)
        for kind in kinds if deletion.replacement != "none" else ():
            bias, one = normal(hidden, scale=0.3), hidden**-0.5
            tensors = ReplacementTensors(bias)
            if deletion.replacement == "linear":
                tensors = ReplacementTensors(bias, normal(hidden, hidden, scale=one))
            result[SublayerRef(deletion.layer, kind)] = tensors
    return Replacements(Path("replacements.safetensors"), "0" * 64, result)


def ids_of(batch: int = 2, tokens: int = 12) -> Any:
    """The same tokens for whoever is asked."""
    import torch

    return torch.randint(1, 120, (batch, tokens), generator=torch.Generator().manual_seed(0))


def answer(model: Any) -> Any:
    """What a model says to them."""
    import torch

    with torch.inference_mode():
        return model(ids_of())[0]


RATE = 16_000
_TOKENS = {
    "vocab_size": 64, "d_model": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
_STACKS = {
    **_TOKENS, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
_T5 = {**_TOKENS, "num_layers": 2, "num_heads": 4, "d_ff": 48, "d_kv": 8}
_BART = {**_STACKS, "max_position_embeddings": 40, "forced_eos_token_id": None}
_WHISPER = {
    **_STACKS, "num_mel_bins": 8, "max_source_positions": 50, "max_target_positions": 40,
    "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", _WHISPER),
    "t5": ("T5Config", "T5ForConditionalGeneration", _T5),
    "bart": ("BartConfig", "BartForConditionalGeneration", _BART),
    "marian": ("MarianConfig", "MarianMTModel", _BART),
}


def made_loaded(family: str) -> Any:
    """A ``LoadedModel`` of an encoder-decoder without a tokenizer."""
    return as_loaded(enlarged(made_of(*CLASSES[family])), family, num_layers=4, encoder_layers=2)


def write_source(folder: Path, family: str) -> Path:
    """A Hugging Face folder with a tokenizer of 64 words, and for speech its features."""

    made_loaded(family).model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if family == "whisper":
        result = {
            "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 8,
            "sampling_rate": RATE, "hop_length": 160, "chunk_length": 1, "n_fft": 400,
            "padding_value": 0.0,
        }  # fmt: skip
        (folder / "preprocessor_config.json").write_text(json.dumps(result))
    return folder


def write_sound(
    path: Path, seconds: float = 0.5, rate: int = RATE, *, pitch: float = 220.0, channels: int = 1
) -> Path:
    """A tone as a 16-bit WAV file."""
    from scipy.io import wavfile

    times = np.arange(int(seconds * rate)) / rate
    tone = (np.sin(2 * np.pi * pitch * times) * 12_000).astype(np.int16)
    wavfile.write(path, rate, np.stack([tone] * channels, axis=1) if channels > 1 else tone)
    return path


def write_recordings(folder: Path, first: int, number: int = 4) -> Path:
    """A JSON-lines file of recordings with what is said in them, no two alike."""
    folder.mkdir(parents=True)
    lines = []
    for index in range(first, first + number):
        write_sound(folder / f"{index}.wav", 0.4 + 0.05 * index, pitch=150 + 40.0 * index)
        lines.append({"audio": f"{index}.wav", "text": f"w{index} w{index + 7} w{index + 20}"})
    file = folder / "recordings.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


_MEAN = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}


def write_sentence_files(
    folder: Path,
    *,
    pooling: Mapping[str, Any] = _MEAN,
    normalise: bool = False,
    prompts: Mapping[str, str] | None = None,
    default_prompt: str | None = None,
) -> None:
    """Writes them beside a model."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalise else [])]
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": f"{number}_{kind}" if number else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for number, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if prompts is not None:
        text = json.dumps({"prompts": prompts, "default_prompt_name": default_prompt})
        (folder / "config_sentence_transformers.json").write_text(text)


def write_dense(
    folder: Path, *, inputs: int, outputs: int, activation: str = "Tanh"
) -> tuple[Any, Any]:
    """Writes the files of a sentence encoder with a product between pooling and Normalize."""
    write_sentence_files(folder, normalise=True)
    modules = json.loads((folder / "modules.json").read_text())
    dense = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([*modules[:2], dense, *modules[2:]]))
    rng = np.random.default_rng(1)
    weight, bias = rng.normal(size=(outputs, inputs)), rng.normal(size=outputs)
    (folder / "2_Dense").mkdir(exist_ok=True)
    numbers = {"linear.weight": weight, "linear.bias": bias}
    save_file(numbers, folder / "2_Dense" / "model.safetensors")
    result = {"activation_function": f"torch.nn.modules.activation.{activation}"}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(result))
    return weight, bias


def write_encoder(folder: Path, head: str = "Model", **config: Any) -> None:
    """A random BERT of three layers, whose tokenizer knows ``WORDS``."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    made = getattr(transformers, f"Bert{head}")(transformers.BertConfig(**sizes | config))
    made.save_pretrained(folder)
    write_tokenizer(folder)
    result = {"model_input_names": ["input_ids", "attention_mask"], "pad_token": "[UNK]"}
    file = str(folder / "tokenizer.json")
    transformers.PreTrainedTokenizerFast(tokenizer_file=file, **result).save_pretrained(folder)


def write_bert_tokenizer(folder: Path) -> None:
    """The tokenizer of ``WORDS`` with ``[CLS]`` (21) before and ``[SEP]`` (22) behind a text."""
    from tokenizers import Tokenizer, processors

    write_tokenizer(folder, [*WORDS, "[CLS]", "[SEP]"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = [(end, tokenizer.token_to_id(end)) for end in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def write_passages(path: Path, number: int = 40) -> None:
    """A text of paragraphs of known words, no two alike."""
    rng = np.random.default_rng(0)
    paragraphs = [" ".join(rng.choice(WORDS, rng.integers(14, 30))) for _ in range(number)]
    path.write_text("\n\n".join(paragraphs))


KINDS = tuple(f"kind{number}" for number in range(7))
PROCESSOR: dict[str, Any] = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "resample": 2,
    "size": {"height": 16, "width": 16}, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip


def write_image(path: Path, seed: int, size: tuple[int, int] = (20, 24)) -> Path:
    """A PNG of chance colours, written without a library."""
    height, width = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, 1 + 3 * width), dtype=np.uint8)
    pixels[:, 0] = 0  # rows without a filter

    def chunk(name: bytes, content: bytes) -> bytes:
        result = name + content
        return struct.pack(">I", len(content)) + result + struct.pack(">I", zlib.crc32(result))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [("IHDR", header), ("IDAT", zlib.compress(pixels.tobytes())), ("IEND", b"")]
    path.parent.mkdir(parents=True, exist_ok=True)
    chunks = (chunk(name.encode(), content) for name, content in parts)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return path


def write_images(folder: Path, number: int, labels: Sequence[str] = (), *, seed: int = 0) -> Path:
    """So many images side by side, or in a folder for each label."""
    for place in range(number):
        name = f"{place}.png"
        inside = folder / labels[place % len(labels)] / name if labels else folder / name
        write_image(inside, seed + place)
    return folder


def write_classifier(folder: Path, model_type: str = "vit", **changes: Any) -> Path:
    """A random classifier of three layers and seven classes, with its image processor."""

    names = dict(enumerate(KINDS))
    result = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    model = tiny_model(model_type, head="ImageClassification", **result | changes)
    model.save_pretrained(folder)
    write_processor(folder)
    return folder


def write_processor(folder: Path, **changes: Any) -> None:
    """Its settings beside a model; an entry that is None is left out."""
    values = {name: value for name, value in (PROCESSOR | changes).items() if value is not None}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


def made_text(ids: Any, mask: Any = None) -> CalibrationText:
    """Of given ids; without a mask all tokens are real."""
    ids = np.asarray(ids, dtype=np.int64)
    text = CalibrationText.unpadded(ids, "test", "0" * 64)
    if mask is None:
        return text
    real = np.asarray(mask, dtype=bool)
    return CalibrationText(text.ref.model_copy(update={"tokens": int(real.sum())}), ids, real)


def random_text(samples: int = 5, length: int = 12, seed: int = 0) -> CalibrationText:
    """Of ids that every tiny model knows."""
    rng = np.random.default_rng(seed)
    return made_text(rng.integers(3, 64, size=(samples, length)))


REVISION = "0123456789abcdef0123456789abcdef01234567"


def into_cache(folder: Path, cache: Path, *, subfolder: str = "onnx") -> Path:
    """Moves a folder's files into a cache, and gives the folder of links that stands for them."""
    repository = cache / "models--owner--name"
    snapshot = repository / "snapshots" / REVISION / subfolder
    blobs = repository / "blobs"
    for made in (snapshot, blobs):
        made.mkdir(parents=True)
    up = Path(*[".."] * len(snapshot.relative_to(repository).parts))
    for file in sorted(folder.iterdir()):
        name = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.move(file, blobs / name)
        (snapshot / file.name).symlink_to(up / "blobs" / name)
    return snapshot
