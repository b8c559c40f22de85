"""The face: one error boundary, exit codes, completion, stdout for data only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def llmopt(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llmopt_cli", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"NO_COLOR": "1", "HF_HUB_OFFLINE": "1"} | environment,
    )


def test_version() -> None:
    assert llmopt("--version").stdout.startswith("llmopt 0.")


def test_help_names_every_command() -> None:
    shown = llmopt("--help").stdout
    for command in (
        "estimate",
        "quantize",
        "convert",
        "eval",
        "bench",
        "serve",
        "generate",
        "replay",
        "models",
        "gpus",
        "env",
        "demo",
    ):
        assert command in shown


def test_completion_is_offered() -> None:
    run = llmopt("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "complete" in run.stdout


PROMPT = ("--prompt", "x")
BAD_INPUT: list[tuple[tuple[str, ...], int, str, str | None]] = [  # the last: what the hint names, if there is one
    (("generate", "nonesuch", *PROMPT), 2, "unknown model `nonesuch`", "`demo`"),
    (("generate", "nobody/nothing", *PROMPT), 1, "not in the local cache", "`demo`"),
    (("generate", "demo"), 2, "there is no prompt", "--prompt"),
    (("generate", "demo", *PROMPT, "--temperature", "-1"), 2, "temperature must lie in 0..100, not -1", None),
    (("generate", "demo", *PROMPT, "--dtype", "int3"), 2, "unknown dtype `int3`", "float32"),
    (("generate", "demo", "--prompt", "word " * 3000), 1, "the context is 2,048", "shorten the prompt"),
    (("generate", "demo", *PROMPT, "--max-model-len", "4096"), 2, "limit of 2,048 tokens", "at most that"),
    (("generate", "demo", *PROMPT, "--kv-cache-memory-bytes", "9"), 1, "KV cache", "--kv-cache-memory-bytes"),
    (("estimate", "--model", "70x", "--gpu", "a100"), 2, "70x", "llmopt models"),
    (("estimate", "--model", "70b", "--gpu", "a1000000"), 2, "a1000000", "llmopt gpus"),
    (("quantize", "demo", "--method", "awk"), 2, "unknown method `awk`", "awq"),
    (("bench", "demo", "--workload", "chatt"), 2, "unknown workload `chatt`", "chat"),
    (("serve", "--recipe", "nonesuch"), 2, "unknown recipe `nonesuch`", "bf16"),
    (("demo", "--output", "."), 2, "`.` exists already", "a folder that does not"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "message", "hint"), BAD_INPUT, ids=[" ".join(a)[:60] for a, *_ in BAD_INPUT]
)
def test_bad_input_is_one_sentence_a_hint_and_an_exit_code(
    arguments: tuple[str, ...], code: int, message: str, hint: str | None
) -> None:
    run = llmopt(*arguments)
    error, _, said = run.stderr.partition("hint: ")
    assert run.returncode == code
    assert message in error
    assert hint in said if hint else said == ""
    assert "Traceback" not in run.stderr
    assert run.stdout == ""


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    run = llmopt("generate", str(tmp_path), "--prompt", "x")
    assert (run.returncode, "no config.json" in run.stderr) == (1, True)


def test_debug_shows_the_traceback() -> None:
    run = llmopt("generate", "nonesuch", "--prompt", "x", LLMOPT_DEBUG="1")
    assert run.returncode == 1
    assert "Traceback" in run.stderr


def test_generate_prints_text_on_stdout_and_talk_on_stderr() -> None:
    run = llmopt("generate", "demo", "--prompt", "It was", "--max-tokens", "5", "--dtype", "float32")
    assert run.returncode == 0
    assert run.stdout.strip()
    assert "loading" in run.stderr
    quiet = llmopt("generate", "demo", "--prompt", "It was", "--max-tokens", "5", "--dtype", "float32", "--quiet")
    assert (quiet.stdout, quiet.stderr) == (run.stdout, "")


def test_generate_json_has_the_keys_of_the_library() -> None:
    prompts = ["--prompt", "[bold]It[/bold] was", "--prompt", "She said"]
    run = llmopt("generate", "demo", *prompts, "--max-tokens", "3", "--json", "--temperature", "1", "--seed", "1")
    first, second = json.loads(run.stdout)
    assert set(first) == {"prompt", "text", "token_ids", "finish_reason"}
    assert (first["prompt"], len(second["token_ids"])) == ("[bold]It[/bold] was", 3)
    assert second["finish_reason"] == "length"


def test_generate_reads_stdin_and_wraps_chat() -> None:
    command = [sys.executable, "-m", "llmopt_cli", "generate", "demo", "--prompt", "-", "--chat", "--max-tokens", "8"]
    run = subprocess.run(command, input="Who are you?", capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


def test_stdin_that_is_not_text_is_refused() -> None:
    command = [sys.executable, "-m", "llmopt_cli", "generate", "demo", "--prompt", "-"]
    run = subprocess.run(command, input=b"caf\xe9", capture_output=True)
    assert run.returncode == 2
    assert b"the prompt on stdin is not UTF-8" in run.stderr
    assert b"Traceback" not in run.stderr
