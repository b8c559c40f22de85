"""`Draft`: speculative decoding, resolved: what is run, read and kept to propose tokens, whichever way they are.

A draft model runs once for each drafted token, and so does EAGLE's layer (arXiv 2401.15077) under the target's output
matrix; Medusa's heads (arXiv 2401.10774) read a hidden state once for all of them; lookups run nothing. Heads that lie
here are counted by their config.json and file headers, others by the shape of the model they draft for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from llmopt_cli.errors import UsageError
from llmopt_cli.spec.catalog import find_model
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.model import ModelSpec
from llmopt_cli.spec.recipe import Speculation

MEDUSA_BLOCKS = 1  # residual blocks of a head, as published
TOKEN_MAP = "token_map"  # of heads that draft a part of the vocabulary: which tokens


class Product(NamedTuple):
    """A matrix of heads: `rows` x `columns`, multiplied with one hidden state, or with one for `each` drafted token."""

    rows: int
    columns: int
    each: bool = False


@dataclass(frozen=True, slots=True)
class Draft:
    """`tokens` are proposed a step, each accepted with chance `acceptance` once all before it are.

    `spec` is what runs and caches, `products` what is multiplied beside it: for every token in turn where there is a
    `spec`, else once a step. `params` are its own weights, not those it shares with the target; `name` is for people.
    """

    name: str
    tokens: int
    acceptance: float
    spec: ModelSpec | None = None
    products: tuple[Product, ...] = ()
    params: int = 0


def model_draft(spec: ModelSpec, tokens: int, acceptance: float) -> Draft:
    """A small model as the draft."""
    return Draft(spec.name, tokens, acceptance, spec, params=spec.num_params)


def resolve_draft(asked: Speculation, target: ModelSpec) -> Draft:
    """What `asked` drafts with for `target`; raises UsageError or CheckpointError for a model or heads that are not."""
    return _METHODS[asked.method](asked, target)


def _model(asked: Speculation, _: ModelSpec) -> Draft:
    return model_draft(find_model(asked.model), asked.num_speculative_tokens, asked.acceptance)


def _lookup(asked: Speculation, _: ModelSpec) -> Draft:
    return Draft(f"{asked.method} lookup", asked.num_speculative_tokens, asked.acceptance)


def _eagle(asked: Speculation, target: ModelSpec) -> Draft:
    """`fc` joins an embedding and a hidden state; one decoder layer and the target's output matrix follow."""
    stored = _stored(asked.model, asked.method, target)
    layer = _layer(target) if stored is None else ModelSpec.from_hf({"model_type": "llama", **stored.config}, "")
    rows, copied = _rows(stored, target)
    matrices = layer.matrices()
    own = sum(matrices.values()) - matrices["embedding"] - matrices["head"]  # those are the target's
    joined = Product(target.hidden_size, 2 * target.hidden_size)
    return Draft(
        name="an EAGLE head" + _by_shape(stored),
        tokens=asked.num_speculative_tokens,
        acceptance=asked.acceptance,
        spec=replace(layer, name="EAGLE", vocab_size=rows, tied_embeddings=True),
        products=(joined,),
        params=own + joined.rows * joined.columns + copied,
    )


def _medusa(asked: Speculation, target: ModelSpec) -> Draft:
    """Heads of residual blocks before one output matrix, the target's; each of its own would be one more to read."""
    stored = _stored(asked.model, asked.method, target)
    config: Mapping[str, Any] = {} if stored is None else stored.config
    heads = int(config.get("medusa_num_heads", asked.num_speculative_tokens))
    blocks, used = int(config.get("medusa_num_layers", MEDUSA_BLOCKS)), min(heads, asked.num_speculative_tokens)
    size, (rows, copied) = target.hidden_size, _rows(stored, target)
    return Draft(
        name=f"{used} Medusa heads" + _by_shape(stored),
        tokens=used,
        acceptance=asked.acceptance,
        products=(*[Product(used * size, size)] * blocks, Product(rows, size, each=True)),
        params=heads * blocks * (size + 1) * size + copied,
    )


_METHODS: dict[str, Callable[[Speculation, ModelSpec], Draft]] = {
    "draft_model": _model,
    "ngram": _lookup,
    "suffix": _lookup,
    "eagle": _eagle,
    "medusa": _medusa,
}


def _stored(name: str, method: str, target: ModelSpec) -> Checkpoint | None:
    """The heads in a folder; None for a name that is none, as that of a hub."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith((".", "/", "~")):
            raise UsageError(f"there is no folder `{name}` with heads", "make some: `llmopt train-heads MODEL`")
        return None
    found = Checkpoint.open(folder)
    if found.heads != method:
        what, hint = "no heads that draft", "make some: `llmopt train-heads MODEL`"
        if found.heads:
            what, hint = f"{found.heads} heads, not {method}", f"give the method `{found.heads}`"
        raise UsageError(f"`{name}` holds {what}", hint)
    hidden = found.config.get("hidden_size", target.hidden_size)
    if hidden != target.hidden_size:
        raise UsageError(f"the heads in `{name}` are for a hidden size of {hidden}, and {target.name} has another")
    return found


def _by_shape(stored: Checkpoint | None) -> str:
    return "" if stored else ", counted by the model's shape"


def _rows(stored: Checkpoint | None, target: ModelSpec) -> tuple[int, int]:
    """Rows of the output matrix that drafting reads, and the weights of the copy that holds them, if there is one."""
    chosen = stored.tensors.get(TOKEN_MAP) if stored else None
    return (chosen.shape[0], chosen.shape[0] * target.hidden_size) if chosen else (target.vocab_size, 0)


def _layer(target: ModelSpec) -> ModelSpec:
    """One decoder layer like the target's, over all of the context and without experts."""
    return replace(
        target,
        num_layers=1,
        experts=None,
        num_sliding_layers=0,
        sliding_window=None,
        num_linear_layers=0,
        unmodelled=(),
    )
