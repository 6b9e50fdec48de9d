"""Tables from files: `python -m pytest tests/data/test_rows.py`."""

import csv
import io
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamina.data.rows import LABELS, TEXTS, Rows, read
from lamina.errors import UserError


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def columns(rows: Rows) -> dict[str, list[object]]:
    return {name: list(values) for name, values in rows.columns.items()}


HALF = "is half a character (a surrogate without its other half), which no text can have; remove it, or write both"
EXPECTED = {"text": ["a, b", "c\nd"], "label": ["x", "y"]}
OBJECTS = [{"text": "a, b", "label": "x"}, {"text": "c\nd", "label": "y"}]
FORMS = {
    "a.csv": 'text,label\n"a, b",x\n"c\nd",y\n',
    "b.csv": '\ufefftext,label\r\n"a, b",x\r\n\r\n"c\nd",y',
    "a.tsv": 'text\tlabel\na, b\tx\n"c\nd"\ty\n',
    "a.jsonl": "\n".join(map(json.dumps, OBJECTS)) + "\n\n",
    "b.jsonl": '["a, b", "x"]\r\n["c\\nd", "y"]\r\n',
    "a.json": json.dumps(OBJECTS),
    "b.json": json.dumps({"test": [["e", "x"]], "train": [["a, b", "x"], ["c\nd", "y"]], "oos": []}),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_a_table(tmp_path: Path, name: str) -> None:
    for path in (
        put(tmp_path, name, FORMS[name]),
        put(tmp_path, f"{name}.xz", lzma.compress(FORMS[name].encode())),
    ):
        rows, test = read(path, "train")
        assert columns(rows) == EXPECTED
        assert (columns(test) if test else None) == ({"text": ["e"], "label": ["x"]} if name == "b.json" else None)


def test_texts_by_user(tmp_path: Path) -> None:
    rows, _ = read(put(tmp_path, "a.json", '{"anna": "all she wrote", "ben": ""}'), "train")
    assert columns(rows) == {"text": ["all she wrote", ""], "user": ["anna", "ben"]}


def test_plain_text(tmp_path: Path) -> None:
    rows, _ = read(put(tmp_path, "b/2.txt", "two"), "train")
    assert columns(rows) == {"text": ["two"], "file": ["2.txt"]}
    put(tmp_path, "a.txt.xz", lzma.compress(b"one"))
    put(tmp_path, "ignored.md", "# no")
    rows, _ = read(tmp_path, "train")
    assert columns(rows) == {"text": ["one", "two"], "file": ["a.txt.xz", "b/2.txt"]}


def test_folders_of_datasets(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["zebra", "ant"])}
    )
    train = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]}, features=features)
    test = datasets.Dataset.from_dict({"text": ["d"], "label": [0]}, features=features)
    train.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(tmp_path / "two"))
    one, nothing = read(tmp_path / "one", "train")
    two, held = read(tmp_path / "two", "train")
    assert nothing is None
    assert held is not None
    for rows in (one, two):
        assert rows.texts("text") == ["a", "b", "c"]
        assert rows.names("label") == ["ant", "zebra", "ant"]
        assert rows.classes == {"label": ("zebra", "ant")}
    assert held.names("label") == ["zebra"]
    assert read(tmp_path / "two", "test")[0].texts("text") == ["d"]
    unlabelled = datasets.Dataset.from_dict({"text": ["a"], "label": [-1]}, features=features)
    unlabelled.save_to_disk(str(tmp_path / "none"))
    with pytest.raises(UserError, match="row 1: 'label' is -1; the 2 classes are numbered from 0"):
        read(tmp_path / "none", "train")[0].names("label")


def test_datasets_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "state.json", "{}")
    with pytest.raises(UserError, match="cannot be read as a folder of the `datasets` library"):
        read(tmp_path, "train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'lamina\[datasets\]'"):
        read(tmp_path, "train")


cells = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=20)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=6))
def test_nothing_changes_on_the_way(tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    expected = {"text": [text for text, _ in pairs], "label": [label for _, label in pairs]}
    objects = [{"text": text, "label": label} for text, label in pairs]
    table = io.StringIO(newline="")
    writer = csv.writer(table, quoting=csv.QUOTE_ALL)
    writer.writerows([("text", "label"), *pairs])
    for name, content in (
        ("a.csv", table.getvalue()),
        ("a.jsonl", "\n".join(json.dumps(each, ensure_ascii=False) for each in objects)),
        ("a.json", json.dumps(objects, ensure_ascii=False)),
    ):
        assert columns(read(put(tmp_path, name, content), "train")[0]) == expected


def test_a_value_may_be_long(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    rows, _ = read(put(tmp_path, "a.csv", f"text\n{'x' * 200_000}\n"), "train")
    assert len(rows.texts("text")[0]) == 200_000
    assert csv.field_size_limit() == limit


def test_columns_are_found_by_their_usual_names() -> None:
    rows = Rows("F", {"id": [], "Sentence": [], "Category": [], "text": []})
    assert (rows.find("text", None, TEXTS), rows.demand("label", None, LABELS)) == ("text", "Category")
    assert rows.find("text", "id", TEXTS) == "id"
    assert rows.find("user", None, ("user",)) is None
    with pytest.raises(UserError) as caught:
        rows.find("text", "Sentences", TEXTS)
    assert str(caught.value) == (
        "task.text: F has no column 'Sentences'; did you mean 'Sentence'? accepted: id, Sentence, Category, text"
    )
    with pytest.raises(UserError) as caught:
        rows.demand("user", None, ("user", "author"))
    assert str(caught.value) == (
        "task.user must name a column of F: id, Sentence, Category, text; none has a usual name: user, author"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", None], "F, row 2: 'label' is empty"),
        (["a", " "], "F, row 2: 'label' is empty"),
        (["a", 1], "F, row 2: 'label' is an integer, in the first row it is text; make them alike"),
        ([1, "a"], "F, row 2: 'label' is text, in the first row it is an integer; make them alike"),
        ([1.5], "F, row 1: 'label' must be text or an integer, got a number"),
        ([True], "F, row 1: 'label' must be text or an integer, got true or false"),
        ([["a"]], "F, row 1: 'label' must be text or an integer, got a list"),
    ],
)
def test_labels_that_are_none(values: list[object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Rows("F", {"label": values}).names("label")
    assert str(caught.value) == message


def test_texts_and_names() -> None:
    rows = Rows("F", {"a": ["x", ""], "b": [3, 12], "c": ["x", 3]})
    assert (rows.texts("a"), rows.names("b")) == (["x", ""], ["3", "12"])
    with pytest.raises(UserError, match="F, row 2: 'c' must be text, got an integer"):
        rows.texts("c")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "text,label\na,b,c\n",
            "PATH, line 2: 3 values, the header has 2; a value with ',' in it must be in quotes",
        ),
        ("a.csv", 'text,label\n"a,b\n', "PATH, line 2: unexpected end of data"),
        ("a.csv", "text,text\na,b\n", "PATH: two columns have the same name; the header is text, text"),
        ("a.csv", "text,label\n", "PATH has no rows"),
        ("a.csv", "", "PATH has no rows"),
        ("a.csv", b"text\n\xe9\n", "PATH is not UTF-8 text: byte 5 cannot be decoded"),
        ("a.csv.xz", b"text\n", "PATH is not a whole xz file (Input format not supported by decoder)"),
        (
            "a.jsonl",
            '{"text": "a"}\n\n{"text": \n',
            "PATH, line 3 is not JSON: Expecting value: line 1 column 10 (char 9)",
        ),
        ("a.jsonl", '{"text": "a"}\n3\n', "PATH, row 2 must be an object or [text, label], got an integer"),
        ("a.json", "[[", "PATH is not JSON: Expecting value: line 1 column 3 (char 2)"),
        ("a.json", "[" * 100_000, "PATH is not JSON: "),
        ("a.json", '[["\\ud83d\\ude00 \\\\ud83d", "b"],\n["a", "x\\uD83D"]]', f"PATH, line 2: \\uD83D {HALF}"),
        ("a.jsonl", '["a", "\\\\\\\\"]\n\n["a", "\\ude00\\ud83d"]', f"PATH, line 3: \\ude00 {HALF}"),
        ("a.json", '["a"]', "PATH, row 1 must be an object or [text, label], got text"),
        ("a.json", '{"train": ["a"]}', "PATH, part 'train', row 1 must be an object or [text, label], got text"),
        ("a.json", "3", "PATH must hold a list of rows, an object of such lists by part, or of texts by user"),
        ("a.json", "{}", "PATH must hold a list of rows, an object of such lists by part, or of texts by user"),
        ("a.json", '{"a": "b", "c": 1}', "PATH must hold a list of rows, an object of such lists by part, or of texts"),
        ("a.json", '{"trian": [["a", "b"]]}', "PATH has no part 'train'; did you mean 'trian'? accepted: trian"),
        ("a.json", '{"train": []}', "PATH, part 'train' has no rows"),
        ("a.txt", " \n", "PATH holds no text"),
        ("a.parquet", "", "PATH is of an unknown kind: the name must end in .csv or .tsv or .jsonl or .json or "),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = put(tmp_path, name, content)
    with pytest.raises(UserError) as caught:
        read(path, "train")
    assert str(caught.value).startswith(message.replace("PATH", str(path)))


def test_paths_that_cannot_be_used(tmp_path: Path) -> None:
    put(tmp_path, "mine.csv", "text\na\n")
    with pytest.raises(UserError, match=r"mini\.csv does not exist; did you mean .*mine\.csv\?"):
        read(tmp_path / "mini.csv", "train")
    with pytest.raises(UserError, match=r"has no file \.txt or \.txt\.xz, and is no folder of the `datasets` library"):
        read(tmp_path, "train")
