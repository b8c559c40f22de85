"""Every two features together give what each request gets alone without batching; README's table is what ran here.

A feature of the engine must not change an answer; one of the request or the model changes it in the same way alone.
With LLMOPT_WRITE_README=1 the table is written instead of compared.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmopt_cli.errors import LlmoptError
from llmopt_cli.model.codes import IntCodes
from llmopt_cli.model.formats.table import FORMATS
from llmopt_cli.model.load import LoadedModel, load_model
from llmopt_cli.runtime import Engine, SamplingParams
from llmopt_cli.runtime.request import Grammar, RequestOutput
from llmopt_cli.runtime.tokenizer import Tokenizer
from llmopt_cli.spec.adapter import Adapter
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.kv_policy import Selecting, Streaming
from llmopt_cli.spec.recipe import Batching, Speculation
from llmopt_cli.spec.scheme import find_scheme

README = Path(__file__).parents[2] / "README.md"
MARKS = ("<!-- combinations: from tests/runtime/test_combinations.py -->\n", "<!-- end of combinations -->\n")
LEGEND = "`no`: refused by name. `chances`: with the same chances, but a seed means other tokens than without drafts."
PROMPTS = [[(7 * i * i + 13 * i + length) % 4000 + 7 for i in range(length)] for length in (3, 20, 37)]
ANSWER = 8  # tokens
BLOCK = 4
ALONE = Batching(max_num_seqs=1, max_model_len=64, block_size=BLOCK, enable_prefix_caching=False)
TOGETHER = {"max_num_seqs": 4, "max_model_len": 64, "block_size": BLOCK, "enable_prefix_caching": False}
Ran = tuple[Engine, list[RequestOutput]]


@dataclass(frozen=True, eq=False)
class Feature:
    """What is asked for, in which place, and how a run shows that it was at work."""

    name: str
    batching: Mapping[str, Any] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)
    kv: str = "auto"
    model: str = ""
    small: bool = False  # a cache that the answers outgrow
    drafts: str = ""  # by which method
    changes: bool = False  # what is said is not what it would be without it
    at_work: Callable[[Engine, list[RequestOutput]], bool] = lambda *_: True


def accepted(engine: Engine, _: list[RequestOutput]) -> bool:
    tally = engine.stats().speculation
    return tally is not None and tally.accepted > 0


FEATURES = (
    Feature(
        "prefix cache",
        {"enable_prefix_caching": True},
        at_work=lambda _, outs: all(o.num_cached_tokens for o in outs[1:]),
    ),
    Feature("chunked prefill", {"max_num_batched_tokens": 16}),
    Feature("preemption", small=True, at_work=lambda engine, _: engine.stats().num_preemptions > 0),
    Feature("static batches", {"batching_mode": "static"}),
    Feature("priorities", {"scheduling_policy": "priority"}),
    Feature("deterministic", {"deterministic": True}),
    Feature("KV in int8", kv="int8"),
    Feature("KV in fp8", kv="fp8"),
    Feature("seeded draws", request={"temperature": 0.8, "top_p": 0.9, "seed": 5}),
    Feature("penalties, bias", request={"repetition_penalty": 1.3, "logit_bias": ((300, 5.0),)}),
    Feature("grammar", request={"grammar": Grammar("regex", "[a-z ]{60,80}")}),
    Feature("logprobs", request={"logprobs": 2}, at_work=lambda _, outs: all(o.logprobs for o in outs)),
    Feature(
        "prompt logprobs", request={"prompt_logprobs": 1}, at_work=lambda _, outs: all(o.prompt_logprobs for o in outs)
    ),
    Feature("4-bit weights", model="packed"),
    Feature("sliding windows", model="windows"),
    Feature("MoE", model="experts"),
    Feature("MLA", model="latent"),
    Feature("attention soft-cap", model="capped"),
    Feature("attention sinks", model="sinks"),
    Feature("drafts looked up", drafts="suffix", at_work=accepted),
    Feature("drafts of a model", drafts="draft_model", at_work=accepted),
    Feature("KV policy streaming", request={"kv_policy": Streaming(sinks=4, window=8)}, changes=True),
    Feature("KV policy snapkv", request={"kv_policy": Selecting(budget=8, window=4)}, changes=True),
    Feature("beams", request={"beams": 3}, changes=True, at_work=lambda _, outs: all(len(o.beams) == 3 for o in outs)),
    Feature("LoRA", request={"adapter": "law"}, changes=True),
)
MODELS = {  # of families.yaml, by the features that they have; the first that fits is taken
    "llama": "packed",
    "mistral-window": "packed windows",
    "mixtral": "packed experts",
    "qwen2-moe-window": "windows experts",
    "deepseek-v3": "packed experts latent",
    "gemma2": "packed windows capped",
    "gpt-oss": "packed windows experts sinks",
}


@dataclass(frozen=True)
class Bench:
    """Where models are made and kept, and what requests get alone."""

    make: Callable[[str, bool], Path]
    adapt: Callable[[Path], Path]

    @cache  # noqa: B019 - one bench a module
    def load(self, name: str, packed: bool) -> tuple[Checkpoint, LoadedModel, Tokenizer]:
        checkpoint = Checkpoint.open(self.make(name, packed))
        return checkpoint, load_model(checkpoint, "float32", "cpu"), Tokenizer(checkpoint, False)

    @cache  # noqa: B019
    def adapter(self, name: str) -> Adapter:
        return Adapter.open("law", self.adapt(self.make(name, False)))

    def engine(self, name: str, packed: bool, kv: str, params: SamplingParams, batching: Batching, how: str) -> Engine:
        """Where a model drafts, it is the same one in the other precision, if it has another: most of it stands."""
        adapters = [self.adapter(name)] if params.adapter else []
        other = not packed and "packed" in MODELS[name]
        drafting = str(self.make(name, other)) if how == "draft_model" else ""
        asked = Speculation(drafting, 3, method=how, adaptive=False) if how else None
        return Engine(*self.load(name, packed), batching, kv, adapters, asked)

    @cache  # noqa: B019
    def alone(self, name: str, packed: bool, kv: str, params: SamplingParams) -> list[RequestOutput]:
        engine = self.engine(name, packed, kv, params, ALONE, "")
        outputs = [engine.generate([prompt], params)[0] for prompt in PROMPTS]
        engine.close()
        return outputs

    def together(self, name: str, packed: bool, kv: str, params: SamplingParams, pair: tuple[Feature, ...]) -> Ran:
        """All prompts at once; twice where what the first time leaves may be found."""
        wanted = TOGETHER | {key: value for feature in pair for key, value in feature.batching.items()}
        how = "".join(feature.drafts for feature in pair)
        small = any(feature.small for feature in pair)
        if small:
            engine = self.engine(name, packed, kv, params, ALONE, "")
            engine.close()
            blocks = sum(-(-len(prompt) // BLOCK) for prompt in PROMPTS) + len(PROMPTS)
            wanted |= {"kv_cache_memory_bytes": blocks * engine.cache_size.block_bytes}
        engine = self.engine(name, packed, kv, params, Batching(**wanted), how)
        try:
            for _ in range(1 + (wanted["enable_prefix_caching"] or how == "suffix")):
                if small:
                    engine._state.expected = 0.0  # nothing is kept free for answers to grow into
                outputs = engine.generate(PROMPTS, params)
            engine.check_integrity()
        finally:
            engine.close()
        return engine, outputs


@pytest.fixture(scope="module")
def bench(
    tiny: Callable[..., Path],
    write_lora: Callable[..., Path],
    families: dict[str, dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Bench:
    @cache
    def make(name: str, packed: bool) -> Path:
        folder = tiny(**families[name], initializer_range=0.3)
        return pack(folder, tmp_path_factory.mktemp(name) / "packed") if packed else folder

    return Bench(make, lambda base: write_lora(base, ["o_proj"], seed=3))


def pack(folder: Path, target: Path) -> Path:
    """A copy of `folder` with the linears of its blocks rounded to four bits in groups of 32."""
    shutil.copytree(folder, target)
    stored, layout = load_file(target / "model.safetensors"), FORMATS["compressed-tensors"]
    scheme = replace(find_scheme("gptq"), group_size=32)
    kept = []
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        linear, weight = name.removesuffix(".weight"), stored[name]
        if weight.shape[1] % 32 or "experts" in name:
            kept.append(linear)
            continue
        groups = weight.view(len(weight), -1, 32)
        scales = (groups.abs().amax(-1) / 7).half().float()
        codes = (groups / scales[..., None]).round().clamp(-8, 7).add(8).to(torch.uint8).view(weight.shape)
        zeros = torch.full(scales.shape, 8, dtype=torch.uint8)
        del stored[name]
        parts = layout.pack(IntCodes(codes, scales, zeros, 4), scheme)
        stored |= {f"{linear}.{suffix}": part for suffix, part in parts.items()}
    save_file(stored, target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = dict(layout.config(scheme, ["lm_head", *kept], {}))
    (target / "config.json").write_text(json.dumps(config))
    return target


def same(found: list[RequestOutput], expected: list[RequestOutput]) -> bool:
    return all(
        one.token_ids == other.token_ids
        and _values(one.logprobs) == pytest.approx(_values(other.logprobs), abs=1e-3)
        and _values(one.prompt_logprobs) == pytest.approx(_values(other.prompt_logprobs), abs=1e-3)
        for one, other in zip(found, expected, strict=True)
    )


def _values(logprobs: Any) -> list[float]:
    return [position.logprob for position in logprobs or ()]


def outcome(bench: Bench, one: Feature, other: Feature) -> str:
    """`yes`, `-` (no such pair), `off` (one does nothing beside the other), `no` (refused), or `WRONG`.

    `chances` is for drafts alone: a seed means other tokens, of the same chances (test_speculation_draws).
    """
    pair = (one, other)
    needed = {feature.model for feature in pair if feature.model}
    name = next((model for model, has in MODELS.items() if needed <= set(has.split())), None)
    kinds = [feature.kv for feature in pair if feature.kv != "auto"]
    twice = len(kinds) > 1 or (one.drafts and other.drafts) or one.request.keys() & other.request.keys()
    if name is None or twice:
        return "-"
    packed, kv = "packed" in needed, (kinds or ["auto"])[0]
    try:
        params = asked(*pair)
        engine, outputs = bench.together(name, packed, kv, params, pair)
    except LlmoptError:
        return "no"
    if not same(outputs, bench.alone(name, packed, kv, params)):
        return "chances" if params.temperature and (one.drafts or other.drafts) else "WRONG"
    without = [bench.alone(name, packed, kv, asked(rest)) for rest, it in (pair, pair[::-1]) if it.changes]
    told = all([o.token_ids for o in outputs] != [o.token_ids for o in plain] for plain in without)
    return "yes" if told and all(feature.at_work(engine, outputs) for feature in pair) else "off"


def asked(*features: Feature) -> SamplingParams:
    request = {key: value for feature in features for key, value in feature.request.items()}
    return SamplingParams(max_tokens=ANSWER, ignore_eos=True, **request)


@pytest.fixture(scope="module")
def outcomes(bench: Bench) -> dict[tuple[str, str], str]:
    pairs = itertools.combinations(FEATURES, 2)
    return {(one.name, other.name): outcome(bench, one, other) for one, other in pairs}


def test_no_two_features_spoil_each_other(outcomes: dict[tuple[str, str], str]) -> None:
    assert [pair for pair, found in outcomes.items() if found == "WRONG"] == []


def test_the_readme_shows_what_ran(outcomes: dict[tuple[str, str], str]) -> None:
    head, rest = README.read_text().split(MARKS[0], 1)
    shown, tail = rest.split(MARKS[1], 1)
    if os.environ.get("LLMOPT_WRITE_README"):
        README.write_text(head + MARKS[0] + table(outcomes) + MARKS[1] + tail)
    else:
        assert shown == table(outcomes)


def table(outcomes: dict[tuple[str, str], str]) -> str:
    """The triangle of all pairs in Markdown."""
    names = [feature.name for feature in FEATURES]
    lines = [
        f"| | {' | '.join(str(column) for column in range(1, len(names)))} |",
        "|---" * len(names) + "|",
    ]
    for row, name in enumerate(names):
        cells = [outcomes[names[column], name] if column < row else "" for column in range(len(names) - 1)]
        lines.append(f"| {row + 1} {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", LEGEND]) + "\n"
