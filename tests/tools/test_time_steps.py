"""tools/time_steps.py: kernels in place, from a trace of the profiler; the rest needs a GPU."""

import pytest

from tools.time_steps import in_place, main


def event(name: str, start: float, duration: float, grid: int = 1) -> dict[str, object]:
    return {
        "cat": "kernel",
        "name": name,
        "ts": start,
        "dur": duration,
        "args": {"grid": [grid, 1, 1], "block": [32, 1, 1]},
    }


def test_times_in_place_are_from_end_to_end_and_add_up() -> None:
    """Two steps of a, b, b: b begins before a has ended; the second b ends before the first one, and costs nothing."""
    step = [("a", 0.0, 4.0), ("b", 1.0, 5.0), ("b", 2.0, 3.0)]
    events = [event(name, start + offset, duration) for offset in (0.0, 10.0) for name, start, duration in step]
    found = in_place([*reversed(events), {"cat": "cpu_op", "name": "c", "ts": 0.0, "dur": 9.0}], 2)
    times = {group.name: (group.calls, group.total, group.alone) for group in found}
    assert times == {
        "a 1x1x1 of 32x1x1 after the start": (0.5, 2.0, 4.0),
        "a 1x1x1 of 32x1x1 after b": (0.5, 4.0, 4.0),
        "b 1x1x1 of 32x1x1 after a": (1.0, 2.0, 5.0),
        "b 1x1x1 of 32x1x1 after b": (1.0, 0.0, 3.0),
    }
    assert sum(group.total for group in found) == (16.0 - 0.0) / 2
    assert [group.total for group in found] == sorted((group.total for group in found), reverse=True)


def test_help_says_what_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "add up to the step" in capsys.readouterr().out
