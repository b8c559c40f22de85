"""`llmopt bench` and `llmopt env` as typed: data on stdout, refusals before anything is loaded, Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from llmopt_cli.bench.environment import fingerprint
from llmopt_cli.bench.tables import show
from llmopt_cli.commands.bench import _command_line
from llmopt_cli.estimate.host import Machine, keep
from llmopt_cli.spec.result import Result, read_results

LLMOPT = [sys.executable, "-m", "llmopt_cli"]
ENVIRONMENT = os.environ | {"NO_COLOR": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
SHORT = ("bench", "--workload", "decode", "--num-requests", "4")


def llmopt(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*LLMOPT, *arguments], capture_output=True, text=True, env=ENVIRONMENT, cwd=folder)


def test_each_concurrency_is_one_result_on_stdout_and_in_the_file(tmp_path: Path) -> None:
    run = llmopt(*SHORT, "--concurrency", "1,3", "--max-num-seqs", "5", "--seed", "9", "--json", folder=tmp_path)
    assert run.returncode == 0, run.stderr
    printed = json.loads(run.stdout)
    assert printed == [json.loads(line) for line in (tmp_path / "results" / "bench.jsonl").read_text().splitlines()]
    assert [one["workload"]["arrivals"]["concurrency"] for one in printed] == [1, 3]
    for one in printed:
        assert one["metrics"]["completed"] == 4
        assert one["recipe"]["batching"]["max_num_seqs"] == 5
        assert (one["seed"], one["workload"]["seed"]) == (9, 9)
        assert one["command"].startswith("llmopt bench --workload decode")


def test_drafts_are_told_beside_what_the_formula_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENVIRONMENT, "LLMOPT_CONFIG_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("LLMOPT_CONFIG_DIR", str(tmp_path / "own"))
    here = fingerprint()
    keep(Machine(here.cpu, here.cores, 1, here.gpu, here.date, 2**33, 20.0, {"float32": 0.1, "bfloat16": 0.2}))
    config = json.dumps({"method": "ngram", "num_speculative_tokens": 3, "acceptance": 0.6, "adaptive": False})
    run = llmopt(*SHORT, "-c", "1", "--speculative-config", config, "--json", folder=tmp_path)
    assert run.returncode == 0, run.stderr
    (result,) = map(Result.parse, map(json.dumps, json.loads(run.stdout)))
    found, expected = result.metrics["speculation"], result.predicted["speculation"]
    measured, formula = found["measured"], found["formula"]
    assert 0 < measured["share"] <= 1 < measured["tokens_per_step"]
    assert 0 < measured["acceptance"] <= 1
    assert {key: formula["as_asked"][key] for key in expected} == expected
    assert (expected["acceptance"], expected["length"], expected["share"]) == (0.6, 3, 1)
    assert formula["as_drafted"]["length"] == formula["as_accepted"]["length"] == measured["length"] <= 3
    assert formula["as_accepted"]["acceptance"] == measured["acceptance"]
    for row in formula.values():
        assert row["off"]["speedup"] == pytest.approx(row["speedup"] / measured["speedup"] - 1)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(*show([result]))
    shown = {line[:30].strip(): line.split() for line in console.export_text().splitlines()}
    assert f"{measured['speedup']:.2f}" in shown["measured"]
    assert f"{expected['speedup']:.2f}" in shown["formula, as asked for"]


def test_people_get_tables_on_stdout_and_talk_on_stderr(tmp_path: Path) -> None:
    run = llmopt(*SHORT, "--results", "kept", folder=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "4 requests at concurrency 8" in run.stderr
    assert "give --num-requests 16 or more" in run.stderr
    for part in ("TTFT", "TPOT", "ITL", "E2E", "goodput", "run quality", "0 of 4 failed"):
        assert part in run.stdout
    assert "added to kept/bench.jsonl" in run.stderr
    assert len(read_results(tmp_path / "kept" / "bench.jsonl")) == 1


def test_ctrl_c_keeps_what_was_measured_as_partial(tmp_path: Path) -> None:
    command = [*LLMOPT, "bench", "-w", "decode", "-c", "1", "--num-requests", "5000", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=tmp_path
    ) as process:
        assert process.stderr is not None
        while "decode on engine" not in (line := process.stderr.readline()):
            assert line, "it never began to measure"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=3)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    (result,) = json.loads(stdout)
    assert result["partial"]
    assert 0 < result["metrics"]["completed"] < 5000
    assert result["metrics"]["failed"] == 0
    assert len(read_results(tmp_path / "results" / "bench.jsonl")) == 1


def test_failed_requests_are_kept_without_the_key_and_fail_the_command(tmp_path: Path) -> None:
    workload = tmp_path / "half.yaml"
    workload.write_text(
        "name: half\ninput_len: {kind: uniform, min: 10, max: 90}\noutput_len: {mean: 4}\n"
        "arrivals: {concurrency: 2}\nnum_requests: 8\n"
    )
    # No request may wait: with two at once and room for one in the batch, the server turns some away.
    server = [*LLMOPT, "serve", "demo", "--port", "0", "--json", "--max-num-seqs", "1", "--max-num-queued-reqs", "0"]
    key = {"LLMOPT_API_KEY": "open-sesame"}
    with subprocess.Popen(server, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT | key) as process:
        assert process.stdout is not None
        try:
            document = ""
            while not document.endswith("}\n"):
                document += (line := process.stdout.readline())
                assert line, "the server did not start"
            url = json.loads(document)["url"]
            there = ("--base-url", url, "--api-key", "open-sesame")
            run = llmopt("bench", "-w", str(workload), *there, "-c", "8", "--json", folder=tmp_path)
        finally:
            process.terminate()
    assert run.returncode == 1, run.stderr
    (result,) = json.loads(run.stdout)
    assert result["metrics"]["failed"] > 0
    assert result["metrics"]["completed"] + result["metrics"]["failed"] == 4 * 8  # as many as make a closed loop steady
    assert "requests failed; the first: " in run.stderr
    assert "answered 429" in run.stderr
    line = (tmp_path / "results" / "bench.jsonl").read_text()
    assert "open-sesame" not in line + run.stdout + run.stderr
    assert "--api-key '***'" in result["command"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--concurrency", "2", "--rate", "3"), "two kinds of load"),
        (("--concurrency", "2,x"), "takes numbers, not `2,x`"),
        (("--concurrency", "0"), "concurrency must be at least 1"),
        (("--rate", "-1"), "rate must be above 0"),
        (("--against", "vllm"), "unknown baseline `vllm`"),
        (("--against", "transformers", "--rate", "3"), "leave --rate out"),
        (("--burstiness", "2"), "give a --rate"),
        (("--burstiness", "2", "--concurrency", "2"), "give a --rate"),
        (("--served-model-name", "x"), "give the server's --base-url"),
        (("--api-key", "x"), "--api-key is for a server"),
        (("--base-url", "http://127.0.0.1:9", "--trust-remote-code"), "name the MODEL"),
        (("--results", "/dev/null/results"), "cannot write `/dev/null/results/bench.jsonl`"),
        (("--base-url", "http://127.0.0.1:9", "--dtype", "float32"), "--dtype is for an engine in this process"),
        (("--base-url", "http://127.0.0.1:9", "--against", "transformers"), "--against is for an engine"),
    ],
)
def test_contradictions_are_refused_before_anything_is_loaded(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    probe = (
        "import sys; from llmopt_cli.cli import main; sys.argv[0] = 'llmopt'\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    command = [sys.executable, "-c", probe, "bench", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path)
    assert run.returncode == 2, run.stderr
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert not list(tmp_path.iterdir())


def test_a_key_in_the_environment_is_no_flag(tmp_path: Path) -> None:
    command = [*LLMOPT, "bench", "--results", "/dev/null/results"]
    environment = ENVIRONMENT | {"LLMOPT_API_KEY": "open-sesame"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert "cannot write" in run.stderr  # which is found out after the flags were found right
    assert "--api-key" not in run.stderr


@pytest.mark.parametrize("typed", [["--api-key", "it's secret"], ["--api-key=it's secret", "-q"]])
def test_the_key_of_a_server_is_not_kept(monkeypatch: pytest.MonkeyPatch, typed: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/llmopt", "bench", *typed])
    kept = _command_line("it's secret")
    assert kept.startswith("llmopt bench ")
    assert "--api-key" in kept
    assert "secret" not in kept


def test_a_probed_machine_predicts_its_runs_and_stands_in_for_a_gpu(tmp_path: Path) -> None:
    environment = ENVIRONMENT | {"LLMOPT_CONFIG_DIR": str(tmp_path / "own")}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([*LLMOPT, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done

    unknown = run(*SHORT, "-c", "1", "--results", "before")
    assert "nothing was predicted: this machine has not been measured yet" in unknown.stderr
    probed = run("env", "--probe", "--json")
    assert {"memory_bytes", "bandwidth_gb_s", "tflops"} <= json.loads(probed.stdout).keys()
    assert f"kept in {tmp_path / 'own' / 'machines.yaml'}" in probed.stderr
    shown = run(*SHORT, "-c", "1,2")
    assert "predicted mean" in shown.stdout
    assert "nothing was predicted" not in shown.stderr
    results = read_results(tmp_path / "results" / "bench.jsonl")
    assert all(result.predicted["mean_ttft_ms"] > 0 for result in results)
    assert json.loads(run("estimate", "--model", "demo", "--gpu", "host", "--json").stdout)["gpu"]["asked"] == "host"
    (outcome,) = json.loads(run("estimate", "--calibrate", "results", "--json").stdout)["outcomes"]
    assert (outcome["runs"], outcome["kept"]) == (2, False)  # two loads are too few to learn from


def test_env_prints_the_fingerprint_of_results(tmp_path: Path) -> None:
    run = llmopt("env", "--json", folder=tmp_path)
    found = json.loads(run.stdout)
    assert run.returncode == 0
    assert {"date", "cpu", "gpu", "cores", "threads", "memory", "commit", "versions"} <= found.keys()
    assert {"llmopt", "python", "torch", "transformers"} <= found["versions"].keys()
    assert found["threads"] == 1
    human = llmopt("env", folder=tmp_path)
    assert found["cpu"] in human.stdout
    assert found["versions"]["torch"] in human.stdout
