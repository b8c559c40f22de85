"""From what a deployment asks for to a proposer. What can't work is refused before any weights are read."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmopt_cli.errors import ModelError, UsageError
from llmopt_cli.model.load import LoadedModel, context_limit, load_model
from llmopt_cli.runtime.budget import CacheSize
from llmopt_cli.runtime.kv_cache import needs_of
from llmopt_cli.runtime.speculative.draft_model import DraftModel
from llmopt_cli.runtime.speculative.eagle import Eagle
from llmopt_cli.runtime.speculative.heads import KINDS, Heads
from llmopt_cli.runtime.speculative.lookup import NGram, Suffix
from llmopt_cli.runtime.speculative.medusa import Medusa
from llmopt_cli.runtime.speculative.proposer import Proposer
from llmopt_cli.runtime.tokenizer import Tokenizer
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.recipe import Batching, Speculation


@dataclass(frozen=True)
class Drafter:
    """What drafts, found fit and opened: a small model, which is `loaded`, or `heads` of the target.

    It takes `block_bytes` of cache for a block of the target's.
    """

    block_bytes: int
    context: int = 0
    loaded: LoadedModel | None = None
    heads: Heads | None = None


def refuse_unfit(asked: Speculation | None, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Raise ModelError if what is to draft has other tokens than `checkpoint`, UsageError if it is the same model."""
    if asked is not None and asked.method in KINDS:
        Heads.open(asked.model, checkpoint, asked.method)
    if asked is None or asked.method != "draft_model":
        return
    draft = Checkpoint.open(asked.model)
    own, wanted = draft.spec.vocab_size, checkpoint.spec.vocab_size
    reason = f"it has a vocabulary of {own:,} tokens, not {wanted:,}" if own != wanted else None
    if reason is None and Tokenizer(draft).backend.get_vocab() != tokenizer.backend.get_vocab():
        reason = "its tokenizer has other tokens"
    if reason is not None:
        hint = "take a smaller model of the same family, or `--spec-method suffix`"
        raise ModelError(f"`{draft.name}` can't draft for `{checkpoint.name}`: {reason}", hint)
    if draft.path == checkpoint.path:
        raise UsageError("a model that drafts for itself only takes time", "name a smaller one with --spec-model")


def open_drafter(asked: Speculation, checkpoint: Checkpoint, target: LoadedModel, batching: Batching) -> Drafter | None:
    """What is to draft for the model of `checkpoint`, in its dtype; None if a text is only looked up."""
    if asked.method in KINDS:
        heads = Heads.open(asked.model, checkpoint, asked.method)
        values = batching.block_size * sum(map(math.prod, heads.cached_shapes))
        return Drafter(values * target.dtype.itemsize, heads=heads)
    if asked.method != "draft_model":
        return None
    draft = Checkpoint.open(asked.model)
    loaded = load_model(draft, str(target.dtype).removeprefix("torch."), str(target.device))
    block_bytes = needs_of(draft, batching, target.dtype, target.dtype).block_bytes
    return Drafter(block_bytes, context_limit(draft), loaded)


def make_proposer(
    asked: Speculation, drafter: Drafter | None, target: LoadedModel, cache: CacheSize, batching: Batching
) -> Proposer:
    """The proposer; whoever needs a cache has one for as many tokens as the target."""
    if drafter is not None and drafter.loaded is not None:
        size = CacheSize(cache.num_blocks, cache.block_size, drafter.block_bytes)
        return DraftModel(drafter.loaded, size, batching, drafter.context)
    if drafter is not None and drafter.heads is not None:
        if asked.method == "medusa":
            return Medusa(drafter.heads, target)
        budget, longest = batching.max_num_batched_tokens, batching.max_model_len or 0
        return Eagle(drafter.heads, target, cache.num_blocks, cache.block_size, budget, longest)
    return NGram(asked.prompt_lookup_min, asked.prompt_lookup_max) if asked.method == "ngram" else Suffix()
