"""Options as schemas: from classes to the command line, to YAML and back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import exporter.cli as command_line
from exporter import option_types
from exporter.cli.command import SchemaCommand, plain_values
from exporter.cli.console import ConsoleProgress
from exporter.compare.options import Generations
from exporter.errors import OptionError, UsageError
from exporter.options import (
    Options,
    Rule,
    argument,
    build,
    dataclass,
    excludes,
    leaves,
    only_with,
    option,
    part,
    required,
    values_of,
)
from tests.raising import ends_in, raises
from tests.reading import in_file


@dataclass(frozen=True)
class Baking(Options):
    degrees: option_types.Count = option(180, "How hot.")
    minutes: option_types.Duration = option(60.0, "How long.", "--time")
    fan: bool | None = option(None, "Move the air.", "--fan/--no-fan")
    glaze: Literal["egg", "milk"] | None = option(None, "On top.", rare=True)
    seed: int = option(0, "Of chance.", config_only=True)
    crust: bool = option(False, "Hard.", "--crust/--soft", config_only=True)
    rules = (excludes("fan", "glaze", "it would fly away"),)


@dataclass(frozen=True)
class Box(Options):
    switch = "kind"
    kind: str = option("tin", "In what.", "--box")
    weight: option_types.Size = option(0, "How much.", "--box-weight")


@dataclass(frozen=True)
class Bread(Options):
    flour: str = argument("FLOUR")
    output: str = required("Where to.", "-o", "--output")
    baking: Baking = part(Baking())
    box: Box | None = part(None)
    slices: option_types.Lengths = option((1,), "How thick.")
    names: option_types.Names = option((), "Called so.")
    salt: option_types.Share = option(0.02, "How much.")
    water: option_types.Tokens | None = option(None, "How much.")
    hands: option_types.Threads = option(None, "How many.")
    seeds: tuple[str, ...] = option((), "On it.", "--seeded")
    rolls: Generations = option((), "As well.")
    recipe: option_types.InputFile | None = option(None, "From where.")
    lid: option_types.Count = option(2, "How heavy.")
    rules = (
        only_with("water", "slices"),
        only_with("lid", "recipe"),
        Rule(("baking.seed",), lambda told: told.baking.seed == -1, "{0} is nothing."),
        Rule(
            ("baking.minutes",),
            lambda told: told.baking.degrees == 999,
            "{0} is too long for that.",
        ),
        Rule(("salt",), lambda told: told.salt > 0.5, "{0} is too much.", "Take less."),
    )


@pytest.fixture
def bake(monkeypatch: pytest.MonkeyPatch) -> list[Bread]:
    made: list[Bread] = []

    def run(call: Bread, progress: ConsoleProgress) -> None:
        """Bake a bread."""
        made.append(call)

    monkeypatch.setitem(command_line.cli.commands, "bake", SchemaCommand("bake", Bread, run))
    return made


def _config(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_the_command_line_makes_the_object(bake: list[Bread]) -> None:
    words = ["rye", "-o", "x", "--time", "2m", "--slices", "3,4", "--box", "wood", "--no-fan"]
    more = ["--seeded", "a", "--seeded", "b", "--rolls", "8x2", "--hands", "auto", "--salt", "5%"]
    assert command_line.run(["bake", *words, *more]) == 0
    (call,) = bake
    assert call.baking == Baking(minutes=120.0, fan=False)
    assert call.box == Box(kind="wood")
    assert (call.slices, call.seeds, call.rolls) == ((3, 4), ("a", "b"), ((8, 2),))
    assert (call.hands, call.salt) == (None, 0.05)


def test_the_command_line_wins_over_the_file(bake: list[Bread], tmp_path: Path) -> None:
    text = "flour: rye\noutput: x\ndegrees: 200\ntime: 2m\nfan: true\nseed: 4\nslices: [2, 3]\n"
    call = ["bake", "--config", _config(tmp_path, text), "--degrees", "150", "--no-fan"]
    assert command_line.run(call) == 0
    assert bake[0].baking == Baking(degrees=150, minutes=120.0, fan=False, seed=4)
    assert bake[0].slices == (2, 3)


@pytest.mark.parametrize(
    ("text", "slices"), [("3", (3,)), ("3,4", (3, 4)), ("'3'", (3,)), ("[3, 4]", (3, 4))]
)
def test_a_list_stands_in_a_file_as_on_the_command_line(
    bake: list[Bread], tmp_path: Path, text: str, slices: tuple[int, ...]
) -> None:
    path = _config(tmp_path, f"slices: {text}\n")
    assert command_line.run(["bake", "rye", "-o", "x", "--config", path]) == 0
    assert bake[0].slices == slices


_ALIASES = "".join(f", &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))
NO_MAPPINGS = (
    *("- a", "a: [", "a: 1\na: 2", "3", "degrees: !!python/name:os.x"),
    *("-1: x", "degrees: !!bool maybe", 'degrees: !!int ""', "degrees: 2020-13-99"),
    "slices: &a [*a]",
    f"slices: [&a0 [1]{_ALIASES}]",
)


@pytest.mark.parametrize(
    ("text", "line", "key", "allowed"),
    [
        ("flour: rye\ndegres: 3", 2, "degres", "degrees"),
        ("flour: rye\nzzz: 3", 2, "zzz", "time"),
        ("degrees: '3'", 1, "degrees", "a whole number"),
        ("degrees: true", 1, "degrees", "a number"),
        ("degrees: 0", 1, "degrees", "1 is the least"),
        ("\nfan: 3", 2, "fan", "true or false"),
        ("glaze: oil", 1, "glaze", "'egg' or 'milk'"),
        ("slices: [1, x]", 1, "slices", "a whole number"),
        ("salt: 3", 1, "salt", "3%"),
        ("rolls: [[8, 1]]", 1, "rolls", "2 is the least"),
        ("recipe: gone.txt", 1, "recipe", "not exist"),
        ("water: 3", 1, "water", "--slices"),
        ("salt: 0.6", 1, "salt", "Take less"),
        ("fan: true\nglaze: egg", 1, "fan", "--glaze"),
        ("box_weight: 3", 1, "box_weight", "--box"),
        *[(text, 0, "", "") for text in NO_MAPPINGS],
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_place(
    bake: list[Bread], tmp_path: Path, capsys: Any, text: str, line: int, key: str, allowed: str
) -> None:
    path = _config(tmp_path, text)
    assert command_line.run(["bake", "rye", "-o", "x", "--config", path]) == 2
    printed = capsys.readouterr().err
    assert (f"{path}, line {line}" if line else path) in printed
    assert key in printed
    assert allowed in printed
    assert "Unexpected" not in printed
    assert bake == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--seed", "3"), "seed: 3"),
        (("--seed=3",), "seed: 3"),
        (("--seed",), "seed: …"),
        (("--seeds",), ""),
        (("--crust",), "crust: true"),
        (("--soft",), "crust: false"),
    ],
)
def test_an_option_that_is_a_key_alone_is_told_as_the_line_of_a_file(
    bake: list[Bread], capsys: pytest.CaptureFixture[str], words: tuple[str, ...], line: str
) -> None:
    assert command_line.run(["bake", "rye", "-o", "x", *words]) == 2
    printed = capsys.readouterr().err
    assert ("--config" in printed) == bool(line)
    assert f"`{line}`" in printed or not line
    assert bake == []


def test_what_is_as_where_nothing_is_said_is_not_given(bake: list[Bread], tmp_path: Path) -> None:
    words = ["bake", "rye", "-o", "x"]
    assert command_line.run([*words, "--box-weight", "1"]) == 2
    assert command_line.run([*words, "--box-weight", "1", "--box", "tin"]) == 0
    for value, code in (("2", 0), ("3", 2)):
        assert command_line.run([*words, "--lid", value]) == code
        assert command_line.run([*words, "--config", _config(tmp_path, f"lid: {value}")]) == code
    assert command_line.run([*words, "--lid", "3", "--recipe", _config(tmp_path, "")]) == 0


EXPORT = ["export", "m", "-o", "x", "--drop-mlp", "1", "--prefill", "8", "--decode-past", "8"]


@pytest.mark.parametrize(
    ("call", "asked", "more"),
    [
        (EXPORT, ["--target", "onnxruntime-cpu", "opset: 20"], ["--target", "portable"]),
        (EXPORT, ["cache_length: 512"], ["--target", "tensorrt"]),
        (EXPORT, ["--stream", "--heal", "bias"], ["--heal", "none"]),
        (EXPORT, ["--quantize", "int4", "--target", "tensorrt"], ["--target", "portable"]),
        (EXPORT, ["--quantize", "int8-qdq"], ["--calibration", "pydoc"]),
        (["plan", "FILE"], [], []),
        (["plan", "FILE", "--parameters", "5%"], ["--search", "one-shot"], []),
        (["quantize", "FILE", "-o", "x"], ["--quantize", "int8-qdq"], []),
    ],
)
def test_a_contradiction_is_told_before_the_configuration_is_shown(
    call: list[str], asked: list[str], more: list[str], tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "file").write_text("{}")
    words = [str(tmp_path / "file") if word == "FILE" else word for word in call]
    words += [*in_file(tmp_path, asked), "--show-config"]
    assert command_line.run(words) == 2
    assert capsys.readouterr().out == ""
    assert not more or command_line.run([*words, *more]) == 0


def test_what_is_shown_runs_the_same(
    bake: list[Bread], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["rye", "-o", "x", "--time", "2m", "--box", "wood", "--no-fan", "--rolls", "8x2,3x4"]
    assert command_line.run(["bake", *words, "--show-config"]) == 0
    printed = capsys.readouterr().out
    assert bake == []
    path = _config(tmp_path, printed)
    assert command_line.run(["bake", "--config", path, "--show-config"]) == 0
    assert capsys.readouterr().out == printed
    assert command_line.run(["bake", *words]) == command_line.run(["bake", "--config", path]) == 0
    assert bake[0] == bake[1]


def test_what_is_required_may_stand_in_the_file(bake: list[Bread], tmp_path: Path) -> None:
    assert command_line.run(["bake", "rye"]) == 2
    assert command_line.run(["bake", "-o", "x"]) == 2
    path = _config(tmp_path, "flour: rye\noutput: x")
    assert command_line.run(["bake", "--config", path]) == 0
    assert len(bake) == 1


_TEXT = st.text("abc-_/ äß,", min_size=1, max_size=5).map(str.strip).filter(bool)
_COUNT = st.integers(1, 10**6)


def _values() -> st.SearchStrategy[dict[str, Any]]:
    box = st.fixed_dictionaries({"box": _TEXT}, optional={"box_weight": st.integers(0, 2**62)})
    own = {
        "degrees": _COUNT,
        "time": st.floats(0.001, 1e6),
        "fan": st.sampled_from([None, True, False]),
        "seed": st.integers(),
        "slices": st.lists(_COUNT, unique=True).map(tuple),
        "names": st.lists(_TEXT.filter(lambda t: "," not in t), unique=True).map(tuple),
        "salt": st.floats(0, 0.5),
        "hands": st.none() | _COUNT,
        "seeded": st.lists(_TEXT).map(tuple),
        "rolls": st.lists(st.tuples(_COUNT, st.integers(2, 99))).map(tuple),
    }
    first = st.fixed_dictionaries({"flour": _TEXT, "output": _TEXT}, optional=own)
    return st.builds(lambda a, b: {**a, **(b or {})}, first, st.none() | box)


@given(_values())
@settings(max_examples=150, deadline=None)
def test_from_the_object_to_yaml_and_back(values: dict[str, Any]) -> None:
    made = build(Bread, values)
    assert build(Bread, values_of(made)) == made
    own = {leaf.key: leaf for leaf in leaves(Bread)}
    plain = plain_values(made)
    read = yaml.safe_load(yaml.safe_dump(plain, allow_unicode=True))
    result = {key: own[key].read(value, strict=True) for key, value in read.items()}
    assert build(Bread, result) == made


@pytest.mark.parametrize(
    ("values", "names", "code"),
    [
        ({"degrees": 0}, {"degrees": "degrees"}, "option-value"),
        ({"minutes": "{0}x"}, {"minutes": "time"}, "option-value"),
        ((180, "x"), {"minutes": "time"}, "option-value"),
        ({"fan": True, "glaze": "egg"}, {"fan": "fan", "glaze": "glaze"}, "options-clash"),
    ],
)
def test_a_wrong_object_names_its_fields(values: Any, names: dict[str, str], code: str) -> None:
    with raises(OptionError, code, *names) as caught:
        Baking(**values) if isinstance(values, dict) else Baking(*values)
    assert caught.value.names == names
    assert not any(f"--{key}" in str(caught.value) for key in names.values())


NUMBERS = (
    *("Count", "Whole", "Several", "WholeOrNone", "Seed", "Threads", "PositiveNumber", "Amount"),
    *("Share", "OpenShare", "Size", "Duration", "Tokens", "Lengths"),
)


@pytest.mark.parametrize("name", NUMBERS)
def test_true_is_no_number(name: str) -> None:
    type_ = option_types.OptionType(getattr(option_types, name))
    type_.read((4,) if name == "Lengths" else 0.5 if "Share" in name else 4)
    with pytest.raises(ValueError, match="True"):
        type_.read((True,) if name == "Lengths" else True)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (["check", "FILE", "--min-speedup", "abc"], ["--min-speedup", "abc", "1.1"]),
        (["check", "FILE", "--max-slowdown", "abc"], ["--max-slowdown", "abc", "3%"]),
        (["plan", "FILE", "--drop-mlp", "1", "--heal", "all"], ["--heal", "bias"]),
        (["plan", "FILE", "faster: fast"], ["1.2x"]),
        (["inspect", ""], ["MODEL"]),
        (["score", ""], ["MODEL"]),
        (["export", " ", "-o", "x", "--drop-mlp", "1"], ["MODEL"]),
    ],
)
def test_a_wrong_value_is_told_with_its_option_and_what_is_allowed(
    asked: list[str], named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("{}")
    words = [str(tmp_path / "file") if word == "FILE" else word for word in asked]
    assert command_line.run(in_file(tmp_path, words)) == 2
    printed = capsys.readouterr().err
    assert [word for word in named if word not in printed] == []


def test_amounts_are_read_as_they_are_written() -> None:
    assert list(map(option_types.size, ("0", "500 MB", "2GiB"))) == [0, 5 * 10**8, 2**31]
    assert option_types.share("3%") == 0.03
    for text in ("3", "x", "8 QB"):
        with pytest.raises(ValueError, match=r"3%|8GB"):
            (option_types.share if text != "8 QB" else option_types.size)(text)


_OTHERWISE = {"output", "report", "also", "costs"}  # a file or folder, a model or arm, new or not


def _commands() -> list[SchemaCommand[Any]]:
    commands = (
        command_line.cli.get_command(None, name) for name in command_line.cli.list_commands()
    )
    return [command for command in commands if isinstance(command, SchemaCommand)]


@pytest.mark.parametrize("columns", ["80", "100"])
@pytest.mark.parametrize("name", [item.name for item in _commands()])
def test_help_is_short_and_all_of_it_is_all(
    name: str, columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    command = command_line.cli.get_command(None, name)
    assert isinstance(command, SchemaCommand)
    assert command_line.run([name, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 60
    assert not [line for line in lines[1:] if line.endswith(("...", "- …"))]
    if name in ("plan", "export") and columns == "80":  # each option takes one line
        own = [line for line in lines[lines.index("Options:") + 1 :] if line.startswith(" ")]
        assert not [line for line in own if not re.match("  -", line)]
    assert command_line.run([name, "--help-all"]) == 0
    printed = capsys.readouterr().out
    for key, leaf in command.leaves.items():
        if not leaf.look.argument:
            shown = f"{key}:" if leaf.look.config_only else f"--{key.replace('_', '-')}"
            assert re.search(rf"(?m)^  (-\w, )?{shown}(?!\w)", printed), shown


def test_a_first_look_folds_and_where_nothing_can_be_folded_fits_maps() -> None:
    export = command_line.cli.get_command(None, "export")
    assert isinstance(export, SchemaCommand)
    call = ["model", "-o", "out", "--quick"]
    quick, result, bare = (
        export.read([*call, *more]).request.heal
        for more in ([], ["--heal", "best"], ["--heal", "none", "--drop-attn", "1"])
    )
    assert (quick.kind, quick.replacements, quick.check_text) == ("fold", "linear", "none")
    assert bare is None
    assert (result.kind, result.replacements) == ("best", "none")


def test_an_option_means_the_same_in_every_command() -> None:
    with_options = {command.name for command in _commands()}
    assert set(command_line.cli.list_commands()) - with_options == {"lm-eval"}
    known: dict[str, tuple[str, Any]] = {}
    for command in _commands():
        for key, leaf in command.leaves.items():
            result = leaf.is_flag, leaf.place
            if not leaf.look.argument and key not in _OTHERWISE:
                name, first = known.setdefault(key, (str(command.name), result))
                assert result == first, f"--{key} of {name} and of {command.name}"


def test_a_share_above_one_is_read_again_as_it_was_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "i.json"
    given.write_text("{}")
    result = ["plan", str(given), "--parameters", "20%", "--at-most", "200%"]
    assert command_line.run([*result, "--show-config"]) == 0
    shown = capsys.readouterr().out
    path = _config(tmp_path, shown)
    assert command_line.run(["plan", str(given), "--config", path, "--show-config"]) == 0
    assert capsys.readouterr().out == shown
    assert "at_most: 200%\n" in shown
    ambiguous = _config(tmp_path, shown.replace("200%", "2.0"))
    assert command_line.run(["plan", str(given), "--config", ambiguous, "--show-config"]) == 2


@pytest.mark.parametrize("word", ["0", "all", "1.5"])
@pytest.mark.parametrize("command", ["compare", "generate"])
def test_threads_are_a_number_or_auto(
    command: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.run([command, str(tmp_path), "x", "--threads", word]) == 2
    printed = capsys.readouterr().err
    assert "'--threads'" in printed
    assert f"'{word}'" in printed or word == "0"


@pytest.mark.parametrize("options", [["--show-config"], ["--config", "a.yaml"]])
def test_lm_eval_takes_no_options_of_depthcut(tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "a.yaml").write_text("threads: 1\n")
    words = [str(tmp_path / word) if word == "a.yaml" else word for word in options]
    with ends_in(UsageError):
        assert command_line.run([*words, "lm-eval", "--tasks", "list"]) == 2
