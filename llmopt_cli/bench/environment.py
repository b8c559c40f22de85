"""The fingerprint of this machine and its software. Imports torch, to ask it for its threads and its GPU."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from llmopt_cli import __version__
from llmopt_cli.estimate.host import cpu_name, usable_cores
from llmopt_cli.spec.result import Environment
from llmopt_cli.spec.yaml_file import PACKAGE

PACKAGES = ("torch", "transformers", "numpy")


def fingerprint() -> Environment:
    """What the figures of a run depend on besides the run itself, as it is now."""
    import torch

    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        platform=platform.platform(),
        cpu=cpu_name(),
        cores=usable_cores(),
        threads=torch.get_num_threads(),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        load_average=round(os.getloadavg()[0], 2),
        versions={"llmopt": __version__, "python": platform.python_version()} | _versions(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        commit=_commit(PACKAGE.parent),
    )


def spinning(environment: Environment) -> str | None:
    """A warning if other load will keep some of our threads off the cores, else None.

    OpenMP threads wait for each other by spinning: one that has no core makes all others burn theirs.
    """
    if environment.threads + environment.load_average < environment.cores + 0.8:
        return None
    remedy = " or set OMP_NUM_THREADS=1" if environment.threads > 1 else ""
    return (
        f"the machine is busy: load average {environment.load_average} on {environment.cores} cores, to which we add "
        f"{environment.threads} torch threads. Those that get no core keep the others spinning, and the figures come "
        f"out too low: wait until it is quiet{remedy}"
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit(root: Path) -> str | None:
    """The commit of a checkout, `-dirty` if files were changed; None for an installed package or without git."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return None
    return done.stdout.strip() or None
