"""The kernels folder must never shadow the registry's package of that name, which transformers imports."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_kernels_folder_does_not_shadow_the_pypi_package() -> None:
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT)


def test_kernels_folder_has_no_init() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_model_classes_import_from_the_repository_root() -> None:
    """`python -m` and `python -c` put the working directory on sys.path, where a package `kernels` would be found."""
    code = "from transformers import LlamaForCausalLM; print(LlamaForCausalLM.__name__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "LlamaForCausalLM"
