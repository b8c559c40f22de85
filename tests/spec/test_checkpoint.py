"""A checkpoint is opened only if it is complete, and never by running what lies in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file

from llmopt_cli.errors import CheckpointError, LlmoptError, UsageError
from llmopt_cli.spec.checkpoint import HUB_FILES, HUB_LEAVES, Checkpoint, read_header


@pytest.fixture
def folder(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("Llama"), tmp_path / "model"))


def test_demo_and_its_draft_open_offline() -> None:
    demo, draft = Checkpoint.open("demo"), Checkpoint.open("demo-draft")
    assert (demo.name, demo.spec.num_layers, demo.spec.hidden_size) == ("demo", 6, 256)
    assert (draft.spec.num_layers, draft.spec.vocab_size) == (2, demo.spec.vocab_size)


def test_headers_agree_with_safetensors(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    found = Checkpoint.open(folder).tensors
    assert {name: header.shape for name, header in found.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert sum(header.nbytes for header in found.values()) == sum(t.nbytes for t in tensors.values())
    assert {header.dtype for header in found.values()} == {"F32"}


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert caught.value.hint == "download it again"


def test_a_file_of_something_else_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(b"\x10\0\0\0\0\0\0\0" + b"not json at all!")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_header(file)


def test_pickles_are_refused_with_the_reason(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="runs the code inside it"):
        Checkpoint.open(folder)


def test_a_folder_without_weights_or_config_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        Checkpoint.open(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Checkpoint.open(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"1 of 2 shards, first `model-2\.safetensors`"):
        Checkpoint.open(folder)


def test_the_usual_file_is_the_whole_model(folder: Path) -> None:
    expected = set(Checkpoint.open(folder).tensors)
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert {header.file.name for header in Checkpoint.open(folder).tensors.values()} == {"model.safetensors"}
    assert set(Checkpoint.open(folder).tensors) == expected


@pytest.mark.parametrize("name", ["nonesuch", "./nonesuch", "/nonesuch/model", "a/b/c", "~nouser/x", "x" * 300])
def test_a_name_that_is_nothing_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        Checkpoint.open(name)
    assert "demo" in str(caught.value.hint)


def test_the_name_is_the_folder_s_or_the_hub_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Checkpoint.open(folder).name == folder.name
    monkeypatch.setattr("llmopt_cli.spec.checkpoint._download", lambda name, revision: folder)
    assert Checkpoint.open("somebody/something").name == "somebody/something"
    monkeypatch.chdir(folder)
    assert Checkpoint.open(".").name == folder.name


def test_a_download_takes_the_weights_once_and_the_code_beside_them() -> None:
    wanted = ["config.json", "model-1.safetensors", "modeling_own.py", "tokenizer.json", "tokenizer.model"]
    others = ["consolidated.safetensors", "original/params.json", "pytorch_model.bin", "README.md"]
    taken = filter_repo_objects([*wanted, *others], allow_patterns=HUB_FILES, ignore_patterns=HUB_LEAVES)
    assert list(taken) == wanted


def test_a_hub_id_without_network_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LlmoptError, match="not in the local cache") as caught:
        Checkpoint.open("nobody/nothing")
    assert "demo" in str(caught.value.hint)
