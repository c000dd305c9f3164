"""The CI sample's workflows, step by step, each in its own shell with stand-ins for others."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.samples.running import SAMPLES

SAMPLE = SAMPLES / "07_ci"
MARK = "<!-- depthcut check 0123456789ab -->"
_DEPTHCUT = """\
#!/bin/sh
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
#!/bin/sh
echo "gh $*" >> "$LOG"
case "$*" in "run download"*) mkdir -p report && cp -r results report/;; esac
"""
_NOTES = '#!/bin/sh\necho "{0} $*" >> "$LOG"\n'
_OWN_GIT = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
"""No settings of the machine's or the user's."""
_CURL = '#!/bin/sh\necho "curl $*" >> "$LOG"\ncase "$*" in *page=*) echo "[]";; esac\n'


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with the sample's files where the README puts them, a clone of its origin."""
    stubs = {"depthcut": _DEPTHCUT, "gh": _GH, "curl": _CURL}
    stubs |= {name: _NOTES.format(name) for name in ("python", "hf")}
    for name, text in stubs.items():
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(text)
        command.chmod(0o755)
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


def test_git_leaves_the_repository_alone_that_a_hook_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = tmp_path / "developer", tmp_path / "own"
    for folder in folders:
        folder.mkdir()
        git(folder, "init", "-q", "-b", "main")
    monkeypatch.setenv("GIT_DIR", str(folders[0] / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(folders[0] / ".git" / "index"))
    git(folders[1], "commit", "-q", "--allow-empty", "-m", "own")
    monkeypatch.delenv("GIT_DIR")
    assert git(folders[1], "rev-list", "--count", "--all").strip() == "1"
    assert git(folders[0], "rev-list", "--count", "--all").strip() == "0"


def shell(checkout: Path, script: str, env: Mapping[str, str]) -> tuple[int, list[str]]:
    """Runs a step as a runner does; its exit code, and what the stand-ins noted."""
    log = checkout.parent / "log"
    log.write_text("")
    path = os.pathsep.join([str(checkout.parent / "bin"), os.environ["PATH"]])
    own = {"PATH": path, "HOME": str(checkout.parent), "LOG": str(log), "MARK": MARK, **_OWN_GIT}
    call = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", script]
    done = subprocess.run(call, cwd=checkout, env={**own, **env}, check=False)
    return done.returncode, log.read_text().splitlines()


def workflow(name: str) -> Any:
    return yaml.safe_load((SAMPLE / name).read_text(encoding="utf-8"))


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


@pytest.mark.parametrize("code", [1, 2, 3])
def test_github_s_gate_fails_with_its_check_and_accepts_nothing(checkout: Path, code: int) -> None:
    job = workflow("github.yml")["jobs"]["gate"]
    codes, _ = run_job(checkout, job, github_values(checkout, main=True), CODE=str(code))
    assert codes["Gate"] == code
    assert not (checkout / ".depthcut-kept" / "build" / "baseline.json").exists()
    assert (checkout / "results" / "build" / "comment.md").exists()


def test_github_s_pull_request_accepts_nothing_and_gets_its_comment(checkout: Path) -> None:
    jobs, values = workflow("github.yml")["jobs"], github_values(checkout, main=False)
    run_job(checkout, jobs["gate"], values)
    assert not (checkout / ".depthcut-kept" / "build" / "baseline.json").exists()
    codes, noted = run_job(checkout, jobs["comment"], values)
    assert codes == {"Comment": 0}
    assert noted[0].startswith("gh run download 5 --name depthcut-report")
    assert "--method POST repos/o/r/issues/7/comments" in noted[-1]
    assert "body=@report/results/build/comment.md" in noted[-1]


def test_a_target_without_the_script_gets_no_comment_and_no_failure(checkout: Path) -> None:
    jobs, values = workflow("github.yml")["jobs"], github_values(checkout, main=False)
    run_job(checkout, jobs["gate"], values)
    (checkout / "ci" / "comment.sh").unlink()
    codes, noted = run_job(checkout, jobs["comment"], values)
    assert codes == {"Comment": 0}
    assert len(noted) == 1


def test_the_action_runs_for_several_reports(checkout: Path) -> None:
    action = workflow("action.yml")
    given = {name: str(item.get("default", "")) for name, item in action["inputs"].items()}
    given |= {"reports": "a/report.json b/report.json", "accept": "1"}
    values = {f"inputs.{name}": value for name, value in given.items()}
    for name in ("a", "b"):
        (checkout / name).mkdir()
        (checkout / name / "report.json").write_text("{}")
    (step,) = action["runs"]["steps"]
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
    comment = {**env, "CI_API_V4_URL": "https://x.invalid", "CI_PROJECT_ID": "5",
               "CI_MERGE_REQUEST_IID": "7", "DEPTHCUT_COMMENT_TOKEN": "secret"}  # fmt: skip
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
