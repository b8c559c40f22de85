"""What publishers call engines, cards, models and precisions, in the catalogues' names.

Patterns are matched with the whole label in lower case; a label that matches none is looked up as it is. Knows no
figures and no columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

from llmopt_cli.errors import LlmoptError
from llmopt_cli.estimate.constants import Constants, find_engine
from llmopt_cli.spec.catalog import find_gpu, find_model
from llmopt_cli.spec.hardware import Hardware
from llmopt_cli.spec.model import ModelSpec
from llmopt_cli.spec.scheme import SCHEMES, Scheme, find_scheme


class Skipped(Exception):
    """A row that cannot be predicted; the message is the reason."""


_ENGINES = {
    r"vllm.*|lmdeploy.*": "vllm",
    r"sglang.*": "sglang",
    r"trtllm.*|tensorrt-llm.*": "trtllm",
    r"llama\.cpp.*|llamacpp": "llamacpp",
    r"gpt-fast.*|torchao.*": "gptfast",
    r"autoawq.*": "autoawq",
    r"exllamav2.*": "exllamav2",
    r"llmopt.*": "llmopt",
}
_CARDS = {
    r"a100[_ -]sxm.*|a100-80gb": "A100-SXM4-80GB",
    r"a100[_ -]pcie.*": "A100-PCIE-80GB",
    r"h100[_ -]pcie.*": "H100-PCIe-80GB",
    r"h100.*": "H100-SXM5-80GB",
    r"gh200[_ -]?(120|96)gb": "GH200-96GB",
    r"h200.*": "H200-SXM-141GB",
    r"gb200.*": "GB200-NVL72",
    r"gb300.*": "GB300-NVL72",
    r"b200.*": "B200-SXM-180GB",
    r"b300.*": "B300-SXM-288GB",
    r"rtx pro 6000.*": "RTX PRO 6000 Blackwell Server",
    r"m1(_\d+ ?-?c(ore)?s?)?(_\d+gb)?": "Apple M1 7c",
    r"m1[_ ]?max.*": "Apple M1 Max 32c",
    r"m2[_ ]?ultra.*": "Apple M2 Ultra 76c",
    r"m3[_ ]?max.*": "Apple M3 Max 40c",
    r"t4\b.*": "T4",
    r"22\.07 gib gpu": "A10G",
    r"8 gib gpu": "RTX 3070",
    r"(a/h100-)?80gb.*": "A100-SXM4-80GB",  # of a log that names the memory alone
}
_MODELS = {
    r"1\.5b .*": "Qwen2.5-1.5B",
    r"8b (fp16|bf16) .*": "Llama-3.1-8B",
    r"(llama|vicuna)-7b": "Llama-2-7B",
    r"(llama|vicuna)-13b": "Llama-2-13B",
    r".*distill-llama-(70b|8b)": r"Llama-3.1-\1",
    r"deepseek-r1(?!.*distill).*": "DeepSeek-R1",
    r"deepseek-v3(?!\.2).*": "DeepSeek-V3",
    r"kimi-k2\.5.*": "Kimi-K2.5",
    r"kimi-k2.*": "Kimi-K2-Instruct",
    r"minimax-m2(\.5)?": "MiniMax-M2.5",
    r"mixtral[ -]8x7b.*": "Mixtral-8x7B-v0.1",
    r"mixtral[ -]8x22b.*": "Mixtral-8x22B-v0.1",
    r"mistral[ -]7b.*": "Mistral-7B-v0.1",
}
_MULTIMODAL = re.compile(r"-vl|mistral-small-3|pixtral|llava|gemma-3-(4|12|27)b", re.IGNORECASE)
_SCHEMES = {
    r"bf16.*|fp16.*|f16|": "bf16",
    r"fp8(-rowwise|-tensorwise)?": "fp8",
    r"fp4": "nvfp4",
    r"int4-awq|int4": "awq",
    r"gptq-4b-g128.*": "gptq",
    r"q(\d)_k - medium": r"q\1_k_m",
    r"sq": "w8a8",
}


def first(table: Mapping[str, str], text: str) -> str | None:
    """What the first matching pattern stands for."""
    matches = ((re.fullmatch(pattern, text), found) for pattern, found in table.items())
    return next((match.expand(found) for match, found in matches if match), None)


def engine(label: str) -> Constants:
    """The profile of an engine."""
    name = first(_ENGINES, label.lower())
    if name is None:
        raise Skipped(f"no profile of the engine {label}")
    return find_engine(name)


@cache
def model(label: str) -> ModelSpec:
    """`meta-llama/Llama-3.1-8B-Instruct`, `LLaMA v3 70B`, `nvidia/DeepSeek-R1-NVFP4`."""
    if _MULTIMODAL.search(label):
        raise Skipped("multimodal: the profile holds images, which no formula here knows")
    plain = label.lower().rpartition("/")[2]
    plain = re.sub(r"-(fp8|nvfp4|fp4|mxfp4|awq|gptq|bnb|int4|bf16)\b.*", "", plain)
    plain = re.sub(r"(?<= )v(?=\d)", "", plain)
    try:
        return find_model(first(_MODELS, plain) or plain)
    except LlmoptError as error:
        raise Skipped(f"model not in the catalogue: {label}") from error


@cache
def card(label: str) -> Hardware:
    """`4070 Ti`, `RTX 4090`, `M2ultra_192GB`, `6000_Ada`, `h100_sxm`."""
    if label == "MI250X (1 GCD)":
        whole, _ = find_gpu("MI250X")  # one of its two dies
        names = ("memory_gib", "memory_gb", "bandwidth_gb_s", "bf16_tflops")
        return replace(whole, **{name: getattr(whole, name) / 2 for name in names})
    plain = label.lower().strip()
    name = first(_CARDS, plain) or re.sub(r"\(.*\)|[_ ]\d+gb$|x\d+$", "", plain).replace("_", " ").strip()
    for text in (name, f"rtx {name}", f"apple {name}"):
        try:
            return find_gpu(text)[0]
        except LlmoptError:
            continue
    raise Skipped(f"accelerator not in the catalogue: {label}")


def scheme(label: str, spec: ModelSpec, notes: str) -> Scheme:
    """A precision, as it is published for this model."""
    name = label.lower()
    if "gpt-oss" in spec.name.lower():
        return SCHEMES["mxfp4"]  # it is published in no other; "fp8" and "fp4" are those of its activations
    if bits := re.fullmatch(r"exl2-([\d.]+)bpw", name):
        return Scheme(name, 4, extra_bits=float(bits[1]) - 4)
    if group := re.fullmatch(r"int4-g(\d+)", name):
        return replace(SCHEMES["awq"], name=name, group_size=int(group[1]), zero_bits=16)
    if name.startswith("w4a8"):
        return replace(SCHEMES["awq"], name="w4a8", compute="fp8")
    try:
        found = find_scheme(first(_SCHEMES, name) or name)
    except LlmoptError as error:
        raise Skipped(f"precision without a scheme: {label}") from error
    if found.name == "fp8" and (spec.latent or "moe_quant=fp8_block" in notes):
        return SCHEMES["fp8_block"]
    if found.name == "nvfp4" and spec.latent:
        return replace(found, covers="experts")  # NVIDIA's DeepSeek in FP4 keeps its attention in 16 bits
    return found
