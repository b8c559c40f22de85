"""A model made by hand that finds again what it has read: after a token it says what followed that token before.

Two layers with one head each, an induction head (arXiv 2209.11895). The first layer's head looks one token back, by
angles alone, and notes what stood there; the second looks for a note of the token that is there now, and says the token
beside that note; where there is none it looks at the text's first token, as heads of real models do. The demo is too
small to have learned it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from llmopt_cli.spec.checkpoint import BUNDLED

VOCAB, CONTEXT = 4096, 2048
NAME = 48  # numbers, each 1 or -1, by which a token is known
TOKEN, NOTE, ANSWER = (slice(start, start + NAME) for start in (0, NAME, 2 * NAME))  # of a hidden state
ONE, START, HIDDEN = 3 * NAME, 3 * NAME + 1, 160  # where every hidden state holds 1, and the first one more; its size
HEAD = 128
FAST, SLOW = 8, HEAD // 2 - NAME // 2  # pairs of a head that turn fast, and the first of those that hardly turn
SHARP = 15.0  # of the look back
MATCH = 4.0  # of a note that is looked for; its square times NAME is the score, and notes at random reach half of it
BOS = 0  # begins every text
LOUD = 5.0  # of the answer
THETA = 1e7


def write_induction(folder: Path) -> Path:
    """Save the model with the demo's tokenizer; float32."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=HEAD,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
    )
    transformers_logging.disable_progress_bar()
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_("norm" in name)
        names = torch.randint(0, 2, (VOCAB, NAME), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        base = model.model
        names[BOS] = 0
        base.embed_tokens.weight[:, TOKEN] = names
        base.embed_tokens.weight[:, ONE] = 1
        base.embed_tokens.weight[BOS, START] = NAME**0.5  # as large as a name
        _look_back(base.layers[0].self_attn)
        _look_up(base.layers[1].self_attn)
        model.lm_head.weight[:, ANSWER] = names
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED["demo"] / file, folder)
    return folder


def _look_back(attention: Any) -> None:
    """Attend to the token before, and copy its name into the note."""
    size = _size(NAME + 1)
    angles = THETA ** (-torch.arange(FAST) / (HEAD // 2))
    attention.q_proj.weight[:FAST, ONE] = SHARP * size
    attention.k_proj.weight[:FAST, ONE] = SHARP * size * angles.cos()  # one position's angle ahead
    attention.k_proj.weight[HEAD // 2 : HEAD // 2 + FAST, ONE] = SHARP * size * angles.sin()
    _copy(attention, NOTE, size)


def _look_up(attention: Any) -> None:
    """Attend to the token whose note is the name of this one, and copy its name into the answer."""
    size = _size(2 * NAME + 1)
    places = torch.cat((torch.arange(SLOW, HEAD // 2), torch.arange(SLOW, HEAD // 2) + HEAD // 2))
    attention.q_proj.weight[places, TOKEN] = MATCH * size * torch.eye(NAME)
    attention.k_proj.weight[places, NOTE] = MATCH * size * torch.eye(NAME)
    attention.q_proj.weight[SLOW - 1, ONE] = MATCH * size
    attention.k_proj.weight[SLOW - 1, START] = 0.7 * MATCH * _size(NAME + 1) * NAME**0.5
    _copy(attention, ANSWER, LOUD * size)


def _copy(attention: Any, to: slice, size: float) -> None:
    attention.v_proj.weight[:NAME, TOKEN] = torch.eye(NAME)
    attention.o_proj.weight[to, :NAME] = size * torch.eye(NAME)


def _size(ones: int) -> float:
    """What a norm divides a hidden state by that holds so many numbers of size 1."""
    return float((ones / HIDDEN) ** 0.5)
