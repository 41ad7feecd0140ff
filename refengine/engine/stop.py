"""Finds stop strings in streamed text, across token boundaries.

The stop string that completes first in the text matches; if several complete on the same character,
the longest (earliest start) matches. No later character is needed for this decision, so it is made
at once, and the division of the text into tokens cannot change it. The text before the match is
emitted; the match and everything after it are not.

Works on decoded text; the tokenizer's stream decoder provides whole code points.
"""

from collections.abc import Sequence

from refengine.errors import RequestError


class StopMatcher:
    """Passes text through until a stop string completes; holds back only text that may be the start of a stop string.

    Raises RequestError for an empty stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise RequestError(f"stop: given {list(stops)!r}, allowed non-empty strings", "stop")
        self._stops = tuple(stops)
        self._max_held = max((len(stop) for stop in stops), default=1) - 1
        self._held = ""
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string has completed; then nothing more is emitted."""
        return self._stopped

    def push(self, text: str) -> tuple[str, bool]:
        """Add the next piece of text; returns (text to emit now, whether a stop string completed).

        After a stop, every further call returns ("", True).
        """
        if self._stopped:
            return "", True
        if not self._stops:
            return text, False
        pending = self._held + text
        match_start = self._first_match(pending)
        if match_start is not None:
            self._stopped = True
            self._held = ""
            return pending[:match_start], True
        n_emit = len(pending) - self._n_held(pending)
        self._held = pending[n_emit:]
        return pending[:n_emit], False

    def finish(self) -> str:
        """The text that is still held back when the generation ends for another reason; "" after a stop."""
        held = self._held
        self._held = ""
        return held

    def _first_match(self, pending: str) -> int | None:
        """The start of the match that completes first; None if there is no match."""
        # The first occurrence of one string is also the one that ends first.
        starts = [(pending.find(stop), len(stop)) for stop in self._stops]
        ends = [(start + length, start) for start, length in starts if start >= 0]
        return min(ends)[1] if ends else None

    def _n_held(self, pending: str) -> int:
        """Length of the longest suffix of `pending` that begins a stop string."""
        for n_suffix in range(min(self._max_held, len(pending)), 0, -1):
            suffix = pending[-n_suffix:]
            if any(stop.startswith(suffix) for stop in self._stops):
                return n_suffix
        return 0
