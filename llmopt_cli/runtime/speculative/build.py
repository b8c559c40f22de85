"""From what a deployment asks for to a proposer. What can't work is refused before any weights are read."""

from __future__ import annotations

from dataclasses import dataclass

from llmopt_cli.errors import ModelError, UsageError
from llmopt_cli.model.load import LoadedModel, context_limit, load_model
from llmopt_cli.runtime.budget import CacheSize
from llmopt_cli.runtime.kv_cache import needs_of
from llmopt_cli.runtime.speculative.draft_model import DraftModel
from llmopt_cli.runtime.speculative.lookup import NGram, Suffix
from llmopt_cli.runtime.speculative.proposer import Proposer
from llmopt_cli.runtime.tokenizer import Tokenizer
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.recipe import Batching, Speculation


@dataclass(frozen=True)
class Drafter:
    """A draft model that was found fit, and then loaded: its `block_bytes` of cache for a block of the target's."""

    checkpoint: Checkpoint
    loaded: LoadedModel
    block_bytes: int


def refuse_unfit(asked: Speculation, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Raise ModelError if what is to draft has other tokens than `checkpoint`, UsageError if it is the same model."""
    if asked.method != "draft_model":
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


def load_drafter(asked: Speculation, target: LoadedModel, batching: Batching) -> Drafter | None:
    """The draft model, if one is asked for, in the target's dtype."""
    if asked.method != "draft_model":
        return None
    checkpoint = Checkpoint.open(asked.model)
    loaded = load_model(checkpoint, str(target.dtype).removeprefix("torch."), str(target.device))
    return Drafter(checkpoint, loaded, needs_of(checkpoint, batching, target.dtype, target.dtype).block_bytes)


def make_proposer(asked: Speculation, drafter: Drafter | None, cache: CacheSize, batching: Batching) -> Proposer:
    """The proposer; a draft model has a cache for as many tokens as the target."""
    if drafter is not None:
        size = CacheSize(cache.num_blocks, cache.block_size, drafter.block_bytes)
        return DraftModel(drafter.loaded, size, batching.max_num_batched_tokens, context_limit(drafter.checkpoint))
    if asked.method == "ngram":
        return NGram(asked.prompt_lookup_min, asked.prompt_lookup_max)
    if asked.method == "suffix":
        return Suffix()
    raise UsageError(f"speculation by {asked.method} is not built in", "take draft_model, ngram or suffix")
