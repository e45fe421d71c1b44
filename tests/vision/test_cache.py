"""The byte-bounded cache."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chiasm.cache import ByteLRU


def test_drops_what_was_unused_for_longest() -> None:
    cache: ByteLRU[str] = ByteLRU(10)
    assert cache.put("a", "A", 4)
    assert cache.put("b", "B", 4)
    assert cache.get("a") == "A"
    assert cache.put("c", "C", 4)
    assert "b" not in cache
    assert (cache.get("a"), cache.get("c"), cache.get("b")) == ("A", "C", None)
    assert cache.num_bytes == 8


def test_what_exceeds_the_budget_is_not_kept() -> None:
    cache: ByteLRU[str] = ByteLRU(10)
    cache.put("a", "A", 10)
    assert not cache.put("b", "B", 11)
    assert cache.get("a") == "A"
    cache.put("a", "A2", 3)
    assert (cache.get("a"), cache.num_bytes, len(cache)) == ("A2", 3, 1)
    cache.discard("a")
    cache.discard("a")
    assert cache.num_bytes == 0


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 12))))
def test_never_exceeds_its_budget(puts: list[tuple[str, int]]) -> None:
    cache: ByteLRU[int] = ByteLRU(10)
    sizes: dict[str, int] = {}
    for key, num_bytes in puts:
        cache.put(key, num_bytes, num_bytes)
        sizes[key] = num_bytes
        assert cache.num_bytes == sum(sizes[k] for k in "abcdef" if k in cache)
        assert cache.num_bytes <= 10
        assert (key in cache) == (num_bytes <= 10)
