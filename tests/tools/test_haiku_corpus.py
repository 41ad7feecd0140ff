"""The corpus of the haiku models: every poem scans, what is held out is not trained on, a seed gives one text."""

import random
import re
import shutil
from pathlib import Path

import pytest

from tools.haiku import grammar
from tools.haiku.corpus import AGAIN, FORMS, Corpus, held_out
from tools.haiku.grammar import LEXICON, LINES, Haiku, Lexicon, forms, repeats, with_articles


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus()


def poems(corpus: Corpus, count: int, unseen: bool = False) -> list[Haiku]:
    rng = random.Random(5)
    return [corpus.poem(topic, rng, unseen) for topic in corpus.topics for _ in range(count)]


def test_lexicon_has_sixty_topics_and_gpu_computing(corpus: Corpus) -> None:
    assert len(corpus.topics) >= 60
    assert corpus.grammar.lexicon.by_name["gpu computing"].key == "gpu_computing"


@pytest.mark.parametrize("unseen", [False, True])
def test_every_poem_scans_and_names_its_topic(corpus: Corpus, unseen: bool) -> None:
    lexicon = corpus.grammar.lexicon
    for poem in poems(corpus, 20, unseen):
        assert lexicon.scans(poem.lines), poem
        assert lexicon.touches(corpus.topics[poem.topic], poem.text), poem
        assert not repeats(poem.lines), poem
        assert not re.search(r"\ba [aeio]|\ban [^aeiou]|\[|  ", poem.text.replace("a one", "")), poem


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("silent GPUs", 5),
        ("the half-forgotten moon", 6),
        ("a thousand xylems", None),  # a word that the lexicon does not have
        ("", 0),
    ],
)
def test_count_adds_the_syllables_of_known_words(corpus: Corpus, text: str, count: int | None) -> None:
    assert corpus.grammar.lexicon.count(text.replace("a thousand", "the moon")) == count


def test_scans_wants_five_seven_five(corpus: Corpus) -> None:
    scans = corpus.grammar.lexicon.scans
    lines = ["my lockstep matrix", "warm bandwidth beside the fan", "silicon runs now"]
    assert scans(lines)
    assert not scans(lines[:2])
    assert not scans([lines[1], lines[0], lines[2]])
    assert not scans([*lines, "now"])


def test_every_line_pattern_serves_most_topics(corpus: Corpus) -> None:
    for line, kind in enumerate(LINES):
        for number in range(len(kind)):
            able = sum(number in corpus.grammar.patterns(key, line) for key in corpus.topics)
            assert able > len(corpus.topics) / 2, kind[number]


def test_draw_takes_every_filling_alike() -> None:
    """A pattern with 2 x 1 + 1 x 3 fillings of three syllables: each comes up as often as the others."""
    lexicon = Lexicon()
    slots = {"A": {1: ("old", "new"), 2: ("silent",)}, "S": {1: ("moon", "wind", "owl"), 2: ("river",)}}
    topic = grammar.Topic("t", ("t",), frozenset(), slots)
    pattern = grammar.Pattern("[A] [S]", lexicon, topic, 3)
    assert pattern.n_fillings == 5
    rng = random.Random(1)
    drawn = [pattern.draw(rng) for _ in range(5000)]
    counts = {line: drawn.count(line) for line in set(drawn)}
    assert set(counts) == {"old river", "new river", "silent moon", "silent wind", "silent owl"}
    # Each count is binomial with mean 1000 and standard deviation 28; five of those either way.
    assert all(860 < n < 1140 for n in counts.values())


def test_documents_depend_on_the_seed_alone(corpus: Corpus) -> None:
    first = list(corpus.documents(3, 50))
    assert list(Corpus().documents(3, 50)) == first
    assert list(corpus.documents(4, 50)) != first


def test_training_has_nothing_that_is_held_out(corpus: Corpus) -> None:
    held_out_prompts = {r.prompt for r in corpus.held_out_requests}
    # A prompt may be held out under one name and also be another form of another name: those count as trained.
    trained = {f.format(n) for t in corpus.topics.values() for n in t.names for f in FORMS if not held_out(n, f)}
    for text in corpus.documents(0, 3000):
        for prompt in re.findall(r"<\|im_start\|>user\n(.*)<\|im_end\|>", text):
            assert prompt not in held_out_prompts - trained or any(
                re.fullmatch(re.escape(form).replace(r"\{\}", ".*"), prompt) for form in AGAIN
            )
    assert all(not held_out(p.topic, *p.template) for p in poems(corpus, 20))
    assert all(held_out(p.topic, *p.template) for p in poems(corpus, 20, unseen=True))
    assert {r.topic for r in corpus.held_out_requests} == set(corpus.topics)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["wave after wave", "the sea", "and the wind"], False),
        (["the moon", "two moons", "x"], True),
        (["waiting, the moon", "the wind waits", "x"], True),
        (["the old moon", "the new wind", "the sea"], False),
    ],
)
def test_repeats_sees_inflected_words(lines: list[str], expected: bool) -> None:
    assert repeats(lines) is expected


def test_forms_share_the_complement() -> None:
    assert forms("wait/waits/waiting at the gate") == ("wait at the gate", "waits at the gate", "waiting at the gate")
    assert forms("cool down/cools down/cooling down") == ("cool down", "cools down", "cooling down")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a owl", "an owl"),
        ("a universe", "a universe"),
        ("look — a old one", "look — an old one"),
        ("sea oak", "sea oak"),
    ],
)
def test_with_articles_agrees_with_the_sound(line: str, expected: str) -> None:
    assert with_articles(line) == expected


def test_lexicon_names_words_without_a_count(tmp_path: Path) -> None:
    shutil.copytree(LEXICON, tmp_path / "lexicon")
    path = tmp_path / "lexicon" / "computing.toml"
    path.write_text(path.read_text("utf-8").replace("silicon", "zyzzyva"), "utf-8")
    with pytest.raises(ValueError, match="zyzzyva"):
        Lexicon(tmp_path / "lexicon")
