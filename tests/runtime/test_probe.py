"""Free memory: the machine's, or what a container's limit leaves of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmopt_cli.runtime.probe import UNKNOWN, available_ram

V2, V1 = "sys/fs/cgroup/memory.{}", "sys/fs/cgroup/memory/memory.{}_in_bytes"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


STAT = "anon 7\ninactive_file 40\nactive_file 3\n"
MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 1000 kB\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, UNKNOWN),
        (MEMINFO, 1000 * 1024),
        (MEMINFO | {V2.format("max"): "max\n", V2.format("current"): "500"}, 1000 * 1024),
        (MEMINFO | {V2.format("max"): "9000\n", V2.format("current"): "500"}, 8500),
        (MEMINFO | {V2.format("max"): "9000\n", V2.format("current"): "9001"}, 0),
        (MEMINFO | {V2.format("max"): "9000", V2.format("current"): "9000", V2.format("stat"): STAT}, 40),
        (MEMINFO | {V1.format("limit"): "7000", V1.format("usage"): "1000"}, 6000),
        (MEMINFO | {V1.format("limit"): str(2**62), V1.format("usage"): "1000"}, 1000 * 1024),
    ],
)
def test_the_smallest_of_what_is_known(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert available_ram(write(tmp_path, files)) == expected
