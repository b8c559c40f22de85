"""What proposers keep: as many bytes as are counted for them, and beginnings that requests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from llmopt_cli.model.attention import paged_layers
from llmopt_cli.model.load import LoadedModel, load_model
from llmopt_cli.runtime.budget import CacheSize
from llmopt_cli.runtime.request import Request, SamplingParams
from llmopt_cli.runtime.speculative.build import make_proposer, open_drafter
from llmopt_cli.runtime.speculative.draft_model import DraftModel
from llmopt_cli.runtime.speculative.eagle import Eagle
from llmopt_cli.runtime.speculative.heads import EAGLE_FILE, eagle_shapes, write_heads
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.recipe import Batching, Speculation

SIZE, BLOCK, BLOCKS = 32, 4, 24
BATCHING = Batching(max_num_seqs=4, block_size=BLOCK, max_num_batched_tokens=16, max_model_len=64)
HEAD = {"num_hidden_layers": 1, "hidden_size": SIZE, "intermediate_size": 40, "vocab_size": 4096, "head_dim": 8}
TEXT = [(7 * i * i + 13 * i) % 4000 + 7 for i in range(60)]


@pytest.fixture(scope="module")
def base(tiny: Callable[..., Path]) -> Checkpoint:
    return Checkpoint.open(tiny("Llama", hidden_size=SIZE, num_attention_heads=2, num_key_value_heads=1))


@pytest.fixture(scope="module")
def loaded(base: Checkpoint) -> LoadedModel:
    return load_model(base, "float32", "cpu")


@pytest.fixture
def drafts(loaded: LoadedModel) -> Iterator[Callable[..., DraftModel]]:
    """Makes draft models over one and the same model, one after the other."""
    made: list[DraftModel] = []

    def make(num_blocks: int = BLOCKS, share: bool = True) -> DraftModel:
        if made:
            made[-1].close()
        batching = Batching(4, 16, 64, BLOCK, enable_prefix_caching=share)
        made.append(DraftModel(loaded, CacheSize(num_blocks, BLOCK, 0), batching, 64))
        return made[-1]

    yield make
    made[-1].close()


def request(name: str, tokens: list[int], **more: Any) -> Request:
    return Request(name, list(tokens), len(tokens), SamplingParams(), num_computed=len(tokens) - 1, **more)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_eagle_head_takes_the_bytes_that_are_counted(
    base: Checkpoint, loaded: LoadedModel, tmp_path: Path, kv_heads: int, dtype: torch.dtype
) -> None:
    """Its own KV heads and their size decide, not those of the model that it drafts for."""
    config = HEAD | {"num_attention_heads": 4, "num_key_value_heads": kv_heads}
    shapes = eagle_shapes(config, base.spec)
    write_heads(tmp_path, EAGLE_FILE, config, {name: torch.zeros(shape) for name, shape in shapes.items()})
    asked = Speculation(method="eagle", model=str(tmp_path))
    target = loaded if dtype == loaded.dtype else load_model(base, "bfloat16", "cpu")
    drafter = open_drafter(asked, base, target, BATCHING)
    assert drafter is not None
    proposer = make_proposer(asked, drafter, target, CacheSize(BLOCKS, BLOCK, 0), BATCHING)
    assert isinstance(proposer, Eagle)
    allocated = sum(pages.values.nbytes for pages in (proposer._layer._k, proposer._layer._v))
    assert allocated == BLOCKS * drafter.block_bytes == BLOCKS * BLOCK * 2 * kv_heads * 8 * dtype.itemsize


def test_a_draft_model_takes_the_bytes_that_are_counted(base: Checkpoint, loaded: LoadedModel) -> None:
    asked = Speculation(model=str(base.path))
    drafter = open_drafter(asked, base, loaded, BATCHING)
    assert drafter is not None
    assert drafter.loaded is not None
    proposer = make_proposer(asked, drafter, loaded, CacheSize(BLOCKS, BLOCK, 0), BATCHING)
    pages = [one for layer in paged_layers(drafter.loaded.model) for one in (layer.k, layer.v)]
    assert sum(one.values.nbytes for one in pages if one is not None) == BLOCKS * drafter.block_bytes
    proposer.close()


def test_who_begins_like_another_is_caught_up_with_at_once(drafts: Callable[..., DraftModel]) -> None:
    """A step has room for 16 tokens, and both prompts are longer."""
    for share in (True, False):
        one = drafts(share=share)
        first, second = request("a", TEXT[:38]), request("b", [*TEXT[:32], 5, 6])
        strange = request("c", second.token_ids, salt=b"another's")
        while not one.propose([first], [3])[0].tokens:
            pass
        assert bool(one.propose([second], [3])[0].tokens) == share
        assert not one.propose([strange], [3])[0].tokens
        one.forget("a")
        after = request("d", [*TEXT[:36], 9])  # what was run for one that ended is still there
        assert bool(one.propose([after], [3])[0].tokens) == share
        for name in "bcd":
            one.forget(name)
        one._room.check_integrity([])
        one.forget_ended()
        assert not one.propose([request("e", [*TEXT[:36], 8])], [3])[0].tokens


@torch.inference_mode()
def greedy(loaded: LoadedModel, tokens: list[int], count: int) -> tuple[int, ...]:
    """What the model says next, all of it computed anew for every token."""
    known = list(tokens)
    for _ in range(count):
        known.append(int(loaded.logits(torch.tensor(known), torch.arange(len(known)))[-1].argmax()))
    return tuple(known[len(tokens) :])


@pytest.mark.parametrize("num_blocks", [60, 20])
def test_drafts_are_what_the_model_says_whoever_shares(
    loaded: LoadedModel, drafts: Callable[..., DraftModel], num_blocks: int
) -> None:
    """Requests come, grow as their drafts stand or not, and go; some are left alone for a while, or lose their room."""
    one, random, running, made = drafts(num_blocks), Random(num_blocks), list[Request](), 0
    for step in range(90):
        if len(running) < 4:
            length = random.randrange(8, 30)
            running.append(request(f"{step}", [*TEXT[:length], random.randrange(9, 4000)]))
        lengths = [random.choice((0, 2, 3)) for _ in running]
        for asked, draft in zip(running, one.propose(running, lengths), strict=True):
            made += bool(draft.tokens)
            assert draft.tokens == greedy(loaded, asked.token_ids, len(draft.tokens))
            asked.token_ids += [*draft.tokens[: random.randrange(4)], random.randrange(9, 4000)]
        tables = [follower.request.blocks for follower in one._followers.values()]
        one._room.check_integrity(tables)
        for gone in [asked for asked in running if asked.num_tokens > 50 or random.random() < 0.05]:
            running.remove(gone)
            one.forget(gone.request_id)
    assert made > 40
