"""The built wheel, installed in a new environment, does all four verbs in an empty folder, offline."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "llmopt_cli", "kernels", "recipes")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a new environment that holds the wheel; its dependencies are borrowed from this one."""
    source, home = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("env")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / part, source / part)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(source / "dist"), str(source)]
    subprocess.run(wheel, check=True, capture_output=True)
    venv.create(home, with_pip=False)
    packages = next((home / "lib").glob("python*/site-packages"))
    [built] = (source / "dist").glob("llmopt-*.whl")
    install = [*pip, "--python", str(home / "bin" / "python"), "install", "--no-deps", "--no-index", str(built)]
    subprocess.run(install, check=True, capture_output=True)
    (packages / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"])
    return home / "bin"


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def run(binaries: Path, *arguments: str) -> str:
    done = subprocess.run([str(binaries / "llmopt"), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_itself_is_what_runs(binaries: Path, empty: Path) -> None:
    code = (
        "import llmopt_cli, llmopt_kernels.cpu as cpu; from llmopt_cli.spec.yaml_file import recipes_folder;"
        "print(llmopt_cli.__file__, recipes_folder(), cpu.library() is not None)"
    )
    out = subprocess.run([str(binaries / "python"), "-c", code], capture_output=True, text=True, check=True).stdout
    package, recipes, compiled = out.split()
    assert Path(package).is_relative_to(binaries.parent)
    assert Path(recipes).is_relative_to(binaries.parent)
    assert compiled == str(shutil.which("g++") is not None)


def test_estimate(binaries: Path, empty: Path) -> None:
    assert "A100-SXM4-80GB" in run(binaries, "estimate", "--model", "70b", "--gpu", "a100")


def test_quantize_then_bench(binaries: Path, empty: Path) -> None:
    run(binaries, "quantize", "--method", "awq", "--samples", "16")
    assert (empty / "demo-awq-w4g128" / "model.safetensors").is_file()
    run(binaries, "bench", "--workload", "chat.yaml")
    [line] = (empty / "results" / "bench.jsonl").read_text().splitlines()
    assert json.loads(line)["metrics"]["failed"] == 0


def test_serve(binaries: Path, empty: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [str(binaries / "llmopt"), "serve", "--port", str(port)], stderr=subprocess.PIPE, text=True
    )
    assert server.stderr
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            except httpx.TransportError:
                assert server.poll() is None, server.stderr.read()
            time.sleep(0.1)
        answer = httpx.post(f"{url}/v1/completions", json={"model": "demo", "prompt": "It was", "max_tokens": 4})
        assert answer.json()["usage"]["completion_tokens"] == 4
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
    assert server.returncode == 0
