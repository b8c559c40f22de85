"""With `deterministic` the logits of a request are the same bit for bit, whatever else runs and however it is cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import llmopt_kernels
from llmopt_cli.errors import ModelError
from llmopt_cli.runtime import Engine, SamplingParams
from llmopt_cli.runtime.request import Request
from llmopt_cli.runtime.scheduler import Chunk
from llmopt_cli.spec.recipe import Batching
from llmopt_kernels import Rowwise, cpu

PROMPTS = [[(7 * i * i + 13 * i + length) % 500 + 7 for i in range(length)] for length in (1, 5, 17, 40)]
Bits = dict[tuple[int, ...], Tensor]


def logits_of(engine: Engine, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> Bits:
    """The logits after every sequence that was sampled from."""
    found: Bits = {}
    run = engine._runner.run

    def watched(chunks: Sequence[Chunk], requests: Mapping[str, Request]) -> Tensor:
        logits = run(chunks, requests)
        sampled = [chunk for chunk in chunks if chunk.samples]
        for chunk, row in zip(sampled, logits, strict=True):
            found[tuple(requests[chunk.request_id].token_ids)] = row.clone()
        return logits

    monkeypatch.setattr(engine._runner, "run", watched)
    engine.generate(prompts, SamplingParams(max_tokens=6, ignore_eos=True))
    return found


def together_and_alone(folder: str | Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Bits, Bits]:
    """In one batch in chunks of 16 tokens with shared prefixes, and one by one in whole prompts without."""
    small = Batching(max_num_seqs=4, max_num_batched_tokens=16, block_size=8, max_model_len=64, deterministic=True)
    large = Batching(max_num_seqs=1, max_model_len=64, enable_prefix_caching=False, deterministic=True)
    engines = [Engine.from_pretrained(folder, dtype=dtype, device="cpu", batching=b) for b in (small, large)]
    together = logits_of(engines[0], PROMPTS, monkeypatch)
    alone: Bits = {}
    for prompt in PROMPTS:
        alone |= logits_of(engines[1], [prompt], monkeypatch)
    for engine in engines:
        engine.close()
    return together, alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt-neox", "gpt2", "gpt-oss", "deepseek-v3", "llama4-chunked"])
def test_logits_are_the_same_bits_in_every_batch(
    strong: Callable[[str], Path], name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, alone = together_and_alone(strong(name), dtype, monkeypatch)
    assert together.keys() == alone.keys()
    assert [key for key in together if not torch.equal(together[key], alone[key])] == []


def test_without_compiled_ops_it_is_the_same(strong: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "fits", lambda *_: False)
    together, alone = together_and_alone(strong("qwen3"), "float32", monkeypatch)
    assert [key for key in together if not torch.equal(together[key], alone[key])] == []


def test_packed_weights_are_the_same_whatever_the_number_of_rows() -> None:
    torch.manual_seed(0)
    codes, zeros = torch.randint(0, 256, (40, 128), dtype=torch.uint8), torch.randint(0, 16, (40, 2), dtype=torch.uint8)
    x, scales = torch.randn(23, 256), torch.rand(40, 2)
    with Rowwise():
        whole = llmopt_kernels.int4_linear(x, codes, scales, zeros)
        rows = [llmopt_kernels.int4_linear(row[None], codes, scales, zeros) for row in x]
    assert torch.equal(whole, torch.cat(rows))
    assert torch.allclose(whole, llmopt_kernels.int4_linear(x, codes, scales, zeros), rtol=1e-4, atol=1e-3)


def test_a_product_without_a_way_of_its_own_is_refused() -> None:
    with Rowwise(), pytest.raises(NotImplementedError, match="einsum"):
        torch.einsum("ij,jk->ik", torch.ones(2, 2), torch.ones(2, 2))
    torch.einsum("ij,jk->ik", torch.ones(2, 2), torch.ones(2, 2))


def test_a_model_with_such_a_product_is_refused_at_the_start(
    strong: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmopt_kernels.rowwise.UNABLE", {torch.cat})
    with pytest.raises(ModelError, match="`cat` has no way"):
        Engine.from_pretrained(strong("phi3"), device="cpu", batching=Batching(deterministic=True))
