"""Haiku of five, seven and five syllables, from a lexicon and a list of line patterns.

The lexicon is in `lexicon/*.toml`, one table a topic, every field a list of phrases separated by commas:

    names       what a request may call the topic: "Write a haiku about ..."
    singular    countable nouns, without article          plural      plural nouns, without article
    mass        nouns that take no article                adjectives  that fit the topic's nouns
    verbs       base/-s/-ing of intransitive verbs        places      prepositional phrases: "under the heat sink"
    acts        the same with an object or a complement: "wait/waits/waiting at the barrier"

`lexicon/shared.toml` has what fits any topic, `lexicon/syllables.toml` the syllables of every word. A line pattern is
words and slots; for every topic, pattern and length the fillings are counted, and one is drawn with equal chances.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TypeAlias

LEXICON = Path(__file__).parent / "lexicon"
SYLLABLES = (5, 7, 5)

# Slots: S, P, M nouns (singular, plural, mass); A adjective; Vs, Vp, Vg verb (-s, base, -ing); Cs, Cp, Cg act;
# L place; T time; H person; D what a person does to a noun; G their gesture; O onlooker; K its mood; E "S after S".
# "a" becomes "an" before a vowel.
OPENINGS = (
    "the [A] [S]", "a [A] [S]", "[A] [P]", "[A], [A] [P]", "[A] [M]", "the [A] [A] [S]", "[T], the [S]", "[T], [P]",
    "[T] — [M]", "[L], [M]", "[P] [L]", "the [S] [Vs]", "a [S] [Vs]", "[P] [Vp] [T]", "how [A] the [S]",
    "how [A] the [P]", "so many [P]", "only the [S]", "nothing but [M]", "[P] and [P]", "[M] and [M]", "[Vg], the [S]",
    "still [Vg], the [P]", "another [S]", "[H] and the [S]", "listen — [P] [Vp]", "look — the [S] [Vs]",
    "[P], [P], [P]", "this [S], this [M]", "not one [S] [Vs]", "my [A] [S]",
)  # fmt: skip
MIDDLES = (
    "the [S] [Vs] [L]", "[P] [Vp] [L]", "a [A] [S] [Vs] [L]", "[A] [P] [Vp] [L]", "the [P] [Cp]", "a [S] [Cs]",
    "[M] [Cs]", "the [A] [P] [Cp]", "[T], the [P] [Vp]", "[T], a [S] [Cs]", "[H] [D] the [S]", "[H] [D] the [A] [P]",
    "[H] [D] [M]", "where the [P] [Vp], a [S] [Vs]", "the [S] [Vs], the [S] [Vs]", "[P] [Vp] and [P] [Vp]",
    "now I [Cp]", "[Vg] [L], the [S]", "[Cg] [T]", "no [S], only [M]", "as if the [P] could [Vp]",
    "until the last [S] [Vs]", "who taught the [P] to [Vp]", "[P] [L], [M]", "each [S] [Cs]", "[A] [M] [L]",
    "one [S] [Cs]", "[H] [G], and the [P] [Vp]", "between the [P] and the [P]", "you [Cp] [T]",
    "[M], and then more [M]", "without the [S], no [M]", "[E], [A] [P]", "[E], and then [M]",
)  # fmt: skip
CLOSINGS = (
    "the [S] [Vs]", "then only [M]", "[T], [M]", "and the [S] [Vs]", "a [S], then [M]", "[Vg] [T]", "[M] [L]",
    "[Vg] [L]", "still the [S] [Vs]", "the [A] [M]", "[M] to [M]", "I [Vp], and you [Vp]", "one more [S] [Vs]",
    "all the [P] [Vp]", "and [H] [G]", "and [O] [K]", "[O] [K] [T]", "the last [S] [Vs]", "[A] [M]", "no more [P] now",
    "the [P] [Vp] [T]", "and [M] again", "[M] [Vs] [T]", "a [S] [Vs] [T]", "we [Vp], and [Vp]", "the [S] and I",
)  # fmt: skip
LINES = (OPENINGS, MIDDLES, CLOSINGS)

FIELDS = ("names", "singular", "plural", "mass", "verbs", "acts", "adjectives", "places")
# May occur more than once in a poem.
FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an the and or of in on at to by for from with without under over into onto across along between beside "
        "behind before after through around against upon above below near past inside beneath beyond out up down "
        "as is are no not one two three all each every my your our its his her this that these those i you we it so "
        "how who what where when if could until then only but nothing more again still even too now once",
    )
)
CONSONANT_VOWELS = ("one", "uni", "use", "usu", "eu")  # begin with a vowel letter, sound like a consonant
MIN_FILLINGS, FULL_WEIGHT = 3, 1000  # a pattern that a topic can fill in few ways is left out, or drawn more seldom
Template: TypeAlias = tuple[int, int, int]  # the numbers of the patterns of the three lines
OWN_WEIGHT = 3  # a topic's own adjectives against the shared ones


@dataclass(frozen=True)
class Topic:
    """One topic. `slots` maps a slot to its phrases by number of syllables; `nouns` are those a poem must name."""

    key: str
    names: tuple[str, ...]
    nouns: frozenset[str]
    slots: dict[str, dict[int, tuple[str, ...]]] = field(repr=False)


@dataclass(frozen=True)
class Haiku:
    """A poem: its topic's key, the numbers of its three line patterns, and its lines."""

    topic: str
    template: Template
    lines: tuple[str, str, str]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


class Lexicon:
    """All topics, and the syllables of every word. Raises ValueError naming the words that have no count."""

    def __init__(self, folder: Path = LEXICON) -> None:
        counted = tomllib.loads((folder / "syllables.toml").read_text("utf-8"))
        self.syllables = {word: int(n) for n, line in counted["syllables"].items() for word in line.split()}
        shared = tomllib.loads((folder / "shared.toml").read_text("utf-8"))["shared"]
        tables: dict[str, dict[str, str]] = {}
        for path in sorted(folder.glob("*.toml")):
            if path.stem not in ("shared", "syllables"):
                more = tomllib.loads(path.read_text("utf-8"))
                if twice := tables.keys() & more.keys():
                    raise ValueError(f"{path}: topic {min(twice)!r} is in another file too")
                tables |= more
        unknown = {w for table in (shared, *tables.values()) for w in words(" ".join(table.values()))}
        unknown -= self.syllables.keys()
        if unknown:
            raise ValueError(f"no syllable count in {folder / 'syllables.toml'} for: {' '.join(sorted(unknown))}")
        self.topics = {key: self._topic(key, table, shared) for key, table in tables.items()}
        self.by_name = {name.lower(): topic for topic in self.topics.values() for name in topic.names}
        if len(self.by_name) < sum(len(topic.names) for topic in self.topics.values()):
            raise ValueError("two topics have a name in common")

    def count(self, text: str) -> int | None:
        """Syllables of a text, or None if it has a word that the lexicon does not know."""
        counts = [self.syllables.get(word) for word in words(text)]
        return None if None in counts else sum(n for n in counts if n is not None)

    def scans(self, lines: list[str] | tuple[str, ...]) -> bool:
        """Whether these are three lines of five, seven and five syllables."""
        return tuple(map(self.count, lines)) == SYLLABLES

    def touches(self, topic: Topic, text: str) -> bool:
        """Whether the text has a noun of the topic, whole and as the lexicon writes it."""
        spoken = f" {' '.join(words(text))} "
        return any(f" {noun} " in spoken for noun in topic.nouns)

    def _topic(self, key: str, table: dict[str, str], shared: dict[str, str]) -> Topic:
        missing = [f for f in FIELDS if not table.get(f)]
        if missing:
            raise ValueError(f"topic {key!r} lacks {', '.join(missing)}")
        own = {name: phrases(table[name]) for name in FIELDS}
        verbs, acts = (list(zip(*map(forms, own[name]), strict=True)) for name in ("verbs", "acts"))
        nouns = [*own["singular"], *own["plural"], *own["mass"]]
        slots = {
            "S": own["singular"],
            "P": own["plural"],
            "M": own["mass"],
            "E": tuple(f"{s} after {s}" for s in own["singular"]),
            "A": own["adjectives"] * OWN_WEIGHT + phrases(shared["adjectives"]),
            "Vp": verbs[0],
            "Vs": verbs[1],
            "Vg": verbs[2],
            "Cp": acts[0],
            "Cs": acts[1],
            "Cg": acts[2],
            "L": own["places"],
            "T": phrases(shared["times"]),
            "H": phrases(shared["people"]),
            "D": phrases(shared["deeds"]),
            "G": phrases(shared["gestures"]),
            "O": phrases(shared["onlookers"]),
            "K": phrases(shared["moods"]),
        }
        by_length = {slot: self._by_syllables(found) for slot, found in slots.items()}
        return Topic(key, own["names"], frozenset(" ".join(words(n)) for n in nouns), by_length)

    def _by_syllables(self, found: tuple[str, ...]) -> dict[int, tuple[str, ...]]:
        grouped: dict[int, list[str]] = {}
        for phrase in found:
            grouped.setdefault(self.count(phrase) or 0, []).append(phrase)
        return {n: tuple(group) for n, group in sorted(grouped.items())}


def words(text: str) -> list[str]:
    """Words of a text in lower case; hyphens and slashes part them."""
    return re.findall(r"[a-zé']+", text.lower())


def phrases(text: str) -> tuple[str, ...]:
    """The phrases of a field, which commas separate."""
    return tuple(" ".join(phrase.split()) for phrase in text.split(","))


def forms(verb: str) -> tuple[str, str, str]:
    """`wait/waits/waiting at the gate` → ("wait at the gate", "waits at the gate", "waiting at the gate")."""
    base, s_form, rest = verb.split("/")
    ing_form, _, complement = rest.partition(" ")
    if len(base.split()) > 1:  # a verb of two words is written out in every form
        return base, s_form, rest
    tail = f" {complement}" if complement else ""
    return base + tail, s_form + tail, ing_form + tail


class Pattern:
    """A line pattern for one topic and one number of syllables, ready to draw lines from."""

    def __init__(self, pattern: str, lexicon: Lexicon, topic: Topic, n_syllables: int) -> None:
        # Phrases by syllables, for every part; words of the pattern itself are a part with one choice.
        self.parts: list[dict[int, tuple[str, ...]]] = [
            topic.slots[slot] if slot else {lexicon.count(literal) or 0: (literal,)}
            for literal, slot in re.findall(r"([^\[]+)|\[(\w+)\]", pattern)
        ]
        # ways[i][n]: in how many ways the parts from i on make n syllables.
        self.ways: list[list[int]] = [[1] + [0] * n_syllables]
        for part in reversed(self.parts):
            after = self.ways[0]
            row = [sum(len(p) * after[n - m] for m, p in part.items() if m <= n) for n in range(n_syllables + 1)]
            self.ways.insert(0, row)
        self.n_syllables = n_syllables
        self.n_fillings = self.ways[0][n_syllables]

    def draw(self, rng: random.Random) -> str:
        """A line; every filling has the same chance."""
        text, left = "", self.n_syllables
        for i, part in enumerate(self.parts):
            pick = int(rng.random() * self.ways[i][left])
            for n, found in part.items():
                share = len(found) * self.ways[i + 1][left - n] if n <= left else 0
                if pick < share:
                    text, left = text + found[pick % len(found)], left - n
                    break
                pick -= share
        return with_articles(text)


def with_articles(line: str) -> str:
    """`a` before a vowel becomes `an`."""

    def article(match: re.Match[str]) -> str:
        return match[0] if match[2].startswith(CONSONANT_VOWELS) else f"{match[1]}n {match[2]}"

    return re.sub(r"\b(a) ([aeiou]\w*)", article, line)


class Grammar:
    """Draws haiku. The same lexicon, topic and state of the generator give the same poem."""

    def __init__(self, lexicon: Lexicon | None = None) -> None:
        self.lexicon = lexicon or Lexicon()

    @cache  # noqa: B019 - there is one grammar, and it lives as long as the process
    def patterns(self, key: str, line: int) -> dict[int, Pattern]:
        """The patterns of line 0, 1 or 2 that this topic can fill, by their number in LINES."""
        topic = self.lexicon.topics[key]
        made = {i: Pattern(p, self.lexicon, topic, SYLLABLES[line]) for i, p in enumerate(LINES[line])}
        return {i: pattern for i, pattern in made.items() if pattern.n_fillings >= MIN_FILLINGS}

    def draw(self, key: str, rng: random.Random, allowed: Callable[[str, Template], bool] | None = None) -> Haiku:
        """A haiku on topic `key`, of a template that `allowed(key, template)` accepts (any, if None).

        It names a noun of its topic and uses no content word twice, except where a pattern does ("wave after wave").
        """
        topic = self.lexicon.topics[key]
        choices = [self.patterns(key, line) for line in range(3)]
        weighted = [(list(c), [min(p.n_fillings, FULL_WEIGHT) for p in c.values()]) for c in choices]
        while True:
            first, second, third = (_weighted(numbers, weights, rng) for numbers, weights in weighted)
            template = (first, second, third)
            if allowed is not None and not allowed(key, template):
                continue
            lines = tuple(c[i].draw(rng) for c, i in zip(choices, template, strict=True))
            poem = Haiku(key, template, (lines[0], lines[1], lines[2]))
            if self.lexicon.touches(topic, poem.text) and not repeats(poem.lines):
                return poem


def _weighted(options: list[int], weights: list[int], rng: random.Random) -> int:
    pick = int(rng.random() * sum(weights))
    for option, weight in zip(options, weights, strict=True):
        if pick < weight:
            return option
        pick -= weight
    raise AssertionError("the weights add up")


def repeats(lines: Iterable[str]) -> bool:
    """Whether a content word occurs twice, plural and singular being the same word."""
    seen: set[str] = set()
    for line in lines:
        content = [stem(w) for w in words(re.sub(r"(.+) after \1", r"\1", line)) if w not in FUNCTION_WORDS]
        if len(set(content)) < len(content) or seen.intersection(content):
            return True
        seen.update(content)
    return False


def stem(word: str) -> str:
    """The word without an ending of inflection, roughly."""
    for ending in ("ing", "es", "s"):
        if word.endswith(ending) and len(word) > len(ending) + 2:
            return word[: -len(ending)].removesuffix("e")
    return word.removesuffix("e")
