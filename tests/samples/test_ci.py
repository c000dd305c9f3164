"""The CI sample: its script gates as its README says, its workflows run step by step."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import exporter.cli as command_line
from exporter.cli.console import ConsoleProgress
from tests.made_reports import gate_accuracy, gate_report, gate_row
from tests.samples.running import SAMPLES, run_sample

SAMPLE = SAMPLES / "07_ci"
WORSE_BY_5 = gate_accuracy(16 * 1.05)


def command(folder: Path, name: str, script: str) -> None:
    """A stand-in for a program, in ``bin``."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}")
    path.chmod(0o755)


def workflow(name: str) -> Any:
    return yaml.safe_load((SAMPLE / name).read_text(encoding="utf-8"))


def gate(
    folder: Path, row: Any, *, accept: bool = False, env: dict[str, str] | None = None,
    **changes: Any,
) -> int:  # fmt: skip
    changes = {"accuracy": WORSE_BY_5, **changes}
    report = gate_report([row], **changes).write(folder / "report.json")
    settings = {"ACCEPT": str(int(accept)), **(env or {})}
    folders = (folder / "kept", folder / "results")
    done = run_sample(folder, "07_ci/gate.sh", report, *folders, **settings)
    assert "Traceback" not in done.stderr
    return done.returncode


def test_the_script_gates_and_keeps_what_passed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    assert gate(tmp_path, gate_row(), accept=True) == 0
    accepted = (kept / "baseline.json").read_text()
    assert gate(tmp_path, gate_row(candidate_ms=88.0), accept=True) == 1
    assert gate(tmp_path, gate_row(candidate_ms=83.0, width=0.05)) == 3
    written = {path.name for path in (tmp_path / "results").iterdir()}
    assert {"limits.xml", "baseline.xml", "comment.md", "github-benchmark"} <= written
    assert gate(tmp_path, gate_row(), machine="Another CPU") == 2
    assert not (tmp_path / "results" / "baseline.xml").exists()
    text = (tmp_path / "results" / "comment.md").read_text()
    assert text != (tmp_path / "results" / "limits.md").read_text()  # it tells the error, too
    assert (kept / "baseline.json").read_text() == accepted
    assert len((kept / "history.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("perplexity", "env", "code"),
    [
        (16 * 1.95, {}, 1),
        (16 * 1.08, {}, 1),
        (16 * 1.95, {"MAX_PERPLEXITY_INCREASE": "100%"}, 1),
        (16 * 1.95, {"MAX_PERPLEXITY_GROWTH": "100%"}, 1),
        (16 * 1.052, {}, 0),
        (None, {}, 2),  # another text, as the baseline's: refused
    ],
)
def test_quality_is_held_against_the_limit_and_against_the_last_run(
    perplexity: float | None, env: dict[str, str], code: int, tmp_path: Path
) -> None:
    assert gate(tmp_path, gate_row(), accept=True) == 0
    accuracy = None if perplexity is None else gate_accuracy(perplexity)
    assert gate(tmp_path, gate_row(), accuracy=accuracy, env=env) == code


def test_a_first_run_without_quality_does_not_pass(tmp_path: Path) -> None:
    assert gate(tmp_path, gate_row(), accept=True, accuracy=None) == 3
    assert not (tmp_path / "kept" / "baseline.json").exists()


def gates(folder: Path, *reports: str, codes: tuple[int, ...] = ()) -> int:
    """Runs a copy of the script beside a stub of gate.sh, which writes down its report."""
    (folder / "gates.sh").write_text((SAMPLE / "gates.sh").read_text(encoding="utf-8"))
    (folder / "gate.sh").write_text(
        'mkdir -p "$3"; echo "$1" > "$3/of"; echo "$2" > "$3/kept"; exit "$(cat "$1")"\n'
    )
    for report, code in zip(reports, codes or [0] * len(reports), strict=True):
        (folder / report).parent.mkdir(parents=True, exist_ok=True)
        (folder / report).write_text(str(code))
    call = ["sh", folder / "gates.sh", "kept", folder / "out", *reports]
    return subprocess.run(call, cwd=folder, check=False).returncode


@pytest.mark.parametrize(
    ("codes", "worst"),
    [((0, 0), 0), ((0, 3), 3), ((3, 1), 1), ((1, 3), 1), ((1, 2), 2), ((2, 1), 2), ((0, 137), 2)],
)
def test_several_models_end_with_the_worst_of_their_codes(
    tmp_path: Path, codes: tuple[int, ...], worst: int
) -> None:
    assert gates(tmp_path, "a/report.json", "b/report.json", codes=codes) == worst


@pytest.mark.parametrize(
    ("reports", "names"),
    [
        (("a/report.json", "b/report.json"), ["a", "b"]),
        (("a/build/report.json", "b/build/report.json"), ["build", "build-2"]),
        (
            ("x/build-3/report.json", "a/build/report.json", "b/build/report.json"),
            ["build-3", "build", "build-3-3"],
        ),
        (("report.json",), ["here"]),
    ],
)
def test_each_report_has_a_folder_of_its_own_name(
    tmp_path: Path, reports: tuple[str, ...], names: list[str]
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for _ in range(2):  # a second call uses the same folders
        assert gates(here, *reports) == 0
        texts = {path.name: (path / "of").read_text() for path in (here / "out").iterdir()}
        assert texts == {n: f"{r}\n" for n, r in zip(names, reports, strict=True)}
        for name in names:  # cuts of one model have one key: each has a baseline of its own
            assert (here / "out" / name / "kept").read_text() == f"kept/{name}\n"


def stub(folder: Path, name: str, *pages: str) -> Path:
    """A command that notes its arguments, and answers these pages where it is asked for some."""
    log = folder / f"{name}.log"
    for number, page in enumerate(pages, 1):
        (folder / f"page-{number}").write_text(page)
    paged = f'"{folder}/page-${{all##*&page=}}" 2>/dev/null || echo "[]"'
    command(
        folder, name,
        f'echo "$*" >> {log}\nall=$*\ncase "$all" in\n*--paginate*) cat {folder}/page-*;;\n'
        f'*"&page="*) cat {paged};;\nesac\n',
    )  # fmt: skip
    return log


MARK = "<!-- depthcut check 0123456789ab -->"
HOSTS = {
    "gh": {"GITHUB_ACTIONS": "true", "GITHUB_REPOSITORY": "o/r", "PULL_REQUEST": "7"},
    "curl": {
        "CI_API_V4_URL": "https://gitlab.invalid/api/v4", "CI_PROJECT_ID": "5",
        "CI_MERGE_REQUEST_IID": "7", "DEPTHCUT_COMMENT_TOKEN": "secret",
    },
}  # fmt: skip


def notes(count: int, *last: str) -> str:
    """GitLab's answer: so many notes of others, and this one."""
    bodies = ["x"] * count + list(last)
    return json.dumps([{"id": number, "body": body} for number, body in enumerate(bodies)])


@pytest.mark.parametrize(
    ("host", "pages", "method", "place"),
    [
        ("gh", ("",), "POST", "issues/7/comments"),
        ("gh", ("42",), "PATCH", "issues/comments/42"),
        ("curl", (), "POST", "merge_requests/7/notes"),
        ("curl", (notes(100), notes(100), notes(3)), "POST", "merge_requests/7/notes"),
        ("curl", (notes(42, f"{MARK} y"),), "PUT", "notes/42"),
        ("curl", (notes(100), notes(42, f"{MARK} y")), "PUT", "notes/42"),
    ],
)
def test_a_comment_is_written_over_the_one_of_the_same_model(
    tmp_path: Path, host: str, pages: tuple[str, ...], method: str, place: str
) -> None:
    log = stub(tmp_path, host, *pages)
    file = tmp_path / "comment.md"
    file.write_text(f"{MARK}\n$(touch {tmp_path}/run) `id`\n")
    env = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", **HOSTS[host]}
    subprocess.run(["sh", SAMPLE / "comment.sh", file], env=env, check=True)
    *result, written = log.read_text().splitlines()
    assert 1 <= len(result) <= len(pages) + 1
    assert f" {method} " in written
    assert place in written
    assert f"body@{file}" in written or f"body=@{file}" in written
    assert not (tmp_path / "run").exists()


def test_what_comments_runs_nothing_of_the_request_s_and_nothing_else_may_write() -> None:
    github = workflow("github.yml")["jobs"]
    assert github["comment"]["permissions"]["pull-requests"] == "write"
    assert "permissions" not in github["gate"]
    (checkout, _) = github["comment"]["steps"]
    assert checkout["with"]["ref"] == "${{ github.event.pull_request.base.sha }}"
    script = workflow("gitlab-ci.yml")["comment"]["script"]
    assert any("git show FETCH_HEAD:ci/comment.sh" in line for line in script)


@pytest.mark.parametrize(
    ("limits", "against", "code"),
    [
        (0, 0, 0), (3, 0, 3), (0, 1, 1), (3, 1, 1), (1, 3, 1), (1, 2, 2), (2, 1, 2), (3, 2, 2),
        (137, 0, 2), (0, 137, 2), (127, 1, 2), (130, 3, 2),
    ],
)  # fmt: skip
def test_a_check_that_was_killed_passes_nothing(
    tmp_path: Path, limits: int, against: int, code: int
) -> None:
    command(
        tmp_path, "depthcut",
        f'case "$*" in *--update-baseline*) echo kept > {tmp_path}/updated;;\n'
        f"*--baseline*) exit {against};;\n*) exit {limits};;\nesac\n",
    )  # fmt: skip
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "baseline.json").touch()
    done = subprocess.run(
        ["sh", SAMPLE / "gate.sh", "report.json", tmp_path / "kept", tmp_path / "results"],
        env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "ACCEPT": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == code
    assert (tmp_path / "updated").exists() == (code == 0)


@pytest.mark.parametrize(
    ("again", "compared", "second", "code"),
    [("", "", 0, 1), ("--rounds 9", "ab", 0, 0), ("--rounds 9", "ab", 1, 1),
    ("--rounds 9", "ab", 3, 3), ("--rounds 9", "", 0, 2), ("--rounds 9", "aa", 0, 2)],
)  # fmt: skip
def test_a_regression_must_show_twice_where_it_is_measured_again(
    again: str, compared: str, second: int, code: int, tmp_path: Path
) -> None:
    def report(arms: str) -> str:
        names = zip(("baseline", "candidate"), arms, strict=False)
        sides = {name: {"sha256": arm} for name, arm in names}
        return json.dumps({"arms": sides, "latency": [], "environment": {"threads": 2}})

    (tmp_path / "report.json").write_text(report("ab"))
    made = f"mkdir -p out/again; echo '{report(compared)}' > out/again/report.json"
    command(
        tmp_path, "depthcut",
        f'case "$*" in compare*) echo "$*" > call; {made if compared else "exit 1"};;\n'
        f"*again/report.json*) exit {second};;\n*) exit 1;;\nesac\n",
    )  # fmt: skip
    done = subprocess.run(
        ["sh", SAMPLE / "gate.sh", "report.json", "kept", "out"], cwd=tmp_path, check=False,
        env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "AGAIN": again, "CANDIDATE": "mine"},
    )  # fmt: skip
    assert done.returncode == code
    call = f"compare ./baseline mine -o out/again {again}\n"
    assert (tmp_path / "call").exists() == bool(again)
    assert not again or (tmp_path / "call").read_text() == call


@pytest.mark.parametrize("name", ["github.yml", "gitlab-ci.yml"])
def test_the_commands_of_the_workflows_exist(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").touch()
    text = (SAMPLE / name).read_text(encoding="utf-8")
    calls = re.findall(r"^\s*(?:- )?(?:run: )?depthcut (\w+ .*)$", text, re.MULTILINE)
    assert calls
    for call in calls:
        command, *arguments = shlex.split(call)
        result = command_line.cli.get_command(None, command)
        assert result is not None
        result.make_context(command, arguments, obj=ConsoleProgress())


def test_every_action_is_pinned_by_its_commit() -> None:
    text = (SAMPLE / "github.yml").read_text(encoding="utf-8")
    uses = re.findall(r"uses: (.*)", text)
    assert len(uses) >= 5
    for action in uses:
        assert re.fullmatch(r"actions/[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)
    commits: dict[str, set[str]] = {}
    for repository, commit in re.findall(r"uses: (actions/[\w-]+)\S*@(\S+)", text):
        commits.setdefault(repository, set()).add(commit)
    assert {len(item) for item in commits.values()} == {1}


def test_a_fork_s_pull_request_does_not_run_on_our_machine() -> None:
    job = workflow("github.yml")["jobs"]["gate"]
    assert "self-hosted" in job["runs-on"]
    assert "github.event.pull_request.head.repo.full_name == github.repository" in job["if"]
    assert workflow("github.yml")["permissions"] == {"contents": "read"}
    (checkout,) = (s for s in job["steps"] if s.get("uses", "").startswith("actions/checkout@"))
    assert checkout["with"]["persist-credentials"] is False


def test_only_main_writes_what_others_are_held_against() -> None:
    steps = workflow("github.yml")["jobs"]["gate"]["steps"]
    kept = [s for s in steps if s.get("with", {}).get("path") == ".depthcut-kept"]
    saving = [s for s in kept if "/restore@" not in s["uses"]]
    assert kept != saving
    assert saving
    assert all("github.ref == 'refs/heads/main'" in step["if"] for step in saving)
    caches = workflow("gitlab-ci.yml")["gate"]["cache"]
    assert {cache["key"] for cache in caches} == {"models", "depthcut-kept"}
    assert all("unprotect" not in cache for cache in caches)


def test_a_model_is_read_without_network_and_without_a_token() -> None:
    github = workflow("github.yml")
    assert github["env"]["HF_HUB_DISABLE_IMPLICIT_TOKEN"] == "1"
    reading = [s for s in github["jobs"]["gate"]["steps"] if "depthcut export" in s.get("run", "")
               or "gates.sh" in s.get("run", "")]  # fmt: skip
    assert len(reading) == 2
    assert all(step["env"]["HF_HUB_OFFLINE"] == "1" for step in reading)
    gitlab = workflow("gitlab-ci.yml")
    assert gitlab["variables"]["HF_HUB_DISABLE_IMPLICIT_TOKEN"] == "1"
    script = gitlab["gate"]["script"]
    first = next(place for place, line in enumerate(script) if line.startswith("depthcut"))
    assert "export HF_HUB_OFFLINE=1" in script[:first]
    assert any(line.startswith("unset CI_JOB_TOKEN ") for line in script[:first])


_DEPTHCUT = """\
echo "depthcut $*" >> "$LOG"
[ "$1" != export ] || { mkdir -p build; echo '{}' > build/report.json; exit 0; }
case "$*" in *--update-baseline*) echo accepted > "$4";; esac
while [ $# -gt 1 ]; do
  [ "$1" != --comment ] || printf '%s\\ntable\\n' "$MARK" > "$2"
  shift
done
exit "${CODE:-0}"
"""
_GH = """\
echo "gh $*" >> "$LOG"
case "$*" in "run download"*) mkdir -p report && cp -r results report/;; esac
"""
_NOTES = 'echo "{0} $*" >> "$LOG"\n'
_OWN_GIT = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
"""No settings of the machine's or the user's."""
_CURL = 'echo "curl $*" >> "$LOG"\ncase "$*" in *page=*) echo "[]";; esac\n'


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with the sample's files where the README puts them, a clone of its origin."""
    stubs = {"depthcut": _DEPTHCUT, "gh": _GH, "curl": _CURL}
    stubs |= {name: _NOTES.format(name) for name in ("python", "hf")}
    for name, text in stubs.items():
        command(tmp_path, name, text)
    origin = tmp_path / "origin"
    shutil.copytree(SAMPLE, origin / "ci")
    git(origin, "init", "-q", "-b", "main")
    git(origin, "add", "-A")
    git(origin, "commit", "-q", "-m", "all")
    git(tmp_path, "clone", "-q", str(origin), "checkout")
    return tmp_path / "checkout"


def git(folder: Path, *arguments: str) -> str:
    """Runs git in a folder, whatever repository a hook that runs the tests names; what it says."""
    names = [
        f"-c{key}" for key in ("user.name=a", "user.email=a@b.invalid", "commit.gpgsign=false")
    ]
    parts = [part for name in names for part in (name[:2], name[2:])]
    rest = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    call = ["git", *parts, *arguments]
    done = subprocess.run(
        call, cwd=folder, env=rest | _OWN_GIT, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def shell(checkout: Path, script: str, env: Mapping[str, str]) -> tuple[int, list[str]]:
    """Runs a step as a runner does; its exit code, and what the stand-ins noted."""
    log = checkout.parent / "log"
    log.write_text("")
    path = os.pathsep.join([str(checkout.parent / "bin"), os.environ["PATH"]])
    own = {"PATH": path, "HOME": str(checkout.parent), "LOG": str(log), "MARK": MARK, **_OWN_GIT}
    call = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", script]
    done = subprocess.run(call, cwd=checkout, env={**own, **env}, check=False)
    return done.returncode, log.read_text().splitlines()


def resolved(settings: Mapping[str, Any], values: Mapping[str, str]) -> dict[str, str]:
    """GitHub's expressions by their values; one that isn't known here fails the test."""
    return {
        name: re.sub(r"\$\{\{ (.*?) \}\}", lambda item: values[item[1]], str(value))
        for name, value in settings.items()
    }


def github_values(checkout: Path, *, main: bool) -> dict[str, str]:
    return {
        "vars.DEPTHCUT": "depthcut @ file:///x",
        "github.workspace": str(checkout),
        "github.ref == 'refs/heads/main' && '1' || '0'": str(int(main)),
        "github.token": "secret",
        "github.event.pull_request.number": "7",
    }


def run_job(
    checkout: Path, job: Mapping[str, Any], values: Mapping[str, str], **env: str
) -> tuple[dict[str, int], list[str]]:
    """The steps that run a shell, until one fails; their codes by name, and what was noted."""
    result = workflow("github.yml")
    codes, noted = {}, []
    for step in (item for item in job["steps"] if "run" in item):
        settings = resolved({**result["env"], **step.get("env", {})}, values)
        runner = {"GITHUB_ACTIONS": "true", "GITHUB_REPOSITORY": "o/r", "GITHUB_RUN_ID": "5"}
        codes[step["name"]], lines = shell(checkout, step["run"], {**runner, **settings, **env})
        noted += lines
        if codes[step["name"]]:
            break
    return codes, noted


def test_github_s_gate_runs_each_step_and_keeps_what_passed(checkout: Path) -> None:
    job = workflow("github.yml")["jobs"]["gate"]
    codes, noted = run_job(checkout, job, github_values(checkout, main=True))
    assert codes == dict.fromkeys(["Install", "Fetch the model", "Cut and compare", "Gate"], 0)
    words = [" ".join(line.split()[:2]) for line in noted]
    assert words == ["python -m", "hf download", *["depthcut export"], *["depthcut check"] * 2]
    assert "depthcut @ file:///x" in noted[0]
    assert (checkout / ".depthcut-kept" / "build" / "baseline.json").exists()
    assert (checkout / "results" / "build" / "comment.md").read_text().startswith(MARK)
    assert job["steps"][-1]["with"]["path"].split() == ["build/report.*", "results"]


def test_github_s_pull_request_accepts_nothing_and_gets_its_comment(checkout: Path) -> None:
    jobs, values = workflow("github.yml")["jobs"], github_values(checkout, main=False)
    run_job(checkout, jobs["gate"], values)
    assert not (checkout / ".depthcut-kept" / "build" / "baseline.json").exists()
    codes, noted = run_job(checkout, jobs["comment"], values)
    assert codes == {"Comment": 0}
    assert noted[0].startswith("gh run download 5 --name depthcut-report")
    assert "--method POST repos/o/r/issues/7/comments" in noted[-1]
    assert "body=@report/results/build/comment.md" in noted[-1]


def test_the_action_runs_for_several_reports(checkout: Path) -> None:
    action = workflow("action.yml")
    given = {name: str(item.get("default", "")) for name, item in action["inputs"].items()}
    given |= {"reports": "a/report.json b/report.json", "accept": "1"}
    values = {f"inputs.{name}": value for name, value in given.items()}
    for name in ("a", "b"):
        (checkout / name).mkdir()
        (checkout / name / "report.json").write_text("{}")
    (step,) = action["runs"]["steps"]
    assert set(step["env"].values()) == {f"${{{{ inputs.{name} }}}}" for name in action["inputs"]}
    assert "${{" not in step["run"]  # an input is never a part of the script
    env = {**resolved(step["env"], values), "GITHUB_ACTION_PATH": str(checkout / "ci")}
    code, noted = shell(checkout, step["run"], env)
    assert code == 0
    assert [line.split()[2] for line in noted] == ["a/report.json"] * 2 + ["b/report.json"] * 2
    kept = {path.parent.name for path in (checkout / ".depthcut-kept").rglob("baseline.json")}
    assert kept == {"a", "b"}


def gitlab(
    checkout: Path, job: Mapping[str, Any], *parts: str, **env: str
) -> tuple[int, list[str]]:
    """All lines of the parts in one shell, as GitLab's runner has them."""
    result = {name: str(value) for name, value in workflow("gitlab-ci.yml")["variables"].items()}
    result["HF_HOME"] = result["HF_HOME"].replace("$CI_PROJECT_DIR", str(checkout))
    lines = [line for part in parts for line in job[part]]
    return shell(checkout, "\n".join(lines), {**result, "DEPTHCUT": "depthcut @ file:///x", **env})


@pytest.mark.parametrize("accepted", [False, True])
def test_gitlab_s_merge_request_is_held_against_its_target_branch(
    checkout: Path, accepted: bool
) -> None:
    origin = checkout.parent / "origin"
    if accepted:
        (origin / "ci" / "kept" / "build").mkdir(parents=True)
        (origin / "ci" / "kept" / "build" / "baseline.json").write_text("{}")
        git(origin, "add", "-A")
        git(origin, "commit", "-q", "-m", "accept")
    left = checkout / ".depthcut-kept" / "left.json"
    left.parent.mkdir()
    left.touch()
    jobs = workflow("gitlab-ci.yml")
    env = {"CI_MERGE_REQUEST_TARGET_BRANCH_NAME": "main"}
    code, noted = gitlab(checkout, jobs["gate"], "before_script", "script", **env)
    assert code == 0
    assert not left.exists()
    checks = [line for line in noted if line.startswith("depthcut check")]
    assert len(checks) == 1 + accepted
    assert not git(checkout, "remote")
    comment = env | HOSTS["curl"]
    git(checkout, "remote", "add", "origin", str(origin))  # another job: another checkout
    code, noted = gitlab(checkout, jobs["comment"], "script", **comment)
    assert code == 0
    assert " POST " in noted[-1]
    assert "body@results/build/comment.md" in noted[-1]


def test_gitlab_s_main_accepts_what_passed_and_warns_of_what_is_unsure(checkout: Path) -> None:
    job = workflow("gitlab-ci.yml")["gate"]
    code, _ = gitlab(checkout, job, "before_script", "script", ACCEPT="1", CODE="3")
    assert code in job["allow_failure"]["exit_codes"]
    assert not (checkout / ".depthcut-kept" / "build" / "baseline.json").exists()
    git(checkout, "remote", "add", "origin", str(checkout.parent / "origin"))
    assert gitlab(checkout, job, "before_script", "script", ACCEPT="1")[0] == 0
    assert (checkout / ".depthcut-kept" / "build" / "baseline.json").exists()
