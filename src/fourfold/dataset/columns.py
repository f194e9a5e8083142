"""Samples as Arrow columns: what a chunk of rows becomes, in a form that is sent and stored as it is.

Columns of a role (`""` for pt and sft, else with the role and a dot before the name):

    input_ids   list<int32>   token ids
    spans       list<int32>   start, stop, ... of the stretches whose labels are the tokens themselves
    overrides   list<int32>   position, label, ... where the label is another token
    documents   list<int32>   lengths of the packed documents; empty for a single one

and of the sample: `length` (int32, tokens of all roles), `targets` (int32, trained positions), `set` (int16, which
data set; -1 for a pack), and `extras.<name>` (float64). Labels take little room this way, and reading one sample is
a few slices.

The processes that tokenise import this and not what reads the columns, which needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import pyarrow as pa

from fourfold.dataset.encoded import EncodedRow, TokenIds

TOKEN_COLUMNS = ("input_ids", "spans", "overrides", "documents")
EXTRAS = "extras."


def to_record_batch(samples: Sequence[EncodedRow], sets: Sequence[int], roles: Sequence[str]) -> pa.RecordBatch:
    """The columns of some samples.

    Args:
        sets: number of each sample's data set, -1 for a pack of several.
        roles: the roles that each sample has, in order.
    """
    columns: dict[str, pa.Array] = {}
    for role in roles:
        sequences = [sample.sequences[role] for sample in samples]
        columns[column_name(role, "input_ids")] = _ids_array([tokens.ids for tokens in sequences])
        lists = (
            [tokens.spans for tokens in sequences],
            [tokens.overrides for tokens in sequences],
            [tokens.documents for tokens in sequences],
        )
        for name, values in zip(TOKEN_COLUMNS[1:], lists, strict=True):
            columns[column_name(role, name)] = _list_array(values)
    columns["length"] = pa.array([sample.length for sample in samples], pa.int32())
    columns["targets"] = pa.array([sample.num_targets for sample in samples], pa.int32())
    columns["set"] = pa.array(sets, pa.int16())
    for name in samples[0].extras if samples else ():
        columns[EXTRAS + name] = pa.array([sample.extras[name] for sample in samples], pa.float64())
    return pa.RecordBatch.from_pydict(columns)


def column_name(role: str, name: str) -> str:
    """What a role's column is called."""
    return f"{role}.{name}" if role else name


def _ids_array(lists: Sequence[TokenIds]) -> pa.ListArray:
    return _as_lists(lists, np.frombuffer(b"".join(lists), dtype=np.int32))


def _list_array(lists: Sequence[Sequence[int]]) -> pa.ListArray:
    return _as_lists(lists, np.fromiter(chain.from_iterable(lists), dtype=np.int32))


def _as_lists(lists: Sequence[Sequence[int]], values: np.ndarray) -> pa.ListArray:
    offsets = np.zeros(len(lists) + 1, dtype=np.int32)
    np.cumsum([len(entry) for entry in lists], out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
