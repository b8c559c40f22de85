"""This machine as an accelerator: what `llmopt env --probe` measured, and what calibrations made of the runs on it.

Both are kept in one YAML file of the user's, `machines.yaml`. Measures and fits nothing itself.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

from llmopt_cli.errors import UnknownNameError, UsageError
from llmopt_cli.estimate.bands import OUTSIDE, Band
from llmopt_cli.estimate.constants import Override
from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.spec.catalog import find_gpu
from llmopt_cli.spec.hardware import GB, GIB, Hardware
from llmopt_cli.spec.result import Environment
from llmopt_cli.spec.scheme import Scheme
from llmopt_cli.spec.yaml_file import read_yaml

HOST = "host"
FILE = "machines.yaml"
HEAD = "# What llmopt knows of machines: `llmopt env --probe` and `llmopt estimate --calibrate` write it.\n"
PROBE_HINT = "`llmopt env --probe` measures it in a few seconds"


@dataclass(frozen=True, slots=True)
class Spread:
    """How far runs were off that the fit had not seen: the median of |predicted / measured - 1|.

    Measured / predicted lay between `low` and `high` for four of five.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    median_error: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Constants of one engine on one machine, fitted to `runs`. `errors` are by figure, named as bands are.

    It was seen to hold for what was among the runs: `models`, in `schemes`.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    engine: str
    date: str
    runs: int
    models: list[str]
    schemes: list[str]
    constants: dict[str, float]
    errors: dict[str, Spread]

    def basis(self, figure: str = "tpot_ms") -> str:
        """`calibrated from 12 runs, +-6%`."""
        return f"calibrated from {self.runs} runs, +-{self.errors[figure].median_error:.0%}"


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine as it was probed: free memory in bytes, a copy's bandwidth, and the rate of products by dtype.

    Another number of threads is another machine. Without `gpu` it is the CPU that computes.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    cpu: str
    cores: int
    threads: int
    gpu: str | None
    date: str
    memory_bytes: int
    bandwidth_gb_s: float
    tflops: dict[str, float]
    calibrations: list[Calibration] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The GPU, else the CPU and how much of it."""
        return self.gpu or f"{self.cpu}, {self.cores} cores, {self.threads} threads"

    def computes(self, environment: Environment, device: str) -> bool:
        """Whether a run in `environment` on a recipe's `device` was computed here."""
        gpu = None if device == "cpu" else environment.gpu
        same = (environment.cpu, environment.cores, gpu) == (self.cpu, self.cores, self.gpu)
        return same and (gpu is not None or environment.threads == self.threads)

    def hardware(self, scheme: Scheme) -> Hardware:
        """As an accelerator, whose one rate is that of the products of `scheme`."""
        return Hardware(
            name=self.name,
            vendor="",
            arch=HOST,
            memory_gib=round(self.memory_bytes / GIB, 2),
            memory_gb=round(self.memory_bytes / GB, 1),
            bandwidth_gb_s=self.bandwidth_gb_s,
            bf16_tflops=self.tflops["float32" if scheme.weight_bits > 16 else "bfloat16"],
            spec_source=f"measured here on {self.date[:10]} by `llmopt env --probe`",
        )

    def calibration(self, engine: str) -> Calibration | None:
        """What is known of an engine here."""
        return next((known for known in self.calibrations if known.engine == engine), None)

    def with_calibration(self, new: Calibration) -> Machine:
        """`new` in the place of what was known of its engine."""
        others = [known for known in self.calibrations if known.engine != new.engine]
        return replace(self, calibrations=[*others, new])


@dataclass(frozen=True, slots=True)
class MachinesFile:
    """The whole file."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    machines: list[Machine]


def config_folder() -> Path:
    """LLMOPT_CONFIG_DIR, else `llmopt` in the user's configuration folder."""
    if own := os.environ.get("LLMOPT_CONFIG_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "llmopt"


def machines() -> list[Machine]:
    """Every machine that was probed, none where there is no file; one that cannot be read raises ConfigFileError."""
    return _read(config_folder() / FILE)


@cache
def _read(path: Path) -> list[Machine]:
    return read_yaml(path, MachinesFile).machines if path.exists() else []


def keep(machine: Machine) -> Path:
    """Write `machine` in the place of what was known of it; the file is whole at any time. May raise UsageError."""
    import yaml

    path = config_folder() / FILE
    others = [known for known in machines() if _identity(known) != _identity(machine)]
    text = HEAD + yaml.safe_dump(asdict(MachinesFile([*others, machine])), sort_keys=False, allow_unicode=True)
    draft = path.with_name(f"{FILE}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
        _read.cache_clear()
    except OSError as error:
        raise UsageError(f"cannot write `{path}`: {error.strerror}", "choose a folder with LLMOPT_CONFIG_DIR") from None
    return path


def _identity(machine: Machine) -> tuple[object, ...]:
    return machine.cpu, machine.cores, machine.gpu, None if machine.gpu else machine.threads


def this_machine() -> Machine:
    """The machine we run on; UsageError where it was not probed.

    Of several entries that differ in threads, the one of OMP_NUM_THREADS, else the one probed last.
    """
    known = [one for one in machines() if (one.cpu, one.cores) == (cpu_name(), usable_cores())]
    if not known:
        raise UsageError("this machine has not been measured yet", PROBE_HINT)
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return max(known, key=lambda one: (str(one.threads) == threads, one.date))


def find_accelerator(text: str, scheme: Scheme) -> tuple[Hardware, int | None]:
    """`host` for this machine, else as `find_gpu`."""
    if text.strip().lower() == HOST:
        return this_machine().hardware(scheme), 1
    return find_gpu(text)


def accelerator_of(environment: Environment, device: str, scheme: Scheme) -> Hardware:
    """What computes in `environment` on a recipe's `device`: as probed, else the catalogue's GPU of that name."""
    for machine in machines():
        if machine.computes(environment, device):
            return machine.hardware(scheme)
    if environment.gpu is None or device == "cpu":
        raise UsageError("this machine has not been measured yet", PROBE_HINT)
    try:
        return find_gpu(environment.gpu.removeprefix("NVIDIA "))[0]
    except UnknownNameError as error:
        raise UsageError(error.message, PROBE_HINT) from None


def calibration_of(on: Deployment) -> Calibration | None:
    """What was learned of the engine on the machine of a deployment."""
    if on.hardware.arch != HOST:
        return None
    return next((one.calibration(on.engine.name) for one in machines() if one.name == on.hardware.name), None)


def tuned(on: Deployment) -> Deployment:
    """With the constants that were learned on its machine, if any were."""
    known = calibration_of(on)
    if known is None:
        return on
    learned = tuple(
        Override(on.hardware.name, name, value, f"{known.basis()}, {known.date[:10]}")
        for name, value in known.constants.items()
    )
    return replace(on, engine=replace(on.engine, overrides=on.engine.overrides + learned))


def band(figure: str, on: Deployment) -> Band | None:
    """The band of a figure by the calibration of its machine; wider for models and precisions that were not in it."""
    known = calibration_of(on)
    spread = known and known.errors.get(figure)
    if not (known and spread):
        return None
    outside = ", ".join(
        f"none of {kind}"
        for kind, seen in ((on.spec.name, known.models), (on.scheme.name, known.schemes))
        if kind not in seen
    )
    power = OUTSIDE if outside else 1.0
    return Band(spread.median_error, spread.low**power, spread.high**power, known.runs, known.basis(figure), outside)


def cpu_name() -> str:
    """As the kernel tells it, else the architecture."""
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def usable_cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
