"""Writes SentencePiece's model file, with only the fields that a BPE model with byte fallback needs.

The `sentencepiece` library loads a serialised protocol buffer (`sentencepiece_model.proto`). Its own Python classes for
that need the `protobuf` package; writing the few fields used here is simpler than that dependency:
a field is a varint `number << 3 | wire type`, then a varint (type 0), four bytes (type 5), or a length and that many
bytes (type 2).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

# Field numbers in sentencepiece_model.proto.
_MODEL_PIECES, _MODEL_TRAINER_SPEC, _MODEL_NORMALIZER_SPEC = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 1, 2, 3
_TRAINER_MODEL_TYPE, _TRAINER_VOCAB_SIZE, _TRAINER_BYTE_FALLBACK, _TRAINER_UNK_ID = 3, 4, 35, 40
_NORMALIZER_NAME, _NORMALIZER_DUMMY_PREFIX, _NORMALIZER_REMOVE_SPACES, _NORMALIZER_ESCAPE_SPACES = 1, 3, 4, 5
_MODEL_TYPE_BPE = 2


def build_model_proto(
    pieces: Sequence[str], scores: Sequence[float], types: Sequence[int], *, unk_id: int, byte_fallback: bool
) -> bytes:
    """A serialised ModelProto of a BPE model whose only normalisation replaces each space by U+2581.

    `types`: SentencePiece's types (1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte), which GGUF uses
    too. Exactly one piece must be unknown.
    """
    encoded = [
        _message(
            _MODEL_PIECES,
            _text(_PIECE_TEXT, piece),
            _tag(_PIECE_SCORE, 5) + struct.pack("<f", score),
            _int(_PIECE_TYPE, kind),
        )
        for piece, score, kind in zip(pieces, scores, types, strict=True)
    ]
    trainer_spec = _message(
        _MODEL_TRAINER_SPEC,
        _int(_TRAINER_MODEL_TYPE, _MODEL_TYPE_BPE),
        _int(_TRAINER_VOCAB_SIZE, len(pieces)),
        _int(_TRAINER_BYTE_FALLBACK, byte_fallback),
        _int(_TRAINER_UNK_ID, unk_id),
    )
    normalizer_spec = _message(
        _MODEL_NORMALIZER_SPEC,
        _text(_NORMALIZER_NAME, "identity"),
        _int(_NORMALIZER_DUMMY_PREFIX, False),
        _int(_NORMALIZER_REMOVE_SPACES, False),
        _int(_NORMALIZER_ESCAPE_SPACES, True),
    )
    return b"".join([*encoded, trainer_spec, normalizer_spec])


def _varint(value: int) -> bytes:
    digits = bytearray()
    rest = value
    while rest > 0x7F:
        digits.append(0x80 | (rest & 0x7F))
        rest >>= 7
    digits.append(rest)
    return bytes(digits)


def _tag(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _int(field: int, value: int) -> bytes:
    return _tag(field, 0) + _varint(int(value))


def _text(field: int, value: str) -> bytes:
    encoded = value.encode()
    return _tag(field, 2) + _varint(len(encoded)) + encoded


def _message(field: int, *fields: bytes) -> bytes:
    body = b"".join(fields)
    return _tag(field, 2) + _varint(len(body)) + body
