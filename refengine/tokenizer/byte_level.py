"""How tokens spell bytes, independent of any vocabulary.

Byte-level BPE writes each byte as one printable character (GPT-2's `bytes_to_unicode`): printable Latin-1 bytes stand
for themselves; the other 68 are, in order, U+0100 and up. SentencePiece writes text unchanged except for spaces, and
has a token for each byte, used for text that no other token covers.
"""

from __future__ import annotations

from collections.abc import Mapping

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]

BYTE_TO_CHAR: dict[int, str] = {
    **{byte: chr(byte) for byte in _PRINTABLE},
    **{byte: chr(0x100 + n) for n, byte in enumerate(_OTHERS)},
}
CHAR_TO_BYTE: dict[str, int] = {char: byte for byte, char in BYTE_TO_CHAR.items()}

SPACE = "\u2581"  # SentencePiece's visible space
BYTE_FALLBACK: dict[str, int] = {f"<0x{byte:02X}>": byte for byte in range(256)}  # SentencePiece's byte tokens


def byte_level_to_bytes(text: str) -> bytes:
    """The bytes that a byte-level token stands for.

    A text with characters outside the alphabet is not a byte-level token (but an added token of type normal): its
    bytes are its UTF-8.
    """
    try:
        return bytes([CHAR_TO_BYTE[char] for char in text])
    except KeyError:
        return text.encode()


def sentencepiece_to_bytes(text: str, byte_tokens: Mapping[str, int] = BYTE_FALLBACK) -> bytes:
    """The bytes that a SentencePiece token stands for. `byte_tokens`: the byte tokens of this vocabulary."""
    if text in byte_tokens:
        return bytes([byte_tokens[text]])
    return text.replace(SPACE, " ").encode()
