"""Small vocabularies for tests, as GGUF files: byte-level BPE and SentencePiece, with the faults that a test wants."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refengine.gguf.file import GGUFFile
from refengine.tokenizer.byte_level import BYTE_TO_CHAR
from tests.gguf_builder import BOOL, F32, I32, STRING, U32, GGUFBuilder

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BYTE_CHARS = [BYTE_TO_CHAR[byte] for byte in range(256)]  # ids 0..255 of every small BPE vocabulary
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]  # ids 3..258 of every small SentencePiece vocabulary


def write_vocabulary(
    path: Path,
    model: str | None,
    tokens: Sequence[str],
    types: Sequence[int] | None = None,
    *,
    scores: Sequence[float] | None = None,
    merges: Sequence[str] | None = None,
    pre: str | None = None,
    name: str = "test",
    ids: Mapping[str, int] | None = None,
    flags: Mapping[str, bool] | None = None,
    chat_template: str | None = None,
) -> Path:
    """A GGUF file with these `tokenizer.ggml.*` keys; what is None is left out. `ids`: `eos_token_id` and the like."""
    builder = GGUFBuilder().pair("general.architecture", STRING, "llama").pair("general.name", STRING, name)
    key = "tokenizer.ggml."
    texts: dict[str, Any] = {key + "model": model, key + "pre": pre, "tokenizer.chat_template": chat_template}
    for text_key, text in texts.items():
        if text is not None:
            builder.pair(text_key, STRING, text)
    builder.array(key + "tokens", STRING, tokens)
    if types is not None:
        builder.array(key + "token_type", I32, types)
    if scores is not None:
        builder.array(key + "scores", F32, scores)
    if merges is not None:
        builder.array(key + "merges", STRING, merges)
    for id_key, token_id in (ids or {}).items():
        builder.pair(key + id_key, U32, token_id)
    for flag_key, flag in (flags or {}).items():
        builder.pair(key + flag_key, BOOL, flag)
    return builder.write(path)


def bpe_file(
    path: Path,
    merges: Sequence[str] = (),
    special: Mapping[str, int] | None = None,
    *,
    pre: str | None = "gpt-2",
    **more: Any,
) -> GGUFFile:
    """Byte-level BPE: 256 bytes, then what the merges make, in order, then `special` texts with their types."""
    made = [merge.replace(" ", "") for merge in merges]
    tokens = [*BYTE_CHARS, *made, *(special or {})]
    types = [NORMAL] * (256 + len(made)) + list((special or {}).values())
    return GGUFFile(write_vocabulary(path, "gpt2", tokens, types, merges=merges, pre=pre, **more))


def spm_file(
    path: Path, pieces: Mapping[str, float], special: Mapping[str, int] | None = None, **more: Any
) -> GGUFFile:
    """SentencePiece: <unk>, <s>, </s>, 256 bytes, `pieces` with their scores, then `special` texts with their types."""
    tokens = ["<unk>", "<s>", "</s>", *BYTE_TOKENS, *pieces, *(special or {})]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces) + list((special or {}).values())
    scores = [0.0] * 259 + list(pieces.values()) + [0.0] * len(special or {})
    return GGUFFile(write_vocabulary(path, "llama", tokens, types, scores=scores, **more))
