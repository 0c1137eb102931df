"""Parquet files as records, a batch at a time."""

import io
from collections.abc import Iterator
from typing import IO, Any

from ftkit.errors import ExitCode, UserError
from ftkit.io.tables import Record

MAGIC = b"PAR1"
BATCH_ROWS = 1_000


def read_parquet(stream: IO[bytes], name: str) -> Iterator[Record]:
    """Rows numbered from 1. Dates and decimals become text; what JSON cannot hold (bytes) is a data error.

    A file is read where its rows are; anything that cannot seek (stdin, a packed file) is held in memory first.
    """
    import pyarrow
    import pyarrow.parquet

    source = stream if stream.seekable() else io.BytesIO(stream.read())
    try:
        table = pyarrow.parquet.ParquetFile(source)
        number = 0
        for batch in table.iter_batches(batch_size=BATCH_ROWS):
            for values in readable(batch, name).to_pylist():
                number += 1
                yield Record(number, values)
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).strip().splitlines() or ["?"])[0][:200]
        raise UserError(f"{name}: damaged Parquet: {reason}", ExitCode.DATA, hint="get the file again") from None
    if number == 0:
        raise UserError(f"{name}: 0 rows", ExitCode.DATA, hint="the table is empty")


def readable(batch: Any, name: str) -> Any:
    """The batch with every column as something that JSON can hold."""
    import pyarrow
    from pyarrow import types

    columns = []
    for field, column in zip(batch.schema, batch.columns, strict=True):
        kind = field.type
        if types.is_dictionary(kind):
            column = column.cast(kind.value_type)
        elif types.is_temporal(kind) or types.is_decimal(kind):
            column = column.cast(pyarrow.string())
        elif types.is_binary(kind) or types.is_large_binary(kind):
            raise UserError(
                f"{name}: column '{field.name}' holds bytes, not text",
                ExitCode.DATA,
                hint="leave the column out of the file, or store its text",
            )
        columns.append(column)
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)
