"""Files and datasets to packed, resumable batches."""

from mor_jax.data.chat import Encoded, encode_messages
from mor_jax.data.classification import load_labelled
from mor_jax.data.examples import OVERLONG, Examples, SourceCounts, load_examples
from mor_jax.data.iterator import BATCH_FIELDS, Batch, BatchIterator, build_row, make_iterator, single_pass, stack_rows
from mor_jax.data.packing import MODES, EpochRows, PackingPlan, make_plan, pack
from mor_jax.data.records import encode_record
from mor_jax.data.sources import DataError, DataSource, parse_source, parse_sources, read_records
from mor_jax.data.tokenization import (
    Tokenization,
    as_tokenization,
    check_unicode,
    decide_tokens,
    prints_date,
    read_tokenization,
)
from mor_jax.data.tokenizer import load_tokenizer
from mor_jax.data.vocabulary import check_tokens

__all__ = [
    "BATCH_FIELDS",
    "MODES",
    "OVERLONG",
    "Batch",
    "BatchIterator",
    "DataError",
    "DataSource",
    "Encoded",
    "EpochRows",
    "Examples",
    "PackingPlan",
    "SourceCounts",
    "Tokenization",
    "as_tokenization",
    "build_row",
    "check_tokens",
    "check_unicode",
    "decide_tokens",
    "encode_messages",
    "encode_record",
    "load_examples",
    "load_labelled",
    "load_tokenizer",
    "make_iterator",
    "make_plan",
    "pack",
    "parse_source",
    "parse_sources",
    "prints_date",
    "read_records",
    "read_tokenization",
    "single_pass",
    "stack_rows",
]
