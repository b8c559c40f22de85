"""What pyproject.toml cannot say: recipes/ goes into the wheel, the CPU ops are compiled where there is a compiler."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
INSTRUCTION_SETS = {"default": [], "avx2": ["-mavx2", "-mfma", "-mf16c"], "avx512": ["-march=x86-64-v4"]}
if platform.machine().lower() not in ("x86_64", "amd64"):
    INSTRUCTION_SETS = {"default": []}


class BuildPy(build_py):
    """Copies recipes/ beside the package's modules."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "recipes", Path(self.build_lib) / "llmopt_cli" / "recipes", dirs_exist_ok=True)


class BuildExt(build_ext):
    """Compiles plain shared libraries: no Python in them, hence no ABI tag in their names."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


# -fopenmp only when compiling: linking it would bring a second OpenMP runtime beside torch's.
FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast", "-fvisibility=default"]
setup(
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
    ext_modules=[
        Extension(
            f"llmopt_kernels.cpu.ops_{name}",
            ["kernels/llmopt_kernels/cpu/ops.cpp"],
            depends=[str(header.relative_to(ROOT)) for header in (ROOT / "kernels/llmopt_kernels/cpu").glob("*.h")],
            extra_compile_args=[*FLAGS, *flags],
            optional=True,  # no compiler, no OpenMP, another machine: plain torch serves
        )
        for name, flags in INSTRUCTION_SETS.items()
    ],
)
