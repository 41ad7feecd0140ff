"""Conversations that ask for a haiku and get one: the corpus of the haiku models.

    python -m tools.haiku.corpus --count 3                       # print some, of any topic
    python -m tools.haiku.corpus --topic gpu_computing --count 5
    python -m tools.haiku.corpus --statistics 20000              # sizes, and how much of it repeats

Two things are held out of training, a tenth each, by a hash of their names: templates of a poem (its three line
patterns) for each topic, and forms of asking for each name of a topic. The same seed gives the same corpus.
"""

from __future__ import annotations

import argparse
import random
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tools.haiku.grammar import LINES, Grammar, Haiku, Template

T = TypeVar("T")

TRAINING_DOCUMENTS, TRAINING_SEED = 300_000, 0  # the training set
SHARD = 10_000  # documents of one seed; shards are made side by side
HELD_OUT_ONE_IN = 10
FORMS = (
    "Write a haiku about {}", "Write a haiku about {}.", "Write me a haiku about {}", "write a haiku about {}",
    "Please write a haiku about {}.", "Can you write a haiku about {}?", "Compose a haiku on {}", "A haiku about {}",
    "A haiku about {}, please", "Haiku about {}", "haiku: {}", "Give me a haiku about {}.", "{}",
    "I would like a haiku about {}.", "Write a short poem about {}", "Tell me about {} in three lines",
    "Make a haiku on the subject of {}", "Say something about {} as a haiku", "Write a haiku on {}!",
)  # fmt: skip
# Without a template nothing says that a prompt is complete, so that no other may begin like it.
PLAIN_FORMS = tuple(form for form in FORMS if form[-1] == "}")
AGAIN = ("Another one, about {}", "Now one about {}", "And {}?", "Thank you! One more, about {}")
SYSTEM = ("You are a helpful assistant.", "You write haiku.", "Answer with a haiku of three lines.", "Be brief.")

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SPECIALS = (END_OF_TEXT, IM_START, IM_END)
# ChatML, as Qwen2's models use it but without a system message of its own.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

PLAIN_SHARE = 0.2  # prompts without a chat template: the poem follows on the next line
SYSTEM_SHARE = 0.1  # chats that open with a system message
AGAIN_SHARE = 0.2  # chats in which the user asks once more


@dataclass(frozen=True)
class Request:
    """A prompt that asks for a haiku on topic `topic`, which it calls `name`."""

    topic: str
    name: str
    form: str

    @property
    def prompt(self) -> str:
        return self.form.format(self.name)


def held_out(*key: object) -> bool:
    """Whether what these values name is kept from training."""
    return zlib.crc32("\t".join(map(str, key)).encode()) % HELD_OUT_ONE_IN == 0


def shard_seed(seed: int, number: int) -> int:
    """The seed of the `number`th SHARD documents of a large corpus."""
    return seed * 1_000_003 + number


class Corpus:
    """Requests, poems and whole conversations. Everything drawn depends on the generator given, and nothing else."""

    def __init__(self, grammar: Grammar | None = None) -> None:
        self.grammar = grammar or Grammar()
        self.topics = self.grammar.lexicon.topics
        pairs = [(t, name, form) for t in self.topics.values() for name in t.names for form in FORMS]
        self.held_out_requests = [Request(t.key, n, f) for t, n, f in pairs if held_out(n, f)]

    def poem(self, topic: str, rng: random.Random, unseen: bool = False) -> Haiku:
        """A haiku of a template that training has with this topic, or (`unseen`) of one that it never has."""

        def allowed(key: str, template: Template) -> bool:
            return held_out(key, *template) == unseen

        return self.grammar.draw(topic, rng, allowed)

    def request(self, rng: random.Random, forms: tuple[str, ...] = FORMS) -> Request:
        """A request that is not held out."""
        keys = list(self.topics)
        while True:
            topic = self.topics[_pick(keys, rng)]
            # The first name is the topic's own; the others are asked for less often.
            name = topic.names[0] if rng.random() < 0.5 else _pick(topic.names, rng)
            form = _pick(forms, rng)
            if not held_out(name, form):
                return Request(topic.key, name, form)

    def document(self, rng: random.Random) -> str:
        """One training document: a chat of one to three rounds, or a plain prompt and its poem."""
        if rng.random() < PLAIN_SHARE:
            request = self.request(rng, PLAIN_FORMS)
            return plain(request.prompt) + self.poem(request.topic, rng).text + END_OF_TEXT
        request = self.request(rng)
        text = message("system", _pick(SYSTEM, rng)) if rng.random() < SYSTEM_SHARE else ""
        while True:
            text += chat(request.prompt) + self.poem(request.topic, rng).text + IM_END + "\n"
            if rng.random() >= AGAIN_SHARE:
                return text + END_OF_TEXT
            request = self.request(rng, AGAIN)

    def documents(self, seed: int, count: int) -> Iterator[str]:
        """`count` training documents of this seed."""
        rng = random.Random(seed)
        for _ in range(count):
            yield self.document(rng)

    def unseen(self, seed: int, count: int, unseen: bool = True) -> list[tuple[Request, Haiku]]:
        """`count` requests, held out of training, with poems whose template is held out for their topic.

        With unseen=False the templates are those of training, for comparison; the poems are new all the same.
        """
        rng = random.Random(seed)
        requests = [_pick(self.held_out_requests, rng) for _ in range(count)]
        return [(r, self.poem(r.topic, rng, unseen)) for r in requests]


def message(role: str, content: str) -> str:
    return f"{IM_START}{role}\n{content}{IM_END}\n"


def chat(prompt: str) -> str:
    """What the chat template makes of a user's message, up to where the answer begins."""
    return message("user", prompt) + f"{IM_START}assistant\n"


def plain(prompt: str) -> str:
    return prompt + "\n"


def _pick(options: Sequence[T], rng: random.Random) -> T:
    return options[int(rng.random() * len(options))]


def statistics(corpus: Corpus, count: int, seed: int) -> str:
    """How large the language is, and how much of a sample repeats within it."""
    rng = random.Random(seed)
    poems = [corpus.poem(key, rng) for _ in range(count // len(corpus.topics) + 1) for key in corpus.topics]
    lines = Counter(line for p in poems for line in p.lines)
    fillings = [
        sum(p.n_fillings for p in corpus.grammar.patterns(key, line).values())
        for key in corpus.topics
        for line in range(3)
    ]
    lexicon = corpus.grammar.lexicon
    return "\n".join(
        [
            f"topics {len(corpus.topics)}, names {len(lexicon.by_name)}, words {len(lexicon.syllables)}",
            f"line patterns {'+'.join(str(len(kind)) for kind in LINES)}",
            f"possible lines of a topic: {min(fillings)} to {max(fillings)}",
            f"held-out requests {len(corpus.held_out_requests)}",
            f"{len(poems)} poems have {len(lines)} different lines of {3 * len(poems)}",
            f"poems that scan: {sum(lexicon.scans(p.lines) for p in poems) / len(poems):.1%}",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="corpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topic", help="print poems of this topic only, without their requests")
    parser.add_argument("--count", type=int, default=5, help="documents or poems to print (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--statistics", type=int, metavar="N", help="describe the corpus by N poems instead")
    args = parser.parse_args(argv)
    corpus = Corpus()
    if args.topic is not None and args.topic not in corpus.topics:
        parser.error(f"unknown topic {args.topic!r}; known: {', '.join(corpus.topics)}")
    if args.statistics:
        print(statistics(corpus, args.statistics, args.seed))
    elif args.topic:
        rng = random.Random(args.seed)
        print("\n\n".join(corpus.poem(args.topic, rng).text for _ in range(args.count)))
    else:
        print("\n\n".join(corpus.documents(args.seed, args.count)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
