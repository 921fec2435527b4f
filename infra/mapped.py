"""A table of any size on this machine's disk: written once, batch by batch, then mapped. None of its rows are held.

The file has no name and is gone with its process, however that ends. It lies in the folder for temporary files, which
TMPDIR names, and is as large as the rows are in memory.
"""

import mmap
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pyarrow as pa

# What is in memory of a table that is being written. A mapped table's own description takes some KB a batch.
BATCH_BYTES = 16 << 20


def joined(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of at least ``BATCH_BYTES``, but for the last."""
    held: list[pa.Table] = []
    size = 0
    for table in tables:
        held.append(table)
        size += table.nbytes
        if size >= BATCH_BYTES:
            yield pa.concat_tables(held)
            held, size = [], 0
    if held:
        yield pa.concat_tables(held)


class Spool:
    """Rows on their way to the disk. OSError where it is full."""

    def __init__(self, schema: pa.Schema) -> None:
        self._file = tempfile.TemporaryFile(prefix="switchyard-")  # noqa: SIM115 (its mapping outlives it)
        self._writer = pa.ipc.new_file(self._file, schema)

    def write(self, rows: pa.Table) -> None:
        with _folder_named():
            self._writer.write_table(rows.combine_chunks())

    def table(self) -> pa.Table:
        """All rows, read where they are used. Nothing can be written any more."""
        with _folder_named():
            self._writer.close()
            self._file.flush()
        mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._file.close()
        # Rows are drawn in any order: what lies around one is of no use.
        mapped.madvise(mmap.MADV_RANDOM)
        return pa.ipc.open_file(pa.py_buffer(mapped)).read_all()


@contextmanager
def _folder_named() -> Iterator[None]:
    """A file without a name says of no disk that it is full."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, tempfile.gettempdir()) from None
