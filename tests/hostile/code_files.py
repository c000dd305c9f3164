"""Python code in a model's folder, or named by it."""

from __future__ import annotations

import random

from tests.hostile.place import payload
from tests.hostile.spoilt import Spoilt, mutation


@mutation("code", hostile=True)
def brought_code(spoilt: Spoilt, rng: random.Random) -> None:
    """Code beside the model, named in one of its files."""
    spoilt.write("payload.py", payload(spoilt.place))
    name = rng.choice(("config.json", "config.json", "tokenizer_config.json",
    "generation_config.json", "preprocessor_config.json",))  # fmt: skip
    entries = {
        "AutoConfig": "payload.Config",
        "AutoModelForCausalLM": "payload.Model",
        "AutoModel": "payload.Model",
    }
    if name == "tokenizer_config.json":
        entries = {"AutoTokenizer": ["payload.Tokenizer", "payload.Tokenizer"]}
        spoilt.change(name, "tokenizer_class", "Tokenizer")
    if name == "preprocessor_config.json":
        entries = {"AutoImageProcessor": "payload.Model", "AutoProcessor": "payload.Model"}
    spoilt.change(name, "auto_map", entries)
    if rng.random() < 0.5:
        spoilt.change("config.json", "model_type", "kid")


@mutation("code", hostile=True)
def code_elsewhere(spoilt: Spoilt, rng: random.Random) -> None:
    target = rng.choice(("../beside/evil/payload.Model",
    f"{spoilt.place.beside / 'evil'}--payload.Model", "attacker/x--payload.Model",
    "..payload.Model",))  # fmt: skip
    key = rng.choice(("AutoConfig", "AutoModelForCausalLM", "AutoModel"))
    spoilt.change("config.json", "auto_map", {key: target})
    spoilt.change("config.json", "model_type", "kid")


@mutation("code")
def modules(spoilt: Spoilt, rng: random.Random) -> None:
    """Files that Python would import by their names, if it looked there."""
    for name in rng.sample(
        (
            "torch.py",
            "json.py",
            "sitecustomize.py",
            "__init__.py",
            "modeling_llama.py",
            "exporter.py",
            "numpy.py",
            "transformers.py",
            "conftest.py",
            "custom_generate/generate.py",
            "safetensors.py",
            "onnx.py",
        ),
        4,
    ):
        spoilt.write(name, payload(spoilt.place))
    if rng.random() < 0.5:
        spoilt.write("custom_generate/generate.py", payload(spoilt.place))
