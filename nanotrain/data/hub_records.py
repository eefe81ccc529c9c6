"""Records of a component, from the hub or from local files, by the same code: the `datasets` library, streaming.

Nothing is downloaded ahead and nothing is held in memory but a batch. A stream can be left and taken up again: its state
is a small JSON value.
"""

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import httpx
import pyarrow as pa
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from nanotrain.config.errors import MissingInputError, UserError, nearest
from nanotrain.config.sources import ComponentConfig, SubsetConfig

Record = dict[str, Any]
State = dict[str, Any]
_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
_COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
_TYPES = {"string": (pa.types.is_string, pa.types.is_large_string), "int": (pa.types.is_integer,)} | {
    "float": (pa.types.is_floating,),
    "bool": (pa.types.is_boolean,),
    "struct": (pa.types.is_struct,),
    "list": (pa.types.is_list, pa.types.is_large_list),
}


def expand_files(patterns: list[str], what: str) -> list[str]:
    """Return the files that the patterns name, sorted within a pattern.

    Raises:
        MissingInputError: a pattern names no file.
        UserError: files of different kinds, or of a kind that cannot be read.
    """
    files = []
    for pattern in patterns:
        found = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))  # noqa: PTH207 - may be absolute
        if not found:
            raise MissingInputError(f"`{pattern}` ({what}) matches no file; correct the path or pattern.")
        files += found
    kinds = {_builder(file) for file in files}
    if len(kinds) > 1:
        raise UserError(f"{what} names files of different kinds ({', '.join(sorted(kinds))}); use one kind at a time.")
    return files


def _builder(file: str) -> str:
    path = Path(file)
    suffix = Path(path.stem).suffix if path.suffix in _COMPRESSIONS else path.suffix
    if suffix not in _BUILDERS:
        raise UserError(
            f"`{file}` is not a kind of file that holds records; name *.parquet or *.jsonl (also .gz, .zst)."
        )
    return _BUILDERS[suffix]


_READ_ERRORS = (pa.ArrowException, DatasetGenerationError, EOFError, OSError, httpx.HTTPError, UnicodeDecodeError)


class _Stream:
    """Records in order, from a place that can be kept and returned to."""

    def __init__(self, dataset: datasets.IterableDataset, name: str, where: str) -> None:
        self._dataset, self._name, self.where = dataset, name, where
        self._start = dataset.state_dict()
        self.schema: pa.Schema | None = (
            None if dataset.features is None else dataset.features.arrow_schema.remove_metadata()
        )
        """Of the records, where they are known."""

    def records(self, state: State | None = None) -> Iterator[Record]:
        """Yield records, all of them or those after `state`.

        Raises:
            UserError: a file is damaged, or the connection failed.
        """
        self._dataset.load_state_dict(state or self._start)
        try:
            yield from self._dataset
        except _READ_ERRORS as error:
            raise UserError(
                f"`{self._name}`: reading from {self.where} failed ({_reason(error)}); finished files stay, run the same"
                " command again, and replace the file when it is damaged."
            ) from None

    def state(self) -> State:
        """Return where the stream stands: what `records` takes to go on after the last record it gave."""
        return self._dataset.state_dict()


class RecordStream(_Stream):
    """A subset's records.

    Attributes:
        where: the hub's id or the files, for manifests and messages.
        columns: column -> Arrow type, as found.
    """

    def __init__(self, dataset: datasets.IterableDataset, name: str, where: str, columns: dict[str, str]) -> None:
        super().__init__(dataset, name, where)
        self.columns = columns


class LocalRecords(_Stream):
    """Records of local files without a component.

    Args:
        files: patterns or files.
        what: the option that named them, for messages.
        needed: columns that every record must have.
    """

    def __init__(self, files: list[str], what: str, needed: tuple[str, ...]) -> None:
        dataset = open_local(files, what)
        for column in needed:
            if column not in (dataset.features or {}):
                raise UserError(
                    f"{what} ({files[0]}) has no column `{column}`; {nearest(column, dataset.features or ['none'])}"
                )
        super().__init__(dataset, what, ", ".join(files))


def open_records(component: ComponentConfig, name: str) -> RecordStream:
    """Open a subset of a component, its local files if it names any, else the hub.

    Raises:
        MissingInputError: a local file is not there.
        UserError: unknown subset, no access, no such configuration or split, a needed column missing or of another type.
    """
    if name not in component.subsets:
        raise UserError(f"`{name}` is not a subset of {component.hub_id}; {nearest(name, component.subsets)}")
    subset = component.subsets[name]
    if subset.local_files:
        dataset, where = open_local(subset.local_files, f"`subsets.{name}.local_files`"), ", ".join(subset.local_files)
    else:
        dataset, where = _open_hub(component, subset), component.hub_id
    features = dataset.features
    if features is None:
        raise UserError(f"`{name}`: {where} holds no record, so its columns are unknown; leave the subset out.")
    columns = {column: features.arrow_schema.field(column).type for column in features}
    _check_columns(name, subset, where, columns)
    return RecordStream(dataset, name, where, {key: str(kind) for key, kind in columns.items()})


def open_local(patterns: list[str], what: str) -> datasets.IterableDataset:
    """Return the records of local parquet or jsonl files as a stream."""
    files = expand_files(patterns, what)
    try:
        dataset = datasets.load_dataset(_builder(files[0]), data_files={"train": files}, split="train", streaming=True)
        return dataset if dataset.features is not None else dataset._resolve_features()
    except (
        pa.ArrowException,
        DatasetGenerationError,
        datasets.exceptions.DatasetGenerationCastError,
        ValueError,
        OSError,
    ) as error:
        raise UserError(
            f"{what} ({files[0]}) cannot be read as records ({_reason(error)}); replace the file."
        ) from None


def _open_hub(component: ComponentConfig, subset: SubsetConfig) -> datasets.IterableDataset:
    token = os.environ.get(component.token_variable) or None
    try:
        dataset = datasets.load_dataset(
            component.hub_id, subset.hub_config or None, split=subset.split, streaming=True, token=token
        )
        return dataset if dataset.features is not None else dataset._resolve_features()
    except (GatedRepoError, RepositoryNotFoundError, DatasetNotFoundError) as error:
        raise UserError(_access_sentence(component, error)) from None
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise UserError(_access_sentence(component, error)) from None
        raise UserError(f"`{component.hub_id}`: the hub answered {_reason(error)}; try again later.") from None
    except ValueError as error:  # unknown configuration or split; the library lists the known ones
        raise UserError(
            f"`{component.hub_id}` has no configuration `{subset.hub_config}` with a split `{subset.split}`"
            f" ({_reason(error)}); correct `hub_config` and `split` in the component's file."
        ) from None
    except (ConnectionError, OSError, httpx.HTTPError) as error:
        raise UserError(
            f"`{component.hub_id}` cannot be reached ({_reason(error)}); check the network, or copy its files here and"
            " name them in `local_files`."
        ) from None


def _access_sentence(component: ComponentConfig, error: Exception) -> str:
    set_or_not = "is set but has no access" if os.environ.get(component.token_variable) else "is not set"
    if component.gated or isinstance(error, GatedRepoError):
        return (
            f"`{component.hub_id}` is gated and {component.token_variable} {set_or_not}; ask for access at"
            f" {component.page}, then set {component.token_variable} to a token of that account."
        )
    return (
        f"`{component.hub_id}` was not found on the hub, or needs access ({component.token_variable} {set_or_not}); look"
        f" at {component.page} and set {component.token_variable} to a token that can read it."
    )


def _check_columns(name: str, subset: SubsetConfig, where: str, columns: dict[str, pa.DataType]) -> None:
    for needed in subset.needed_columns():
        if needed not in columns:
            raise UserError(
                f"`{name}`: {where} has no column `{needed}`; {nearest(needed, columns)} Correct the component's file."
            )
        kind = subset.columns[needed]
        if not any(is_type(columns[needed]) for is_type in _TYPES[kind]):
            raise UserError(
                f"`{name}`: column `{needed}` of {where} is {columns[needed]}, but the component's file says {kind};"
                " correct `columns` there, or the file."
            )


def _reason(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
    return " ".join(str(cause).split())[:200] or type(cause).__name__
