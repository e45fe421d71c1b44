"""Stop strings against an offline search, for every way to cut the text."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from chiasm.services.gateway.stops import StopStrings

TEXTS = st.text(alphabet="abc", max_size=40)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=6), max_size=4)


def offline(text: str, stops: list[str], num_exempt: int) -> tuple[int, int] | None:
    """Start and end of the stop string that is complete first, the longest of several."""
    for end in range(num_exempt + 1, len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return min(starts), end
    return None


@st.composite
def pieces(draw: st.DrawFn) -> list[str]:
    text = draw(TEXTS)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=len(text))))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@given(pieces(), STOPS, st.booleans(), st.integers(0, 5))
@example(["a", "a", "b"], ["ab"], False, 0)
@example(["aab", "c"], ["abc", "b"], False, 1)
def test_pieces_give_what_the_whole_gives(
    cut: list[str], stops: list[str], include: bool, num_exempt_pieces: int
) -> None:
    text = "".join(cut)
    num_exempt = len("".join(cut[:num_exempt_pieces]))
    place = offline(text, stops, num_exempt)
    expected = text if place is None else text[: place[1] if include else place[0]]
    strings, shown, stop = StopStrings(stops, include=include), "", None
    for i, piece in enumerate(cut):
        passed = strings.push(piece, is_exempt=i < num_exempt_pieces)
        shown, stop = shown + passed.text, passed.stop
        # Whatever comes next, nothing shown has to be taken back.
        assert expected.startswith(shown)
        if stop is not None:
            break
    if stop is None:
        shown += strings.flush()
    assert shown == expected
    assert stop == (None if place is None else text[slice(*place)])


@given(pieces(), STOPS)
def test_only_what_may_become_a_stop_string_is_held_back(cut: list[str], stops: list[str]) -> None:
    strings, seen, shown = StopStrings(stops), "", ""
    for piece in cut:
        passed = strings.push(piece)
        seen, shown = seen + piece, shown + passed.text
        if passed.stop is not None:
            return
        held = seen[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)
