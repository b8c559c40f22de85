"""The whole of it on real files: AWQ beats rounding, files are the model that was judged, failures leave nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmopt_cli.errors import (
    CapacityError,
    CheckpointError,
    LlmoptError,
    ModelError,
    QualityError,
    UnknownNameError,
    UsageError,
)
from llmopt_cli.model.load import read_config
from llmopt_cli.model.stream import Store
from llmopt_cli.output import Report
from llmopt_cli.quant import write
from llmopt_cli.quant.blocks import FEWEST_TOKENS, digest
from llmopt_cli.quant.calibrate import EVALUATION, Corpus, sample, windows
from llmopt_cli.quant.dryrun import plan
from llmopt_cli.quant.evaluate import evaluate
from llmopt_cli.quant.methods import METHODS
from llmopt_cli.quant.quality import compare
from llmopt_cli.quant.quantize import EVALUATION_WINDOWS, Job, Outcome, quantize
from llmopt_cli.runtime import Engine, SamplingParams
from llmopt_cli.spec.checkpoint import BUNDLED, Checkpoint

HELD_OUT = Path(__file__).resolve().parents[2] / "../shared/data/models/bookworm-text/heldout-novel.txt"
SEQ_LEN, SAMPLES = 128, 32


@contextmanager
def quietly(label: str) -> Iterator[Report]:
    yield lambda done, total: None


def silent(done: int, total: int) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Outcome]]:
    """The demo model by both methods: the folder and what `quantize` said of it."""
    root = tmp_path_factory.mktemp("demo")
    jobs = {
        name: Job("demo", method=name, out=root / name, samples=SAMPLES, seq_len=SEQ_LEN) for name in ("awq", "rtn")
    }
    return {name: (job.folder, quantize(job, quietly)) for name, job in jobs.items()}


@pytest.fixture
def job(tiny: Callable[..., Path], texts: dict[str, Path], tmp_path: Path) -> Callable[..., Job]:
    def make(family: str = "Llama", model: Path | None = None, **changes: Any) -> Job:
        """A job on a tiny model that takes a second."""
        settings: dict[str, Any] = {"out": tmp_path / "out", "samples": 4, "seq_len": 64, "group_size": 32, **texts}
        return Job(str(model or tiny(family)), **(settings | changes))

    return make


def dequantized(folder: Path) -> Any:
    """The transformers model in float32 with the weights that the files of `folder` mean."""
    checkpoint = Checkpoint.open(folder)
    model = AutoModelForCausalLM.from_config(read_config(checkpoint), dtype=torch.float32).eval()
    with Store(checkpoint) as store:
        tensors = {name: store.get(name) for name in store.names}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert unexpected == []
    model.tie_weights()
    return model


def judge(folder: Path, text: Path) -> Any:
    """Quality of the files in `folder` against the demo, on windows of `text`."""
    models = (AutoModelForCausalLM.from_pretrained(BUNDLED["demo"], dtype=torch.float32).eval(), dequantized(folder))
    tokens = windows(Corpus.read(text), AutoTokenizer.from_pretrained(BUNDLED["demo"]), SEQ_LEN)
    base, other = (lambda ids, model=model: model(input_ids=ids, use_cache=False).logits for model in models)
    return compare(base, other, sample(tokens, EVALUATION_WINDOWS, 0), silent)


def test_awq_beats_rounding_by_a_quarter_of_the_divergence(demo: dict[str, tuple[Path, Outcome]]) -> None:
    fine, plain = (demo[name][1].quality for name in ("awq", "rtn"))
    assert fine.kl_mean.value < 0.75 * plain.kl_mean.value
    assert fine.kl_mean.high < plain.kl_mean.low
    assert fine.perplexity_ratio.value - 1 < 0.75 * (plain.perplexity_ratio.value - 1)
    assert fine.top1_agreement.low > plain.top1_agreement.high


@pytest.mark.skipif(not HELD_OUT.is_file(), reason="the held-out novel is not on this machine")
def test_awq_beats_rounding_on_a_novel_that_nobody_fitted(demo: dict[str, tuple[Path, Outcome]]) -> None:
    fine, plain = (judge(demo[name][0], HELD_OUT) for name in ("awq", "rtn"))
    assert fine.kl_mean.high < plain.kl_mean.low
    assert fine.perplexity_ratio.value < plain.perplexity_ratio.value


def test_every_module_is_reported_with_what_was_really_done(demo: dict[str, tuple[Path, Outcome]]) -> None:
    for method, (_, outcome) in demo.items():
        assert outcome.summary == f"42/42 {method.upper()}, 0 fallback"
        assert {module.method for module in outcome.modules} == {method}
        assert {module.tokens for module in outcome.modules} == {SAMPLES * SEQ_LEN}
        assert all(0 < module.error < 0.2 for module in outcome.modules)
    pairs = list(zip(demo["awq"][1].modules, demo["rtn"][1].modules, strict=True))
    assert all(fine.error < plain.error for fine, plain in pairs)
    assert all(plain.scaled_by is None and not plain.fallback for _, plain in pairs)


def test_the_files_are_the_model_that_was_judged(demo: dict[str, tuple[Path, Outcome]]) -> None:
    folder, outcome = demo["awq"]
    again = judge(folder, Path(EVALUATION))
    assert again.kl_mean.value == pytest.approx(outcome.quality.kl_mean.value, rel=1e-4)
    assert again.perplexity == pytest.approx(outcome.quality.perplexity, rel=1e-6)
    assert again.top1_agreement == outcome.quality.top1_agreement


def test_what_is_not_quantized_keeps_its_bytes_and_tied_weights_stay_tied(
    demo: dict[str, tuple[Path, Outcome]],
) -> None:
    base, made = (load_file(path / "model.safetensors") for path in (BUNDLED["demo"], demo["rtn"][0]))
    assert "lm_head.weight" not in made
    kept = [name for name in made if name in base]
    assert len(kept) == 1 + 6 * 2 + 1  # embeddings and norms
    assert all(made[name].dtype == base[name].dtype and torch.equal(made[name], base[name]) for name in kept)


def test_the_folder_is_complete(demo: dict[str, tuple[Path, Outcome]]) -> None:
    folder, outcome = demo["awq"]
    base = {path.name for path in BUNDLED["demo"].iterdir()}
    assert {path.name for path in folder.iterdir()} == base | {"quality.json"}
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["modules_to_not_convert"] == ["lm_head"]
    said = json.loads(json.dumps(asdict(outcome)))
    assert json.loads((folder / "quality.json").read_text()) == {name: said[name] for name in said if name != "seconds"}
    card = (folder / "README.md").read_text()
    assert outcome.calibration.sha256[:16] in card
    assert f"{outcome.quality.kl_mean.value:.5f}" in card
    assert not list(folder.parent.glob("*.partial"))
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_the_engine_runs_the_files_as_transformers_runs_what_they_mean(demo: dict[str, tuple[Path, Outcome]]) -> None:
    folder, _ = demo["awq"]
    prompt = AutoTokenizer.from_pretrained(folder)("The captain said that he would")["input_ids"]
    expected = dequantized(folder).generate(
        torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=6
    )
    engine = Engine.from_pretrained(str(folder), dtype="float32", device="cpu")
    output = engine.generate([prompt], SamplingParams(max_tokens=16, ignore_eos=True))[0]
    engine.close()
    assert list(output.token_ids) == expected[0, len(prompt) :].tolist()


FAMILIES: dict[str, tuple[dict[str, Any], int]] = {  # changes to the tiny model, and linears of its two blocks
    "Llama": ({}, 14),
    "Qwen2": ({}, 14),
    "Qwen3": ({"head_dim": 16}, 14),
    "Mistral": ({"head_dim": 16, "sliding_window": 16}, 14),
    "Gemma2": ({"head_dim": 16}, 14),
    "Gemma3Text": ({"head_dim": 16, "sliding_window": 16}, 14),
    "Phi3": ({}, 8),
    "OPT": ({"ffn_dim": 96, "word_embed_proj_dim": 64}, 12),
    "GPTNeoX": ({}, 8),
    "Mixtral": ({"num_local_experts": 4}, 2 * (4 + 4 * 3)),
    "Qwen2Moe": ({"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}, 2 * (4 + 15)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_quantized_whole_and_its_files_mean_what_was_judged(
    family: str, tiny: Callable[..., Path], job: Callable[..., Job], texts: dict[str, Path]
) -> None:
    changes, linears = FAMILIES[family]
    one = job(model=tiny(family, **changes), method="gptq", format="compressed-tensors")
    outcome = quantize(one, quietly)
    assert outcome.summary == f"{linears}/{linears} GPTQ, 0 fallback"
    again = evaluate(one.model, str(one.folder), quietly, texts["evaluation"], samples=64, seq_len=64)
    assert again.quality == outcome.quality
    assert 0 < again.quality.kl_mean.value < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_into_its_format_and_comes_back(
    method: str, tiny: Callable[..., Path], job: Callable[..., Job], texts: dict[str, Path]
) -> None:
    size = None if METHODS[method].own_grid else 32
    one = job(model=tiny("Llama", hidden_size=128, intermediate_size=256), method=method, group_size=size)
    outcome = quantize(one, quietly)
    again = evaluate(one.model, str(one.folder), quietly, texts["evaluation"], samples=64, seq_len=64)
    assert again.quality == outcome.quality
    assert outcome.summary.endswith(", 0 fallback")
    assert outcome.bytes_after < 0.84 * outcome.bytes_before


def test_a_correction_changes_the_weights_and_they_still_are_what_was_judged(
    job: Callable[..., Job], texts: dict[str, Path], tmp_path: Path
) -> None:
    plain, fixed = (job(method="rtn", correct=how, out=tmp_path / str(how)) for how in (None, "qep"))
    before, after = quantize(plain, quietly), quantize(fixed, quietly)
    assert after.quality != before.quality
    first = "model.layers.0.self_attn.q_proj"  # nothing is upstream of it
    errors = [{module.name: module.error for module in outcome.modules} for outcome in (before, after)]
    assert errors[0][first] == errors[1][first]
    again = evaluate(fixed.model, str(fixed.folder), quietly, texts["evaluation"], samples=64, seq_len=64)
    assert again.quality == after.quality


def test_an_expert_that_saw_no_tokens_is_rounded_and_said_to_be(
    tiny: Callable[..., Path], job: Callable[..., Job], tmp_path: Path
) -> None:
    folder = tmp_path / "moe"
    shutil.copytree(tiny("Mixtral", num_local_experts=8), folder)
    tensors = load_file(folder / "model.safetensors")
    router = next(name for name in tensors if "layers.1" in name and name.endswith("gate.weight"))
    tensors[router][5] = 0
    tensors[router][:5] *= 50  # of the other seven, some always win
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    made = quantize(job(model=folder, method="gptq"), quietly)
    poor = [module for module in made.modules if module.tokens < FEWEST_TOKENS]
    assert poor
    assert all(module.method == "rtn" and module.fallback for module in poor)
    assert made.summary == f"{2 * 28 - len(poor)}/{2 * 28} GPTQ, {len(poor)} fallback"
    assert any("fewer tokens than" in warning for warning in made.warnings)
    with pytest.raises(ModelError, match="fell back from gptq to rtn"):
        quantize(job(model=folder, method="gptq", strict=True, out=tmp_path / "strict"), quietly)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moe", "out"]


def test_the_same_seed_writes_the_same_bytes(job: Callable[..., Job], tmp_path: Path) -> None:
    first, second, other = (job(out=tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    for one in (first, second, other):
        quantize(one, quietly)
    contents = [{path.name: path.read_bytes() for path in one.folder.iterdir()} for one in (first, second, other)]
    assert contents[0] == contents[1]
    assert contents[0]["model.safetensors"] != contents[2]["model.safetensors"]


def test_large_models_are_sharded(job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(job(out=tmp_path / "whole"), quietly)
    monkeypatch.setattr(write, "SHARD_BYTES", 300_000)
    quantize(job(out=tmp_path / "shards"), quietly)
    shards = Checkpoint.open(tmp_path / "shards")
    assert len(shards.files) > 1
    assert [file.name for file in shards.files] == [
        f"model-{index + 1:05}-of-{len(shards.files):05}.safetensors" for index in range(len(shards.files))
    ]
    together = {name: tensor for file in shards.files for name, tensor in load_file(file).items()}
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert whole.keys() == together.keys()
    assert all(torch.equal(whole[name], together[name]) for name in whole)


def test_a_file_that_reads_back_otherwise_is_found_out(job: Callable[..., Job]) -> None:
    one = job(method="rtn")
    quantize(one, quietly)
    base, name = Checkpoint.open(one.model), "model.layers.1.mlp.up_proj"
    with Store(Checkpoint.open(one.folder)) as store:
        digests = {f"{linear}.weight": digest(store.get(f"{linear}.weight")) for linear in store.linears}
    write.verify(one.folder, base, digests, write.same_bytes)
    whole = load_file(one.folder / "model.safetensors")
    for changed in (f"{name}.qweight", "model.norm.weight"):
        tensors = {key: value.clone() for key, value in whole.items()}
        tensors[changed].view(torch.uint8)[-1] ^= 1
        save_file(tensors, one.folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=rf"{changed.rpartition('.')[0]}\.weight` reads back"):
            write.verify(one.folder, base, digests, write.same_bytes)


def test_a_result_worse_than_asked_for_is_a_failure_and_leaves_no_file(job: Callable[..., Job], tmp_path: Path) -> None:
    with pytest.raises(QualityError, match=r"divergence from the base is 0\.\d+ .* more than 1e-06"):
        quantize(job(method="rtn", max_kld=1e-6), quietly)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_foretells_sizes_and_problems_and_writes_nothing(job: Callable[..., Job], tmp_path: Path) -> None:
    one = job(method="rtn")
    foretold = plan(one, 64)
    assert list(tmp_path.iterdir()) == []
    assert foretold.bytes_after == pytest.approx(quantize(one, quietly).bytes_after, rel=0.01)
    assert sum(kind.nbytes for kind in foretold.kinds) == pytest.approx(foretold.bytes_after, rel=0.01)
    assert {kind.problem for kind in foretold.kinds} == {None}
    assert foretold.peak_memory_bytes > 0
    assert foretold.minutes > 0
    bad = plan(job(method="rtn", group_size=48), 64)
    assert [kind.name for kind in bad.kinds if kind.problem] == [
        *(f"model.layers.*.self_attn.{name}_proj.weight" for name in "qkvo"),
        "model.layers.*.mlp.gate_proj.weight",
        "model.layers.*.mlp.up_proj.weight",
    ]


def test_a_full_disk_is_refused_before_any_work(
    job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))  # type: ignore[attr-defined]
    with pytest.raises(CapacityError, match=r"GB free; quantizing needs"):
        quantize(job(), quietly)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_before_any_work(job: Callable[..., Job], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists already") as refused:
        quantize(job(calibration=Path("/nonexistent")), quietly)
    assert "--overwrite" in str(refused.value.hint)
    with pytest.raises(UsageError, match="holds no model"):
        quantize(job(overwrite=True), quietly)


def test_overwrite_replaces_a_model_but_never_its_own_source(
    job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(job(method="rtn"), quietly)
    (tmp_path / "out" / "stale").touch()
    quantize(job(overwrite=True), quietly)
    assert json.loads((tmp_path / "out" / "quality.json").read_text())["scheme"]["method"] == "awq"
    assert not (tmp_path / "out" / "stale").exists()
    source = tmp_path / "source"
    shutil.copytree(BUNDLED["demo-draft"], source)
    with pytest.raises(UsageError, match="onto itself"):
        quantize(job(model=source, out=source, overwrite=True), quietly)
    monkeypatch.chdir(source)
    with pytest.raises(UsageError, match=r"`\.` has no name"):
        quantize(job(out=Path(), overwrite=True), quietly)


def broken(folder: Path, source: Path, value: float = torch.nan) -> Path:
    """A copy of `source` with one weight that no file can hold."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_failure_halfway_leaves_nothing_and_keeps_what_was_there(
    job: Callable[..., Job], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model = broken(tmp_path / "broken", tiny("Llama"))
    with pytest.raises(ModelError, match=r"`model\.layers\.1\.mlp\.down_proj\.weight` holds numbers that are not"):
        quantize(job(model=model), quietly)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
    quantize(job(), quietly)
    with pytest.raises(ModelError):
        quantize(job(model=model, overwrite=True), quietly)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "out"]
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_weight_too_large_for_its_scale_is_named(
    job: Callable[..., Job], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model = broken(tmp_path / "large", tiny("Llama"), 1e9)
    with pytest.raises(ModelError, match=r"a weight of `model\.layers\.1\.mlp\.down_proj` is too large"):
        quantize(job(model=model, method="rtn"), quietly)
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


def test_a_tokenizer_of_another_model_is_refused(job: Callable[..., Job], tiny: Callable[..., Path]) -> None:
    small = tiny("Llama", vocab_size=300)
    with pytest.raises(CheckpointError, match=r"makes token [\d,]+, and the model has 300"):
        quantize(job(model=small), quietly)
    with pytest.raises(CheckpointError, match=r"makes token [\d,]+, and the model has 300"):
        evaluate(str(small), str(small), quietly, seq_len=64)


REFUSED: list[tuple[dict[str, Any], type[LlmoptError], str]] = [
    ({"method": "awk"}, UnknownNameError, "unknown method `awk`"),
    ({"format": "gguff"}, UnknownNameError, "unknown format `gguff`"),
    ({"group_size": 0}, UsageError, "group size 0"),
    ({"correct": "gep"}, UnknownNameError, "unknown correction `gep`"),
    ({"bits": 5}, UsageError, "awq makes no 5-bit weights"),
    ({"method": "awq", "bits": 3, "format": "awq"}, ModelError, "AWQ-gemm files hold 4 bits a weight, not 3"),
    ({"method": "nf4", "format": "gptq", "group_size": None}, UsageError, "`gptq` files can't hold what nf4 makes"),
    ({"method": "fp8"}, UsageError, "fp8 has a grid of its own"),
    ({"group_size": 48}, ModelError, r"layers\.0\.self_attn\.q_proj.*64 inputs are no multiple of the group size 48"),
    ({"device": "tpu"}, UnknownNameError, "tpu"),
    ({"evaluation": Path("/nonexistent.txt")}, UsageError, "cannot read"),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED, ids=[message[:30] for *_, message in REFUSED])
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    changes: dict[str, Any], error: type[LlmoptError], message: str, job: Callable[..., Job], tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        quantize(job(**changes), quietly)
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_no_multiple_of_eight_are_refused_by_name(
    job: Callable[..., Job], tiny: Callable[..., Path]
) -> None:
    model = tiny("Llama", intermediate_size=100)
    with pytest.raises(ModelError, match=r"mlp\.gate_proj.*100 outputs are no multiple of 8"):
        quantize(job(model=model), quietly)


def test_a_quantized_model_is_not_quantized_again(
    job: Callable[..., Job], demo: dict[str, tuple[Path, Outcome]]
) -> None:
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize(job(model=demo["awq"][0]), quietly)


def test_the_folder_is_named_after_model_method_and_scheme() -> None:
    assert Job("demo").folder == Path("demo-awq-w4g128")
    assert Job("owner/name", method="rtn", group_size=64).folder == Path("name-rtn-w4g64")
    assert Job("some/folder/", group_size=-1).folder == Path("folder-awq-w4")
