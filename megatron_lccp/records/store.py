"""The run directory: the one place that training writes and that everything after it reads.

In: the resolved configuration, a dict per optimizer step, events, the Rows of each evaluation window and of training
health. Out: `config.yaml`, `metrics.json` (what each monitor declares of its metrics), `steps.jsonl`, `events.jsonl`,
`rows/step-*.parquet` (one a window), `rows/health-*.parquet` (one for several steps), `format.json` (the version of all
this), and the same again as pandas frames.
Whole files appear under their name only when complete; a line that a killed process left torn is dropped on reading,
a file that is torn is named and skipped, and what was recorded twice counts once. No path is kept inside, so that the
directory may be moved. Rows are scanned by Arrow: only the columns and the rows asked for leave it.
One process writes (rank 0). No torch, no Megatron.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import typing
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from megatron_lccp.files import refuse_write, require_format, write_whole
from megatron_lccp.records.earlier import declared_by_0_1
from megatron_lccp.schema import Metric, Monitor, Row
from megatron_lccp.text import count_text

STEP_COLUMNS = ("step", "tokens", "stage", "loss", "grad_norm", "lr", "tokens_per_s", "time_s", "skipped")
_NUMBERS = tuple(name for name in STEP_COLUMNS if name not in ("stage", "skipped"))
EVENT_COLUMNS = ("time", "step", "kind", "text")
FORMAT = 1
"""Version of the run directory's format that is written, and the newest that is read."""
_ARROW_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64()}
_WINDOW_NAME = re.compile(r"step-(\d+)\.parquet")
_HEALTH_NAME = re.compile(r"health-(\d+)-(\d+)\.parquet")


@cache
def row_schema() -> pa.Schema:
    """Row as an Arrow schema: same names, same order; optional coordinates may be null, nothing else.

    `own` is a JSON object, null for a row without coordinates of its monitor's own.
    """
    hints, fields = typing.get_type_hints(Row), []
    for field in dataclasses.fields(Row):
        if field.name == "own":
            fields.append(pa.field("own", pa.string()))
            continue
        options = typing.get_args(hints[field.name]) or (hints[field.name],)
        kind = next(option for option in options if option in _ARROW_TYPES)
        fields.append(pa.field(field.name, _ARROW_TYPES[kind], nullable=type(None) in options))
    return pa.schema(fields)


@cache
def _required() -> tuple[str, ...]:
    """Columns in which every row has a value."""
    return tuple(field.name for field in row_schema() if not field.nullable)


def rows_frame(rows: Iterable[Row]) -> pd.DataFrame:
    """Rows -> the frame that `RunStore.read_rows` would return for them."""
    return _to_frame(_to_table(rows))


def _to_table(rows: Iterable[Row]) -> pa.Table:
    rows, schema = list(rows), row_schema()
    columns = {field.name: [getattr(row, field.name) for row in rows] for field in schema}
    columns["own"] = [json.dumps(own, sort_keys=True, default=_scalar) if own else None for own in columns["own"]]
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    for field, array in zip(schema, arrays, strict=True):
        if array.null_count and not field.nullable:
            raise ValueError(f"Row.{field.name} is None in {array.null_count} of {len(rows)} rows; give it a value")
    return pa.Table.from_arrays(arrays, schema=schema)


def _to_frame(table: pa.Table) -> pd.DataFrame:
    """Optional whole numbers stay whole (Int64), so that a length reads 4096 and not 4096.0; each coordinate of a
    monitor's own is a column."""
    whole = [field.name for field in table.schema if field.nullable and field.type == pa.int64()]
    own = {}
    if "own" in table.column_names:
        own, table = _own_columns(table["own"]), table.drop_columns("own")
    return table.to_pandas().astype({name: "Int64" for name in whole}).assign(**own)


def _own_columns(column: pa.ChunkedArray) -> dict[str, pd.api.extensions.ExtensionArray]:
    """Name -> values of each coordinate in a column of JSON objects, missing where an object does not have it."""
    if column.null_count == len(column):
        return {}
    codes = column.combine_chunks().dictionary_encode()
    objects = [_object(text) for text in codes.dictionary.to_pylist()]
    at = codes.indices.fill_null(len(objects)).to_numpy()  # the last place stands for none
    names = dict.fromkeys(name for each in objects for name in each)
    return {name: pd.Series([each.get(name) for each in (*objects, {})]).convert_dtypes().array[at] for name in names}


def _object(text: str) -> dict[str, Any]:
    """The JSON object in a text of the column `own`."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"its column own holds {text!r}, which is no object of JSON")
    return found


def _write_table(path: Path, table: pa.Table) -> None:
    write_whole(path, lambda draft: pq.write_table(table, draft, compression="zstd"))


def _read_tables(paths: Sequence[Path], columns: Sequence[str] | None, where: pc.Expression | None) -> pa.Table:
    """Rows of all files in order: all at once, or, if one is torn or not of rows, file by file."""
    schema = row_schema()
    if paths:
        try:
            table = ds.dataset([str(path) for path in paths], schema, "parquet").to_table(columns, filter=where)
            if not _lacks(table):
                return table
        except (pa.ArrowException, OSError):
            pass
    kept = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    tables = [table for path in paths if (table := _read_table(path, columns, where)) is not None]
    return pa.concat_tables([kept.empty_table(), *tables])


def _read_table(
    path: Path, columns: Sequence[str] | None = None, where: pc.Expression | None = None
) -> pa.Table | None:
    """Rows of a file; None, with a warning that names it, if it is not whole Parquet, or not of rows."""
    if problem := _file_problem(path):
        warnings.warn(f"{path}: skipped, {problem}", stacklevel=3)
        return None
    return ds.dataset(str(path), row_schema(), "parquet").to_table(columns, filter=where)


def _file_problem(path: Path) -> str | None:
    """Why a file is not whole Parquet of rows; None if it is. It is read whole."""
    try:
        table, stored = ds.dataset(str(path), row_schema(), "parquet").to_table(), pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        return f"not a readable Parquet file ({_reason(error)})"
    if absent := [name for name in _required() if name not in stored]:
        return f"not a file of rows (it has no column {absent[0]})"
    if lacking := _lacks(table):
        return f"not a file of rows ({lacking})"
    try:
        _own_columns(table["own"])
    except ValueError as error:
        return f"not a file of rows ({error})"
    return None


def _lacks(table: pa.Table) -> str:
    """What is missing in a table of some columns of rows that rows of ours always have; empty if nothing is."""
    for name in set(table.column_names) & {*_required()}:
        if table[name].null_count:
            return f"its column {name} has no value in {table[name].null_count} of {len(table)} rows"
    return ""


class RunStore:
    """Reads and writes one run directory; creates it on the first write.

    Raises ValueError for a directory of a newer format.
    """

    def __init__(self, dir: str | Path):
        self.dir = Path(dir)
        self.format_path = self.dir / "format.json"
        self.config_path = self.dir / "config.yaml"
        self.steps_path = self.dir / "steps.jsonl"
        self.events_path = self.dir / "events.jsonl"
        self.metrics_path = self.dir / "metrics.json"
        self.rows_dir = self.dir / "rows"
        self._check_format()

    def exists(self) -> bool:
        """True if a run has recorded something here."""
        return self.rows_dir.is_dir() or self.steps_path.is_file()

    def _check_format(self) -> None:
        """ValueError if a newer version wrote the directory, which this one would read by halves."""
        if not self.dir.is_dir():
            return
        try:
            version = json.loads(self.format_path.read_bytes())["format"]
        except FileNotFoundError:
            version = None
        except (OSError, ValueError, KeyError, TypeError) as error:
            text = f"{self.format_path}: cannot be read: {error}; remove it if no newer version wrote this run"
            raise ValueError(text) from error
        require_format(self.dir, version, FORMAT)

    def _say_format(self) -> None:
        """Note the format beside what is about to be written. Raises OSError."""
        if not self.format_path.is_file():
            write_whole(self.format_path, lambda draft: draft.write_text(json.dumps({"format": FORMAT}) + "\n"))

    def write_config(self, text: str) -> None:
        """Keep the resolved configuration (YAML text) as config.yaml. Raises OSError."""
        self._say_format()
        write_whole(self.config_path, lambda draft: draft.write_text(text, encoding="utf-8"))

    def write_metrics(self, monitors: Iterable[Monitor]) -> None:
        """Keep what monitors declare of their metrics, beside what earlier ones declared. Raises OSError."""
        declared = self._declared() | {m.name: [dataclasses.asdict(metric) for metric in m.metrics] for m in monitors}
        text = json.dumps(declared, indent=1, ensure_ascii=False) + "\n"
        self._say_format()
        if not self.metrics_path.is_file() or self.metrics_path.read_text(encoding="utf-8") != text:
            write_whole(self.metrics_path, lambda draft: draft.write_text(text, encoding="utf-8"))

    def read_metrics(self) -> dict[tuple[str, str], Metric]:
        """(monitor, metric) -> what the monitor declares of it; where none was kept, what version 0.1 measured.

        Raises ValueError if the file is not one of ours.
        """
        try:
            return metrics_of(declared_by_0_1() | self._declared())
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.metrics_path}: does not hold metrics of monitors ({error}); remove it") from error

    def _declared(self) -> dict[str, list[dict[str, Any]]]:
        return json.loads(self.metrics_path.read_text(encoding="utf-8")) if self.metrics_path.is_file() else {}

    def append_step(self, record: Mapping[str, Any]) -> None:
        """Add one optimizer step: a flat dict with STEP_COLUMNS and whatever else is a number or a string.

        `tokens` counts all training so far, `time_s` is how long this step took (windows excluded). A number that is
        not finite is written as null, as JSON has no other word for it. Raises OSError; the file is then as before.
        """
        self._say_format()
        _append_line(self.steps_path, record)

    def append_event(self, kind: str, text: str, *, step: int) -> None:
        """Add something worth reading later: kind `monitor_error`, `skipped_step`, `resume`, ... Raises OSError."""
        self._say_format()
        time = datetime.now(timezone.utc).isoformat(timespec="seconds")
        _append_line(self.events_path, {"time": time, "step": step, "kind": kind, "text": text})

    def write_window(self, rows: Iterable[Row], step: int) -> Path:
        """Write all rows measured at `step` as one Parquet file, replacing an earlier measurement at that step.

        Raises ValueError for a row of another step or without a required field, OSError for a full disk.
        """
        rows = list(rows)
        for row in rows:
            if row.step != step:
                raise ValueError(f"{row.monitor}.{row.metric}: a row of step {row.step} in the window of step {step}")
        path, table = self.rows_dir / f"step-{step:08d}.parquet", _to_table(rows)
        self._say_format()
        _write_table(path, table)
        return path

    def write_health(self, rows: Iterable[Row]) -> Path:
        """Write the rows of training health of one or more steps, not yet on record, as one Parquet file named by its
        first and last step. Raises ValueError if there are none or one lacks a required field, OSError for a full disk.
        """
        table = _to_table(rows)
        if not len(table):
            raise ValueError("no rows of training health to write")
        path = self._health_path(table)
        self._say_format()
        _write_table(path, table)
        return path

    def _health_path(self, table: pa.Table) -> Path:
        ends = pc.min_max(table["step"]).as_py()
        return self.rows_dir / f"health-{ends['min']:08d}-{ends['max']:08d}.parquet"

    def rewind(self, step: int) -> None:
        """Forget what was recorded after `step`, as training resumes there and will record it again.

        The window at `step` stays, for it measured these very weights, and so does training health up to `step`; a run
        that begins anew has none, so it gives -1. Events stay: they tell what happened. Killed halfway, a second call
        finishes the work. Raises OSError.
        """
        if self.steps_path.is_file():
            kept = [record for record in self._step_records() if record["step"] <= step]
            lines = "".join(map(_line, kept))
            write_whole(self.steps_path, lambda draft: draft.write_text(lines, encoding="utf-8"))
        for window_step, path in self.windows().items():
            if window_step > step:
                path.unlink()
        for (first, last), path in self.health_files().items():
            if first > step:
                path.unlink()
            elif last > step and (table := _read_table(path)) is not None:
                kept = table.filter(pc.field("step") <= step)
                _write_table(self._health_path(kept), kept)
                path.unlink()
        for draft in self.rows_dir.glob("*.tmp"):  # those beside it may be of a report that is being written
            draft.unlink()

    def set_aside(self) -> Path | None:
        """Move what an earlier run left here into `earlier-N`, of which nothing is lost; None if there is nothing.

        For a training that begins anew where another one has recorded. Raises OSError.
        """
        if not self.exists():
            return None
        number = 1 + sum(1 for _ in self.dir.glob("earlier-*"))
        aside = self.dir / f"earlier-{number}"
        aside.mkdir()
        lines = (self.steps_path, self.events_path)
        recorded = (self.rows_dir, *lines, self.config_path, self.metrics_path, self.format_path)
        for path in (*recorded, self.dir / "wandb"):
            if path.exists():
                path.rename(aside / path.name)
        return aside

    def windows(self) -> dict[int, Path]:
        """Step -> Parquet file of each recorded window, in order."""
        found = {
            int(match[1]): path for path in self.rows_dir.glob("*") if (match := _WINDOW_NAME.fullmatch(path.name))
        }
        return dict(sorted(found.items()))

    def health_files(self) -> dict[tuple[int, int], Path]:
        """(first, last step) -> Parquet file of each stretch of training health, in order."""
        found = {
            (int(match[1]), int(match[2])): path
            for path in self.rows_dir.glob("*")
            if (match := _HEALTH_NAME.fullmatch(path.name))
        }
        return dict(sorted(found.items()))

    def read_rows(
        self, first: int | None = None, last: int | None = None, health: bool = True,
        columns: Sequence[str] | None = None, where: pc.Expression | None = None,
    ) -> pd.DataFrame:  # fmt: skip
        """All rows (of steps `first` to `last`), in the order measured: columns as in Row, optional whole numbers as
        Int64. `health=False` reads the windows alone: training health has many rows a step.

        `columns` reads these alone, `where` only rows for which it is true: an expression over all columns, such as
        `pc.field("metric") == "nll"`. A file that is not whole Parquet is named in a warning and skipped.
        """
        with self._naming_the_file():
            return _to_frame(self.read_table(first, last, health, columns, where))

    def read_means(
        self, by: Sequence[str], where: pc.Expression | None = None, health: bool = True
    ) -> pd.DataFrame:  # fmt: skip
        """Rows averaged before they leave Arrow: one line per combination of `by`, in the order first measured.

        value: mean; low, high: the least and the largest; n: how many rows. A value that is not a number makes the
        mean none. For what has a row per sample and head, millions of them in a long run.
        """
        table = self.read_table(None, None, health, [*dict.fromkeys([*by, "value"])], where)
        table = table.append_column("place", pa.array(range(len(table)), pa.int64()))  # Arrow groups in no order
        wanted = [("value", "mean"), ("value", "min"), ("value", "max"), ("value", "count"), ("place", "min")]
        grouped = table.group_by(list(by), use_threads=False).aggregate(wanted)
        grouped = grouped.sort_by("place_min").drop_columns("place_min")
        names = {"value_mean": "value", "value_min": "low", "value_max": "high", "value_count": "n"}
        with self._naming_the_file():
            return _to_frame(grouped.rename_columns([names.get(name, name) for name in grouped.column_names]))

    @contextlib.contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        """A ValueError inside becomes one that names the first file that is not of rows."""
        try:
            yield
        except ValueError as error:
            if not (found := self.damaged()):
                raise
            raise ValueError(f"{found[0]}; remove it, or measure that checkpoint again") from error

    def damaged(self) -> list[str]:
        """Files in rows/ that are not whole Parquet of rows, each with the reason; all of them are read for it."""
        files = [*self.windows().values(), *self.health_files().values()]
        return [f"{path}: {problem}" for path in files if (problem := _file_problem(path))]

    def read_table(
        self, first: int | None = None, last: int | None = None, health: bool = True,
        columns: Sequence[str] | None = None, where: pc.Expression | None = None,
    ) -> pa.Table:  # fmt: skip
        """The same as an Arrow table, in which a value that is not a number is no missing one."""
        low, high = (0 if first is None else first), (math.inf if last is None else last)
        files = {(step, True, step): path for step, path in self.windows().items()}
        if health:  # a window at the last of these steps was measured after them
            files |= {(end, False, start): path for (start, end), path in self._health_once().items()}
        paths = [path for (end, _, start), path in sorted(files.items()) if end >= low and start <= high]
        for bound in ([] if first is None else [pc.field("step") >= low]) + (
            [] if last is None else [pc.field("step") <= high]
        ):
            where = bound if where is None else where & bound
        return _read_tables(paths, columns, where)

    def _health_once(self) -> dict[tuple[int, int], Path]:
        """The files of training health, less those inside another one: a rewind killed halfway leaves such."""
        files, end = {}, -1
        for (first, last), path in sorted(self.health_files().items(), key=lambda item: (item[0][0], -item[0][1])):
            if last > end:
                files[first, last], end = path, last
        return files

    def read_steps(self) -> pd.DataFrame:
        """All optimizer steps, as `steps_frame` makes them."""
        return steps_frame(self._step_records())

    def _step_records(self) -> list[dict[str, Any]]:
        return _read_lines(self.steps_path, ("step", "tokens"), _NUMBERS, ("stage",))

    def read_events(self) -> pd.DataFrame:
        """All events: EVENT_COLUMNS, in the order recorded."""
        return _lines_frame(_read_lines(self.events_path, (), ("step",), ("time", "kind", "text")), EVENT_COLUMNS)


def steps_frame(records: list[dict[str, Any]]) -> pd.DataFrame:
    """Optimizer steps: STEP_COLUMNS and every other field found; numbers as float64 where one is missing.

    Of a step that was recorded twice (by a loop of others that resumed), the last record counts.
    """
    steps = _lines_frame(records, STEP_COLUMNS).drop_duplicates("step", keep="last", ignore_index=True)
    for name in _NUMBERS:
        steps[name] = pd.to_numeric(steps[name])
    steps["skipped"] = steps["skipped"].eq(True)
    return steps


def _line(record: Mapping[str, Any]) -> str:
    plain = {name: _plain(value) for name, value in record.items()}
    return json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"


def _scalar(value: Any) -> Any:
    """Python's number for a scalar of numpy or torch; a coordinate may be one."""
    if not hasattr(value, "item"):
        raise TypeError(f"a coordinate should be a number or a string, is {value!r}")
    return value.item()


def _plain(value: Any) -> Any:
    """Scalars of numpy and torch become Python's; what is not finite becomes None."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def metrics_of(declared: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[tuple[str, str], Metric]:
    """(monitor, metric) -> declaration, from what metrics.json holds."""
    return {(monitor, m.name): m for monitor, metrics in declared.items() for m in map(_metric, metrics)}


def _metric(declared: Mapping[str, Any]) -> Metric:
    """A declaration read back; what a later version says besides is left out."""
    found = {field.name: declared[field.name] for field in dataclasses.fields(Metric) if field.name in declared}
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    return Metric(**fields)


def _append_line(path: Path, record: Mapping[str, Any]) -> None:
    line = _line(record).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError as error:
        refuse_write(path, error)
    end = os.fstat(file).st_size
    try:
        # A process killed while writing leaves half a line: keep it from swallowing this one.
        if end and os.pread(file, 1, end - 1) != b"\n":
            line = b"\n" + line
        while line:  # a disk that fills up takes a part first, and says so on the rest
            line = line[os.write(file, line) :]
    except OSError as error:
        os.ftruncate(file, end)
        refuse_write(path, error)
    finally:
        os.close(file)


def _read_lines(
    path: Path, counts: Sequence[str], numbers: Sequence[str], texts: Sequence[str]
) -> list[dict[str, Any]]:
    """The JSON objects of a file whose fields `counts` are whole numbers, and whose `numbers` and `texts` are what they
    are called if they are there, which not every loop sees to."""
    records, dropped = [], []
    if path.is_file():
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            record = _parsed(line)
            if problem := _line_problem(record, counts, numbers, texts):
                dropped.append(f"{path}:{number}: dropped, {problem}")
            else:
                records.append(record)
    if dropped:
        more = f"; and {count_text(len(dropped) - 1, 'more line')}" if len(dropped) > 1 else ""
        warnings.warn(dropped[0] + more, stacklevel=4)
    return records


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _line_problem(record: Any, counts: Sequence[str], numbers: Sequence[str], texts: Sequence[str]) -> str | None:
    """Why a line is none of ours; None if it is."""
    if not isinstance(record, dict):
        return "not a whole JSON object"
    for name in counts:
        if not _is_whole(record.get(name)):
            return f"{name} is no whole number but {record.get(name)!r}"
    for names, kinds, word in ((numbers, (int, float), "number"), (texts, (str,), "text")):
        for name in names:
            if not isinstance(value := record.get(name), (*kinds, type(None))):
                return f"{name} is no {word} but {value!r}"
    return None


def _is_whole(value: Any) -> bool:
    """True for a whole number that 64 bits hold."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return whole and not isinstance(value, bool) and abs(value) < 1 << 63


def _lines_frame(records: list[dict[str, Any]], columns: tuple[str, ...]) -> pd.DataFrame:
    names = dict.fromkeys([*columns, *(name for record in records for name in record)])
    return pd.DataFrame(records, columns=list(names))


def _reason(error: Exception) -> str:
    """What Arrow has against a file, without the file's name, which is said already."""
    first = str(error).partition("\n")[0].rpartition("': ")[2]
    return first.partition(". ")[0].rstrip(".") or type(error).__name__
