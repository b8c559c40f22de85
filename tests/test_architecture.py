"""The house as it is drawn: who may import whom, what stays light, and what the root holds."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llmopt_cli"
FACE = {"errors", "output", "options", "__init__"}
ALLOWED = {  # package -> packages it may import, beside itself and the errors
    "spec": set(),
    "model": {"spec", "llmopt_kernels"},
    "quant": {"model", "spec", "llmopt_kernels"},
    "runtime": {"model", "spec", "llmopt_kernels", "estimate.memory"},
    "estimate": {"spec", "runtime.request", "runtime.scheduler", "runtime.state", "runtime.blocks"},
    "bench": {"runtime", "estimate", "model", "spec"},
    "server": {"runtime", "estimate", "model", "spec"},
    "views": {"estimate", "spec"},
    "commands": {"views", "server", "bench", "quant", "runtime", "estimate", "model", "spec", "demo"},
}
ROOT_FILES = {
    *("pyproject.toml", "setup.py", "README.md", "Makefile", "constraints.txt", "LICENSE", "CHANGELOG.md"),
    *("llmopt_cli", "kernels", "recipes", "tests", "results"),
}


def imports(file: Path) -> set[str]:
    """The modules that `file` imports, at its top or inside functions, except for type checking."""
    tree = ast.parse(file.read_text())
    checking = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in checking:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def violations(package: str) -> list[str]:
    wrong = []
    for file in (PACKAGE / package).rglob("*.py"):
        for name in imports(file):
            inside = name.removeprefix("llmopt_cli.") if name.startswith(("llmopt_cli.", "llmopt_kernels")) else None
            if inside is None or inside.split(".")[0] in {package, *FACE, "cli", "__version__"}:
                continue
            if not any(f"{inside}.".startswith(f"{allowed}.") for allowed in ALLOWED[package]):
                wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    return wrong


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package: str) -> None:
    assert violations(package) == []


def test_the_demo_runs_the_verbs_as_processes_and_imports_none() -> None:
    ours = {".".join(name.split(".")[:2]) for name in imports(PACKAGE / "demo.py") if name.startswith("llmopt_")}
    assert ours <= {"llmopt_cli.errors", "llmopt_cli.output", "llmopt_cli.spec"}


def test_kernels_import_nothing_of_ours() -> None:
    for file in (ROOT / "kernels").rglob("*.py"):
        assert not any(name.startswith("llmopt_cli") for name in imports(file)), file


def loaded_by(code: str, *heavy: str) -> list[str]:
    """Which of `heavy` are in sys.modules after `code` ran in a new process."""
    probe = f"{code}\nimport sys\nprint([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    found: list[str] = ast.literal_eval(run.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["--version"]])
def test_help_is_light(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['llmopt', *{arguments}]\nfrom llmopt_cli.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code"
    )
    assert loaded_by(code, "torch", "transformers", "numpy", "fastapi", "httpx") == []


@pytest.mark.parametrize(
    "module",
    [
        "spec.catalog",
        "spec.checkpoint",
        "estimate.plan",
        "estimate.simulate",
        "estimate.calibrate",
        "runtime.scheduler",
        "runtime.request",
    ],
)
def test_what_estimate_needs_never_imports_torch(module: str) -> None:
    assert loaded_by(f"import llmopt_cli.{module}", "torch", "transformers", "numpy") == []


def test_the_root_holds_the_house_and_nothing_else() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    tops = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {top for top in tops if not top.startswith(".")} <= ROOT_FILES


def test_every_module_says_what_it_knows() -> None:
    files = [file for folder in (PACKAGE, ROOT / "kernels") for file in folder.rglob("*.py") if file.stat().st_size]
    assert [str(file) for file in files if not ast.get_docstring(ast.parse(file.read_text()))] == []
