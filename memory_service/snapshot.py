"""The whole state of a pool as named columns of bytes, and back: what a fold begins from.

Columns of blocks reach up to the highest block that was ever given out; those behind it are as they were in the
beginning. All arrays are little-endian. Two equal states have equal columns, byte for byte.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from memory_service.block_hash import HASH_BYTES, BlockHash, split_keys
from memory_service.ledger import Counters
from memory_service.sequence_table import Sequence
from memory_service.tenants import Home, Tenant

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memory_service.block_manager import BlockManager
    from memory_service.block_pool import BlockPool
    from memory_service.ledger import Ledger
    from memory_service.session_books import SessionBooks

_INT32: Final = np.dtype("<i4")


def export_state(manager: BlockManager) -> dict[str, bytes]:
    """Every column of the state as it is now. Costs a walk over the blocks that were ever used."""
    ledger = manager.ledger
    return {
        **_export_blocks(manager.pool),
        "rest": json.dumps(_export_rest(ledger), sort_keys=True).encode(),
        **_export_tables(ledger),
    }


def import_state(manager: BlockManager, columns: Mapping[str, bytes]) -> None:
    """Bring a manager that was just made, of the same size, to the state of `columns`.

    Raises:
        ValueError, KeyError: when the columns do not belong together.
    """
    rest = json.loads(columns["rest"])
    _import_rest(manager.ledger, rest)
    _import_blocks(manager.pool, columns, rest["num_used"])
    for books in rest["sessions"]:
        _import_session(manager.ledger, books, columns)


# Blocks


def _num_used(pool: BlockPool) -> int:
    """Blocks up to the highest that was ever given out."""
    used = np.flatnonzero(np.frombuffer(pool.generations, np.int32))
    return int(used[-1]) + 1 if len(used) else 1


def _numbers(pool: BlockPool) -> dict[str, np.ndarray[Any, Any]]:
    """What is kept by block in numbers, as views that can be written to."""
    return {
        "ref_counts": pool.ref_counts,
        "pins": pool.pins,
        "homes": pool.home_ids,
        "sealed": pool.sealed,
        "generations": np.frombuffer(pool.generations, np.int32),
        "last_used": np.frombuffer(pool.last_used, np.float64),
        "stamps": np.frombuffer(pool.queue.stamps, np.int64),
        "token_ids": pool.index.token_ids,
    }


def _export_blocks(pool: BlockPool) -> dict[str, bytes]:
    count, index = _num_used(pool), pool.index
    return {
        **{name: values[:count].tobytes() for name, values in _numbers(pool).items()},
        "keys": bytes(index.keys[: count * HASH_BYTES]),
        "lineages": bytes(index.lineages[: count * HASH_BYTES]),
        "key_states": bytes(index.states[:count]),
        "followers": np.array(list(index.oldest_first()), _INT32).tobytes(),
        # Below these the free list holds what was never given out, the lowest on top.
        "free": pool.free[pool.num_blocks - count :].tobytes(),
    }


def _import_blocks(pool: BlockPool, columns: Mapping[str, bytes], count: int) -> None:
    for name, target in _numbers(pool).items():
        source = np.frombuffer(columns[name], target.dtype)
        target[:count] = source.reshape(count, *target.shape[1:])
    _import_index(pool, columns)
    del pool.free[pool.num_blocks - count :]
    pool.free.frombytes(columns["free"])
    _relink(pool)


def _import_index(pool: BlockPool, columns: Mapping[str, bytes]) -> None:
    index, keys, lineages = pool.index, columns["keys"], columns["lineages"]
    index.keys[: len(keys)] = keys
    index.lineages[: len(lineages)] = lineages
    index.states[: len(columns["key_states"])] = columns["key_states"]
    index.add_all(np.frombuffer(columns["followers"], _INT32))


def _relink(pool: BlockPool) -> None:
    """Put the cached blocks back in their lists, by the stamps they have."""
    held = (pool.ref_counts > 0) | (pool.pins > 0)
    cached = np.flatnonzero((pool.home_ids > 0) & ~held)
    stamps, home_ids = np.frombuffer(pool.queue.stamps, np.int64), pool.home_ids[cached]
    order = np.lexsort((stamps[cached], home_ids))
    bounds = np.flatnonzero(np.diff(home_ids[order])) + 1
    for block_ids in np.split(cached[order].astype(np.int32), bounds):
        if len(block_ids):
            pool.queue.link_all(block_ids, pool.homes[int(pool.home_ids[block_ids[0]])])


# Everything but blocks and tables


def _export_rest(ledger: Ledger) -> dict[str, Any]:
    pool, retentions = ledger.pool, ledger.retentions
    return {
        "num_used": _num_used(pool),
        "revision": ledger.revision,
        "counters": asdict(ledger.counters),
        "last_session_key": ledger.last_session_key,
        "last_generation": ledger.last_generation,
        "writer": list(ledger.writer),
        "num_evictions": pool.num_evictions,
        "last_stamp": pool.queue.last_stamp,
        "last_home_id": pool.last_home_id,
        "tenants": [_export_tenant(found) for found in pool.tenants.values()],
        "homes": [_export_home(found) for found in pool.homes.values()],
        "retentions": [
            [found.retention_id, found.home.home_id, found.expires_at]
            for found in retentions.by_id.values()
        ],
        "last_retention_id": retentions.last_id,
        "published": [
            [prefix_id, [key.hex() for key in keys]]
            for prefix_id, keys in retentions.published.items()
        ],
        "last_prefix_id": retentions.last_prefix_id,
        "sessions": [_export_session(key, found) for key, found in ledger.sessions.items()],
    }


def _export_tenant(tenant: Tenant) -> list[Any]:
    return [
        tenant.name,
        tenant.soft_blocks,
        tenant.hard_blocks,
        tenant.num_blocks,
        tenant.num_sequences,
    ]


def _export_home(home: Home) -> list[Any]:
    return [home.home_id, home.tenant.name, home.retention_id, home.priority, home.num_blocks]


def _import_rest(ledger: Ledger, rest: Mapping[str, Any]) -> None:
    pool, retentions = ledger.pool, ledger.retentions
    ledger.revision = rest["revision"]
    ledger.counters = Counters(**rest["counters"])
    ledger.last_session_key = rest["last_session_key"]
    ledger.last_generation = rest["last_generation"]
    generation, pid, started_ticks = rest["writer"]
    ledger.writer = (generation, pid, started_ticks)
    pool.num_evictions = rest["num_evictions"]
    pool.queue.last_stamp = rest["last_stamp"]
    pool.last_home_id = rest["last_home_id"]
    for name, soft, hard, num_blocks, num_sequences in rest["tenants"]:
        pool.tenants[name] = Tenant(name, soft, hard, num_blocks, num_sequences=num_sequences)
        pool.set_quota(pool.tenants[name], soft, hard)
    for home_id, name, retention_id, priority, num_blocks in rest["homes"]:
        pool.put_home(Home(home_id, pool.tenants[name], retention_id, priority, num_blocks))
    for retention_id, home_id, expires_at in rest["retentions"]:
        retentions.put(retention_id, pool.homes[home_id], expires_at)
    retentions.last_id = rest["last_retention_id"]
    for prefix_id, keys in rest["published"]:
        retentions.publish(prefix_id, tuple(BlockHash(bytes.fromhex(key)) for key in keys))
    retentions.last_prefix_id = rest["last_prefix_id"]


# Sessions


def _export_session(session_key: int, books: SessionBooks) -> dict[str, Any]:
    return {
        "key": session_key,
        "session_id": books.session_id,
        "max_num_rows": books.table.max_num_rows,
        "generation": books.generation,
        "last_applied_step": books.last_applied_step,
        "copies": [list(found) for found in books.unacknowledged_copies],
        "sequences": [_export_sequence(books, row, found) for row, found in books.table.items()],
    }


def _export_sequence(books: SessionBooks, row: int, sequence: Sequence) -> list[Any]:
    home = sequence.retention
    return [
        row,
        sequence.sequence_id,
        sequence.request_id,
        sequence.tenant.name,
        sequence.incarnation,
        sequence.num_cached_tokens,
        sequence.admitted_at,
        b"".join(sequence.expected_keys).hex(),
        home.retention_id if home is not None and home.priority else 0,
        int(books.table.num_computed[row]),
        int(books.table.num_blocks[row]),
    ]


def _export_tables(ledger: Ledger) -> dict[str, bytes]:
    return {
        f"tables/{key}": b"".join(
            books.table.block_table(row).astype(_INT32).tobytes() for row, _ in books.table.items()
        )
        for key, books in ledger.sessions.items()
    }


def _import_session(ledger: Ledger, found: Mapping[str, Any], columns: Mapping[str, bytes]) -> None:
    key = found["key"]
    ledger.open_session(key, found["session_id"], found["max_num_rows"], found["generation"])
    books = ledger.sessions[key]
    books.last_applied_step = found["last_applied_step"]
    books.unacknowledged_copies.extend((step, source) for step, source in found["copies"])
    entries = np.frombuffer(columns[f"tables/{key}"], _INT32)
    begin = 0
    for values in found["sequences"]:
        end = begin + values[-1]
        _import_sequence(ledger, books, values, entries[begin:end])
        begin = end


def _import_sequence(
    ledger: Ledger, books: SessionBooks, values: list[Any], block_table: np.ndarray[Any, Any]
) -> None:
    row, sequence_id, request_id, tenant, incarnation, num_cached, admitted_at = values[:7]
    expected, retention_id, num_computed, _ = values[7:]
    keys = list(split_keys(bytes.fromhex(expected)))
    owner = ledger.pool.tenants[tenant]
    retention = ledger.retentions.by_id[retention_id].home if retention_id else None
    sequence = Sequence(
        sequence_id, request_id, owner, incarnation, num_cached, admitted_at, keys, retention
    )
    books.table.add(row, sequence, block_table, num_computed)
    ledger.pool.index.begin(keys)
