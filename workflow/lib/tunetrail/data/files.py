"""Reads JSONL, CSV, Parquet and the Hugging Face hub as numbered rows of plain Python values.

Libraries that are slow to import are imported inside the functions that need them, since every start of Snakemake
imports this module.
"""

import gzip
import io
import json
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tunetrail.config.data import UNPACKED_MB, FileSource, HubSource
from tunetrail.errors import DataError
from tunetrail.preferences.formats import BadRow

Rows = Iterator[tuple[int, dict]]
"""Rows with their numbers from 1; in JSONL these are line numbers."""
Lines = Iterator[tuple[int, dict | BadRow]]
"""The same, but a line that holds no row comes as a BadRow that says why."""
BATCH_ROWS = 256
"""Rows of a Parquet file that are unpacked at once."""
BAD_GZIP = "the gzip file is cut short or damaged; copy it again"
NOT_UTF8 = "not UTF-8; convert the file with iconv"
LIST_COLUMNS = ("messages", "completions", "ranks", "order", "labels")


class RawRows(NamedTuple):
    """The rows of a source with its own column names and types."""

    name: str
    """The name of the source in messages."""
    rows: Lines


def _parse_line(line: bytes, encoding: str) -> dict | BadRow | None:
    """The object in a line of JSONL, or a BadRow that says what is wrong with the line; None if it is empty."""
    try:
        text = line.decode(encoding)
        row = json.loads(text) if text.strip() else None
    except UnicodeDecodeError:
        return BadRow(NOT_UTF8)
    except (ValueError, RecursionError) as e:
        return BadRow(f"not valid JSON ({e}); every line must hold one JSON object")
    if not text.strip() or isinstance(row, dict):
        return row
    return BadRow(f"must be a JSON object, got {type(row).__name__}")


def _too_large(path: Path, unpacked_mb: int) -> DataError:
    return DataError(
        f"{path}: unpacks to more than {unpacked_mb} MB; split the file, or raise unpacked_mb of its source"
    )


def _opened(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path, unpacked_mb: int) -> Iterator[bytes]:
    """The lines of a file, however long: they are read no further than it may hold."""
    left = unpacked_mb * 10**6
    with _opened(path) as f:
        while line := f.readline(left + 1):
            left -= len(line)
            if left < 0:
                raise _too_large(path, unpacked_mb)
            yield line


def jsonl_lines(path: Path, unpacked_mb: int = UNPACKED_MB) -> Lines:
    """Yields the objects of a JSONL file, which may be gzipped. Skips empty lines.

    Raises DataError for a bad gzip, and for more than `unpacked_mb` of text.
    """
    try:
        # Lines are decoded one by one: a text file decodes ahead and could not say which line is bad.
        for number, line in enumerate(_lines(path, unpacked_mb), 1):
            row = _parse_line(line, "utf-8-sig" if number == 1 else "utf-8")
            if row is not None:
                yield number, row
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise DataError(f"{path}: {BAD_GZIP}") from None


def jsonl_rows(path: Path) -> Rows:
    """Yields the objects of a JSONL file. Raises DataError that names the first line without one."""
    for number, row in jsonl_lines(path):
        if isinstance(row, BadRow):
            raise DataError(f"{path}:{number}: {row}")
        yield number, row


def _reason(error: Exception) -> str:
    """The first line of a library's error."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _plain(value: Any) -> Any:
    """A cell of a table as a plain value; arrays become lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _parquet(path: Path, content: bytes, unpacked_mb: int) -> Any:
    """The table in a Parquet file: a few bytes may hold one long text a million times."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file, batches, left = pq.ParquetFile(io.BytesIO(content)), [], unpacked_mb * 10**6
    for batch in file.iter_batches(batch_size=BATCH_ROWS):
        left -= batch.nbytes
        if left < 0:
            raise _too_large(path, unpacked_mb)
        batches.append(batch)
    return pa.Table.from_batches(batches, file.schema_arrow).to_pandas()


def table_rows(path: Path, is_csv: bool, unpacked_mb: int = UNPACKED_MB) -> Rows:
    """Yields the rows of a CSV or Parquet file, which may be gzipped; missing values are None. Raises DataError."""
    import pandas as pd

    try:
        with _opened(path) as f:
            content = f.read(unpacked_mb * 10**6 + 1)
        if len(content) > unpacked_mb * 10**6:
            raise _too_large(path, unpacked_mb)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise DataError(f"{path}: {BAD_GZIP}") from None
    try:
        with warnings.catch_warnings():
            # If rows have more cells than the header, pandas would shift columns, or drop cells with only a warning.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            if is_csv:
                frame = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False, index_col=False)
            else:
                frame = _parquet(path, content, unpacked_mb)
    except DataError:
        raise
    except pd.errors.ParserWarning:
        raise DataError(f"{path}: rows have more cells than the header; quote cells that hold a comma") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: {NOT_UTF8}") from None
    except Exception as e:  # pandas and pyarrow raise many types
        raise DataError(f"{path}: cannot be read as {'CSV' if is_csv else 'Parquet'}: {_reason(e)}") from None
    frame = frame.astype(object).where(frame.notna(), None)
    for number, row in enumerate(frame.to_dict("records"), 1):
        yield number, {str(key): _plain(value) for key, value in row.items()}


def hub_rows(source: HubSource) -> Rows:
    from datasets import load_dataset

    try:
        rows = load_dataset(source.repo, source.subset, revision=source.revision, split=source.hub_split)
    except Exception as e:
        raise DataError(f"{source.repo}@{source.revision}: cannot be loaded from the hub: {_reason(e)}") from None
    yield from enumerate(rows, 1)


def format_of(path: Path) -> str:
    """The suffix that names a file's format, without .gz."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def raw_rows(source: FileSource | HubSource) -> RawRows:
    """Opens a source. Raises DataError for a file of an unknown format; reading the rows may raise it too."""
    if isinstance(source, HubSource):
        return RawRows(f"{source.repo}@{source.revision}", hub_rows(source))
    path, suffix = source.path, format_of(source.path)
    if suffix not in (".jsonl", ".csv", ".parquet"):
        raise DataError(f"{path}: unknown format; the name must end in .jsonl, .csv or .parquet (.gz may follow)")
    limit = source.unpacked_mb
    return RawRows(
        str(path), jsonl_lines(path, limit) if suffix == ".jsonl" else table_rows(path, suffix == ".csv", limit)
    )


def with_lists(row: dict) -> dict:
    """A row of a CSV file with its lists and chats parsed. Other cells stay text: a prompt may look like a list."""

    def cell(key: str, text: str | None) -> Any:
        try:
            value = json.loads(text) if text and text[0] == "[" else text
        except (ValueError, RecursionError):
            return text
        is_chat = isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)
        return value if key in LIST_COLUMNS or is_chat else text

    return {key: cell(key, text) for key, text in row.items()}


def is_csv(source: FileSource | HubSource) -> bool:
    return isinstance(source, FileSource) and format_of(source.path) == ".csv"
