"""The check of the books finds whatever is wrong with them, and nothing else, even while they change."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import pytest
from flushing import flush
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_faces import OneRouter, ints, new_manager
from pool_driver import PoolDriver

from memory_service import integrity
from memory_service.integrity import check_integrity, integrity_parts, key_parts
from memory_service.prefix_index import INDEXED

if TYPE_CHECKING:
    from collections.abc import Callable

    from memory_service.block_manager import BlockManager

RED_CACHED = [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]


def books() -> BlockManager:
    """A pool with free, cached, shared, pinned and retained blocks."""
    manager = new_manager(30, min_partial_tokens=2)
    router = OneRouter(manager)
    router.cache(RED_CACHED, tenant="red")
    router.cache([1, 1, 1, 1, 5, 5, 5, 5], tenant="red")
    router.run(0, [7] * 9, tenant="blue")
    router.run(1, [7] * 9, tenant="blue")
    router.admit(2, [7] * 6 + [8] * 9, tenant="blue")
    manager.sharing.set_quota("blue", 5, 20)
    manager.sharing.retain_prefix("red", ints([1] * 4), 3, None)
    assert check_integrity(manager) == []
    assert manager.pool.pins.any()
    return manager


def cached(manager: BlockManager) -> list[int]:
    return list(manager.pool.cached_blocks())


def set_in(values: Any, where: int, change: int) -> None:
    values[where] += change


TAMPERINGS: dict[str, Callable[[BlockManager], Any]] = {
    "a reference too many": lambda m: set_in(m.pool.ref_counts, int(m.table(1).entries[0, 0]), 1),
    "a reference too few": lambda m: set_in(m.pool.ref_counts, int(m.table(1).entries[0, 0]), -1),
    "a pin too many": lambda m: set_in(m.pool.pins, int(m.table(1).entries[0, 0]), 1),
    "a pin forgotten": lambda m: m.pool.pins.fill(0),
    "a table entry": lambda m: set_in(m.table(1).entries, (0, 1), 1),
    "a free block lost": lambda m: m.pool.free.pop(),
    "a free block twice": lambda m: m.pool.free.append(m.pool.free[0]),
    "a cached block free": lambda m: m.pool.free.append(cached(m)[0]),
    "the null block free": lambda m: m.pool.free.append(0),
    "a home's count": lambda m: setattr(m.pool.homes[1], "num_blocks", 77),
    "a home's cached count": lambda m: setattr(m.pool.homes[1], "num_cached", 77),
    "a home forgotten": lambda m: m.pool.homes.pop(1),
    "a block in another home": lambda m: m.pool.home_ids.__setitem__(cached(m)[0], 2),
    "a used block nowhere": lambda m: m.pool.home_ids.__setitem__(m.table(1).entries[0, 0], 0),
    "a free block somewhere": lambda m: m.pool.home_ids.__setitem__(m.pool.free[0], 1),
    "retained blocks": lambda m: setattr(m.pool, "num_retained", 9),
    "a tenant's count": lambda m: setattr(m.pool.tenants["red"], "num_blocks", 1),
    "a tenant's sequences": lambda m: setattr(m.pool.tenants["blue"], "num_sequences", 0),
    "a tenant forgotten": lambda m: m.pool.tenants.pop("blue"),
    "a tenant of whom nothing is known": lambda m: m.pool.tenant("nobody"),
    "a link in the order": lambda m: m.pool.queue.next.__setitem__(cached(m)[0], 0),
    "a link back": lambda m: m.pool.queue.previous.__setitem__(cached(m)[1], 0),
    "the order itself": lambda m: m.pool.queue.stamps.__setitem__(cached(m)[0], 1 << 40),
    "the head of a list": lambda m: setattr(m.pool.homes[1], "head", m.pool.homes[1].tail),
    "the tail of a list": lambda m: setattr(m.pool.homes[1], "tail", m.pool.homes[1].head),
    "all cached blocks": lambda m: setattr(m.pool.queue, "num_cached", 0),
    "a key": lambda m: set_in(m.pool.index.keys, 16 * cached(m)[0], 1),
    "the end of a key": lambda m: m.pool.index.keys.__setitem__(16 * cached(m)[0] + 15, 0),
    "a token": lambda m: set_in(m.pool.index.token_ids, (cached(m)[0], 3), 1),
    "whose a block is": lambda m: m.pool.home_ids.__setitem__(m.table(1).entries[0, 0], 1),
    "a lineage": lambda m: m.pool.index.lineages.__setitem__(16 * cached(m)[0], 200),
    "an indexed block forgotten": lambda m: m.pool.index.states.__setitem__(cached(m)[0], 0),
    "a free block indexed": lambda m: m.pool.index.states.__setitem__(m.pool.free[0], INDEXED),
    "a look-up in a circle": lambda m: m.pool.index.arrays().chain.__setitem__(
        cached(m)[0], cached(m)[0]
    ),
    "a head of a chain": lambda m: m.pool.index.arrays().heads.fill(0),
    "a stranger in a chain": lambda m: m.pool.index.arrays().chain.__setitem__(
        cached(m)[0], m.pool.free[0]
    ),
    "followers": lambda m: m.pool.index.arrays().first.fill(0),
    "a follower's successor": lambda m: m.pool.index.arrays().next.__setitem__(
        cached(m)[0], cached(m)[-1]
    ),
    "a follower's predecessor": lambda m: m.pool.index.arrays().previous.__setitem__(
        cached(m)[0], cached(m)[-1]
    ),
    "the size of the index": lambda m: setattr(m.pool.index, "_num_indexed", 2),
    "an indexed block not sealed": lambda m: m.pool.sealed.__setitem__(cached(m)[0], False),
    "a full block not sealed": lambda m: m.pool.sealed.__setitem__(m.table(1).entries[0, 0], False),
    "tokens without blocks": lambda m: m.table(1).num_computed.__setitem__(0, 99),
}


@pytest.mark.parametrize("what", TAMPERINGS)
def test_what_is_wrong_is_found(what: str) -> None:
    """Each thing in the books, changed alone, is told."""
    manager = books()
    TAMPERINGS[what](manager)
    assert check_integrity(manager)


def test_a_full_block_has_a_key() -> None:
    """Even one that cannot be hit any more: what follows it in its sequence may yet be sealed."""
    manager = books()
    flush(manager, "blue", ints([]))
    assert check_integrity(manager) == []
    block_id = int(manager.table(1).entries[0, 0])
    manager.pool.index.clear(block_id)
    assert check_integrity(manager) == [
        f"session 1 row {row} has a full block {block_id} without a key" for row in range(3)
    ]


def test_findings_are_bounded() -> None:
    """Where much is wrong the first findings of a kind are told, and how many more there are."""
    manager = new_manager(500)
    manager.pool.pins[100:] = 1
    findings = check_integrity(manager)
    assert "block 149 has 1 pins, 0 copies read it" in findings
    assert "block 150 has 1 pins, 0 copies read it" not in findings
    assert "and 350 more of this kind" in findings


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1 << 30))
def test_changes_between_two_parts_are_no_findings(seed: int) -> None:
    """Each part holds at any revision: with a change before every part a sound pool stays without findings."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(integrity, "_BLOCKS_AT_ONCE", 4)
        patched.setattr(integrity, "_KEYS_AT_ONCE", 4)
        patched.setattr(integrity, "_ROWS_AT_ONCE", 2)
        manager = new_manager(40, min_partial_tokens=2)
        driver = PoolDriver(manager, seed)
        for _ in range(30):
            driver.act()
        num_parts = 0
        for findings in chain(integrity_parts(manager), key_parts(manager)):
            assert findings == []
            num_parts += 1
            driver.act()
        assert num_parts > 50
