"""The README tells the truth: its links lead somewhere, its flags exist, its estimate is what the command prints."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "kernels" / "README.md", ROOT / ".github" / "CONTRIBUTING.md"]


def llmopt(*arguments: str) -> str:
    command = [sys.executable, "-m", "llmopt_cli", *arguments]
    environment = os.environ | {"NO_COLOR": "1", "COLUMNS": "300"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def example(command: str) -> list[str]:
    """The lines that the README shows below `$ command`, up to the next command or the end of the block."""
    block = README.split(f"$ {command}\n", 1)[1].split("```", 1)[0]
    return [line.rstrip() for line in re.split(r"^\$ ", block, maxsplit=1, flags=re.MULTILINE)[0].splitlines()]


ESTIMATES = re.findall(r"^\$ llmopt (estimate .+)$", README, flags=re.MULTILINE)


@pytest.mark.parametrize("command", ESTIMATES)
def test_estimates_are_what_the_command_prints(command: str) -> None:
    """With LLMOPT_WRITE_README=1 the README is made so instead."""
    printed = [line.rstrip() for line in llmopt(*shlex.split(command)).splitlines()]
    if os.environ.get("LLMOPT_WRITE_README"):
        file = ROOT / "README.md"
        head, rest = file.read_text().split(f"$ llmopt {command}\n", 1)
        end = re.search(r"^(\$ |```)", rest, flags=re.MULTILINE)
        assert end
        file.write_text(f"{head}$ llmopt {command}\n" + "".join(f"{line}\n" for line in printed) + rest[end.start() :])
        return
    assert example(f"llmopt {command}") == printed


@pytest.mark.parametrize("document", DOCUMENTS, ids=[document.parent.name for document in DOCUMENTS])
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_files_that_are_named_exist() -> None:
    named = {
        name
        for document in DOCUMENTS
        for name in re.findall(r"`((?:tests|kernels|llmopt_cli)/[\w./]+)`", document.read_text())
    }
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_flags_and_commands_exist() -> None:
    commands = set(
        re.findall(
            r"llmopt (estimate|quantize|convert|eval|bench|serve|generate|replay|train-heads|models|gpus|env|demo)\b",
            README,
        )
    )
    assert commands == {
        *("estimate", "quantize", "convert", "eval", "bench", "serve", "generate", "replay"),
        "train-heads",
        *("models", "gpus", "env", "demo"),
    }
    known = "".join([llmopt("--help"), *(llmopt(command, "--help") for command in commands)])
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert {flag for flag in flags if flag not in known} == set()
