"""What tests of whole quantizing runs share."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmopt_cli.quant.calibrate import CALIBRATION, EVALUATION


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The first lines of the bundled texts."""
    folder = tmp_path_factory.mktemp("texts")
    for path in map(Path, (CALIBRATION, EVALUATION)):
        (folder / path.name).write_text("".join(path.read_text().splitlines(keepends=True)[:6]))
    return {name: folder / f"{name}.jsonl" for name in ("calibration", "evaluation")}
