"""Reads data sets that TensorFlow Datasets prepared as ArrayRecord files, without TensorFlow."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from specjax.runtime.errors import UserError

# Number of records read at a time.
_AT_ONCE = 1024


def read_split(dataset: str, split: str, data_dir: str) -> tuple[str, Iterator[dict[str, Any]]]:
    """Returns a description of a split, for messages, and its records in file order, with texts as str.

    Missing files are reported at once, but records are read only as they are consumed. TFDS shuffles a data set when
    preparing it, so the first records are a random sample.

    Args:
      dataset: name in TFDS, with the config ("wmt14_translate/de-en").
      split: "train", "validation" or "test".
      data_dir: folder of TFDS's prepared data sets; "" is TFDS's default.

    Raises:
      UserError: for a data set that is not prepared there as ArrayRecord, with the command to prepare it; for a split
        that does not exist.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    folder = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    try:
        # Use only the files: `tfds.data_source` would first load the code that prepares them, which may be of another
        # version or need TensorFlow.
        builder = read_only_builder.builder_from_files(dataset, data_dir=folder)
        sources = builder.as_data_source()
    except tfds.core.DatasetNotFoundError:
        raise UserError(
            f'the data set "{dataset}" is not prepared in {folder}; run `tfds build {dataset} '
            f"--file_format=array_record --data_dir={folder}` where TensorFlow is installed (reading needs none), or "
            "set task.path to where it is prepared, or to a file of JSON lines"
        ) from None
    except NotImplementedError:
        raise UserError(
            f"{builder.data_dir} is not in the format array_record; run `tfds convert_format "
            f"--dataset_version_dir={builder.data_dir} --out_file_format=array_record` where TensorFlow is installed"
        ) from None
    if split not in sources:
        raise UserError(
            f'the data set "{dataset}" in {folder} has no split "{split}", only {", ".join(sources)}; prepare it again'
        )
    return f"{dataset} in {folder}, {split}", _records(sources[split])


def _records(source: Sequence[Any]) -> Iterator[dict[str, Any]]:
    for start in range(0, len(source), _AT_ONCE):
        for record in source.__getitems__(range(start, min(start + _AT_ONCE, len(source)))):
            yield {name: _text(value) for name, value in record.items()}


def _text(value: Any) -> Any:
    return value.decode("utf-8") if isinstance(value, bytes) else value
