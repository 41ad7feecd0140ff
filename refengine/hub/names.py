"""Parses names of models on the hub, `hf:OWNER/REPO[@REVISION][:QUANT or FILE.gguf]`, and finds their files in a repo.

This module does not use the network: `refengine.hub.files` provides the list of files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from refengine.errors import HubError

DEFAULT_QUANT = "Q4_K_M"  # as in llama.cpp
SHOWN_FILES = 40  # how many files of a repo an error lists

_REFERENCE = re.compile(
    r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?(?::(?P<choice>.+))?", re.ASCII | re.DOTALL
)
COMMIT = re.compile(r"[0-9a-f]{40}")
SPLIT_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.ASCII | re.DOTALL)
_QUANT = r"(?:I?Q\d|TQ\d|B?F\d|FP\d|MXFP\d|NVFP\d)"  # the beginning of type names
# Auxiliary files of multimodal models, quantisation, speculative decoding or other models, which cannot run alone.
_NO_MODEL_START = re.compile(r"(?:mtp|lora|adapter|ggml-(?:adapter|lora|vocab)|control[-_]vector)(?![a-z0-9])", re.I)


@dataclass(frozen=True)
class Reference:
    """A parsed name of a model on the hub. text: the name as the user gave it. choice: QUANT or FILE.gguf."""

    text: str
    repo: str
    revision: str | None
    choice: str | None


@dataclass(frozen=True)
class RepoFile:
    """A file of a repo. sha256: None if the hub does not give it."""

    name: str
    size: int | None = None
    sha256: str | None = None


@dataclass
class RepoModel:
    """A model in a repo: one GGUF file, or the files of a split model in order."""

    files: list[RepoFile] = field(default_factory=list)
    n_parts: int = 1

    @property
    def name(self) -> str:
        return self.files[0].name

    @property
    def size(self) -> int:
        return sum(file.size or 0 for file in self.files)


def parse(text: str) -> Reference | None:
    """Parse a name on the hub; None for a path. Raises HubError for a malformed name."""
    if not text.startswith("hf:"):
        return None
    match = _REFERENCE.fullmatch(text)
    if match is None or ".." in f"{match['repo']}/{match['revision']}":
        raise HubError(f"{text[:200]}: write hf:OWNER/REPO[@REVISION][:QUANT or FILE.gguf], such as hf:me/haiku:Q4_K_M")
    return Reference(text, match["repo"], match["revision"], match["choice"])


def choose(reference: Reference, files: Iterable[RepoFile]) -> list[RepoFile]:
    """The file, or the parts, that a name refers to. Raises HubError if there is none or several match."""
    everything = [file for file in files if file.name.lower().endswith(".gguf")]
    models = models_of(file for file in everything if not _is_no_model(file.name))
    choice = reference.choice
    if choice is None:
        found = models if len(models) < 2 else [m for m in models if _has_quant(m.name, DEFAULT_QUANT)]
        if not models:
            raise HubError(f"{reference.text}: this repo has no GGUF model; choose a repo with GGUF files")
        problem = f"there are several models, and not exactly one is {DEFAULT_QUANT}: name one after a colon"
    elif choice.lower().endswith(".gguf"):
        named = models_of(everything)
        found = [m for m in named if any(file.name == choice for file in m.files)]
        found = found or [m for m in named if any(file.name.endswith(f"/{choice}") for file in m.files)]
        problem = f"{'several files have' if found else 'no file has'} this name"
    else:
        found = [m for m in models if _has_quant(m.name, choice)]
        problem = f"{'several models have' if found else 'no model has'} {choice} in the name"
    if len(found) != 1:
        raise HubError(f"{reference.text}: {problem}; there is {_listed(found or models)}")
    (model,) = found
    if len(model.files) != model.n_parts:
        raise HubError(f"{reference.text}: only {len(model.files)} of the {model.n_parts} parts of {model.name} exist")
    return model.files


def models_of(files: Iterable[RepoFile]) -> list[RepoModel]:
    """Group files into models: the parts of a split model belong together."""
    found: dict[str, RepoModel] = {}
    for file in sorted(files, key=lambda file: file.name):
        split = SPLIT_NAME.fullmatch(file.name)
        model = found.setdefault(f"{split['prefix']}-of-{split['count']}" if split else file.name, RepoModel())
        model.files.append(file)
        model.n_parts = int(split["count"]) if split else 1
    return list(found.values())


def _has_quant(name: str, quant: str) -> bool:
    """Whether `quant` is a whole component of the name: `Q4_K` is in `x_q4_k.gguf` but not in `x-Q4_K_M.gguf`."""
    before = "[A-Za-z0-9]" if re.match(_QUANT, quant, re.I) else "[A-Za-z0-9_]"
    return re.search(rf"(?<!{before}){re.escape(quant)}(?![A-Za-z0-9_])", name, re.I) is not None


def _is_no_model(name: str) -> bool:
    base = name.rpartition("/")[2]

    def has(component: str) -> bool:
        return re.search(rf"(?<![a-z0-9]){component}(?![a-z0-9])", base, re.I) is not None

    # Some models have the importance matrix of their quantisation in their names.
    importance = has("imatrix") and re.search(rf"(?<![a-z0-9]){_QUANT}", base, re.I) is None
    return has("mmproj") or importance or _NO_MODEL_START.match(base) is not None


def _listed(models: Sequence[RepoModel]) -> str:
    if not models:
        return "no GGUF model"
    shown = [f"{m.name} ({'' if m.n_parts == 1 else f'{m.n_parts} parts, '}{size_text(m.size)})" for m in models]
    more = f", and {len(shown) - SHOWN_FILES} more" if len(shown) > SHOWN_FILES else ""
    return ", ".join(shown[:SHOWN_FILES]) + more


def size_text(n_bytes: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.2f} {unit}"
    return f"{n_bytes} bytes"
