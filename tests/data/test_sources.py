"""Every format gives its records with their place; every kind of damage is an error that names file and line."""

import gzip
import json

import datasets
import pytest

from mor_jax.data import DataError, DataSource, parse_source, parse_sources, read_records

RECORDS = [{"prompt": "zwei\n\"Zeilen\", und 'Komma'", "completion": "ä"}, {"prompt": "b", "completion": "emoji 🙂"}]


def as_csv(records):
    quoted = [[value.replace('"', '""') for value in record.values()] for record in records]
    return "prompt,completion\n" + "".join(",".join(f'"{value}"' for value in row) + "\n" for row in quoted)


def write(path, text):
    raw = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def read(path):
    return list(read_records(DataSource(str(path))))


LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
TEXTS = {
    "a.jsonl": LINES,
    "b.ndjson": "\ufeff" + LINES.replace("\n", "\r\n"),  # as Windows programs write it
    "c.jsonl.gz": "\n" + LINES,
    "d.json": json.dumps(RECORDS, indent=2),
    "e.json.gz": json.dumps(RECORDS),
    "f.csv": as_csv(RECORDS),
    "h.csv.gz": as_csv(RECORDS) + "\n",
}
SECOND_LINE = {"a.jsonl": 2, "b.ndjson": 2, "c.jsonl.gz": 3, "f.csv": 4, "h.csv.gz": 4}


@pytest.mark.parametrize("name", TEXTS)
def test_text_formats(tmp_path, name):
    path = write(tmp_path / name, TEXTS[name])
    places, records = zip(*read(path), strict=True)
    assert list(records) == RECORDS
    assert places[1] == (f"{path}:{SECOND_LINE[name]}" if name in SECOND_LINE else f"{path}: item 2")


@pytest.fixture(scope="module")
def dataset():
    return datasets.Dataset.from_list(RECORDS)


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_parquet_files_and_dataset_folders(tmp_path, dataset, kind):
    path = tmp_path / ("data.parquet" if kind == "parquet" else "data")
    dataset.to_parquet(path) if kind == "parquet" else dataset.save_to_disk(path)
    places, records = zip(*read(path), strict=True)
    assert list(records) == RECORDS
    assert places == (f"{path}: row 1", f"{path}: row 2")


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_conversations_in_parquet_are_those_of_json_lines(tmp_path, kind):
    """Hub datasets of chats are Parquet; all rows of a file have all columns, empty where they do not apply."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    records: list[dict] = [{"messages": turns, "source": None}, {"messages": [*turns, *turns], "source": "x"}]
    dataset, path = datasets.Dataset.from_list(records), tmp_path / f"data.{kind}"
    dataset.to_parquet(path) if kind == "parquet" else dataset.save_to_disk(path)
    lines = write(tmp_path / "data.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    there = [{"messages": turns}, records[1]]
    assert [record for _, record in read(path)] == [record for _, record in read(lines)] == there


def test_a_parquet_file_need_not_fit_into_memory(tmp_path):
    """No more than 256 rows, and the row group they are in, are held at a time: here a sixth of the file."""
    import pyarrow
    import pyarrow.parquet

    path, rows, letters = tmp_path / "large.parquet", 1600, 5000
    schema = pyarrow.schema([("text", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(0, rows, 10):
            texts = [str(number) * letters for number in range(start + 1000, start + 1010)]
            writer.write_table(pyarrow.table({"text": texts}, schema=schema))
    before, most, count = pyarrow.total_allocated_bytes(), 0, 0
    for _, record in read_records(DataSource(str(path))):
        most = max(most, pyarrow.total_allocated_bytes() - before)
        count += len(record["text"])
    assert count == 4 * letters * rows
    assert most < count / 4


GOOD = '{"text": "good"}\n'
DAMAGED = {
    "cut.jsonl": (GOOD + '{"text": "no en', ":2: not valid JSON"),
    "comma.jsonl": (GOOD + "\n" + '{"text": "a",}\n', ":3: not valid JSON"),
    "two.jsonl": (GOOD + GOOD.strip() + GOOD, ":2: not valid JSON"),
    "single_quotes.jsonl": ("{'text': 'a'}\n", ":1: not valid JSON"),
    "number.jsonl": (GOOD + '{"text": ' + "1" * 5000 + "}\n", ":2: not valid JSON"),
    "deep.jsonl": (GOOD + "[" * 100_000, ":2: not valid JSON"),
    "list.jsonl": (GOOD + '["a"]\n', ":2: expected an object with fields, found list"),
    "word.jsonl": (GOOD + "null\n", ":2: expected an object with fields, found NoneType"),
    "latin1.jsonl": (GOOD.encode() + '{"text": "ä"}\n'.encode("latin-1"), ":2: not UTF-8"),
    "utf16.jsonl": (GOOD.encode("utf-16"), ":1: not UTF-8"),
    "cut.json": ('[{"text": "a"},\n{"text": ', ":2: not valid JSON"),
    "lines.json": (GOOD + GOOD, ":2: not valid JSON .*name it .jsonl"),
    "object.json": (GOOD, ": expected a list of objects, found dict"),
    "item.json": ('[{"text": "a"}, 3]', ": item 2: expected an object"),
    "deep.json": ("[" * 100_000, ": not valid JSON"),
    "more.csv": ('text,label\n"two\nlines",1\na,b,c\n', ":4: 3 columns where the header has 2"),
    "fewer.csv": ("text,label\na,1\nb\n", ":3: 1 columns where the header has 2"),
    "quote.csv": ('text,label\na,1\n"b,2\nc,3\n', ":3: not valid CSV"),
    "after_quote.csv": ('text,label\na,1\n"b"c,2\n', ":3: not valid CSV"),
    "twice.csv": ("text,text\na,b\n", ":1: the column 'text' is there twice"),
    "header_only.csv": ("text,label\n", ": no records"),
    "empty.jsonl": ("", ": no records"),
    "blank.jsonl": ("\n \n", ": no records"),
    "empty.json": ("[]", ": no records"),
    "text.md": ("# a\n", ": unknown format"),
    "cut.jsonl.gz": (gzip.compress(LINES.encode())[:-12], ": damaged gzip file"),
    "plain.jsonl.gz": (LINES.encode(), ": damaged gzip file"),
    "text.parquet": (LINES, ": not a readable Parquet file"),
    "empty.parquet": ("", ": not a readable Parquet file"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_an_error_with_its_place(tmp_path, name):
    content, message = DAMAGED[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_flipped_byte_in_a_gzip_file(tmp_path):
    path = tmp_path / "flipped.jsonl.gz"
    raw = bytearray(gzip.compress(LINES.encode() * 50))
    for place in range(12, len(raw) - 1):
        path.write_bytes(bytes(raw[:place] + bytes([raw[place] ^ 0xFF]) + raw[place + 1 :]))
        with pytest.raises(DataError, match="flipped.jsonl.gz"):
            read(path)


def test_damaged_parquet_and_folders(tmp_path, dataset, capfd):
    path = tmp_path / "cut.parquet"
    dataset.to_parquet(path)
    path.write_bytes(path.read_bytes()[:-20])
    capfd.readouterr()  # progress bars of writing
    with pytest.raises(DataError, match="not a readable Parquet"):
        read(path)
    assert capfd.readouterr() == ("", "")  # the error is the only line that a person sees
    folder = tmp_path / "folder"
    dataset.save_to_disk(folder)
    (arrow,) = folder.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(DataError, match="not a folder of"):
        read(folder)
    dataset.select([]).save_to_disk(tmp_path / "nothing")
    with pytest.raises(DataError, match="no records"):
        read(tmp_path / "nothing")
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match="splits train, test"):
        read(tmp_path / "splits")
    with pytest.raises(DataError, match="not a folder of"):
        read(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="absent.jsonl: no such file"):
        read(tmp_path / "absent.jsonl")


def test_a_hub_name_goes_to_datasets(monkeypatch, dataset):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: asked.append((*names, split)) or dataset)
    assert [record for _, record in read("hub:owner/name/config@test")] == RECORDS
    assert read("hub:owner/name")[1][0] == "hub:owner/name: row 2"
    assert asked == [("owner/name", "config", "test"), ("owner/name", None, "train")]

    def fails(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(DataError, match=r"hub:owner/name: cannot be loaded \(no route\)"):
        read("hub:owner/name")


def test_a_dataset_repository_is_read_by_name(tmp_path, monkeypatch, dataset):
    """`datasets` itself resolves the name; a folder of that name stands in for the hub."""
    folder = tmp_path / "owner" / "name" / "data"
    folder.mkdir(parents=True)
    dataset.select([0]).to_parquet(folder / "train-00000-of-00001.parquet")
    dataset.select([1]).to_parquet(folder / "test-00000-of-00001.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert read("hub:owner/name") == [("hub:owner/name: row 1", RECORDS[0])]
    assert read("hub:owner/name@test") == [("hub:owner/name@test: row 1", RECORDS[1])]
    with pytest.raises(DataError, match=r"^hub:owner/name@none: cannot be loaded \(.*none"):
        read("hub:owner/name@none")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a/b.jsonl", DataSource("a/b.jsonl")),
        ("math=a.jsonl:0.5", DataSource("a.jsonl", "math", 0.5)),
        ("a.jsonl:3", DataSource("a.jsonl", "default", 3.0)),
        ("hub:owner/name@test:2", DataSource("hub:owner/name@test", "default", 2.0)),
        ("hub:owner", DataSource("hub:owner")),
        ("odd name=1/b.csv", DataSource("odd name=1/b.csv")),
    ],
)
def test_source_names(text, wanted):
    assert parse_source(text) == wanted


def test_the_name_of_an_existing_file_is_taken_whole(tmp_path):
    path = tmp_path / "task=a:2"
    path.write_text("")
    assert parse_source(str(path)) == DataSource(str(path))


@pytest.mark.parametrize("text", ["a.jsonl:x", "a.jsonl:0", "a.jsonl:-1", "a.jsonl:nan", "a.jsonl:inf", "", "task="])
def test_bad_source_names(text):
    with pytest.raises(DataError):
        parse_source(text)


def test_several_files_are_tasks_by_their_stems():
    found = parse_sources(["x/math.v1.jsonl", "code=y.csv:2", "hub:owner/dialog@train"])
    assert [source.task for source in found] == ["math", "code", "dialog_train"]
    assert parse_sources(["x/math.jsonl"])[0].task == "default"
    assert [s.task for s in parse_sources(["default=a.jsonl", "b.jsonl"])] == ["default", "b"]
    with pytest.raises(DataError, match="the task name 'math' is taken"):
        parse_sources(["x/math.jsonl", "y/math.csv"])
    with pytest.raises(DataError, match="task name"):
        DataSource("a", task="two words")
