"""Quantize with llama.cpp, or measure perplexity of GGUF files; run by the Python that has llama-cpp-python.

llamacpp_perplexity.py quantize IN OUT FILE_TYPE [IMPORTANCE.npz]
llamacpp_perplexity.py perplexity IDS.json FILE ...      one JSON line: file -> perplexity; `llama_cpp` -> its version
"""

from __future__ import annotations

import ctypes
import json
import sys

import llama_cpp
import numpy as np


class Importance(ctypes.Structure):
    """llama.h's llama_model_imatrix_data."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


def quantize(source: str, target: str, file_type: int, importance: str | None) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type, 1
    if importance:
        arrays = {name: np.ascontiguousarray(data, np.float32) for name, data in np.load(importance).items()}
        entries = (Importance * (len(arrays) + 1))()
        for entry, (name, data) in zip(entries, arrays.items(), strict=False):
            pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.name, entry.data, entry.size = name.encode(), pointer, data.size
        params.imatrix = ctypes.cast(entries, type(params.imatrix))
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    if status:
        raise SystemExit(f"llama_model_quantize answered {status}")


def perplexity(file: str, windows: list[list[int]]) -> float:
    model = llama_cpp.Llama(
        file, n_ctx=len(windows[0]), n_batch=512, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False
    )
    total, count = 0.0, 0
    for ids in windows:
        model.reset()
        model.eval(ids)
        logits = model.scores[: len(ids) - 1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        chosen = logits[np.arange(len(ids) - 1), ids[1:]] - np.log(np.exp(logits).sum(-1))
        total, count = total - chosen.sum(), count + len(chosen)
    return float(np.exp(total / count))


if __name__ == "__main__":
    if sys.argv[1] == "quantize":
        quantize(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5] if len(sys.argv) > 5 else None)
    else:
        with open(sys.argv[2], encoding="utf-8") as stream:
            windows = json.load(stream)
        found = {file: perplexity(file, windows) for file in sys.argv[3:]}
        print(json.dumps({"llama_cpp": llama_cpp.__version__, **found}))  # noqa: T201
