"""The images' files as a builder reads them: what they copy exists, what they install is pinned."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
SCRIPTS = sorted(DOCKER.glob("*.sh"))


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Every instruction and its arguments, continued lines joined, comments left out."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    parts = (line.partition(" ") for line in joined.splitlines() if line.strip())
    return [(word, rest.strip()) for word, _, rest in parts]


def ignored(path: str) -> bool:
    """What .dockerignore says of a path of the checkout's root; the last rule that fits decides."""
    verdict = False
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        if rule and not rule.startswith("#") and fnmatch(path, rule.removeprefix("!")):
            verdict = not rule.startswith("!")
    return verdict


def pins(*files: Path) -> dict[str, str]:
    lines = [line for file in files for line in file.read_text().splitlines()]
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {_plain(name): version for name, version in pairs}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
class TestDockerfile:
    def test_known_instructions_from_a_pinned_base(self, dockerfile: Path) -> None:
        found = instructions(dockerfile)
        words = {word for word, _ in found}
        known = {"FROM", "COPY", "RUN", "USER", "WORKDIR", "ENV", "HEALTHCHECK", "EXPOSE", "CMD"}
        assert words <= known
        assert {"FROM", "USER", "HEALTHCHECK", "CMD"} <= words
        assert re.fullmatch(r"python:3\.\d+-slim-\w+", found[0][1])

    def test_what_is_copied_exists_and_reaches_the_builder(self, dockerfile: Path) -> None:
        for word, rest in instructions(dockerfile):
            if word == "COPY":
                *sources, _target = rest.split()
                for source in sources:
                    assert (ROOT / source).exists()
                    assert source == "." or not ignored(source)

    def test_calls_its_install_script_and_runs_as_nobody_special(self, dockerfile: Path) -> None:
        found = instructions(dockerfile)
        script = f"install-{dockerfile.name.removesuffix('.Dockerfile')}.sh"
        assert any(word == "RUN" and f"docker/{script} /src" in rest for word, rest in found)
        users = [rest for word, rest in found if word == "USER"]
        assert users == ["evomerge"]
        after = found[found.index(("USER", "evomerge")) :]
        assert not any(word in ("RUN", "COPY") for word, _ in after)

    def test_bakes_in_no_secret(self, dockerfile: Path) -> None:
        text = dockerfile.read_text()
        assert not re.search(r"RAY_AUTH_TOKEN|EVOMERGE_STORE|PASSWORD|\bARG\b", text)


def test_the_builder_sees_what_the_package_is_built_from() -> None:
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["readme"]
    packages = ("evomerge", "workers", "alembic", "search_spaces", "docker")
    for name in (
        *packages,
        "setup.py",
        "MANIFEST.in",
        "pyproject.toml",
        "constraints.txt",
        shipped,
    ):
        assert not ignored(name), name
    for name in (".git", ".venv", "tests", "evomerge.db", "docker.env"):
        assert ignored(name), name
    assert ignored("docker/.env"), "the secrets of docker/.env stay out of the images"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
class TestInstallScript:
    def test_is_a_script_that_a_shell_reads(self, script: Path) -> None:
        assert os.access(script, os.X_OK)
        subprocess.run(["sh", "-n", str(script)], check=True)

    def test_installs_what_is_pinned_and_nothing_else(self, script: Path) -> None:
        text = script.read_text().replace("\\\n", " ")
        (command,) = re.findall(r"pip install (.*)", text)
        assert re.findall(r"-c (\S+)", command) == [
            '"$source/constraints.txt"',
            '"$source/docker/constraints.txt"',
        ]
        pinned = pins(ROOT / "constraints.txt", DOCKER / "constraints.txt")
        for named in re.findall(r"'([\w-]+)\[", command):
            assert _plain(named) in pinned
        assert "pip check" in text

    def test_every_extra_it_asks_for_exists_and_is_pinned(self, script: Path) -> None:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        (asked,) = re.findall(r'"\$source\[([\w,]+)\]"', script.read_text())
        pinned = pins(ROOT / "constraints.txt", DOCKER / "constraints.txt")
        wanted = list(extras["dependencies"])
        for extra in asked.split(","):
            wanted += extras["optional-dependencies"][extra]
        for requirement in wanted:
            name = re.split(r"[\[<>=!~ ]", requirement)[0]
            assert _plain(name) in pinned, f"{name} would come in any version"


def test_the_controller_installs_no_model_library() -> None:
    assert "worker" not in (DOCKER / "install-controller.sh").read_text().replace("install-", "")


def test_no_pin_is_given_twice() -> None:
    assert not pins(ROOT / "constraints.txt").keys() & pins(DOCKER / "constraints.txt").keys()
