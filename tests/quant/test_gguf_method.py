"""GGUF as methods: a mix is a run like any other, and the one file it makes is the model that was judged."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from llmopt_cli.errors import CheckpointError, InterruptedWorkError, ModelError, UsageError
from llmopt_cli.model.load import load_model
from llmopt_cli.model.stream import Store
from llmopt_cli.output import Report
from llmopt_cli.quant.dryrun import plan
from llmopt_cli.quant.evaluate import evaluate
from llmopt_cli.quant.ggml_method import ggml
from llmopt_cli.quant.ggml_write import write_checkpoint
from llmopt_cli.quant.job import Job
from llmopt_cli.quant.quantize import Outcome, quantize
from llmopt_cli.runtime.tokenizer import Tokenizer
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.gguf import MIXES
from llmopt_cli.spec.gguf_file import read_gguf
from llmopt_cli.spec.scheme import find_scheme

BAR = 0.002  # by which q8_0 may change the perplexity
SHAPE = {"hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 2}  # 320 is no multiple of 256


@contextmanager
def quietly(label: str) -> Iterator[Report]:
    yield lambda done, total: None


@contextmanager
def interrupted(label: str) -> Iterator[Report]:
    def report(done: int, total: int) -> None:
        if label.startswith("quantizing") and done == 1:
            raise KeyboardInterrupt

    yield report


@pytest.fixture(scope="module")
def run(
    tiny: Callable[..., Path], texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Outcome]]:
    """Quantize a tiny Llama with rows that are no whole blocks; the folder, and what was said of it."""
    made: dict[str, tuple[Path, Outcome]] = {}

    def make(method: str, **changes: Any) -> tuple[Path, Outcome]:
        key = f"{method} {changes}"
        if key not in made:
            out = tmp_path_factory.mktemp("made") / method
            job = Job(str(tiny("Llama", **SHAPE, **changes)), method, out=out, samples=4, seq_len=64, **texts)
            made[key] = out, quantize(job, quietly)
        return made[key]

    return make


def file_of(folder: Path) -> Path:
    [file] = folder.glob("*.gguf")
    return file


@pytest.mark.parametrize("tied", [True, False])
def test_the_file_is_the_model_that_was_judged_embedding_and_head_included(
    run: Callable[..., tuple[Path, Outcome]], tiny: Callable[..., Path], texts: dict[str, Path], tied: bool
) -> None:
    folder, outcome = run("q4_k_m", tie_word_embeddings=tied)
    head = {} if tied else {"lm_head.weight": "q6_k"}
    assert outcome.ends == {"model.embed_tokens.weight": "q6_k" if tied else "q4_k", **head}
    base = tiny("Llama", **SHAPE, tie_word_embeddings=tied)
    found = evaluate(str(base), str(file_of(folder)), quietly, text=texts["evaluation"], seq_len=64).quality
    assert found.kl_mean.value == pytest.approx(outcome.quality.kl_mean.value, rel=1e-4)
    assert found.perplexity == pytest.approx(outcome.quality.perplexity, rel=1e-6)
    assert 0 < outcome.quality.kl_mean.value < 0.5


def test_every_linear_is_reported_with_the_type_it_has_in_the_file(run: Callable[..., tuple[Path, Outcome]]) -> None:
    folder, outcome = run("q4_k_m", tie_word_embeddings=True)
    with Store(Checkpoint.open(folder)) as store:
        types = {linear: scheme.name for linear, scheme in store.linears.items()}
    assert {one.name: one.scheme for one in outcome.modules} == {k: v for k, v in types.items() if "layers" in k}
    assert {one.method for one in outcome.modules} == {"q4_k_m"}
    assert outcome.summary == "14/14 Q4_K_M, 0 fallback"
    counted = Counter(one.scheme for one in outcome.modules)
    assert counted == {"q4_k": 11, "q6_k": 1, "q8_0": 1, "q5_0": 1}  # values and outputs of the last layer get more
    assert sum("320 inputs are no blocks of 256" in warning for warning in outcome.warnings) == 2
    assert json.loads((folder / "quality.json").read_text())["modules"][0]["scheme"] == "q4_k"
    assert "q4_k (11)" in (folder / "README.md").read_text()
    assert outcome.bytes_after == Checkpoint.open(folder).nbytes


def test_the_folder_and_the_file_run_with_the_tokenizer_of_the_base(
    run: Callable[..., tuple[Path, Outcome]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder, _ = run("q4_k_m", tie_word_embeddings=True)
    metadata, _ = read_gguf(file_of(folder))
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert metadata["quantize.imatrix.dataset"] == "calibration.jsonl"
    ids, positions = torch.arange(20, 52)[None], torch.arange(32)[None]
    logits, chats = [], []
    for source in (folder, file_of(folder)):
        checkpoint = Checkpoint.open(source)
        model = load_model(checkpoint, "float32", "cpu").model
        with torch.inference_mode():
            logits.append(model(input_ids=ids, position_ids=positions, use_cache=False).logits)
        chats.append(Tokenizer(checkpoint).chat([{"role": "user", "content": "Hello"}]))
    assert torch.equal(*logits)
    assert chats[0] == chats[1]


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    run: Callable[..., tuple[Path, Outcome]], tiny: Callable[..., Path], texts: dict[str, Path], tmp_path: Path
) -> None:
    whole, _ = run("q4_k_m", tie_word_embeddings=True)
    base = str(tiny("Llama", **SHAPE, tie_word_embeddings=True))
    job = Job(base, "q4_k_m", out=tmp_path / "q4_k_m", samples=4, seq_len=64, **texts)
    with pytest.raises(InterruptedWorkError, match="1 of 2"):
        quantize(job, interrupted)
    quantize(job, quietly)
    for file in whole.iterdir():
        assert (job.folder / file.name).read_bytes() == file.read_bytes(), file.name


def test_eight_bits_keep_the_perplexity_of_the_demo(texts: dict[str, Path], tmp_path: Path) -> None:
    job = Job("demo", "q8_0", out=tmp_path / "q8_0", samples=2, seq_len=64, **texts)
    quality = quantize(job, quietly).quality
    assert abs(quality.perplexity_ratio.value - 1) < BAR
    assert quality.kl_mean.value < 0.001


def test_a_dry_run_lists_types_and_where_they_are_not_those_of_the_mix(
    run: Callable[..., tuple[Path, Outcome]], tiny: Callable[..., Path]
) -> None:
    _, outcome = run("q4_k_m", tie_word_embeddings=True)
    planned = plan(Job(str(tiny("Llama", **SHAPE, tie_word_embeddings=True)), "q4_k_m", samples=2, seq_len=16), 2)
    assert planned.bytes_after == outcome.bytes_after
    assert planned.engines["llama.cpp"] == "yes"
    bits = {(kind.name, kind.bits): kind.problem for kind in planned.kinds}
    assert bits["model.embed_tokens.weight", 6.5625] is None
    assert "q5_0 in place of q4_k" in str(bits["model.layers.*.mlp.down_proj.weight", 5.5])


@pytest.mark.parametrize("mix", [mix for mix in MIXES if mix != "q8_0"])
def test_the_statistics_lower_the_error_that_they_weigh(mix: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 256, generator=generator)
    inputs = torch.randn(512, 256, generator=generator) * torch.logspace(-1, 1, 256)[torch.randperm(256)]
    gram = inputs.T @ inputs / 512

    def error(given: torch.Tensor | None) -> float:
        made = ggml(weight, given, find_scheme(mix), name=mix).codes.dequantize()
        return float(((made - weight) @ inputs.T).square().sum())

    assert error(gram) < 0.95 * error(None)


def test_what_saw_too_little_is_encoded_without_importance_and_said_so(
    tiny: Callable[..., Path], texts: dict[str, Path], tmp_path: Path
) -> None:
    base = str(tiny("Llama", tie_word_embeddings=True))
    settings: dict[str, Any] = {"samples": 2, "seq_len": 8, "out": tmp_path / "out"} | texts
    outcome = quantize(Job(base, "q2_k", **settings), quietly)
    assert outcome.summary == "0/14 Q2_K, 14 fallback"
    assert {one.method for one in outcome.modules} == {"no importance"}
    with pytest.raises(ModelError, match="fell back from q2_k"):
        quantize(Job(base, "q2_k", overwrite=True, strict=True, **settings), quietly)
    assert (tmp_path / "out" / "quality.json").is_file()


def test_a_tokenizer_that_llama_cpp_has_no_name_for_needs_one(
    tiny: Callable[..., Path], texts: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(tiny("Llama", tie_word_embeddings=True), tmp_path / "odd")
    file = tmp_path / "odd" / "tokenizer.json"
    document = json.loads(file.read_text())
    words = {"type": "Split", "pattern": {"Regex": r"\p{L}+|[^\p{L}]"}, "behavior": "Isolated", "invert": False}
    steps = [words, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    file.write_text(json.dumps(document))
    settings: dict[str, Any] = {"samples": 2, "seq_len": 32, "out": tmp_path / "out"} | texts
    with pytest.raises(UsageError, match="splits words") as refused:
        quantize(Job(str(tmp_path / "odd"), "q8_0", **settings), quietly)
    assert "--pre" in str(refused.value.hint)
    assert not list(tmp_path.glob("out*"))
    quantize(Job(str(tmp_path / "odd"), "q8_0", pre="viking", **settings), quietly)
    assert Tokenizer(Checkpoint.open(tmp_path / "out")).encode("it's 12") == Tokenizer(
        Checkpoint.open(tmp_path / "odd")
    ).encode("it's 12")
    with pytest.raises(CheckpointError, match="viking"):  # the file alone does not say what the name means
        Checkpoint.open(file_of(tmp_path / "out"))
    with pytest.raises(UsageError, match="--pre"):
        quantize(Job("demo", "awq", pre="gpt-2", **settings | {"out": tmp_path / "other"}), quietly)


def test_a_gguf_file_of_floats_becomes_one_of_blocks_but_nothing_else(
    tiny: Callable[..., Path], texts: dict[str, Path], tmp_path: Path
) -> None:
    base = Checkpoint.open(tiny("Llama", tie_word_embeddings=True))
    write_checkpoint(tmp_path / "base.gguf", base, "f32", lambda _: None)
    settings: dict[str, Any] = {"samples": 2, "seq_len": 32, "out": tmp_path / "out"} | texts
    with pytest.raises(CheckpointError, match="GGUF"):
        quantize(Job(str(tmp_path / "base.gguf"), "rtn", group_size=32, **settings), quietly)
    quantize(Job(str(tmp_path / "base.gguf"), "q8_0", **settings), quietly)
    found, wanted = (read_gguf(file)[1] for file in (file_of(tmp_path / "out"), tmp_path / "base.gguf"))
    assert [one.name for one in found] == [one.name for one in wanted]


def test_a_folder_of_several_files_is_no_model(run: Callable[..., tuple[Path, Outcome]], tmp_path: Path) -> None:
    folder, _ = run("q4_k_m", tie_word_embeddings=True)
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(file_of(folder), tmp_path / name)
        if name == "a.gguf":
            assert Checkpoint.open(tmp_path).name == tmp_path.name
    with pytest.raises(CheckpointError, match="2 GGUF files"):
        Checkpoint.open(tmp_path)
