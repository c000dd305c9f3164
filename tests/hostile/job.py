"""Does tries one after the other, in a process that has everything imported and only one thread."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.hostile.attempt import Ended, prepare, run
from tests.hostile.bases import in_a_child, write_template
from tests.hostile.commands import COMMANDS, Command
from tests.hostile.judge import faults, outside, results, without_races
from tests.hostile.mutations import KINDS
from tests.hostile.place import Place, clear
from tests.hostile.watch import Rules

_WAIT_S = 120


_LIBRARIES = (
    "scipy.stats", "rich.progress", "jinja2", "tokenizers", "yaml", "safetensors.torch", "torch",
    "transformers", "transformers.generation", "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama", "transformers.models.bert.modeling_bert",
    "onnxscript", "torch.onnx._internal.exporter._core",
)  # fmt: skip
_NOT_IMPORTED = (".__main__", ".worker", "pytest_plugin", "entry_points")


def warm_up() -> None:
    """Imports what commands need, the way that they do, and runs nothing."""
    import exporter
    from exporter.optional import require

    require("onnxruntime", extra="cpu")
    for name in _LIBRARIES:
        importlib.import_module(name)
    root = Path(exporter.__path__[0])
    for path in sorted(root.rglob("*.py")):
        name = ".".join(path.relative_to(root.parent).with_suffix("").parts)
        if not name.endswith(_NOT_IMPORTED):
            with contextlib.suppress(ImportError):
                importlib.import_module(name.removesuffix(".__init__"))


def attempt(
    seed: int, place: Place, template: Path, commands: Sequence[Command], *, sound: bool = False
) -> dict[str, Any]:
    """One try, and all about it."""
    command, arguments, spoilt = prepare(seed, place, template, commands, sound=sound)
    before, earlier = outside(spoilt), results(place)
    own_code = "--trust-remote-code" in arguments
    rules = Rules(place, spoilt.folder, own_code=own_code)
    ended = run(place, lambda: _called(arguments), rules, spoilt.meanwhile)
    texts = list(faults(ended, command, spoilt, before, earlier, own_code=own_code))
    kinds = [mutation.kind for mutation in spoilt.done]
    return {
        "seed": seed, "arguments": arguments, "code": ended.code, "folder": command.folder,
        "seconds": round(ended.seconds, 2), "pid": ended.pid,
        "kinds": kinds,
        "mutations": [mutation.name for mutation in spoilt.done],
        "notes": spoilt.notes[:12], "faults": without_races(texts, kinds, ended.code),
        "said": _said(ended),
    }  # fmt: skip


def _called(arguments: Sequence[str]) -> int:
    from exporter.cli import run

    sys.argv = ["depthcut", *arguments]
    return run(list(arguments))


def _said(ended: Ended) -> str:
    return (ended.out[-1500:] + ended.err[-2500:]).encode("utf-8", "backslashreplace").decode()


def main() -> int:
    """Does the tries that the caller names, and writes a line of JSON for each."""
    sys.dont_write_bytecode = True
    content = json.loads(sys.argv[1])
    template, place = Path(content["template"]), Place(Path(content["place"]))
    place.root.mkdir(parents=True, exist_ok=True)
    warm_up()
    _have_template(template, make=content["make"])
    commands = _commands(content["only"], content["kinds"])
    gc.collect()
    gc.freeze()
    with Path(content["told"]).open("w") as file:
        for seed in content["seeds"]:
            line = attempt(seed, place, template, commands, sound=content["sound"])
            file.write(json.dumps(line) + "\n")
            file.flush()
    clear(place.root)
    return 0


def _commands(only: str | None, kinds: str | None) -> list[Command]:
    """Those that can be called here, of these names, with these ways to spoil their folders."""
    names = only.split(",") if only else [command.name for command in COMMANDS]
    wanted = kinds.split(",") if kinds else list(KINDS)
    unknown = {*names, *wanted} - {command.name for command in COMMANDS} - set(KINDS)
    if unknown:
        raise SystemExit(f"not known: {sorted(unknown)}; kinds are {', '.join(sorted(KINDS))}")
    is_new = int(version("transformers").partition(".")[0]) >= 5  # older ones can't --stream
    changeds = [
        dataclasses.replace(command, kinds=[kind for kind in command.kinds if kind in wanted])
        for command in COMMANDS
        if command.name in names and importlib.util.find_spec(command.needs)
        if is_new or "--stream" not in command.arguments
    ]
    return [command for command in changeds if command.kinds]


def _have_template(template: Path, *, make: bool) -> None:
    done = template.with_name("template-done")
    if make:
        in_a_child(lambda: write_template(template))
        done.touch()
    end = time.monotonic() + _WAIT_S
    while not done.exists():
        if time.monotonic() > end:
            raise RuntimeError("the sound models are not there")
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
