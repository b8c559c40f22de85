"""The catalogues: complete, sourced, true to what they were taken from, and found under the names people type."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from llmopt_cli.errors import AmbiguousNameError, ConfigFileError, UnknownNameError, UsageError
from llmopt_cli.estimate.memory import kv_bytes_per_token
from llmopt_cli.spec.catalog import find_gpu, find_model, gpus, models
from llmopt_cli.spec.model import ModelSpec
from llmopt_cli.spec.scheme import find_scheme

DATA = Path(__file__).resolve().parents[2] / "../shared/data"
GEFORCE = ("RTX 5090", "RTX 4090", "RTX 3090", "RTX 3090 Ti", "RTX 4080 SUPER", "RTX 4060 Ti 16GB")


def rows(name: str) -> list[dict[str, str]]:
    path = DATA / "estimates" / name
    if not path.is_file():
        pytest.skip(f"no {path}")
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def test_every_row_names_its_source() -> None:
    assert len(gpus()) >= 37
    assert len(models()) >= 90
    assert all(gpu.source for gpu in gpus())
    assert all(model.source for model in models())
    assert all(entry.item.price_source for entry in gpus() if entry.item.price_usd_hour)


def test_every_entry_is_found_under_all_its_names() -> None:
    for gpu in gpus():
        assert all(find_gpu(name)[0] is gpu.item for name in gpu.names), gpu.names
    for model in models():
        assert all(find_model(name) is model.item for name in model.names), model.names


def test_a_gpu_row_is_read_whole() -> None:
    h100, _ = find_gpu("h100")
    assert (h100.memory_gib, h100.memory_gb, h100.bandwidth_gb_s) == (79.18, 80, 3350)
    assert (h100.bf16_tflops, h100.fp8_tflops, h100.link_gb_s) == (989, 1979, 450)
    assert (h100.price_usd_hour, h100.price_range) == (2.95, "1.99-5.50")


@pytest.mark.parametrize("name", GEFORCE)
def test_geforce_rates_are_those_with_fp32_accumulation(name: str) -> None:
    listed = {row["name"]: float(row["fp16_bf16_dense_tflops"]) for row in rows("gpus.csv")}
    gpu, _ = find_gpu(name)
    assert gpu.bf16_tflops == listed[name] / 2
    assert "halved" in gpu.notes


def test_all_published_gpus_are_here_with_their_bandwidth() -> None:
    for row in rows("gpus.csv"):
        name = row["name"].split(" (")[0].replace("GH200-96/144GB", "GH200-144GB")
        gpu, _ = find_gpu(name)
        assert gpu.name == name
        assert gpu.bandwidth_gb_s == float(row["mem_bw_gbs"])


def test_parameters_agree_with_the_published_counts() -> None:
    for row in rows("models.csv"):
        spec = find_model(row["hf_id"])
        if "approximate" not in row["notes"]:
            assert spec.num_params / 1e9 == pytest.approx(float(row["params_b_computed"]), rel=0.01), spec.name
        assert kv_bytes_per_token(spec, 2) == int(row["kv_bytes_per_token_bf16_fullctx"]), spec.name


def test_rows_equal_the_configs_they_were_taken_from() -> None:
    taken = [(entry, DATA / "configs" / entry.source.split("; ")[0].rpartition("/")[2]) for entry in models()]
    found = [(entry.item, path) for entry, path in taken if path.is_file()]
    if not found:
        pytest.skip(f"no configs in {DATA}")
    assert len(found) > 25
    for spec, path in found:
        read = ModelSpec.from_hf(json.loads(path.read_text()), spec.name)
        assert read == replace(spec, architecture=read.architecture)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("70b", "Llama-3.1-70B"),
        ("7b", "Llama-2-7B"),
        ("8B", "Llama-3.1-8B"),
        ("llama-2-70b", "Llama-2-70B"),
        ("Llama 2 70B", "Llama-2-70B"),
        ("qwen3-32b", "Qwen3-32B"),
        ("Qwen/Qwen3-32B", "Qwen3-32B"),
        ("meta-llama/Llama-3.1-70B-Instruct", "Llama-3.1-70B"),
        ("llama-3-8b", "Llama-3-8B"),
        ("mixtral-8x7b", "Mixtral-8x7B-v0.1"),
        ("demo", "demo"),
    ],
)
def test_forgiving_model_names(typed: str, meant: str) -> None:
    assert find_model(typed).name == meant


@pytest.mark.parametrize(
    ("typed", "meant", "count"),
    [
        ("a100", "A100-SXM4-80GB", None),
        ("A100-80GB", "A100-SXM4-80GB", None),
        ("A100 40GB", "A100-SXM4-40GB", None),
        ("h100x4", "H100-SXM5-80GB", 4),
        ("H100x1", "H100-SXM5-80GB", 1),
        ("4xh100", "H100-SXM5-80GB", 4),
        ("2 x H100 SXM", "H100-SXM5-80GB", 2),
        ("rtx4090x4", "RTX 4090", 4),
        ("rtx4090", "RTX 4090", None),
        ("4090x2", "RTX 4090", 2),
        ("mi300x", "MI300X", None),
        ("mi300xx8", "MI300X", 8),
        ("l40", "L40", None),
        ("l40s", "L40S", None),
        ("b200", "B200-SXM-180GB", None),
        ("gb200", "GB200-NVL72", None),
    ],
)
def test_forgiving_gpu_names(typed: str, meant: str, count: int | None) -> None:
    gpu, found = find_gpu(typed)
    assert (gpu.name, found) == (meant, count)


def test_unknown_names_list_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="unknown accelerator `h1000`") as gpu:
        find_gpu("h1000")
    assert "H100-SXM5-80GB" in str(gpu.value.hint)
    with pytest.raises(UnknownNameError, match="unknown model `lama-2-70`") as model:
        find_model("lama-2-70")
    assert "Llama-2-70B" in str(model.value.hint)
    with pytest.raises(UnknownNameError) as far:
        find_scheme("foo")  # however far all of them are, they are not the first of the alphabet
    assert "nf4" in str(far.value.hint)
    assert "awq" not in str(far.value.hint)


def test_ambiguous_names_list_every_match() -> None:
    with pytest.raises(AmbiguousNameError, match="`mixtral` fits more than one model") as error:
        find_model("mixtral")
    assert str(error.value.hint) == "one of: Mixtral-8x22B-v0.1, Mixtral-8x7B-v0.1"


@pytest.mark.parametrize("typed", ["", "-", "x4", "x" * 300])
def test_names_without_a_word_are_unknown(typed: str) -> None:
    with pytest.raises(UnknownNameError):
        find_gpu(typed)
    with pytest.raises(UnknownNameError):
        find_model(typed)


def test_no_gpus_are_refused() -> None:
    with pytest.raises(UsageError, match="no accelerator at all"):
        find_gpu("h100x0")


def test_a_folder_and_a_config_file_are_models(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100}
    config |= {"intermediate_size": 128, "max_position_embeddings": 64}
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    assert find_model(str(folder)).num_layers == 2
    assert find_model(str(folder / "config.json")).name == "mine"
    for missing in ("nothing", "nothing/config.json"):
        with pytest.raises(UsageError, match=r"has no config\.json"):
            find_model(str(tmp_path / missing))


@pytest.mark.parametrize(
    "text", ["{", "[]", "\x00", "[" * 100_000, '{"num_hidden_layers": -1}', '{"hidden_size": NaN}']
)
def test_a_broken_config_is_a_matter_of_usage(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        find_model(str(file))
    assert error.value.exit_code == 2


def test_a_hub_id_is_not_looked_up() -> None:
    with pytest.raises(UsageError, match="nothing is looked up on the hub") as error:
        find_model("nobody/nothing-9b")
    assert "config.json" in str(error.value.hint)


MY_GPU = "name: My GPU\nmemory_gib: 47.5\nbandwidth_gb_s: 900\nbf16_tflops: 180\n"


def test_a_gpu_can_be_described_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(MY_GPU)
    gpu, count = find_gpu(str(file))
    assert (gpu.name, gpu.memory_gib, gpu.memory_gb, gpu.bandwidth, count) == ("My GPU", 47.5, 51.0, 9e11, None)
    assert gpu.spec_source == str(file)
    file.write_text(MY_GPU + "count: 4\nlink: NVLink\nlink_gb_s: 300\n")
    assert [find_gpu(f"{file}{count}")[1] for count in ("", "x2")] == [4, 2]
    assert not find_gpu(str(file))[0].over_pcie


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (MY_GPU.replace("47.5", "-1"), "`memory_gib` in .*, line 2: .*positive"),
        (MY_GPU.replace("900", "0"), "`bandwidth_gb_s` in .*, line 3: .*positive"),
        (MY_GPU.replace("180", ".inf"), "`bf16_tflops` in .*, line 4"),
        (MY_GPU.replace("180", "fast"), "`bf16_tflops` in .*, line 4"),
        (MY_GPU + "bandwith: 3\n", "unknown key `bandwith` in .*, line 5"),
        (MY_GPU + "count: 0\n", "`count` in .*, line 5"),
        ("name: My GPU\n", "`memory_gib` is missing"),
        ("", "must hold `key: value` lines"),
    ],
)
def test_a_wrong_gpu_file_is_said_by_key_and_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(text)
    with pytest.raises(ConfigFileError, match=said) as error:
        find_gpu(str(file))
    assert error.value.hint


def test_a_missing_gpu_file_shows_an_example() -> None:
    with pytest.raises(ConfigFileError, match=r"cannot read `nowhere\.yaml`") as error:
        find_gpu("nowhere.yaml")
    assert "memory_gib:" in str(error.value.hint)
