"""Reading and writing of ArrayRecord files; records are read by number, without read-ahead."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

# without read-ahead and threads: a process has several readers, and asks each for one record at a time
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


def open_reader(file: str | os.PathLike) -> Any:
    """Returns an ArrayRecordReader of a file; raises RuntimeError if the file is damaged."""
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(str(file), READER_OPTIONS)


def write_records(file: str | os.PathLike, records: Iterable[bytes], *, compressed: bool = True) -> None:
    """Writes a file of records. It must not be read before this returns, because its index is written last."""
    from array_record.python.array_record_module import ArrayRecordWriter

    # one record per group, so that reading a record decodes no other
    writer = ArrayRecordWriter(str(file), "group_size:1" if compressed else "group_size:1,uncompressed")
    try:
        for record in records:
            writer.write(record)
    finally:
        writer.close()


class RecordReaders:
    """Readers of several files, each opened when it is first needed. A pickle holds only the paths."""

    def __init__(self, files: Sequence[str]):
        self.files = tuple(files)
        self._readers: dict[int, Any] = {}

    def __reduce__(self):
        return RecordReaders, (self.files,)

    def read(self, file: int, record: int) -> bytes:
        """Returns a record of a file, both by number; raises RuntimeError or IndexError if the file is damaged."""
        # opened when needed: otherwise every worker would open all shards of a run
        if file not in self._readers:
            self._readers[file] = open_reader(self.files[file])
        [data] = self._readers[file].read([record])
        return data
