"""EAGLE: one decoder layer that goes on with the model's own hidden states, and the model's output head on top.

From the hidden state of a token and the embedding of the one that follows it guesses the hidden state of that one, and
so on with its own guesses (EAGLE-1, arXiv 2401.15077). Such a pair is cached like a token, at the place of the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmopt_cli.model.load import LoadedModel
from llmopt_cli.runtime.request import Request
from llmopt_cli.runtime.scheduler import Chunk
from llmopt_cli.runtime.speculative.heads import LAYER, MAP, Heads, layer_spec
from llmopt_cli.runtime.speculative.heads_output import output_matrix
from llmopt_cli.runtime.speculative.proposer import Draft
from llmopt_cli.runtime.speculative.room import Room
from llmopt_kernels import (
    PagedBatch,
    Pages,
    Rule,
    Span,
    argmax,
    indices,
    linear,
    paged_attention,
    rms_norm,
    rotary,
    silu_mul,
    store_kv,
)

UNSURE, RECALLED = 4, 24  # first guesses of a pass that count for nothing, and guesses that are looked at, at most
KEPT = 512  # hidden states of a request that may wait for their pass: a longer past is left out


def angles(
    config: Mapping[str, Any], positions: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin (positions, D) of a head's rotary embedding."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    made = LlamaRotaryEmbedding(LlamaConfig.from_dict({**config, "model_type": "llama"}))
    cos, sin = made(torch.empty(1, dtype=torch.float32), torch.arange(positions)[None])
    return cos[0].to(device, dtype), sin[0].to(device, dtype)


class EagleLayer:
    """The weights, over pages of its own."""

    def __init__(self, heads: Heads, loaded: LoadedModel, positions: int, slots: int) -> None:
        config, dtype, device = heads.checkpoint.config, loaded.dtype, loaded.device
        spec = layer_spec(config)
        held = heads.tensors(dtype, device)
        self._embed, self._output = loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()
        self._tokens = held.get(MAP)
        self._rows = None if self._tokens is None else output_matrix(loaded)[self._tokens].to(dtype)
        self._fc, self._fc_bias = held["fc.weight"], held.get("fc.bias")
        attention = f"{LAYER}self_attn."
        self._qkv, self._qkv_bias = (_joined(held, attention, part) for part in ("weight", "bias"))
        self._o, self._o_bias = (held.get(f"{attention}o_proj.{part}") for part in ("weight", "bias"))
        self._norm = held[f"{LAYER}post_attention_layernorm.weight"]
        self._eps = float(config.get("rms_norm_eps", 1e-6))
        self._gate_up = torch.cat([held[f"{LAYER}mlp.{name}_proj.weight"] for name in ("gate", "up")])
        self._down = held[f"{LAYER}mlp.down_proj.weight"]
        self._heads, self._kv_heads, self._dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self._rule = Rule(spec.head_dim**-0.5)
        self._cos, self._sin = angles(config, positions, dtype, device)
        self._k, self._v = (Pages.empty(slots, *shape, dtype, device) for shape in heads.cached_shapes)

    def __call__(self, tokens: Tensor, hidden: Tensor, positions: Tensor, batch: PagedBatch) -> Tensor:
        """Hidden states (T, H) of `tokens` (T,), as guessed from those before them, `hidden` (T, H) at `positions`."""
        x = linear(torch.cat((self._embed(tokens), hidden), dim=-1), self._fc, self._fc_bias)
        heads = linear(x, self._qkv, self._qkv_bias).view(len(tokens), -1, self._dim)
        turned = rotary(heads[:, : -self._kv_heads], self._cos[positions], self._sin[positions])
        store_kv(turned[:, self._heads :], heads[:, -self._kv_heads :], self._k, self._v, batch.new_slots)
        seen = paged_attention(turned[:, : self._heads], self._k, self._v, batch, self._rule)
        assert self._o is not None
        x = x + linear(seen.flatten(1), self._o, self._o_bias)
        return x + linear(silu_mul(linear(rms_norm(x, self._norm, self._eps), self._gate_up)), self._down)

    def likeliest(self, hidden: Tensor) -> Tensor:
        """Tokens int64 (B,) that the model's output head finds likeliest."""
        if self._tokens is None or self._rows is None:
            return argmax(self._output(hidden))
        return self._tokens[argmax(linear(hidden, self._rows))]


def _joined(held: Mapping[str, Tensor], attention: str, part: str) -> Any:
    """Rows of queries, keys and values; None if none of them is stored."""
    members = [held.get(f"{attention}{name}_proj.{part}") for name in "qkv"]
    return None if members[0] is None else torch.cat([one for one in members if one is not None])


@dataclass(slots=True, eq=False)
class _Follower:
    """A request as the head has it: `count` pairs in the cache, the last of them before position `next`.

    `rows` are hidden states from positions on, in order, that a pass may need: those not run, and the last that was.
    """

    blocks: list[int] = field(default_factory=list)
    count: int = 0
    next: int = 0
    asked: int = 0  # tokens that were drafted last
    rows: list[tuple[int, Tensor]] = field(default_factory=list)

    def see(self, start: int, hidden: Tensor) -> None:
        """More hidden states (T, H); what was seen from there on before was of drafts."""
        kept = [(at, rows[: start - at]) for at, rows in self.rows if at < start]
        left_out = max(0, len(hidden) - KEPT)
        self.rows = [*kept, (start + left_out, hidden[left_out:])]
        if len(hidden) > 1 or len(self.rows) > KEPT:
            while len(self.rows) > 1 and sum(len(rows) for _, rows in self.rows) > KEPT:
                del self.rows[0]

    def waiting(self, last: int, most: int) -> tuple[list[int], Tensor | None]:
        """Positions and hidden states of pairs up to `last` that are to run, `most` at a time; None if not seen."""
        if not self.blocks:  # others took them
            self.count = 0
        if self.next > last:  # asked again for the same tokens
            self.next -= 1
            self.count = max(0, self.count - 1)
        positions: list[int] = []
        parts = []
        for start, rows in self.rows:
            first, end = max(start, self.next), min(start + len(rows), last + 1)
            if first < end:
                positions += range(first, end)
                parts.append(rows[first - start : end - start])
        if not positions or positions[-1] != last:
            return [], None
        return positions[:most], (torch.cat(parts) if len(parts) > 1 else parts[0])[:most]

    def ran(self, positions: Sequence[int]) -> None:
        """These pairs are in the cache now."""
        self.count += len(positions)
        self.next = positions[-1] + 1
        self.rows = [(start, rows) for start, rows in self.rows if start + len(rows) >= self.next]


class _Known(NamedTuple):
    """A pass over pairs that are known, packed; `ends` are the places of last ones, by request.

    `past` are places behind which is known already what came.
    """

    tokens: list[int]
    positions: list[int]
    hidden: list[Tensor]
    spans: list[Span]
    ends: dict[str, int]
    past: dict[str, range]


class Eagle:
    """Drafts with an EAGLE head: certain drafts. Its cache has `num_blocks`; at most `budget` tokens run at once."""

    unseen = 32
    in_turn = True

    def __init__(
        self, heads: Heads, loaded: LoadedModel, num_blocks: int, block_size: int, budget: int, positions: int
    ) -> None:
        """`positions` is the longest context that a request may have."""
        self._layer = EagleLayer(heads, loaded, positions, num_blocks * block_size)
        self._room, self._block_size, self._budget = Room(num_blocks, block_size), block_size, budget
        self._device = loaded.device
        self._followers: dict[str, _Follower] = {}

    def see(self, chunks: Sequence[Chunk], hidden: Tensor) -> None:
        """Keep the hidden states (T, H) of a step's tokens until they are needed."""
        begin = 0
        for chunk in chunks:
            end = begin + chunk.length
            follower = self._followers.get(chunk.request_id)
            if follower is None:
                follower = self._followers[chunk.request_id] = _Follower()
            follower.see(chunk.start, hidden[begin:end])
            begin = end

    @torch.inference_mode()
    def propose(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Draft]:
        """As long as wanted; nothing for those of whose past too much is to run first, or does not fit."""
        wanted = {one.request_id: (one, length) for one, length in zip(requests, lengths, strict=True) if length}
        known = self._known(wanted)
        found, names = self._run(known), list(known.ends)
        if not names:
            return [Draft()] * len(requests)
        recalled = self._recall(known, found)
        hidden = found if len(names) == len(found) else found[indices(known.ends.values(), self._device)]
        tokens = self._layer.likeliest(hidden)
        drafts = {name: [token] for name, token in zip(names, tokens.tolist(), strict=True)}
        for step in range(1, max(wanted[name][1] for name in names)):
            going = [place for place, name in enumerate(names) if wanted[name][1] > step]
            if len(going) < len(names):  # others have room for no more
                rows = indices(going, self._device)
                names, tokens, hidden = [names[place] for place in going], tokens[rows], hidden[rows]
            spans = [Span(1, one.count + step, one.blocks) for one in map(self._followers.__getitem__, names)]
            batch = PagedBatch(spans, self._block_size, self._device)
            positions = indices([wanted[name][0].num_computed + step - 1 for name in names], self._device)
            hidden = self._layer(tokens, hidden, positions, batch)
            tokens = self._layer.likeliest(hidden)
            for name, token in zip(names, tokens.tolist(), strict=True):
                drafts[name].append(token)
        return [
            Draft(tuple(drafts.get(one.request_id, ())), recalled=recalled.get(one.request_id, ())) for one in requests
        ]

    def _known(self, wanted: Mapping[str, tuple[Request, int]]) -> _Known:
        """What is known of each, and is to run; who has an end in it is caught up with then."""
        known = _Known([], [], [], [], {}, {})
        for name, (request, length) in wanted.items():
            follower, left = self._followers.get(name), self._budget - len(known.tokens)
            last = request.num_computed - 1
            places, hidden = follower.waiting(last, left) if follower and left else ([], None)
            if follower is None or hidden is None:
                continue
            others = (other.blocks for owner, other in self._followers.items() if owner not in wanted)
            if self._room.make(follower.blocks, follower.count + len(places) + length, others):
                follower.ran(places)
                known.tokens.extend([request.token_ids[place + 1] for place in places])
                known.positions.extend(places)
                known.hidden.append(hidden)
                known.spans.append(Span(len(places), follower.count, follower.blocks))
                if places[-1] == last:
                    known.ends[name] = end = len(known.tokens) - 1
                    skipped = max(UNSURE, follower.asked)  # what was drafted has been judged
                    begin = max(request.num_prompt - 1, places[0] + skipped, last - RECALLED)
                    follower.asked = length
                    if begin < last == places[0] + len(places) - 1:
                        known.past[name] = range(end - last + begin, end)
        return known

    def _run(self, known: _Known) -> Tensor:
        """One pass; guessed hidden states (T, H)."""
        if not known.spans:
            return torch.empty(0)
        batch = PagedBatch(known.spans, self._block_size, self._device)
        hidden = torch.cat(known.hidden) if len(known.hidden) > 1 else known.hidden[0]
        tokens, positions = (indices(numbers, self._device) for numbers in (known.tokens, known.positions))
        return self._layer(tokens, hidden, positions, batch)

    def _recall(self, known: _Known, found: Tensor) -> dict[str, tuple[tuple[int, int]]]:
        """What `Draft.recalled` is, for first places alone, by request: (T, H) are `found`."""
        if not known.past:
            return {}
        rows = [row for place in known.past.values() for row in place]
        guessed = iter(self._layer.likeliest(found[indices(rows, self._device)]).tolist())
        # A pair leads to the token behind its own, which is that of the next pair.
        return {
            name: ((len(rows), sum([next(guessed) == known.tokens[row + 1] for row in rows])),)
            for name, rows in known.past.items()
        }

    def forget(self, request_id: str) -> None:
        """Drop what was seen of a request, and give back its blocks."""
        follower = self._followers.pop(request_id, None)
        if follower is not None:
            self._room.give_back(follower.blocks)

    def close(self) -> None:
        """Drop all of it."""
        for name in list(self._followers):
            self.forget(name)
