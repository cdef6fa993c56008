"""A flush forgets what begins with its tokens, wherever it lies and whatever is gone or shared in front of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_faces import SIZE, OneRouter, ints, new_manager
from pool_driver import TENANTS, PoolDriver

from memory_service import sharing
from memory_service.block_hash import BlockHash, BlockHasher
from memory_service.block_manager import BlockManager
from memory_service.integrity import check_integrity

if TYPE_CHECKING:
    import pytest

HEAD = [1] * SIZE


class RecordingHasher(BlockHasher):
    """Remembers of which tokens each key was made, and behind which key."""

    def __init__(self) -> None:
        super().__init__(b"secret", b"root")
        self.made: dict[BlockHash, tuple[BlockHash, tuple[int, ...]]] = {}

    def key(self, parent: BlockHash, token_ids: bytes, salt: bytes) -> BlockHash:
        found = super().key(parent, token_ids, salt)
        values = [int.from_bytes(token_ids[at : at + 4], "little") for at in range(0, 4 * SIZE, 4)]
        self.made[found] = (parent, tuple(values))
        return found

    def keys_to(self, key: BlockHash) -> list[BlockHash]:
        """The chain of keys up to this one."""
        return [] if key == self.root else [*self.keys_to(self.made[key][0]), key]

    def tokens_to(self, key: BlockHash) -> list[int]:
        """All tokens up to the end of its block."""
        return [token for each in self.keys_to(key) for token in self.made[each][1]]


def own_keys(manager: BlockManager, tenant: str) -> set[BlockHash]:
    """Keys of the blocks of a tenant that could be hit, those apart that all share."""
    pool, found = manager.pool, set()
    for block_id in pool.index.indexed_blocks():
        home, key = pool.home_of(block_id), pool.index.key_of(block_id)
        if home and home.tenant.name == tenant and key not in manager.ledger.retentions.public_keys:
            found.add(key)
    return found


def flush(manager: BlockManager, tenant: str, tokens: list[int]) -> None:
    plan = manager.sharing.plan_flush(tenant, ints(tokens))
    while not manager.sharing.flush_part(plan).is_done:
        pass


def num_hit(manager: BlockManager, tokens: list[int], tenant: str) -> int:
    return manager.probe(ints([*tokens, 0]), tenant).num_tokens(SIZE)


@settings(deadline=None, max_examples=examples(40))
@given(
    st.integers(0, 1 << 30),
    st.lists(st.integers(0, 1), max_size=10),
    st.sampled_from(TENANTS),
    st.sampled_from([16, 30, 300]),
)
def test_exactly_what_begins_with_the_tokens_is_forgotten(
    seed: int, tokens: list[int], tenant: str, num_blocks: int
) -> None:
    """By the tokens of every block: none is left that begins so, and none went but those, or such without a beginning."""
    hasher = RecordingHasher()
    manager = BlockManager(num_blocks, SIZE, hasher, min_partial_tokens=2)
    driver = PoolDriver(manager, seed)
    for _ in range(90):
        driver.act()
    before = {found: own_keys(manager, found) for found in TENANTS}
    there = {manager.pool.index.key_of(found) for found in manager.pool.index.indexed_blocks()}
    flush(manager, tenant, tokens)
    after = own_keys(manager, tenant)
    assert not [key for key in after if hasher.tokens_to(key)[: len(tokens)] == tokens]
    for key in before[tenant] - after:
        has_beginning = all(found in there for found in hasher.keys_to(key))
        assert hasher.tokens_to(key)[: len(tokens)] == tokens or not has_beginning
    others = {found: own_keys(manager, found) for found in TENANTS if found != tenant}
    assert others == {found: keys for found, keys in before.items() if found != tenant}
    assert check_integrity(manager) == []


def test_what_all_share_hides_nothing_behind_it() -> None:
    """Blocks of the tenant are found behind a published prefix that is longer than the tokens; the prefix stays."""
    manager = new_manager(60)
    manager.sharing.publish(ints(HEAD * 2))
    router, tokens = OneRouter(manager), HEAD * 2 + [2] * 8
    router.cache(tokens, tenant="red")
    flush(manager, "red", HEAD)
    assert num_hit(manager, tokens, "red") == num_hit(manager, tokens, "blue") == 8


def test_what_was_cached_before_a_prefix_was_published_is_found() -> None:
    """It cannot be hit while all share the prefix; nor is it when that is over."""
    manager = new_manager(60)
    router, tokens = OneRouter(manager), HEAD + [2] * 8
    router.cache(tokens, tenant="red")
    published = manager.sharing.publish(ints(HEAD))
    flush(manager, "red", HEAD)
    manager.sharing.withdraw(published.made_id)
    assert num_hit(manager, tokens, "red") == 0


def test_what_lost_its_beginning_is_found() -> None:
    """A retained tail whose head was evicted does not hit again once somebody computes the head anew."""
    manager = new_manager(16)
    router, tokens = OneRouter(manager), HEAD + [2] * 4 + [3] * 4
    router.cache(tokens, tenant="red")
    manager.sharing.retain_prefix("red", ints(tokens), 7, None)
    heads = manager.sharing.retain_prefix("red", ints(tokens[:8]), 7, None)
    manager.sharing.release("red", heads.made_id)
    for which in range(12):
        router.cache([4, which] * SIZE)
    assert (num_hit(manager, tokens, "red"), manager.pool.num_retained) == (0, 1)
    flush(manager, "red", HEAD)
    assert manager.pool.num_retained == 0
    router.cache(tokens[:8], tenant="red")
    assert num_hit(manager, tokens, "red") == 8


def test_tokens_that_fill_no_block_are_a_beginning_too() -> None:
    """Only blocks whose first tokens they are go; those that share fewer stay."""
    manager = new_manager(60)
    router = OneRouter(manager)
    for last in (5, 6):
        router.cache([*HEAD, 2, 2, 2, last, *[7] * 4], tenant="red")
    flush(manager, "red", [*HEAD, 2, 2, 2, 5])
    assert num_hit(manager, [*HEAD, 2, 2, 2, 5], "red") == 4
    assert num_hit(manager, [*HEAD, 2, 2, 2, 6, *[7] * 4], "red") == 12
    flush(manager, "red", [1])
    assert num_hit(manager, HEAD, "red") == 0


def test_a_plan_spares_what_comes_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that was given out anew between two parts holds something else: it is not forgotten."""
    monkeypatch.setattr(sharing, "FLUSH_CHUNK", 1)
    manager = new_manager(10)
    router = OneRouter(manager)
    router.cache([1] * 16, tenant="red")
    plan = manager.sharing.plan_flush("red", ints([]))
    assert not manager.sharing.flush_part(plan).is_done
    router.cache([2] * 36, tenant="blue")
    assert manager.pool.tenants.keys() == {"blue"}
    while not (outcome := manager.sharing.flush_part(plan)).is_done:
        assert outcome.num_freed == 0
    assert num_hit(manager, [2] * 32, "blue") == 32
