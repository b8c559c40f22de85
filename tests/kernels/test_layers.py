"""Decoder layers as one op: the reference against a plain loop over whole sequences, the compiled op against it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmopt_kernels import Layer, PagedBatch, Pages, Rowwise, Rule, Span, Stack, Weights, cpu, reference
from llmopt_kernels.paging import SHORT

SIZE = 4  # tokens of a block
CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"bias": True},
    "norms of heads": {"head_norms": True},
    "window": {"window": 3},
    "softcap": {"softcap": 2.0},
    "odd widths": {"hidden": 38, "inner": 70, "heads": 3, "kv_heads": 1, "dim": 10},
}


def make(
    dtype: torch.dtype = torch.float32,
    hidden: int = 32,
    inner: int = 48,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    bias: bool = False,
    head_norms: bool = False,
    **limits: Any,
) -> Layer:
    def some(*shape: int, there: bool = True) -> Any:
        return (torch.randn(shape) * shape[-1] ** -0.5).to(dtype) if there else None

    width = (heads + 2 * kv_heads) * dim
    weights = Weights(
        some(hidden) + 1,
        some(width, hidden),
        some(width, there=bias),
        some(dim, there=head_norms),
        some(dim, there=head_norms),
        some(hidden, heads * dim),
        some(hidden, there=bias),
        some(hidden) + 1,
        some(2 * inner, hidden),
        some(2 * inner, there=bias),
        some(hidden, inner),
        some(hidden, there=bias),
        *(1e-5, 1e-4, 1e-3),
    )
    pages = (Pages.empty(64 * SIZE, kv_heads, dim, dtype, CPU) for _ in range(2))
    return Layer(weights, *pages, Rule(dim**-0.5, **limits))


def angles(positions: torch.Tensor, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    turned = (positions[:, None] * 10.0 ** -torch.arange(dim // 2)).repeat(1, 2)
    return turned.cos().to(dtype), turned.sin().to(dtype)


def whole(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """A layer over one whole sequence (T, N), as one would write it down."""
    w, dim, kv_heads = layer.weights, layer.k.values.shape[2], layer.k.values.shape[1]
    cos, sin = (one[:, None] for one in angles(torch.arange(len(x)), dim, x.dtype))

    def turn(heads: torch.Tensor) -> torch.Tensor:
        low, high = heads.chunk(2, dim=-1)
        return torch.cat(
            (
                low * cos[..., : dim // 2] - high * sin[..., : dim // 2],
                high * cos[..., dim // 2 :] + low * sin[..., dim // 2 :],
            ),
            -1,
        )

    normed = F.rms_norm(x, x.shape[1:], w.norm, w.eps)
    q, k, v = F.linear(normed, w.qkv, w.qkv_bias).view(len(x), -1, dim).tensor_split((-2 * kv_heads, -kv_heads), 1)
    if w.q_norm is not None and w.k_norm is not None:
        q, k = F.rms_norm(q, (dim,), w.q_norm, w.head_eps), F.rms_norm(k, (dim,), w.k_norm, w.head_eps)
    times = q.shape[1] // kv_heads
    scores = torch.einsum("qhd,khd->hqk", turn(q), turn(k).repeat_interleave(times, 1)) * layer.rule.scale
    if layer.rule.softcap is not None:
        scores = (scores / layer.rule.softcap).tanh() * layer.rule.softcap
    ago = torch.arange(len(x))[:, None] - torch.arange(len(x))
    scores = scores.masked_fill((ago < 0) | (ago >= (layer.rule.window or len(x))), float("-inf"))
    mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(times, 1)).flatten(1)
    x = x + F.linear(mixed, w.o, w.o_bias)
    gate, up = F.linear(F.rms_norm(x, x.shape[1:], w.mlp_norm, w.mlp_eps), w.gate_up, w.gate_up_bias).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, w.down, w.down_bias)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_over_a_cache_are_the_layers_over_the_whole_sequence(kind: str) -> None:
    torch.manual_seed(0)
    layers = [make(**KINDS[kind]) for _ in range(2)]
    x = torch.randn(7, layers[0].weights.norm.numel())
    expected = x
    for layer in layers:
        expected = whole(expected, layer)
    found = []
    for start, end in ((0, 3), (3, 4), (4, 7)):
        batch = PagedBatch([Span(end - start, end, [9, 2])], SIZE, CPU)
        cos, sin = angles(batch.positions, layers[0].k.values.shape[2], x.dtype)
        found.append(reference.decoder_layers(x[start:end], layers, cos, sin, batch))
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[1], [4], [1] * 17, [1, 3, 2, 4] * 4], ids=["one", "drafts", "17", "ragged"])
def test_compiled_layers_equal_the_reference(kind: str, lengths: list[int]) -> None:
    torch.manual_seed(1)
    layers = [make(torch.bfloat16, **KINDS[kind]) for _ in range(2)]
    for layer in layers:
        layer.k.values.normal_()
        layer.v.values.normal_()
    twins = [replace(layer, k=Pages(layer.k.values.clone()), v=Pages(layer.v.values.clone())) for layer in layers]
    x = torch.randn(sum(lengths), layers[0].weights.norm.numel()).bfloat16()
    spans = [Span(length, min(SIZE, length + number % 4), [number]) for number, length in enumerate(lengths)]
    batch, stack = PagedBatch(spans, SIZE, CPU), Stack(layers)
    if not stack.runs(x, batch):
        pytest.skip("this machine has no compiled product of bfloat16")
    cos, sin = angles(batch.positions, layers[0].k.values.shape[2], x.dtype)
    found, expected = stack.run(x, cos, sin, batch), reference.decoder_layers(x, twins, cos, sin, batch)
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert error < 0.01, "bfloat16 has eight bits"
    for layer, twin in zip(layers, twins, strict=True):
        torch.testing.assert_close(layer.k.values, twin.k.values, rtol=0.05, atol=0.05)
        torch.testing.assert_close(layer.v.values, twin.v.values, rtol=0.05, atol=0.05)


def test_what_the_op_does_not_take_is_left_to_the_parts() -> None:
    layer = make(torch.bfloat16)
    x, batch = torch.randn(2, 32).bfloat16(), PagedBatch([Span(1, 1, [0]), Span(1, 2, [1])], SIZE, CPU)
    able = cpu.pairs_bf16()
    assert Stack([layer]).runs(x, batch) is able
    eight = Pages.empty(64 * SIZE, 2, 16, torch.int8, CPU)
    odd = replace(layer.weights, down=layer.weights.down[:, :47].contiguous(), gate_up=layer.weights.gate_up[:94])
    mixed = PagedBatch([Span(1, 1, [0]), Span(SHORT + 1, SHORT + 1, [1, 2, 3])], SIZE, CPU)
    assert not Stack([]).runs(x, batch)
    assert not Stack([layer, replace(layer, k=eight, v=eight)]).runs(x, batch)
    assert not Stack([replace(layer, weights=odd)]).runs(x, batch)
    assert not Stack([replace(layer, rule=Rule(1.0, sinks=torch.zeros(4)))]).runs(x, batch)
    assert not Stack([make()]).runs(x.float(), batch)
    assert not Stack([layer]).runs(torch.randn(SHORT + 2, 32).bfloat16(), mixed)
    assert not Stack([layer]).runs(torch.randn(65, 32).bfloat16(), batch)
    with Rowwise():
        assert not Stack([layer]).runs(x, batch)
