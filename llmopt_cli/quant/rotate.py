"""Rotations folded into the weights: outliers are spread over all channels, and the model computes what it did.

R1 turns the residual stream, R2 the values of every head (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406). With
column vectors and an orthogonal R, the stream h becomes R^T h: what writes to it is W' = R^T W, what reads it after a
norm of gain g is W' = W diag(g) R, and the gain becomes one: without it an RMS norm and a rotation commute.

Block by block, in float64. Which linears read and write is found by structure, and every block is run to prove that it
is the same function; norms that subtract a mean, or that stand after what they should stand before, are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmopt_cli.errors import ModelError
from llmopt_cli.quant.structure import Group

Run = Callable[[Tensor], Tensor]  # hidden states [B, L, hidden] -> those after the block
TOLERANCE = 1e-4  # of the largest output
ROWS = 4096  # of a matrix are in float64 at a time


@dataclass(frozen=True, eq=False)
class Rotation:
    """R1 [hidden, hidden], and R2 by the width of a head; orthogonal, float64, the same for the same seed."""

    residual: Tensor
    seed: int

    @classmethod
    def make(cls, hidden: int, seed: int, device: torch.device | None = None) -> Rotation:
        """The rotation of a residual stream of `hidden` channels."""
        return cls(orthogonal(hidden, seed).to(device), seed)

    def undone(self, hidden: Tensor) -> Tensor:
        """Rotated hidden states float32 [..., hidden] as they were."""
        return hidden @ self.residual.T.to(hidden.device, hidden.dtype)

    def of_heads(self, width: int) -> Tensor:
        """R2 [width, width]."""
        return orthogonal(width, self.seed + 1).to(self.residual.device)


def orthogonal(size: int, seed: int) -> Tensor:
    """A random Hadamard matrix, float64 [size, size]: the largest power of two in `size` by Sylvester's construction.

    It is the Kronecker product with a random orthogonal matrix of the odd rest, with random signs of its rows.
    """
    generator = torch.Generator().manual_seed(seed)
    odd = size // (size & -size)
    matrix: Tensor = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64)).Q.contiguous()
    step = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64) / 2**0.5
    while len(matrix) < size:
        matrix = torch.kron(step, matrix)
    signs = torch.randint(2, (size, 1), generator=generator) * 2 - 1
    return matrix * signs


@torch.inference_mode()
def rotate_block(
    block: nn.Module, where: str, groups: Sequence[Group], rotation: Rotation, run: Run, hidden: Tensor
) -> None:
    """Rotate a block in place; `groups` are its own, `hidden` [B, L, hidden] is an example for the unrotated block.

    ModelError unless the block then turns rotated hidden states into rotated ones.
    """
    turn = rotation.residual.float()
    before = run(hidden)
    norms = _readers(groups, len(turn))
    for norm, readers in norms.items():
        fold_gain(block.get_submodule(norm), [block.get_submodule(name) for name in readers], rotation.residual)
    read = {name for readers in norms.values() for name in readers}
    for group in groups:
        _rotate_heads(block, group, rotation)
        for name in set(group.linears) - read:
            linear: Any = block.get_submodule(name)
            if linear.out_features == len(turn):
                _turn_output(linear, rotation.residual)
    difference = (run(hidden @ turn) @ turn.T - before).abs().max()
    if not bool(difference <= TOLERANCE * before.abs().max()):
        raise ModelError(
            f"`{where}` would not compute the same with its residual stream rotated",
            "blocks of attention and a dense MLP, each after an RMS norm, can be; leave out --rotate",
        )


def fold_gain(norm: nn.Module, readers: Sequence[nn.Module], turn: Tensor) -> None:
    """Move a norm's gain into the linears that read it, with the turn: W' = W diag(g) R, and then the gain is one."""
    gain: Any = norm.weight
    for reader in readers:
        weight: Any = reader.weight
        for rows in torch.split(weight, ROWS):
            rows.copy_((rows.double() * gain.double()) @ turn)
    gain.fill_(1)


def rotate_embedding(embedding: Tensor, rotation: Rotation) -> None:
    """Turn rows of the embedding [vocabulary, hidden] in place."""
    for rows in torch.split(embedding, ROWS):
        rows.copy_(rows.double() @ rotation.residual)


@torch.inference_mode()
def changed_vectors(
    block: nn.Module, change: Callable[[], None], dtypes: Mapping[str, torch.dtype]
) -> dict[str, Tensor]:
    """Gains and biases of `block` that `change` changes, rounded in place to what they are stored as."""
    before = {name: value.clone() for name, value in block.named_parameters() if value.ndim == 1}
    change()
    after: dict[str, Tensor] = {name: block.get_parameter(name) for name in before}
    changed = {name: value for name, value in after.items() if not torch.equal(value, before[name])}
    for name, value in changed.items():
        value.copy_(value.to(dtypes[name]))
    return changed


def _readers(groups: Sequence[Group], width: int) -> dict[str, list[str]]:
    """The linears that read each norm of the residual stream."""
    norms: dict[str, list[str]] = {}
    for group in groups:
        if group.producer is not None and group.producer.kind == "gain" and group.producer.heads[-1] == width:
            norms.setdefault(group.producer.name, []).extend(group.linears)
    return norms


def _rotate_heads(block: nn.Module, group: Group, rotation: Rotation) -> None:
    """R2: values and what reads them, where one linear makes nothing but values."""
    producer = group.producer
    home: Any = block.get_submodule(group.linears[0].rpartition(".")[0])
    if producer is None or producer.kind != "rows" or getattr(home, "head_dim", None) != producer.heads[2]:
        return
    turn = rotation.of_heads(producer.heads[2])
    for part in _parameters(block.get_submodule(producer.name)):
        heads = part.double().view(producer.heads[0], producer.heads[2], -1)
        part.copy_((turn.T @ heads).view(part.shape))
    for name in group.linears:
        weight: Any = block.get_submodule(name).weight
        weight.copy_((weight.double().view(len(weight), -1, len(turn)) @ turn).view(weight.shape))


def _turn_output(linear: nn.Module, turn: Tensor) -> None:
    for part in _parameters(linear):
        part.copy_(turn.T @ part.double())


def _parameters(linear: nn.Module) -> Iterator[Tensor]:
    """The weight [out, in] and the bias [out] if there is one."""
    yield from linear.parameters()
