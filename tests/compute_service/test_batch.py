"""A step of several rows, packed: every number of every tensor, and every refusal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from compute_service.batch import pack_step
from compute_service.rows import RowStore
from compute_service.sampling import RowSampling
from compute_service.step import NewRow, Step, StepError

BLOCK_SIZE = 4
GREEDY = RowSampling(0.0, 1.0, 0, 0.0, 7, 1.0, 0.0, 0.0, (), -1, 0, ())


def new_row(row: int, table: list[int], tokens: range, num_prompt_tokens: int) -> NewRow:
    return NewRow(
        row=row,
        incarnation=1,
        block_table=np.array(table, dtype=np.int32),
        token_ids=np.array(tokens, dtype=np.int32),
        num_prompt_tokens=num_prompt_tokens,
        sampling=GREEDY,
    )


STEP = Step(
    generation=1,
    number=1,
    epoch=1,
    reset=True,
    drop_rows=(),
    new_rows=(
        new_row(3, [9, 4], range(100, 106), 6),
        new_row(0, [2], range(200, 203), 2),
        new_row(8, [5, 6, 7], range(300, 309), 8),
    ),
    forks=(),
    appends=(),
    remaps=(),
    copies=(),
    rows=(3, 0, 8),
    starts=(2, 2, 8),
    num_tokens=(4, 1, 1),
    pending=(),
    outputs=((8, 0), (3, 0), (3, 1)),
)


def pack(**changes: Any) -> Any:
    rows = RowStore()
    rows.apply(STEP)
    return pack_step(replace(STEP, **changes), rows, BLOCK_SIZE, torch.device("cpu"))


def test_rows_of_one_token_come_first() -> None:
    """Among themselves rows keep the order of the step; tables end in zeros."""
    packed = pack()
    assert packed.token_ids.tolist() == [202, 308, 102, 103, 104, 105]
    assert packed.position_ids.tolist() == [2, 8, 2, 3, 4, 5]
    batch = packed.batch
    assert batch.block_tables.tolist() == [[2, 0, 0], [5, 6, 7], [9, 4, 0]]
    assert batch.query_start.tolist() == [0, 1, 2, 6]
    assert batch.context_lens.tolist() == [3, 9, 6]
    assert batch.slot_mapping.tolist() == [10, 28, 38, 39, 16, 17]
    assert (batch.num_decodes, batch.max_query_len, batch.max_context_len) == (2, 4, 9)
    assert packed.token_ids.dtype == packed.position_ids.dtype == torch.int64
    assert batch.block_tables.dtype == batch.context_lens.dtype == torch.int32
    assert batch.query_start.dtype == torch.int32
    assert batch.slot_mapping.dtype == torch.int64


def test_samples_of_a_row_share_its_logits() -> None:
    """Outputs keep the order of the step; each knows its row's prompt and output apart."""
    packed = pack()
    assert packed.output_rows.tolist() == [1, 5]
    assert [found.logits_row for found in packed.sample_rows] == [0, 1, 1]
    assert [found.sampling.sample_index for found in packed.sample_rows] == [0, 0, 1]
    assert [found.position for found in packed.sample_rows] == [9, 6, 6]
    first = packed.sample_rows[0]
    assert first.prompt_token_ids.tolist() == list(range(300, 308))
    assert first.output_token_ids.tolist() == [308]
    assert first.num_output_tokens == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"starts": (3, 2, 8)}, r"row 3 cannot run \[3, 7\): 6 tokens are known"),
        ({"starts": (-1, 2, 8)}, r"row 3 cannot run \[-1, 3\): 6 tokens are known"),
        ({"num_tokens": (4, 0, 1)}, r"row 0 cannot run \[2, 2\): 3 tokens are known"),
        ({"num_tokens": (4, 2**31 - 1, 1)}, r"row 0 cannot run"),
        ({"rows": (3, 0, 1)}, "row 1 is unknown"),
        ({"rows": (), "starts": (), "num_tokens": (), "outputs": ()}, "the step runs no row"),
        ({"rows": (3, 0), "starts": (2, 2), "num_tokens": (4, 1)}, "row 8 is sampled but"),
    ],
)
def test_what_cannot_run_is_refused(changes: dict[str, Any], message: str) -> None:
    """In one sentence that names the row."""
    with pytest.raises(StepError, match=message):
        pack(**changes)


def test_a_table_that_ends_too_early_is_refused() -> None:
    """The row knows the token, but no block is there for it."""
    rows = RowStore()
    rows.apply(replace(STEP, new_rows=(new_row(3, [9], range(6), 6), *STEP.new_rows[1:])))
    with pytest.raises(StepError, match="row 3: its table does not cover position 5"):
        pack_step(STEP, rows, BLOCK_SIZE, torch.device("cpu"))
