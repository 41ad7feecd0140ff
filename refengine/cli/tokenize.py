"""Implements `refengine tokenize`: text to ids, or ids to text."""

from __future__ import annotations

import argparse
import json
import sys

from refengine.cli.console import model_path, parse_ids, write
from refengine.errors import RequestError
from refengine.gguf.file import GGUFFile
from refengine.tokenizer import load_tokenizer


def tokenize(arguments: argparse.Namespace) -> None:
    path = model_path(arguments.model)
    with GGUFFile(path) as gguf:
        tokenizer = load_tokenizer(gguf)
        if tokenizer is None:
            raise RequestError(f"{path} has no vocabulary")
        text = sys.stdin.read() if arguments.text in (None, "-") else arguments.text
        if arguments.decode:
            write(tokenizer.decode(parse_ids(text)) + "\n")
        else:
            ids = tokenizer.encode(text, add_special=arguments.special, parse_special=arguments.parse_special)
            print(json.dumps(ids))
