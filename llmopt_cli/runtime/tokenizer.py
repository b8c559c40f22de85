"""Text to tokens and back: the checkpoint's tokenizer, incremental detokenization, stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmopt_cli.errors import ModelError, UsageError
from llmopt_cli.spec.checkpoint import Checkpoint, read_json


class Tokenizer:
    """The tokenizer that lies beside the weights, and the ids that end a text."""

    def __init__(self, checkpoint: Checkpoint, trust_remote_code: bool = False) -> None:
        from transformers import AutoTokenizer

        try:
            self._hf: Any = AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code)
        except Exception as error:  # noqa: BLE001  for a damaged tokenizer.json there is no narrower class
            reason = (str(error) or type(error).__name__).splitlines()[0]
            hint = "its tokenizer.json must be the one it was published with: download it again"
            raise ModelError(f"`{checkpoint.path}` has no usable tokenizer: {reason}", hint) from None
        self.backend: Any = getattr(self._hf, "backend_tokenizer", None)
        if self.backend is None:
            raise ModelError(f"the tokenizer of `{checkpoint.name}` has no tokenizer.json, which streaming text needs")
        self._hf.model_max_length = 2**62  # the engine has its own limit, and its own words when it is passed
        self.name = checkpoint.name
        self.vocab_size = len(self._hf)
        self.backend.no_truncation()  # neither limit is ours, and encode may be called from several threads
        self.backend.no_padding()
        self._added: dict[int, Any] = self.backend.get_added_tokens_decoder()
        self._is_bytes = "ByteLevel" in str(self.backend.decoder)  # each character of a token stands for a byte
        self.eos_ids = _eos_ids(checkpoint, self._hf.eos_token_id)

    def encode(self, text: str) -> list[int]:
        """Token ids of raw text, with the special tokens that the tokenizer adds by itself."""
        ids: list[int] = self._hf(text).input_ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=True)
        return text

    def token_bytes(self, token: int) -> bytes:
        """What a token alone stands for: the text of a special token, else its part of a text in UTF-8."""
        raw: str | None = self.backend.id_to_token(token)
        if raw is None:
            return b""
        if token in self._added:
            return raw.encode()
        if self._is_bytes:
            return bytes(byte for char in raw if (byte := _BYTES.get(char)) is not None)
        if len(raw) == 6 and raw.startswith("<0x"):
            return bytes([int(raw[3:5], 16)])
        return raw.replace("\u2581", " ").encode()

    def is_special(self, token: int) -> bool:
        """Whether a token never shows in text."""
        added = self._added.get(token)
        return added is not None and bool(added.special)

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation by the model's chat template, up to where the assistant speaks."""
        if not self._hf.chat_template:
            raise UsageError(f"`{self.name}` has no chat template", "use a raw prompt (`/v1/completions`)")
        from jinja2 import TemplateError

        try:
            text = self._hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise UsageError(f"the chat template of `{self.name}` refuses these messages: {error}") from None
        ids: list[int] = self._hf(text, add_special_tokens=False).input_ids  # the template writes them itself
        return ids


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level tokens spell bytes: those that print are themselves, the rest comes after."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTES = _byte_alphabet()


class TextStream:
    """The growing text of one output: whole characters only, cut before the first stop string.

    `text` is what may be shown; characters that could be the start of a stop string are held back until `close`.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        # Priming with the prompt keeps the space that some tokenizers put between it and the first word.
        self._stream = self._open(prompt_ids)
        self._pending: list[int] = []  # tokens whose characters are not complete yet
        self._decoded = ""
        self._stop = tuple(stop)
        self._hold = max((len(string) for string in stop), default=1) - 1
        self._stopped = False

    @property
    def text(self) -> str:
        """The text that may be shown so far."""
        return self._decoded[: max(len(self._decoded) - self._hold, 0)]

    def push(self, token: int, may_stop: bool = True) -> bool:
        """Add a token; True if it completed a stop string, which ends the text before it if it `may_stop`."""
        self._pending.append(token)
        piece = self._step(token)
        if piece:
            self._pending.clear()
            self._append(piece, may_stop)
        return self._stopped

    def close(self) -> None:
        """No more tokens: show what was held back, and a cut character as the replacement character."""
        if self._pending and not self._stopped:
            self._append(self._tokenizer.decode(self._pending), may_stop=True)
        self._hold = 0

    def _append(self, piece: str, may_stop: bool) -> None:
        """Search stop strings only where the new characters can have completed one; the earliest wins."""
        old = len(self._decoded)
        self._decoded += piece
        if not may_stop:
            return
        found = [(self._decoded.find(string, max(old - len(string) + 1, 0)), len(string)) for string in self._stop]
        starts = [(start + length, start) for start, length in found if start >= 0]
        if starts:
            self._decoded = self._decoded[: min(starts)[1]]
            self._stopped = True
            self._hold = 0

    def _open(self, ids: Sequence[int]) -> Any:
        from tokenizers.decoders import DecodeStream

        return DecodeStream(ids=list(ids), skip_special_tokens=True)

    def _step(self, token: int) -> str | None:
        try:
            piece: str | None = self._stream.step(self._tokenizer.backend, token)
        except Exception as error:
            if "Invalid prefix" not in str(error):
                raise
            # Byte tokens that never form a character can wedge the stream: start anew from this token.
            self._stream = self._open([])
            piece = self._stream.step(self._tokenizer.backend, token)
        return piece


def _eos_ids(checkpoint: Checkpoint, of_tokenizer: int | None) -> frozenset[int]:
    """The ids that end a text: generation_config.json's, maybe a list, else config.json's, else the tokenizer's."""
    file = checkpoint.path / "generation_config.json"
    generation = read_json(file) if file.is_file() else {}
    for source in (generation, checkpoint.config, checkpoint.config.get("text_config") or {}):
        found = source.get("eos_token_id")
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset() if of_tokenizer is None else frozenset([of_tokenizer])
