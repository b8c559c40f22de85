"""The bar of exactness: in float32 greedy answers are transformers' own, whatever chunks, blocks and states.

A difference counts unless the reference's two best logits are closer than TIE; such ties are counted and must be rare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmopt_cli.model.load import LoadedModel, load_model
from llmopt_cli.runtime import Engine, SamplingParams
from llmopt_cli.runtime.tokenizer import Tokenizer
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.recipe import Batching

FAMILIES = (
    *("llama-rope-llama3", "qwen2", "qwen3", "mistral-window", "gemma2"),
    *("gpt-oss", "mixtral", "deepseek-v3", "llama4-chunked", "gpt-neox"),
)
LENGTHS = (7, 40, 101, 61)
PROMPTS = [[(7 * i * i + 13 * i + 5 * length) % 500 + 7 for i in range(length)] for length in LENGTHS]
ANSWER = SamplingParams(max_tokens=40, ignore_eos=True)
TIE = 1e-4  # of the two best logits
RARE = 0.001  # of all tokens


@dataclass
class Family:
    """One model, loaded once, and what transformers answers."""

    checkpoint: Checkpoint
    loaded: LoadedModel
    tokenizer: Tokenizer
    answers: list[list[int]]
    margins: list[Tensor]  # between the two best logits at every token
    ties: list[str] = field(default_factory=list)
    compared: int = 0

    def engine(self, batching: Batching) -> Engine:
        return Engine(self.checkpoint, self.loaded, self.tokenizer, batching)

    def compare(self, engine: Engine, prompts: list[int]) -> None:
        """Whether the engine answers PROMPTS[i] for i in `prompts`, together, as transformers does."""
        outputs = engine.generate([PROMPTS[i] for i in prompts], ANSWER)
        for index, output in zip(prompts, outputs, strict=True):
            expected, found = self.answers[index], list(output.token_ids)
            self.compared += len(expected)
            if found != expected:
                where = next(i for i, pair in enumerate(zip(found, expected, strict=True)) if len(set(pair)) > 1)
                assert self.margins[index][where] < TIE, f"prompt {index} differs from token {where} on"
                self.ties.append(f"prompt {index}, token {where}")
        engine.check_integrity()


def _answers(folder: Path) -> tuple[list[list[int]], list[Tensor]]:
    """What greedy `generate` gives for each prompt alone, and how clearly."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    answers, margins = [], []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=ANSWER.max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=6,
            output_logits=True,
            return_dict_in_generate=True,
        )
        answers.append(out.sequences[0, len(prompt) :].tolist())
        best = torch.cat(out.logits).topk(2).values
        margins.append(best[:, 0] - best[:, 1])
    return answers, margins


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, strong: Callable[[str], Path]) -> Iterator[Family]:
    folder = strong(request.param)
    checkpoint = Checkpoint.open(folder)
    one = Family(checkpoint, load_model(checkpoint, "float32", "cpu"), Tokenizer(checkpoint, False), *_answers(folder))
    yield one
    if one.ties:
        line = f"{request.param}: {len(one.ties)} ties in {one.compared:,} tokens: {', '.join(one.ties)}"
        request.config.get_terminal_writer().line(line)
    assert len(one.ties) <= RARE * one.compared


def limits(chunk: int, block: int, **others: int | bool) -> Batching:
    return Batching(max_num_seqs=4, max_num_batched_tokens=chunk, block_size=block, max_model_len=144, **others)  # type: ignore[arg-type]


@pytest.mark.parametrize("block", [8, 16])
@pytest.mark.parametrize("chunk", [16, 64, 512])
class TestGreedyAnswersAreTransformersOwn:
    """Every family in every chunk and block size, from three states of the cache."""

    def test_cold_and_then_from_the_prefix_cache(self, family: Family, chunk: int, block: int) -> None:
        engine = family.engine(limits(chunk, block))
        family.compare(engine, [0, 1, 2, 3])
        assert engine.stats().prefix_cache_hits == 0
        family.compare(engine, [3, 2, 1, 0])
        assert engine.stats().prefix_cache_hits == sum((length - 1) // block * block for length in LENGTHS)
        engine.close()

    def test_preempted(self, family: Family, chunk: int, block: int) -> None:
        """All prompts are admitted, with room for no more than a block of each answer."""
        roomy = family.engine(limits(chunk, block, kv_cache_memory_bytes=2**20, enable_prefix_caching=False))
        block_bytes = roomy.cache_size.block_bytes
        roomy.close()
        blocks = sum(-(-length // block) for length in LENGTHS) + len(LENGTHS)
        small = limits(chunk, block, kv_cache_memory_bytes=blocks * block_bytes, enable_prefix_caching=False)
        engine = family.engine(small)
        engine._state.expected = 0.0  # nothing is kept free for answers to grow into
        family.compare(engine, [0, 1, 2, 3])
        assert engine.stats().num_preemptions > 0
        engine.close()


def test_a_request_alone_and_in_a_batch_says_the_same(family: Family) -> None:
    engine = family.engine(limits(64, 16, enable_prefix_caching=False))
    for index in range(len(PROMPTS)):
        family.compare(engine, [index])
    family.compare(engine, [2, 2, 2, 0])
    engine.close()
