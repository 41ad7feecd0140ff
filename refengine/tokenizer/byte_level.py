"""The byte alphabet of byte-level BPE: each byte as one printable character (GPT-2's `bytes_to_unicode`).

Printable Latin-1 bytes stand for themselves; the other 68 are, in order, U+0100 and up. Knows no vocabulary.
"""

from __future__ import annotations

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]

BYTE_TO_CHAR: dict[int, str] = {
    **{byte: chr(byte) for byte in _PRINTABLE},
    **{byte: chr(0x100 + n) for n, byte in enumerate(_OTHERS)},
}
CHAR_TO_BYTE: dict[str, int] = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def token_to_bytes(text: str) -> bytes:
    """The bytes that a byte-level token stands for.

    A text with characters outside the alphabet is no byte-level token (an added token typed as a normal one): its
    bytes are its own UTF-8.
    """
    try:
        return bytes([CHAR_TO_BYTE[char] for char in text])
    except KeyError:
        return text.encode()
