"""A record says the same in every format: nulls are absent fields, quotes in .tsv are letters, lists are lists."""

import csv
import gzip
import io
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from byte_tokenizers import SHARED

from mor_jax.data import DataError, DataSource, load_examples, load_labelled, read_records
from tests.cli.tiny_bert import make_tokenizer

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def read(path):
    return [record for _, record in read_records(DataSource(str(path)))]


def save(path, records):
    """The records as a dataset, whose rows all have all columns and all messages all keys."""
    dataset = datasets.Dataset.from_list(records)
    dataset.to_parquet(path) if path.suffix == ".parquet" else dataset.save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["data.parquet", "folder"])
def test_what_is_null_is_not_there(tmp_path, tokenizer, name):
    """Rows of several kinds in one table, and a key that only one message has."""
    called = [*CHAT, {"role": "assistant", "content": "c", "name": "x"}]
    records = [{"prompt": "p", "completion": "c"}, {"text": "t"}, {"messages": CHAT}, {"messages": called}]
    every = [dict.fromkeys(("prompt", "completion", "text", "messages")) | record for record in records]
    path = save(tmp_path / name, every)
    lines = tmp_path / "data.jsonl"
    lines.write_text("".join(json.dumps(record) + "\n" for record in every))
    assert read(path) == read(lines) == records
    ours, theirs = (load_examples([DataSource(str(each))], tokenizer, 99) for each in (path, lines))
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    assert len(ours) == 4


def test_the_template_sees_no_key_that_the_message_has_not(tmp_path):
    from byte_tokenizers import byte_tokenizer

    template = (
        "{% for m in messages %}{{ m.role }}{{ 'CALLS' if 'tool_calls' in m else '' }}{{ m.content }}{% endfor %}"
    )
    path = save(tmp_path / "a.parquet", [{"messages": CHAT}, {"messages": [CHAT[0], CHAT[1] | {"tool_calls": "x"}]}])
    tokenizer = byte_tokenizer(template)
    found = load_examples([DataSource(str(path))], tokenizer, 99)
    texts = [tokenizer.decode(found.tokens[a:b]) for a, b in zip(found.offsets[:-1], found.offsets[1:], strict=True)]
    assert texts == ["useraassistantb", "useraassistantCALLSb"]


@pytest.mark.parametrize("name", ["data.csv", "data.tsv", "data.parquet", "data.jsonl"])
def test_messages_and_options_written_as_json_text(tmp_path, name):
    record = {"messages": json.dumps(CHAT), "options": '["a", "b"]', "text": "[1, 2]"}
    path, mark = tmp_path / name, "\t" if name.endswith("tsv") else ","
    if name.endswith("parquet"):
        save(path, [record])
    elif name.endswith("jsonl"):
        path.write_text(json.dumps(record) + "\n")
    else:
        quoted = [value if mark == "\t" else '"' + value.replace('"', '""') + '"' for value in record.values()]
        path.write_text(mark.join(record) + "\n" + mark.join(quoted) + "\n")
    assert read(path) == [{"messages": CHAT, "options": ["a", "b"], "text": "[1, 2]"}]


def test_messages_as_python_prints_them_are_refused(tmp_path, tokenizer):
    path = tmp_path / "data.csv"
    path.write_text(f'messages\n"{CHAT}"\n')
    with pytest.raises(DataError, match="data.csv:2: messages must be a list"):
        load_examples([DataSource(str(path))], tokenizer, 99)


def test_an_index_of_pandas_is_no_field(tmp_path):
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "__index_level_0__": [7]}), path)
    assert read(path) == [{"text": "a"}]
    path = tmp_path / "data.csv"
    path.write_text(",text\n0,a\n")
    assert read(path) == [{"text": "a"}]


def test_a_dataset_saved_with_numpys_format_has_plain_values(tmp_path):
    dataset = datasets.Dataset.from_list([{"text": "a", "label": 1}]).with_format("numpy", columns=["label"])
    dataset.save_to_disk(tmp_path / "data")
    (record,) = read(tmp_path / "data")
    assert record == {"text": "a", "label": 1}
    assert type(record["label"]) is int


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv", "data.tsv", "data.parquet"])
def test_a_second_text_that_is_empty_is_none(tmp_path, name):
    rows = [("red house", "blue boat", "a"), ("red house", "", "b")]
    path, mark = tmp_path / name, "\t" if name.endswith("tsv") else ","
    fields = ("sentence1", "sentence2", "label")
    if name.endswith("parquet"):
        columns = {field: [row[place] or None for row in rows] for place, field in enumerate(fields)}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    elif name.endswith("jsonl"):
        path.write_text("".join(json.dumps(dict(zip(fields, row, strict=True))) + "\n" for row in rows))
    else:
        path.write_text("".join(mark.join(row) + "\n" for row in [fields, *rows]))
    words = make_tokenizer()
    found = load_labelled([DataSource(str(path))], words, 16)[0]
    wanted = [words("red house", "blue boat")["input_ids"], words("red house")["input_ids"]]
    assert found.tokens.tolist() == sum(wanted, [])


@pytest.mark.parametrize("mark", [",", "\t"])
def test_a_table_of_several_kinds_leaves_empty_cells_out(tmp_path, mark):
    path = tmp_path / ("data.csv" if mark == "," else "data.tsv")
    lines = [("prompt", "completion", "text"), ("p", "c", ""), ("", "", "t")]
    path.write_text("".join(mark.join(line) + "\n" for line in lines))
    assert read(path) == [{"prompt": "p", "completion": "c"}, {"text": "t"}]
    path.write_text(mark.join(("prompt", "completion")) + "\n" + mark.join(("", "c")) + "\n")
    assert read(path) == [{"prompt": "", "completion": "c"}]  # of one kind: an empty text


TSV = {
    "quote": ('label\ttext\n1\t"a good film\n0\tbad "\n', [("1", '"a good film'), ("0", 'bad "')]),
    "quoted": ('label\ttext\n1\t"a"\n', [("1", '"a"')]),
    "windows": ("\ufefflabel\ttext\r\n1\ta\r\n\r\n0\tb\r\n", [("1", "a"), ("0", "b")]),
    "backslashes": ("label\ttext\n1\ta\\tb\\n\\\\\n", [("1", "a\\tb\\n\\\\")]),
    "separators": ("label\ttext\n1\ta\u2028b\x0bc\x85d\n", [("1", "a\u2028b\x0bc\x85d")]),
    "commas": ("label\ttext\n1\ta, b\n", [("1", "a, b")]),
    "no end": ("label\ttext\n1\ta", [("1", "a")]),
    "an empty cell": ("label\ttext\n\ta\n", [("", "a")]),
    "an empty column": ("label\ttext\t\n1\ta\t\n0\tb\n", [("1", "a"), ("0", "b")]),
    "a tab too many": ("label\ttext\n1\ta\t\n", [("1", "a")]),
    "spaces in the header": (" label\ttext \n1\ta\n", [("1", "a")]),
}


@pytest.mark.parametrize("name", TSV)
@pytest.mark.parametrize("packed", [False, True])
def test_lines_and_tabs_alone_make_a_tsv_file(tmp_path, name, packed):
    content, rows = TSV[name]
    path = tmp_path / ("data.tsv.gz" if packed else "DATA.TSV")
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    assert read(path) == [{"label": label, "text": text} for label, text in rows]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("label\ttext\n1\n", r":2: 1 columns where the header has 2.*one line.*quotes are letters"),
        ('label\ttext\n1\t"a\tb"\n', r":2: 3 columns where the header has 2.*quotes are letters"),
        ("text\ttext\na\tb\n", r":1: the column 'text' is there twice"),
        ("label\ttext\r1\ta\r", r":1: .*carriage return"),
        ("label\ttext\n", ": no records"),
    ],
)
def test_a_damaged_tsv_file(tmp_path, content, message):
    path = tmp_path / "data.tsv"
    path.write_bytes(content.encode())
    with pytest.raises(DataError, match=f"^{path}{message}"):
        read(path)


def test_cells_quoted_as_in_csv_are_told(tmp_path, caplog):
    path = tmp_path / "data.tsv"
    path.write_text('label\ttext\n1\t"say ""hi"""\n0\t"say ""ho"""\n')
    assert [record["text"] for record in read(path)] == ['"say ""hi"""', '"say ""ho"""']
    (told,) = caplog.messages
    assert f"{path}:2: quotes in .tsv are letters" in told


@pytest.mark.parametrize("content", ["text,label\na,1,\n", "text,label,\na,1,\n", " text , label\na,1\n"])
def test_an_empty_column_at_the_end_of_a_csv_file(tmp_path, content):
    path = tmp_path / "data.csv"
    path.write_text(content)
    assert read(path) == [{"text": "a", "label": "1"}]


GLUE = {
    "mrpc": (
        "train",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n",
        "{label}\t7\t8\t{sentence1}\t{sentence2}\r\n",
    ),
    "rte": ("train", "index\tsentence1\tsentence2\tlabel\n", "{number}\t{sentence1}\t{sentence2}\t{label_text}\n"),
}


@pytest.mark.parametrize("task", GLUE)
def test_the_files_of_glue(tmp_path, task):
    """The real pairs in the layout of GLUE's own files: hundreds of them begin with a quote that nothing closes."""
    split, header, line = GLUE[task]
    source = SHARED / f"data/glue/{task}/{split}.jsonl"
    if not source.exists():
        pytest.skip(f"the real data are not on this machine: no {source}")
    records = [json.loads(row) for row in source.read_text(encoding="utf-8").split("\n") if row]
    path = tmp_path / f"{split}.tsv"
    text = header + "".join(line.format(number=number, **record) for number, record in enumerate(records))
    path.write_bytes(text.encode())
    assert any(record["sentence1"].startswith('"') for record in records)
    words = make_tokenizer()
    found, names = load_labelled([DataSource(str(path))], words, 512)
    assert len(found) == len(records)
    assert names == {"mrpc": ("0", "1"), "rte": ("entailment", "not_entailment")}[task]
    assert found.labels is not None
    assert found.labels.tolist() == [record["label"] for record in records]
    wanted = load_labelled([DataSource(str(source))], words, 512)[0]
    assert found.tokens.tolist() == wanted.tokens.tolist()
    if task == "rte":
        from_csv = tmp_path / "train.csv"
        written = io.StringIO(newline="")
        csv.writer(written).writerows(
            [("sentence1", "sentence2", "label")]
            + [(record["sentence1"], record["sentence2"], record["label"]) for record in records]
        )
        from_csv.write_bytes(written.getvalue().encode())
        again = load_labelled([DataSource(str(from_csv))], words, 512, labels=names)[0]
        assert again.fingerprint == found.fingerprint
