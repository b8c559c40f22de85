"""Every op against a plainer loop, and the compiled CPU version against the reference, on odd shapes."""

from __future__ import annotations

import math

import pytest
import torch

import llmopt_kernels
from llmopt_kernels import QUANTIZED, PagedBatch, Pages, Rule, Span, cpu, paged_attention, reference, store_kv

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
compiled = pytest.mark.skipif(cpu.library() is None, reason="the CPU ops are not compiled here")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    tolerance = TOLERANCE[found.dtype]
    return torch.allclose(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


@compiled
@dtypes
@pytest.mark.parametrize("shape", [(1, 1, 7), (3, 65), (33, 256)])
def test_compiled_rms_norm_equals_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    assert close(cpu.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


def test_rms_norm_is_its_formula() -> None:
    x, weight = [3.0, -4.0], [2.0, 1.0]
    scale = 1 / math.sqrt((9 + 16) / 2 + 1e-5)
    found = reference.rms_norm(torch.tensor(x), torch.tensor(weight), 1e-5)
    assert found.tolist() == pytest.approx([2 * 3 * scale, -4 * scale])


@compiled
@dtypes
@pytest.mark.parametrize("heads", [1, 3])
def test_compiled_rotary_equals_reference_on_a_slice_of_heads(heads: int, dtype: torch.dtype) -> None:
    angles = torch.randn(5, 8).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    merged = torch.randn(5, heads + 2, 16).to(dtype)
    untouched = merged[:, heads:].clone()
    expected = reference.rotary(merged[:, :heads].clone(), cos, sin)
    assert close(cpu.rotary(merged[:, :heads], cos, sin), expected)
    assert torch.equal(merged[:, heads:], untouched)


def test_rotary_turns_pairs_by_their_angle() -> None:
    angle = 0.3
    cos, sin = torch.full((1, 2), math.cos(angle)), torch.full((1, 2), math.sin(angle))
    turned = reference.rotary(torch.tensor([[[1.0, 0.0]]]), cos, sin)
    assert turned.flatten().tolist() == pytest.approx([math.cos(angle), math.sin(angle)])


@compiled
@dtypes
@pytest.mark.parametrize("width", [1, 17, 96])
def test_compiled_silu_mul_equals_reference(width: int, dtype: torch.dtype) -> None:
    gate_up = (torch.randn(9, 2 * width) * 20).to(dtype)
    assert close(cpu.silu_mul(gate_up), reference.silu_mul(gate_up))


@compiled
@dtypes
@pytest.mark.parametrize("width", [1, 33, 256, 700])
def test_compiled_argmax_is_the_first_of_the_largest(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    x = torch.randint(-9, 9, (7, width)).to(dtype)
    x[0], x[1, : width // 2], x[2, -1] = float("-inf"), float("-inf"), 50.0
    assert cpu.argmax(x).tolist() == [row.index(max(row)) for row in x.tolist()] == reference.argmax(x).tolist()
    x[3, 0] = float("nan")
    assert 0 <= cpu.argmax(x)[3] < width


@dtypes
@pytest.mark.parametrize(("count", "rows", "width"), [(1, 1, 1), (3, 7, 33), (9, 33, 64), (17, 130, 100)])
@pytest.mark.parametrize("use_compiled", [False, pytest.param(True, marks=compiled)], ids=["torch", "compiled"])
def test_rows_of_a_product_do_not_depend_on_each_other(
    count: int, rows: int, width: int, dtype: torch.dtype, use_compiled: bool
) -> None:
    torch.manual_seed(4)
    x, weight, bias = (
        torch.randn(count, width).to(dtype),
        torch.randn(rows, width).to(dtype),
        torch.randn(rows).to(dtype),
    )
    linear = cpu.linear_rows if use_compiled else reference.linear_rows
    found = linear(x, weight, bias)
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    scale = exact.abs().max()
    assert close((found / scale).to(dtype), (exact / scale).to(dtype))
    assert torch.equal(found[-1:], linear(x[-1:], weight, bias))
    assert torch.equal(found[count // 2 :], linear(x[count // 2 :], weight, bias))


@pytest.mark.parametrize("use_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(
    ("count", "rows", "width"),
    [
        *[(1, 12, 32), (2, 3, 2), (3, 17, 66), (5, 30, 70), (6, 9, 30), (8, 100, 256)],
        *[(10, 13, 64), (16, 25, 34), (33, 100, 256), (64, 7, 2)],
    ],
)
def test_product_of_few_rows_equals_its_formula(count: int, rows: int, width: int, use_bias: bool) -> None:
    torch.manual_seed(5)
    x, weight, bias = (torch.randn(*shape).bfloat16() for shape in ((count, width), (rows, width), (rows,)))
    if not cpu.multiplies(x, weight, bias):
        pytest.skip("this machine has no compiled product of bfloat16")
    given = bias if use_bias else None
    found = llmopt_kernels.linear(x, weight, given)
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if given is None else given.double())
    assert torch.allclose(found.double(), exact, rtol=2**-8, atol=1e-4)
    few = 8  # FEW in products.h: sums of more rows come in another order
    least = 1 if count <= few else few + 1
    assert torch.equal(found[-least:], cpu.linear(x[-least:], weight, given)), "a row depends on the others"


@pytest.mark.parametrize("count", [3, 65])
def test_product_is_torchs_where_there_is_no_compiled_one(count: int) -> None:
    """In float32, for odd widths, strided weights, many rows, and a bias of another dtype, which torch refuses."""
    for x, weight in (
        (torch.randn(count, 8), torch.randn(5, 8)),
        (torch.randn(count, 7).bfloat16(), torch.randn(5, 7).bfloat16()),
        (torch.randn(count, 8).bfloat16(), torch.randn(8, 5).bfloat16().t()),
    ):
        assert torch.equal(llmopt_kernels.linear(x, weight), torch.nn.functional.linear(x, weight))
    with pytest.raises(RuntimeError):
        llmopt_kernels.linear(torch.randn(count, 8).bfloat16(), torch.randn(5, 8).bfloat16(), torch.randn(5))


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (5, 40), (64, 1024)])
def test_codes_of_fewer_bits_come_back_as_nibbles(bits: int, rows: int, columns: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    packed = reference.pack_low(codes, bits)
    assert packed.shape == (rows, columns * bits // 8)
    wanted = codes[:, 0::2] | codes[:, 1::2] << 4
    assert torch.equal(reference.nibbles(packed, bits), wanted)
    assert torch.equal(llmopt_kernels.nibbles(packed, bits), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 9])
def test_scales_are_taken_as_the_file_stores_them(dtype: torch.dtype, tokens: int) -> None:
    scales = torch.randn(6, 2).to(dtype)
    scales[0] = torch.tensor([6e-8, -6e-5]).to(dtype)  # below float16's normal numbers
    codes, x = torch.randint(0, 256, (6, 128), dtype=torch.uint8), torch.randn(tokens, 256)
    for zeros in (torch.randint(0, 16, (6, 2), dtype=torch.uint8), torch.full((1, 1), 8, dtype=torch.uint8)):
        wanted = reference.int4_linear(x, codes, scales, zeros)
        torch.testing.assert_close(llmopt_kernels.int4_linear(x, codes, scales, zeros), wanted, atol=1e-4, rtol=1e-4)


def test_dequantize_int4_is_its_formula() -> None:
    codes = torch.tensor([[0x21, 0x43, 0xF0, 0x08]], dtype=torch.uint8)  # columns 1 2 3 4 | 0 15 8 0
    scales, zeros = torch.tensor([[0.5, 2.0]]), torch.tensor([[1, 8]], dtype=torch.uint8)
    assert reference.dequantize_int4(codes, scales, zeros).tolist() == [[0.0, 0.5, 1.0, 1.5, -16.0, 14.0, 0.0, -16.0]]


@compiled
@dtypes
@pytest.mark.parametrize("count", [1, 3, 6, 7, 20])
@pytest.mark.parametrize(("rows", "groups", "group_size"), [(3, 1, 2), (24, 3, 32), (40, 2, 128), (9, 3, 256)])
def test_compiled_int4_linear_equals_reference(
    rows: int, groups: int, group_size: int, count: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(2)
    codes = torch.randint(0, 256, (rows, groups * group_size // 2), dtype=torch.uint8)
    zeros = torch.randint(0, 16, (rows, groups), dtype=torch.uint8)
    scales = torch.rand(rows, groups) * 0.1
    x = torch.randn(2, count, groups * group_size).to(dtype)
    exact = torch.nn.functional.linear(x.double(), reference.dequantize_int4(codes, scales.double(), zeros))
    for one, expected in ((x, exact), (x[:1], exact[:1])):
        found = cpu.int4_linear(one, codes, scales, zeros)
        scale = expected.abs().max()
        assert close((found / scale).to(dtype), (expected / scale).to(dtype))


def naive_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: Rule) -> torch.Tensor:
    """One request, contiguous KV, one query and head at a time. query (Q, H, D), keys (L, K, D) -> (Q, H, Dv)."""
    count, heads, _ = query.shape
    length, kv_heads, _ = keys.shape
    out = torch.zeros(count, heads, values.shape[-1])
    for row in range(count):
        position = length - count + row
        first = 0 if rule.window is None else max(0, position - rule.window + 1)
        if rule.chunk is not None:
            first = max(first, position - position % rule.chunk)
        for head in range(heads):
            kv = head // (heads // kv_heads)
            scores = keys[first : position + 1, kv].double() @ query[row, head].double() * rule.scale
            if rule.softcap is not None:
                scores = torch.tanh(scores / rule.softcap) * rule.softcap
            weights = scores.exp()
            total = weights.sum() + (0 if rule.sinks is None else rule.sinks[head].double().exp())
            out[row, head] = (weights / total @ values[first : position + 1, kv].double()).float()
    return out


@dtypes
@pytest.mark.parametrize(
    "limits",
    [{}, {"window": 3}, {"chunk": 4}, {"softcap": 0.7}, {"sinks": 1.5}, {"window": 5, "softcap": 2.0, "sinks": -1.0}],
)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "value_dim"), [(4, 2, 16, 16), (3, 1, 7, 5), (2, 2, 64, 64)])
@pytest.mark.parametrize("use_compiled", [False, pytest.param(True, marks=compiled)], ids=["torch", "compiled"])
def test_paged_attention_equals_naive_attention_over_scattered_pages(
    heads: int,
    kv_heads: int,
    dim: int,
    value_dim: int,
    limits: dict[str, float],
    dtype: torch.dtype,
    use_compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not use_compiled:
        monkeypatch.setattr(cpu, "fits", lambda *_: False)
    torch.manual_seed(1)
    size = 4
    sinks = torch.randn(heads) + limits["sinks"] if "sinks" in limits else None
    rule = Rule(**({"scale": dim**-0.5} | limits | {"sinks": sinks}))  # type: ignore[arg-type]
    blocks = torch.randperm(40).tolist()
    spans, histories = [], []
    for length, context in ((1, 1), (1, 9), (5, 5), (3, 11), (1, 16), (11, 14)):
        pages = [blocks.pop() for _ in range(-(-context // size))]
        spans.append(Span(length, context, pages))
        histories.append(
            (torch.randn(context, kv_heads, dim).to(dtype), torch.randn(context, kv_heads, value_dim).to(dtype))
        )
    batch = PagedBatch(spans, size, torch.device("cpu"))
    k_cache = Pages(torch.full((40 * size, kv_heads, dim), 99.0, dtype=dtype))
    v_cache = Pages(torch.full((40 * size, kv_heads, value_dim), 99.0, dtype=dtype))
    for span, (keys, values) in zip(spans, histories, strict=True):
        past = PagedBatch([Span(span.context, span.context, span.blocks)], size, torch.device("cpu"))
        store_kv(keys, values, k_cache, v_cache, past.new_slots)
    query = torch.randn(sum(span.length for span in spans), heads, dim).to(dtype)
    found = paged_attention(query, k_cache, v_cache, batch, rule)
    rows = query.split([span.length for span in spans])
    expected = [naive_attention(q, k, v, rule) for q, (k, v) in zip(rows, histories, strict=True)]
    assert close(found, torch.cat(expected).to(dtype))


@dtypes
@pytest.mark.parametrize("cached", list(QUANTIZED), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("use_compiled", [False, pytest.param(True, marks=compiled)], ids=["torch", "compiled"])
def test_a_quantized_cache_is_attention_over_what_its_codes_mean(
    cached: torch.dtype, dtype: torch.dtype, use_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not use_compiled:
        monkeypatch.setattr(cpu, "fits", lambda *_: False)
    torch.manual_seed(2)
    size, rule, heads, kv_heads, dim, value_dim = 4, Rule(0.3), 6, 3, 20, 16
    spans = [Span(1, 7, [5, 2]), Span(3, 3, [1]), Span(1, 1, [4]), Span(9, 9, [6, 0, 3])]
    k_cache = Pages.empty(7 * size, kv_heads, dim, cached, torch.device("cpu"))
    v_cache = Pages.empty(7 * size, kv_heads, value_dim, cached, torch.device("cpu"))
    meant = []
    for span in spans:
        keys, values = (torch.randn(span.context, kv_heads, width).to(dtype) for width in (dim, value_dim))
        keys[0] = 0  # a head of zeros has a scale, too
        past = PagedBatch([Span(span.context, span.context, span.blocks)], size, torch.device("cpu"))
        store_kv(keys, values, k_cache, v_cache, past.new_slots)
        codes = [reference.quantize_heads(tensor, cached) for tensor in (keys, values)]
        meant.append([code.float() * by[..., None] for code, by in codes])
        for tensor, wide in zip((keys, values), meant[-1], strict=True):
            error = (wide - tensor.float()).abs().amax(-1)
            assert bool((error <= tensor.float().abs().amax(-1) * STEPS[cached] * 1.0001 + 1e-9).all())
    query = torch.randn(sum(span.length for span in spans), heads, dim).to(dtype)
    found = paged_attention(query, k_cache, v_cache, PagedBatch(spans, size, torch.device("cpu")), rule)
    rows = query.split([span.length for span in spans])
    expected = [naive_attention(q, k, v, rule) for q, (k, v) in zip(rows, meant, strict=True)]
    assert close(found, torch.cat(expected).to(dtype))


STEPS = {torch.int8: 0.5 / 127, torch.float8_e4m3fn: 2**-4, torch.float8_e5m2: 2**-3}  # the largest rounding error


@compiled
def test_compiled_and_torch_put_the_same_codes_into_an_int8_cache() -> None:
    torch.manual_seed(3)
    new, slots = torch.randn(7, 3, 24), torch.tensor([3, 0, 5, 1, 6, 2, 4])
    pages = [Pages.empty(8, 3, 24, torch.int8, torch.device("cpu")) for _ in range(4)]
    cpu.store_kv(new, new, *pages[:2], slots)
    reference.store_kv(new, new, *pages[2:], slots)
    assert torch.equal(pages[0].values, pages[2].values)
    assert pages[0].scales is not None
    assert pages[2].scales is not None
    assert torch.equal(pages[0].scales, pages[2].scales)


@compiled
def test_compiled_ops_take_strided_heads() -> None:
    """Models that keep q, k and v side by side per head, or heads before tokens, hand over strided views."""
    size = torch.device("cpu")
    batch = PagedBatch([Span(1, 1, [0]), Span(1, 1, [1])], 4, size)
    interleaved = torch.randn(2, 3, 3 * 8)
    query, key, value = interleaved.chunk(3, dim=-1)
    heads_first = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (query, key, value)]
    results = []
    for q, k, v in ((query, key, value), heads_first):
        caches = Pages(torch.zeros(8, 3, 8)), Pages(torch.zeros(8, 3, 8))
        store_kv(k, v, *caches, batch.new_slots)
        results.append(paged_attention(q, *caches, batch, Rule(1.0)))
    assert torch.equal(results[0], results[1])
    assert close(results[0], value)  # one token sees only itself


@dtypes
def test_mixed_dtypes_never_reach_the_compiled_ops(dtype: torch.dtype) -> None:
    """They would read the bytes of one type as the other, and write past the end."""
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    assert not cpu.fits(torch.zeros(1, dtype=dtype), torch.zeros(1, dtype=other))
    x, weight = torch.randn(3, 8).to(dtype), torch.randn(8).to(other)
    assert torch.equal(llmopt_kernels.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    batch = PagedBatch([Span(1, 1, [0])], 1, torch.device("cpu"))
    cache = Pages(torch.zeros(1, 2, 4, dtype=other))
    with pytest.raises(RuntimeError):
        store_kv(torch.ones(1, 2, 4, dtype=dtype), torch.ones(1, 2, 4, dtype=dtype), cache, cache, batch.new_slots)


def test_angles_for_a_part_of_the_head_are_refused() -> None:
    with pytest.raises(RuntimeError):
        llmopt_kernels.rotary(torch.randn(5, 2, 16), torch.randn(5, 8), torch.randn(5, 8))


@pytest.mark.parametrize("use_compiled", [False, pytest.param(True, marks=compiled)], ids=["torch", "compiled"])
def test_a_request_of_nan_does_not_spoil_its_neighbours(use_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not use_compiled:
        monkeypatch.setattr(cpu, "fits", lambda *_: False)
    batch = PagedBatch([Span(1, 4, [0]), Span(1, 2, [1])], 4, torch.device("cpu"))
    cache = torch.randn(8, 1, 8)
    cache[:4] = float("nan")
    cache[6:] = float("nan")  # slots that the healthy request has not reached yet
    found = paged_attention(torch.randn(2, 1, 8), Pages(cache), Pages(cache), batch, Rule(1.0))
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


def test_new_slots_and_positions_follow_the_block_table() -> None:
    batch = PagedBatch([Span(2, 6, [7, 3]), Span(1, 1, [0])], 4, torch.device("cpu"))
    assert batch.positions.tolist() == [4, 5, 0]
    assert batch.new_slots.tolist() == [3 * 4 + 0, 3 * 4 + 1, 0]


@compiled
def test_sixteen_bit_products_with_packed_weights_take_the_compiled_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales are float32 whatever x is: a dispatch on their dtype would be right, and ten times slower."""
    monkeypatch.setattr(reference, "int4_linear", None)
    codes, zeros = torch.zeros(8, 64, dtype=torch.uint8), torch.zeros(8, 1, dtype=torch.uint8)
    out = llmopt_kernels.int4_linear(torch.ones(1, 128, dtype=torch.bfloat16), codes, torch.ones(8, 1), zeros)
    assert out.dtype == torch.bfloat16
