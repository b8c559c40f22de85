"""Machines: what was probed is kept whole in the user's folder, stands for the accelerator, and is not mistaken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llmopt_cli.errors import ConfigFileError, UsageError
from llmopt_cli.estimate import host
from llmopt_cli.estimate.constants import find_engine
from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.host import Calibration, Machine, Spread
from llmopt_cli.estimate.latency import StepModel
from llmopt_cli.spec.catalog import find_model
from llmopt_cli.spec.hardware import GIB
from llmopt_cli.spec.result import Environment
from llmopt_cli.spec.scheme import find_scheme

HERE = Machine(
    cpu=host.cpu_name(),
    cores=host.usable_cores(),
    threads=1,
    gpu=None,
    date="2026-01-02T03:04:05+00:00",
    memory_bytes=8 * GIB,
    bandwidth_gb_s=20.0,
    tflops={"float32": 0.1, "bfloat16": 0.25},
)
LEARNED = Calibration(
    engine="llmopt",
    date="2026-02-03T00:00:00+00:00",
    runs=12,
    models=["demo"],
    schemes=["bf16"],
    constants={"step_s": 0.25},
    errors={"tpot_ms": Spread(0.06, 0.9, 1.2), "ttft_ms": Spread(0.2, 0.8, 1.5)},
)
ENVIRONMENT = Environment("2026", "Linux", HERE.cpu, HERE.cores, 1, 1, 0.0, {})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMOPT_CONFIG_DIR", str(tmp_path / "own"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path / "own"


def on(model: str = "demo", scheme: str = "bf16", engine: str = "llmopt") -> Deployment:
    precision = find_scheme(scheme)
    hardware, _ = host.find_accelerator("host", precision)
    return Deployment(find_model(model), hardware, precision, engine=find_engine(engine))


def test_an_own_folder_wins_over_the_users_and_that_over_home(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert host.config_folder() == folder
    monkeypatch.delenv("LLMOPT_CONFIG_DIR")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert host.config_folder() == tmp_path / "llmopt"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert host.config_folder() == tmp_path / "home" / ".config" / "llmopt"


def test_what_is_kept_is_read_back_and_replaces_its_like_alone(folder: Path) -> None:
    other, threaded = replace(HERE, cpu="another"), replace(HERE, threads=2)
    for machine in (HERE, other, threaded, replace(HERE, bandwidth_gb_s=21.0)):
        assert host.keep(machine.with_calibration(LEARNED)) == folder / host.FILE
    known = host.machines()
    assert len(known) == 3
    assert {(one.cpu, one.threads): one.bandwidth_gb_s for one in known}[HERE.cpu, 1] == 21.0
    assert all(one.calibrations == [LEARNED] for one in known)
    assert [file.name for file in folder.iterdir()] == [host.FILE]


def test_a_newer_calibration_replaces_that_of_its_engine() -> None:
    newer, other = replace(LEARNED, runs=20), replace(LEARNED, engine="vllm")
    machine = HERE.with_calibration(LEARNED).with_calibration(other).with_calibration(newer)
    assert machine.calibrations == [other, newer]


def test_host_is_this_machine_at_the_rate_of_the_weights_dtype() -> None:
    host.keep(HERE)
    hardware, count = host.find_accelerator(" HOST ", find_scheme("bf16"))
    assert (hardware.memory_bytes, hardware.bandwidth, hardware.flops(), count) == (8 * GIB, 20e9, 0.25e12, 1)
    assert host.find_accelerator("host", find_scheme("float32"))[0].flops() == 0.1e12
    assert host.find_accelerator("h100x2", find_scheme("bf16"))[0].name.startswith("H100")


def test_threads_choose_among_the_entries_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    host.keep(replace(HERE, threads=2, date="2026-03"))
    host.keep(HERE)
    assert host.this_machine().threads == 2  # probed last
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert host.this_machine().threads == 1


def test_a_machine_that_was_not_probed_is_one_sentence_with_the_next_command() -> None:
    host.keep(replace(HERE, cpu="another"))
    with pytest.raises(UsageError, match="not been measured") as caught:
        host.find_accelerator("host", find_scheme("bf16"))
    assert "llmopt env --probe" in (caught.value.hint or "")


def test_a_file_that_was_edited_wrongly_is_told_with_its_line(folder: Path) -> None:
    path = host.keep(HERE)
    path.write_text(path.read_text().replace("cores:", "kores:"))
    with pytest.raises(ConfigFileError, match=r"cores.* is missing in .*machines.yaml"):
        host.machines()


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLMOPT_CONFIG_DIR", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="cannot write"):
        host.keep(HERE)


@pytest.mark.parametrize(
    ("environment", "device", "same"),
    [
        (ENVIRONMENT, "auto", True),
        (replace(ENVIRONMENT, threads=2), "auto", False),
        (replace(ENVIRONMENT, cores=64), "auto", False),
        (replace(ENVIRONMENT, gpu="a GPU"), "auto", False),
        (replace(ENVIRONMENT, gpu="a GPU"), "cpu", True),
    ],
)
def test_a_run_belongs_to_what_computed_it(environment: Environment, device: str, same: bool) -> None:
    assert HERE.computes(environment, device) is same


def test_an_unprobed_gpu_is_looked_up_in_the_catalogue() -> None:
    environment = replace(ENVIRONMENT, gpu="NVIDIA L40S")
    assert host.accelerator_of(environment, "auto", find_scheme("bf16")).name.startswith("L40S")
    for unknown in (ENVIRONMENT, replace(ENVIRONMENT, gpu="NVIDIA Nonesuch 9"), environment):
        with pytest.raises(UsageError):
            host.accelerator_of(unknown, "cpu" if unknown is environment else "auto", find_scheme("bf16"))


def test_what_was_learned_counts_on_its_machine_for_its_engine_alone() -> None:
    host.keep(HERE)
    plain = on()
    host.keep(HERE.with_calibration(LEARNED))
    slower = StepModel(host.tuned(plain)).step(1, 100) - StepModel(plain).step(1, 100)
    assert slower == pytest.approx(0.25 - plain.engine.step_s)
    assert host.tuned(on(engine="vllm")) == on(engine="vllm")
    h100 = replace(plain, hardware=host.find_accelerator("h100", plain.scheme)[0])
    assert host.tuned(h100) == h100
    assert host.tuned(plain).engine.overrides[-1].source == "calibrated from 12 runs, +-6%, 2026-02-03"


def test_the_band_is_that_of_the_calibration_and_wider_beyond_it() -> None:
    host.keep(HERE)
    assert host.band("tpot_ms", on()) is None
    host.keep(HERE.with_calibration(LEARNED))
    band = host.band("tpot_ms", on())
    assert band
    assert (band.median_error, band.low, band.high, band.rows) == (0.06, 0.9, 1.2, 12)
    assert (band.basis, band.outside) == ("calibrated from 12 runs, +-6%", "")
    beyond = host.band("tpot_ms", on("qwen3-0.6b", "float32"))
    assert beyond
    assert beyond.low < band.low < band.high < beyond.high
    assert "Qwen3-0.6B" in beyond.outside
    assert "fp32" in beyond.outside
    assert host.band("decode_b1_tok_s", on()) is None
    assert (host.band("ttft_ms", on()) or band).basis == "calibrated from 12 runs, +-20%"
