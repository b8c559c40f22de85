"""Stored bytes of every format: written by hand or by naive code, round trips of any shape, damage refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmopt_cli.errors import CheckpointError, UsageError
from llmopt_cli.model.codes import FloatCodes, IntCodes, Nested, TableCodes
from llmopt_cli.model.formats.bitsandbytes import code_table, nested_table
from llmopt_cli.model.formats.gptq import without_zero_zero
from llmopt_cli.model.formats.table import FORMATS, format_of
from llmopt_cli.model.formats.words import pack_words, unpack_words
from llmopt_cli.spec.scheme import Scheme, find_scheme

INTS = replace(find_scheme("gptq"), group_size=32)
GPTQ, GPTQ_V2, CT, BNB, FP8 = (FORMATS[n] for n in ("gptq", "gptq_v2", "compressed-tensors", "bitsandbytes", "fp8"))


def integers(rows: int, groups: int, size: int, bits: int, seed: int, symmetric: bool = False) -> IntCodes:
    generator = torch.Generator().manual_seed(seed)
    top = 2**bits
    codes = torch.randint(0, top, (rows, groups * size), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, top, (rows, groups), dtype=torch.uint8, generator=generator)
    if symmetric:
        zeros.fill_(top // 2)
    return IntCodes(codes, torch.randn(rows, groups, generator=generator).half(), zeros, bits)


def naive_words(values: list[int], bits: int) -> bytes:
    """One long number of all codes, the first lowest, cut into bytes from the lowest."""
    number = sum(value << (bits * index) for index, value in enumerate(values))
    return number.to_bytes(-(-len(values) * bits // 32) * 4, "little")


@settings(max_examples=60)
@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 5), st.integers(1, 100), st.integers(0, 2**31))
def test_words_are_the_dense_bit_stream(bits: int, rows: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, count), dtype=torch.uint8, generator=generator)
    words = pack_words(codes, bits)
    assert words.numpy().tobytes() == b"".join(naive_words(row.tolist(), bits) for row in codes)
    assert torch.equal(unpack_words(words, bits, count), codes)


def test_three_bit_words_are_those_of_the_gptq_layout() -> None:
    # Rows 0-9 in bits 0-29 of word 0, row 10 across words 0 and 1, row 21 across words 1 and 2.
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 0], codes[0, 10], codes[0, 21], codes[0, 31] = 5, 0b110, 0b101, 7
    words = [number & 0xFFFFFFFF for number in pack_words(codes, 3)[0].tolist()]
    assert words == [5 | (0b10 << 30), 0b1 | (0b1 << 31), 0b10 | (7 << 29)]


def test_gptq_bytes_written_by_hand() -> None:
    # [out 32, in 32], one group: output 1 has code 1 for input 0, 15 for input 7 and 2 for input 8; zeros 8.
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[1, 0], codes[1, 7], codes[1, 8] = 1, 15, 2
    weight = IntCodes(codes, torch.full((32, 1), 0.5), torch.full((32, 1), 8, dtype=torch.uint8))
    first, second = GPTQ.pack(weight, INTS), GPTQ_V2.pack(weight, INTS)
    assert first["qweight"].shape == (4, 32)
    assert first["qweight"][0, 1].item() & 0xFFFFFFFF == 0xF0000001
    assert first["qweight"][1, 1].item() == 2
    assert first["qzeros"].numpy().tobytes() == b"\x77" * 16  # the zero minus one
    assert second["qzeros"].numpy().tobytes() == b"\x88" * 16
    assert first["scales"].dtype == torch.float16
    assert first["g_idx"].tolist() == [0] * 32


def test_gptq_zero_zero_is_turned_round_not_wrapped() -> None:
    weight = integers(32, 2, 32, 4, seed=3)
    weight.zeros[:, 0] = 0
    turned = without_zero_zero(weight)
    stored = GPTQ.pack(weight, replace(INTS, symmetric=False))
    assert int(turned.zeros.min()) > 0
    assert torch.equal(turned.dequantize(), weight.dequantize())
    assert torch.equal(GPTQ.unpack(stored, replace(INTS, symmetric=False)).dequantize(), weight.dequantize())


def test_compressed_tensors_bytes_written_by_hand() -> None:
    # Codes 0..7 mean -8..-1 and are stored as they are; the zero of outputs 0..7 runs along the words of one column.
    codes = torch.arange(8, dtype=torch.uint8).repeat(8, 4)
    zeros = torch.arange(8, dtype=torch.uint8)[:, None]
    scheme = replace(INTS, symmetric=False)
    stored = CT.pack(IntCodes(codes, torch.ones(8, 1), zeros), scheme)
    assert stored["weight_packed"].shape == (8, 4)
    assert stored["weight_packed"][0, 0].item() == 0x76543210
    assert stored["weight_zero_point"].tolist() == [[0x76543210]]
    assert stored["weight_shape"].tolist() == [8, 32]
    eight = IntCodes(
        torch.tensor([[0, 255, 128]], dtype=torch.uint8), torch.ones(1, 1), torch.tensor([[128]]).byte(), 8
    )
    assert CT.pack(eight, find_scheme("w8a8"))["weight"].tolist() == [[-128, 127, 0]]


def test_bitsandbytes_bytes_written_by_hand() -> None:
    weight = TableCodes(torch.full((2, 32), 0xF0, dtype=torch.uint8), torch.tensor([2.0, 3.0]), code_table("nf4"))
    stored = BNB.pack(weight, find_scheme("nf4"))
    assert stored["weight"].tolist() == [[0xF0]] * 64  # 1.0, -1.0: the first in the high nibble
    assert weight.dequantize()[:, :3].tolist() == [[2, -2, 2], [3, -3, 3]]
    state = json.loads(bytes(stored["weight.quant_state.bitsandbytes__nf4"].tolist()))
    assert state == {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 64]}


def test_tables_are_those_of_bitsandbytes() -> None:
    assert code_table("nf4")[[0, 7, 15]].tolist() == [-1, 0, 1]
    assert code_table("fp4")[:8].tolist() == pytest.approx([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4])
    table = nested_table()
    assert table.shape == (256,)
    assert table[[0, 1, 253, 254, 255]].tolist() == pytest.approx([-0.99296875, -0.97890625, 0.97890625, 0.99296875, 1])
    assert int((table == 0).sum()) == 1


def test_a_row_scale_of_int8_is_stored_so_that_it_divides_back_exactly() -> None:
    scales = torch.rand(5000, generator=torch.Generator().manual_seed(0))[:, None] / 127
    weight = IntCodes(torch.zeros(5000, 2).byte(), scales, torch.full((5000, 1), 128).byte(), 8)
    assert torch.equal(BNB.pack(weight, find_scheme("int8"))["SCB"] / 127, scales.flatten())


int_formats = st.sampled_from(["gptq", "gptq_v2", "compressed-tensors"])


@settings(max_examples=60)
@given(
    int_formats, st.sampled_from([2, 3, 4, 8]), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.integers(0, 99)
)
def test_integers_come_back_as_the_same_weight(
    form: str, bits: int, rows: int, groups: int, symmetric: bool, seed: int
) -> None:
    weight = integers(32 * rows, groups, 32, bits, seed, symmetric)
    scheme = replace(INTS, weight_bits=bits, symmetric=symmetric)
    layout = FORMATS[form]
    assert layout.misfit(*weight.codes.shape, scheme) is None
    stored = layout.pack(weight, scheme)
    assert set(stored) <= set(layout.suffixes)
    read = layout.unpack(stored, scheme)
    assert isinstance(read, IntCodes)
    assert torch.equal(read.dequantize(), weight.dequantize())
    assert torch.equal(read.codes, weight.codes) or form == "gptq"


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 99))
def test_odd_shapes_pack_without_groups(rows: int, columns: int, seed: int) -> None:
    weight = integers(rows, 1, columns, 3, seed)
    scheme = replace(INTS, weight_bits=3, group_size=0, symmetric=False)
    read = CT.unpack(CT.pack(weight, scheme), scheme)
    assert torch.equal(read.dequantize(), weight.dequantize())


@settings(max_examples=30)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(["row", "one", "block"]), st.integers(0, 99))
def test_floats_come_back_as_the_same_weight(rows: int, columns: int, kind: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    blocks = (-(-rows // 128), -(-columns // 128))
    shape = {"row": (rows, 1), "one": (1, 1), "block": blocks}[kind]
    scheme = find_scheme("fp8_block" if kind == "block" else "fp8")
    weight = FloatCodes(codes, torch.rand(shape, generator=generator), 128 if kind == "block" else 0)
    for layout in (CT,) if kind == "row" else (CT, FP8):
        assert torch.equal(layout.unpack(layout.pack(weight, scheme), scheme).dequantize(), weight.dequantize())
    expanded = weight.scales
    if kind == "block":
        expanded = torch.stack([torch.stack([weight.scales[i // 128, j // 128] for j in range(columns)]) for i in (0,)])
    assert torch.equal(weight.dequantize()[0], codes.float()[0] * expanded[0])


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 200), st.booleans(), st.integers(0, 99))
def test_table_codes_come_back_as_the_same_weight(rows: int, pairs: int, double: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-rows * pairs * 2 // 64)
    absmax: Tensor | Nested = torch.rand(blocks, generator=generator)
    if double:
        small = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
        absmax = Nested(small, torch.rand(-(-blocks // 256), generator=generator), nested_table(), 0.5)
    codes = torch.randint(0, 256, (rows, pairs), dtype=torch.uint8, generator=generator)
    weight = TableCodes(codes, absmax, code_table("fp4"))
    scheme = replace(find_scheme("nf4"), name="fp4")
    read = BNB.unpack(BNB.pack(weight, scheme), scheme)
    assert torch.equal(read.dequantize(), weight.dequantize())
    if rows > 4:  # rows are cut where a block begins: every 32 pairs of codes
        start = 4 if pairs % 8 == 0 else 0
        assert torch.equal(read.rows(start, rows).dequantize(), weight.dequantize()[start:])


SCHEMES: list[tuple[str, Scheme]] = [
    *((form, replace(INTS, weight_bits=bits, zero_bits=bits)) for form in ("gptq", "gptq_v2") for bits in (2, 3, 4, 8)),
    ("gptq", replace(INTS, group_size=0, symmetric=False)),
    ("compressed-tensors", INTS),
    ("compressed-tensors", replace(INTS, group_size=0, symmetric=False)),
    ("compressed-tensors", find_scheme("w8a8")),
    ("compressed-tensors", find_scheme("fp8")),
    ("compressed-tensors", replace(find_scheme("fp8"), static_inputs=True)),
    ("compressed-tensors", find_scheme("fp8_block")),
    ("bitsandbytes", find_scheme("nf4")),
    ("bitsandbytes", replace(find_scheme("int8"), compute="int8", outliers=6.0)),
    ("fp8", find_scheme("fp8_block")),
    ("fp8", find_scheme("fp8")),
]


def of_the_linear(scheme: Scheme) -> Scheme:
    """What decides how a linear is stored and run; the rest of a scheme is for people and estimates."""
    return replace(scheme, name="", note="", scale_bits=0, zero_bits=0, extra_bits=0, method=None)


@pytest.mark.parametrize(("form", "scheme"), SCHEMES)
def test_a_config_parses_back_to_its_scheme_and_names_its_format(form: str, scheme: Scheme) -> None:
    written = json.loads(json.dumps(FORMATS[form].config(scheme, ["lm_head"], {})))
    assert format_of(written) is FORMATS[form]
    assert of_the_linear(FORMATS[form].parse_config(written).default) == of_the_linear(scheme)


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_linears_of_another_precision_are_named_in_the_config(form: str) -> None:
    wide = replace(INTS, weight_bits=8, zero_bits=8)
    written = FORMATS[form].config(INTS, ["lm_head"], {"model.layers.1.mlp.up_proj": wide})
    schemes = FORMATS[form].parse_config(json.loads(json.dumps(written)))
    assert schemes.of("model.layers.1.mlp.up_proj").weight_bits == 8
    assert schemes.of("model.layers.11.mlp.up_proj").weight_bits == 4
    assert schemes.of("model.layers.1.mlp.up_proj_b").weight_bits == 4


@pytest.mark.parametrize("form", ["awq", "bitsandbytes", "fp8"])
def test_a_format_of_one_precision_says_so(form: str) -> None:
    with pytest.raises(UsageError, match="one precision for all linears"):
        FORMATS[form].config(find_scheme("awq"), [], {"a": INTS})


@pytest.mark.parametrize(
    ("form", "shape", "scheme", "reason"),
    [
        ("gptq", (32, 48), INTS, "48 inputs"),
        ("gptq", (40, 64), INTS, "40 outputs"),
        ("gptq", (32, 64), replace(INTS, weight_bits=5), "not 5"),
        ("compressed-tensors", (8, 48), INTS, "group size 32"),
        ("compressed-tensors", (8, 48), replace(find_scheme("w8a8"), symmetric=False), "symmetric"),
        ("bitsandbytes", (8, 48), INTS, "not gptq"),
        ("bitsandbytes", (8, 7), find_scheme("nf4"), "7 inputs"),
        ("fp8", (8, 48), INTS, "not gptq"),
    ],
)
def test_what_a_format_cannot_hold_is_said(form: str, shape: tuple[int, int], scheme: Scheme, reason: str) -> None:
    assert reason in str(FORMATS[form].misfit(*shape, scheme))


DAMAGE: list[tuple[str, Scheme, str, Any]] = [
    ("gptq", INTS, "qweight", lambda t: t[1:]),
    ("gptq", INTS, "scales", lambda t: t.T),
    ("gptq", INTS, "g_idx", lambda t: t.flip(0) // 2),
    ("gptq", INTS, "qzeros", None),
    ("compressed-tensors", INTS, "weight_packed", lambda t: t[:, 1:]),
    ("compressed-tensors", INTS, "weight_shape", lambda t: t[:1]),
    ("compressed-tensors", replace(INTS, symmetric=False), "weight_zero_point", None),
]


@pytest.mark.parametrize(("form", "scheme", "suffix", "damage"), DAMAGE)
def test_damaged_integers_are_refused(form: str, scheme: Scheme, suffix: str, damage: Any) -> None:
    stored = FORMATS[form].pack(integers(32, 2, 32, 4, 0, symmetric=True), scheme)
    part = stored.pop(suffix)
    if damage is not None:
        stored[suffix] = damage(part)
    with pytest.raises(CheckpointError, match=f"{'lacks its' if damage is None else 'are not'}"):
        FORMATS[form].unpack(stored, scheme)


def test_damaged_tables_and_floats_are_refused() -> None:
    nf4 = TableCodes(torch.zeros(2, 32).byte(), torch.ones(2), code_table("nf4"))
    stored = BNB.pack(nf4, find_scheme("nf4"))
    for suffix, part in (
        ("weight.quant_state.bitsandbytes__nf4", torch.tensor(list(b'{"shape": 3'), dtype=torch.uint8)),
        ("weight.absmax", torch.ones(3)),
        ("weight", stored["weight"][1:]),
    ):
        with pytest.raises(CheckpointError):
            BNB.unpack(stored | {suffix: part}, find_scheme("nf4"))
    block = FP8.pack(
        FloatCodes(torch.zeros(130, 4).to(torch.float8_e4m3fn), torch.ones(2, 1), 128), find_scheme("fp8_block")
    )
    for suffix, part in (("weight_scale_inv", torch.ones(1, 1)), ("weight", block["weight"].float())):
        with pytest.raises(CheckpointError):
            FP8.unpack(block | {suffix: part}, find_scheme("fp8_block"))
