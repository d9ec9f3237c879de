"""A corpus: an immutable table of records, Arrow underneath."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from etude.values.digest import LENGTH, canonical
from etude.values.errors import InputError, nearest

if TYPE_CHECKING:
    import datasets

JSON_ENDINGS = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".jsonl.zst", ".ndjson.zst", ".json.zst")
TEXT_ENDINGS = (".txt", ".md", ".rst", ".py")
FILE = "corpus.parquet"


class Corpus:
    """A table of records that never changes.

    Columns carry the ecosystem's names: ``text``; ``prompt``/``completion``; ``messages``; ``chosen``/``rejected``;
    ``choices``/``label``.  Any other column may stand beside them.

    >>> Corpus(["a", "b"]).texts
    ['a', 'b']
    """

    def __init__(self, records: pa.Table | Iterable[str] | Iterable[Mapping[str, Any]]):
        """Build from an Arrow table, from strings (they become the column ``text``), or from mappings."""
        if isinstance(records, pa.Table):
            self._table = records
            return
        rows = list(records)
        if all(isinstance(row, str) for row in rows):
            self._table = pa.table({"text": pa.array(rows, pa.string())})
        else:
            self._table = pa.Table.from_pylist([dict(row) for row in rows])  # type: ignore[arg-type]

    @property
    def table(self) -> pa.Table:
        """The Arrow table; Arrow tables cannot be changed."""
        return self._table

    @property
    def columns(self) -> list[str]:
        return self._table.column_names

    def __len__(self) -> int:
        return self._table.num_rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._table.to_batches(max_chunksize=1024):
            yield from batch.to_pylist()

    def __getitem__(self, index: int | slice) -> Any:
        """One record as a dict, or for a slice a corpus."""
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        return self._table.slice(range(len(self))[index], 1).to_pylist()[0]

    def __repr__(self) -> str:
        return f"Corpus({len(self):,} records: {', '.join(self.columns)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Corpus) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def column(self, name: str) -> list[Any]:
        """One column as a list.  Raises InputError with the nearest name if there is none of this name."""
        if name not in self.columns:
            raise InputError(f"the corpus has no column {name!r}", remedy=nearest(name, self.columns))
        return self._table.column(name).to_pylist()

    @property
    def texts(self) -> list[str]:
        """The column ``text``."""
        return self.column("text")

    @cached_property
    def digest(self) -> str:
        """Digest of every record, the same for equal content in whichever format and order of columns it came."""
        state = hashlib.sha256(canonical(sorted(self.columns)).encode())
        for batch in self._table.to_batches(max_chunksize=512):
            for row in batch.to_pylist():
                state.update(canonical(row).encode("utf8", "surrogatepass"))
                state.update(b"\n")
        return state.hexdigest()[:LENGTH]

    # New corpora from old ones.

    def select(self, indices: Iterable[int]) -> Corpus:
        """The records at these positions, in this order."""
        return Corpus(self._table.take(pa.array(list(indices), pa.int64())))

    def keep(self, condition: Callable[[dict[str, Any]], bool] | Sequence[bool]) -> Corpus:
        """The records for which the condition holds; a function of the record, or one boolean a record."""
        mask = [condition(record) for record in self] if callable(condition) else list(condition)
        return Corpus(self._table.filter(pa.array(mask, pa.bool_())))

    def map(self, function: Callable[[pa.RecordBatch], pa.RecordBatch], batch_size: int = 1024) -> Corpus:
        """Apply a function of Arrow record batches, the form that also runs in worker processes and in Ray Data."""
        batches = [function(batch) for batch in self._table.to_batches(max_chunksize=batch_size)]
        return Corpus(pa.Table.from_batches(batches)) if batches else self

    def with_column(self, name: str, values: Sequence[Any]) -> Corpus:
        """The same records with one column added or replaced."""
        array = pa.array(values)
        if name in self.columns:
            return Corpus(self._table.set_column(self.columns.index(name), name, array))
        return Corpus(self._table.append_column(name, array))

    def renamed(self, columns: Mapping[str, str]) -> Corpus:
        """The same records with columns renamed, old name to new."""
        for name in columns:
            if name not in self.columns:
                raise InputError(f"the corpus has no column {name!r} to rename", remedy=nearest(name, self.columns))
        return Corpus(self._table.rename_columns([columns.get(name, name) for name in self.columns]))

    # To and from files.

    @classmethod
    def read(cls, path: str | Path) -> Corpus:
        """Read JSON Lines (plain, .gz, .zst), Parquet, a saved corpus, or a folder of text files.

        Raises InputError when the path is missing, empty, unreadable, or of no known format.
        """
        path = Path(path)
        if not path.exists():
            beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            raise InputError(f"there is no file or folder {path}", remedy=nearest(path.name, beside))
        try:
            corpus = cls._read_folder(path) if path.is_dir() else cls._read_file(path)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read: {error}", remedy="Is the file whole, and of the format that its name says?") from error
        if not len(corpus):
            raise InputError(f"{path} holds no records", remedy="A corpus needs at least one record.")
        return corpus

    @classmethod
    def _read_file(cls, path: Path) -> Corpus:
        name = path.name.lower()
        if name.endswith(".parquet"):
            import pyarrow.parquet

            return cls(pyarrow.parquet.read_table(path, memory_map=True))
        if name.endswith(JSON_ENDINGS):
            import pyarrow.json

            if path.stat().st_size == 0:
                return cls([])
            options = pyarrow.json.ReadOptions(block_size=1 << 26)  # a record must fit into one block
            with pa.input_stream(str(path), compression="detect") as stream:
                return cls(pyarrow.json.read_json(stream, read_options=options))
        if name.endswith(TEXT_ENDINGS):
            return cls([{"text": path.read_text(encoding="utf8"), "path": path.name}])
        raise InputError(f"{path} is of no format that Étude reads", remedy=f"It reads {', '.join(JSON_ENDINGS)}, .parquet, and folders of text files.")

    @classmethod
    def _read_folder(cls, path: Path) -> Corpus:
        if (path / FILE).exists():
            return cls._read_file(path / FILE)
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.name.lower().endswith(TEXT_ENDINGS))
        if files:
            return cls([{"text": file.read_text(encoding="utf8"), "path": file.relative_to(path).as_posix()} for file in files])
        tables = sorted(file for file in path.iterdir() if file.name.lower().endswith((".parquet", *JSON_ENDINGS)))
        return cls(pa.concat_tables([cls._read_file(file).table for file in tables], promote_options="permissive")) if tables else cls([])

    @classmethod
    def from_dataset(cls, dataset: datasets.Dataset) -> Corpus:
        """From a ``datasets.Dataset``, with its selection applied."""
        return cls(dataset.with_format("arrow")[:])

    def to_dataset(self) -> datasets.Dataset:
        """As a ``datasets.Dataset`` over the same Arrow memory."""
        import datasets

        return datasets.Dataset(self._table)

    def write_jsonl(self, path: str | Path) -> None:
        """Write JSON Lines, compressed if the name ends in .gz or .zst."""
        compression = {".gz": "gzip", ".zst": "zstd"}.get(Path(path).suffix)
        with pa.output_stream(str(path), compression=compression) as stream:
            for record in self:
                stream.write(canonical(record).encode() + b"\n")

    def write_parquet(self, path: str | Path) -> None:
        """Write one Parquet file."""
        import pyarrow.parquet

        pyarrow.parquet.write_table(self._table, path, compression="zstd")

    def write_texts(self, folder: str | Path) -> None:
        """Write every text as a file of its own, at its `path` if there is that column, else numbered.

        Raises InputError, before anything is written, if a path leads out of the folder or is of no text ending.
        """
        root = Path(folder).resolve()
        paths = self.column("path") if "path" in self.columns else [f"{index:06}.txt" for index in range(len(self))]
        for path in paths:
            if not (root / path).resolve().is_relative_to(root) or not path.lower().endswith(TEXT_ENDINGS):
                raise InputError(f"{path!r} is no place for a text in {folder}", remedy=f"A path stays in the folder and ends in {', '.join(TEXT_ENDINGS)}.")
        for path, text in zip(paths, self.texts, strict=True):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text, encoding="utf8", newline="")

    def save(self, folder: str | Path) -> None:
        """Write the corpus as Parquet into a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.write_parquet(Path(folder) / FILE)

    load = read


def bytes_of(texts: Sequence[str]) -> int:
    """UTF-8 bytes in some texts."""
    return pc.sum(pc.binary_length(pa.array(texts, pa.string()).cast(pa.binary()))).as_py() or 0
