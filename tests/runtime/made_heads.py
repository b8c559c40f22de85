"""Heads that draft, made without a lesson: random ones as they are published, and ones that know what will be said.

Those that know are solved for: least squares over the states that a model has in certain texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmopt_cli.model.load import LoadedModel
from llmopt_cli.runtime.speculative.heads import EAGLE_FILE, MEDUSA_FILE, write_heads
from llmopt_cli.runtime.speculative.train import hidden_states

SIZE, VOCABULARY = 32, 4096
MEDUSA: dict[str, Any] = {"medusa_num_heads": 3, "medusa_num_layers": 2, "base_model_name_or_path": "somewhere/else"}
EAGLE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "num_hidden_layers": 1,
    "hidden_size": SIZE,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "vocab_size": VOCABULARY,
}
Text = tuple[Sequence[int], Sequence[int]]  # a prompt, and what is said behind it


def medusa_tensors(size: int = SIZE, vocabulary: int = VOCABULARY) -> dict[str, Tensor]:
    """Random Medusa heads for a model of that size."""
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for head in range(MEDUSA["medusa_num_heads"]):
        for layer in range(MEDUSA["medusa_num_layers"]):
            tensors[f"{head}.{layer}.linear.weight"] = torch.randn(size, size, generator=generator) * 0.5
            tensors[f"{head}.{layer}.linear.bias"] = torch.randn(size, generator=generator)
        tensors[f"{head}.{MEDUSA['medusa_num_layers']}.weight"] = torch.randn(vocabulary, size, generator=generator)
    return tensors


def eagle_tensors(config: Mapping[str, Any] = EAGLE, strength: float = 0.3) -> dict[str, Tensor]:
    """A random EAGLE head, with an embedding that nobody needs."""
    size, inner, dim = config["hidden_size"], config["intermediate_size"], config["hidden_size"] // 4
    shapes = {
        "fc.weight": (size, 2 * size),
        "layers.0.self_attn.q_proj.weight": (4 * dim, size),
        "layers.0.self_attn.k_proj.weight": (2 * dim, size),
        "layers.0.self_attn.v_proj.weight": (2 * dim, size),
        "layers.0.self_attn.o_proj.weight": (size, 4 * dim),
        "layers.0.mlp.gate_proj.weight": (inner, size),
        "layers.0.mlp.up_proj.weight": (inner, size),
        "layers.0.mlp.down_proj.weight": (size, inner),
        "layers.0.post_attention_layernorm.weight": (size,),
        "embed_tokens.weight": (VOCABULARY, size),
    }
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(shape, generator=generator) * strength for name, shape in shapes.items()}


def drafts_of_few(kind: str, tokens: Sequence[int], vocabulary: int, folder: Path) -> Path:
    """Writes random heads that draft no tokens but these; what EAGLE drafts hangs on the token before."""
    few = {"token_map": torch.tensor(tokens)}
    if kind == "medusa":
        write_heads(folder, MEDUSA_FILE, MEDUSA, medusa_tensors(SIZE, vocabulary) | few)
    else:
        tensors = eagle_tensors() | few
        tensors["fc.weight"][:, :SIZE] *= 50  # embeddings are as much smaller than hidden states
        write_heads(folder, EAGLE_FILE, EAGLE | {"vocab_size": vocabulary}, tensors)
    return folder


def knowing_medusa(loaded: LoadedModel, texts: Sequence[Text], folder: Path, heads: int = 5) -> Path:
    """Writes Medusa heads that find what each text goes on with, most of the time; their blocks do nothing."""
    states = _states(loaded, texts)
    tensors: dict[str, Tensor] = {}
    for head in range(heads):
        rows, ahead = [], []
        for (prompt, answer), state in zip(texts, states, strict=True):
            places = range(len(prompt) - 1, len(state) - 2 - head)
            rows.append(state[places.start : places.stop])
            ahead += [*prompt, *answer][places.start + 2 + head : places.stop + 2 + head]
        said = F.one_hot(torch.tensor(ahead), VOCABULARY)
        tensors[f"{head}.0.linear.weight"] = torch.zeros(SIZE, SIZE)
        tensors[f"{head}.0.linear.bias"] = torch.zeros(SIZE)
        tensors[f"{head}.1.weight"] = _solve(torch.cat(rows), said)
    write_heads(folder, MEDUSA_FILE, {"medusa_num_heads": heads, "medusa_num_layers": 1}, tensors)
    return folder


def knowing_eagle(loaded: LoadedModel, texts: Sequence[Text], folder: Path) -> Path:
    """Writes an EAGLE head whose `fc` foresees the states of each text, and whose layer disturbs that a little."""
    embed, rows, following = loaded.model.get_input_embeddings(), [], []
    for (prompt, answer), state in zip(texts, _states(loaded, texts), strict=True):
        first = len(prompt) - 1
        tokens = torch.tensor([*prompt, *answer])
        rows.append(torch.cat((embed(tokens[first + 1 :]), state[first:-1]), dim=-1))
        following.append(state[first + 1 :])
    tensors = eagle_tensors(strength=0.1)
    tensors["layers.0.post_attention_layernorm.weight"] = torch.ones(SIZE)
    tensors["fc.weight"] = _solve(torch.cat(rows), torch.cat(following))
    write_heads(folder, EAGLE_FILE, EAGLE | {"max_position_embeddings": 256}, tensors)
    return folder


@torch.no_grad()
def _states(loaded: LoadedModel, texts: Sequence[Text]) -> list[Tensor]:
    """(L, H) of each text."""
    return [hidden_states(loaded, torch.tensor([[*text[0], *text[1]]]), lambda *_: None)[0] for text in texts]


def _solve(rows: Tensor, wanted: Tensor) -> Tensor:
    """The matrix (M, K) that makes `wanted` (N, M) of `rows` (N, K), as nearly as one can."""
    x, ridge = rows.detach().double(), 1e-4 * torch.eye(rows.shape[1], dtype=torch.float64)
    solved: Tensor = torch.linalg.solve(x.T @ x + ridge, x.T @ wanted.double())
    return solved.T.float()
