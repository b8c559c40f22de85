"""Small integers as a dense bit stream in 32-bit words: what GPTQ and compressed-tensors share.

Code j of a row lies at bits j*b .. j*b+b-1 of the row's stream, lowest bit first; a code may cross from one word into
the next (3 bits). Knows nothing of scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

OCTET = 8  # so many codes of b bits are b whole bytes


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, n] -> int32 [rows, ceil(n * bits / 32)] on the CPU, the last word filled up with zeros."""
    rows, count = codes.shape
    padded = torch.zeros(rows, -(-count // 32) * 32, dtype=torch.uint8)
    padded[:, :count] = codes.cpu()
    stream = torch.zeros(rows, padded.shape[1] // OCTET, dtype=torch.int64)
    for index in range(OCTET):
        stream |= padded[:, index::OCTET].long() << (bits * index)
    octets = stream.view(torch.uint8).view(rows, -1, OCTET)[..., :bits]  # a word's bytes, lowest first
    words = octets.reshape(rows, -1).contiguous().view(torch.int32)
    return words[:, : -(-count * bits // 32)].contiguous()


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 [rows, ceil(count * bits / 32)] -> uint8 [rows, count]."""
    rows = words.shape[0]
    stored = words.contiguous().view(torch.uint8)
    octets = torch.zeros(rows, -(-count // OCTET), OCTET, dtype=torch.uint8)
    whole = torch.zeros(rows, octets.shape[1] * bits, dtype=torch.uint8)
    length = min(whole.shape[1], stored.shape[1])
    whole[:, :length] = stored[:, :length]
    octets[..., :bits] = whole.view(rows, -1, bits)
    stream = octets.view(torch.int64).squeeze(-1)
    codes = torch.empty(rows, stream.shape[1], OCTET, dtype=torch.uint8)
    for index in range(OCTET):
        codes[..., index] = (stream >> (bits * index)) & (2**bits - 1)
    return codes.view(rows, -1)[:, :count].contiguous()
