"""What tests of commands share: a sweep that takes a second, files of other rows, a committee."""

import json
from pathlib import Path

import pyarrow.parquet as pq

from mlp_jax.records import rows
from mlp_jax.training.arrays import for_dataset
from mlp_jax.training.fit import fit

TINY = [
    *("--dataset", "kmnist", "--hidden", "16", "8", "--batch-size", "32", "--quiet"),
    *("--epochs", "2", "--learning-rate", "0.1"),
]


def write(where, table):
    path, content = rows.encode(Path(where), table)
    path.write_bytes(content)


def other_code(path):
    """A file of the same rows, as of other training code."""
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"about"]) | {"program": "0" * 64}
    return table.replace_schema_metadata({"about": json.dumps(about)})


def trained(config, data):
    """A Config, and the params of a committee of two."""
    config = for_dataset(config, data)
    *_, last = fit(config, data, seeds=(0, 1))
    return config, last.fetch_params()
