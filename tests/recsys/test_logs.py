"""Reading logs: every layout of the same events gives the same log, and what cannot be read is named."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyhead.errors import UserError
from recsys.logs import LogFormat, core, read_log

USERS = [2, 1, 2, 1, 2, 3]
ITEMS = ["b", "a", "c", "c", "a", "b"]
TIMES = [30, 10, 10, 20, 20, 5]
# In order of user and time
EXPECTED = [(1, "a"), (1, "c"), (2, "c"), (2, "a"), (2, "b"), (3, "b")]


def events(log: Any) -> list[tuple[Any, Any]]:
    return [(log.users[u], log.items[i]) for u, i in zip(log.user, log.item, strict=True)]


def table(user: str = "user_id", item: str = "item_id", time: str = "timestamp") -> pa.Table:
    return pa.table({user: USERS, item: ITEMS, time: TIMES})


def write_csv(path: Path, content: pa.Table, separator: str = ",") -> Path:
    pacsv.write_csv(content, path, pacsv.WriteOptions(delimiter=separator))
    return path


def parquet(folder: Path) -> Path:
    pq.write_table(table("userId", "movieId", "ts"), folder / "log.parquet")
    return folder / "log.parquet"


def comma(folder: Path) -> Path:
    return write_csv(folder / "log.csv", table())


def semicolon(folder: Path) -> Path:
    return write_csv(folder / "log.csv", table(), ";")


def recbole(folder: Path) -> Path:
    content = table("user_id:token", "item_id:token", "timestamp:float")
    return write_csv(folder / "log.inter", content, "\t")


def recbole_lists(folder: Path) -> Path:
    lines = ["user_id:token\titem_id_list:token_seq", "1\ta c", "2\tc a b", "3\tb"]
    (folder / "log.inter").write_text("\n".join(lines))
    return folder / "log.inter"


def lists(folder: Path) -> Path:
    content = pa.table({"user_id": [1, 2, 3], "items": [["a", "c"], ["c", "a", "b"], ["b"]]})
    pq.write_table(content, folder / "log.parquet")
    return folder


def zipped(folder: Path) -> Path:
    write_csv(folder / "log.csv", table())
    with zipfile.ZipFile(folder / "log.zip", "w") as archive:
        archive.write(folder / "log.csv", "inside/log.csv")
        archive.writestr("README.txt", "about")
    (folder / "log.csv").unlink()
    return folder


def dates(folder: Path) -> Path:
    times = [f"2024-01-{d:02d} 10:00:00" for d in TIMES]
    return write_csv(folder / "log.csv", table().set_column(2, "timestamp", pa.array(times)))


def floats(folder: Path) -> Path:
    pq.write_table(table().set_column(0, "user_id", pa.array([float(u) for u in USERS])), folder / "log.parquet")
    return folder


def beside_another(folder: Path) -> Path:
    write_csv(folder / "items.csv", pa.table({"item_id": ["a"], "title": ["A"]}))
    write_csv(folder / "log.csv", table())
    return folder


LAYOUTS = [parquet, comma, semicolon, recbole, recbole_lists, lists, zipped, dates, floats, beside_another]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_events(layout: Callable[[Path], Path], tmp_path: Path) -> None:
    log = read_log(layout(tmp_path))
    assert events(log) == EXPECTED
    assert log.items == ["a", "b", "c"] and log.users == [1, 2, 3]


def test_columns_of_any_name_and_the_order_of_rows(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "log.csv", table("who", "what", "when"))
    named = LogFormat({"user": "who", "item": "what", "time": "when"})
    assert events(read_log(path, format=named)) == EXPECTED
    rows = LogFormat({"user": "who", "item": "what"}, order="rows")
    assert events(read_log(path, format=rows)) == [(1, "a"), (1, "c"), (2, "b"), (2, "c"), (2, "a"), (3, "b")]


def test_a_list_in_text_is_read_as_told(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,history\n1,a|c\n2,c|a|b\n3,b\n")
    assert events(read_log(tmp_path, format=LogFormat(list_separator="|"))) == EXPECTED


def test_parts_are_read_as_one(tmp_path: Path) -> None:
    for number in range(3):
        pq.write_table(table().slice(2 * number, 2), tmp_path / f"part-{number}.parquet")
    assert events(read_log(tmp_path, "part-*")) == EXPECTED
    with pytest.raises(UserError, match="several logs"):
        read_log(tmp_path)


def test_duplicates_are_counted_and_left_out_or_kept(tmp_path: Path) -> None:
    double = pa.concat_tables([table(), table().slice(1, 2)])
    path = write_csv(tmp_path / "log.csv", double)
    log = read_log(path)
    assert log.duplicates == 2 and events(log) == EXPECTED
    kept = read_log(path, format=LogFormat(duplicates="keep"))
    assert kept.duplicates == 2 and len(kept.user) == 8


def test_a_repeated_item_is_no_duplicate(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "log.csv", pa.table({"user": [1, 1, 1], "item": [5, 5, 5], "time": [1, 2, 3]}))
    log = read_log(path)
    assert len(log.user) == 3 and log.duplicates == 0


def broken(text: str, suffix: str = ".csv", **options: Any) -> tuple[str, str, dict[str, Any]]:
    return text, suffix, options


BROKEN = {
    "no time": (broken("user,item\n1,2\n"), "--data.order rows"),
    "no user": (broken("a,item,time\n1,2,3\n"), "--data.user_column"),
    "another name": (broken("user,item,time\n1,2,3\n", columns={"item": "itm"}), "no column 'itm'"),
    "strange separator": (broken("user^item^time\n1^2^3\n"), "--data.user_column"),
    "long separator": (broken("user::item::time\n1::2::3\n", separator="::"), "--data.separator"),
    "a gap": (broken("user,item,time\n1,,3\n"), "without an item"),
    "no time here": (broken("user,item,time\n1,2,\n"), "without a time"),
    "words for times": (broken("user,item,time\n1,2,soon\n"), "'soon'"),
    "nothing": (broken(""), "log.csv"),
    "a header": (broken("user,item,time\n"), "no events"),
    "ragged": (broken("user,item,time\n1,2,3\n4,5\n"), "cannot read log.csv"),
    "no parquet": (broken("user,item,time\n1,2,3\n", ".parquet"), "cannot read log.parquet"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_read_is_named(case: str, tmp_path: Path) -> None:
    (text, suffix, options), message = BROKEN[case]
    path = tmp_path / f"log{suffix}"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_log(path, format=LogFormat(**options))
    assert message in caught.value.message + " ".join(caught.value.hints)


def test_incomplete_rows_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,item,time\n1,a,3\n1,,4\n,b,5\n2,c,\n2,c,7\n")
    log = read_log(tmp_path, format=LogFormat(skip=True))
    assert log.incomplete == 3 and events(log) == [(1, "a"), (2, "c")]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_the_core_is_the_largest_part_in_which_all_have_enough(pairs: list[tuple[int, int]], least: int) -> None:
    user, item = (np.array(v) for v in zip(*pairs, strict=True))
    keep = core(user, item, least)
    rest = list(range(len(pairs)))
    while True:
        counts = [[pairs[r][side] for r in rest] for side in (0, 1)]
        left = [r for r in rest if all(counts[s].count(pairs[r][s]) >= least for s in (0, 1))]
        if left == rest:
            break
        rest = left
    assert np.flatnonzero(keep).tolist() == rest


# Messy tables


def text(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_part_that_cannot_be_read_is_not_left_out(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "part-0.parquet")
    (tmp_path / "part-1.parquet").write_bytes(b"PAR1 no")
    for name in ("part-*", None):
        with pytest.raises(UserError, match="cannot read part-1.parquet"):
            read_log(tmp_path, name)
    pq.write_table(table(item="itm"), tmp_path / "part-1.parquet")
    with pytest.raises(UserError, match="part-1.parquet has no column for the item"):
        read_log(tmp_path, "part-*")
    assert len(read_log(tmp_path).item) == len(ITEMS)  # beside a log other tables may lie


def test_parts_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number, item in ((1, "a"), (2, "b"), (10, "c")):
        text(tmp_path / f"part-{number}.csv", "user,item", f"1,{item}")
    assert events(read_log(tmp_path, "part-*", LogFormat(order="rows"))) == [(1, "a"), (1, "b"), (1, "c")]


def test_parts_of_other_kinds_are_refused(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "part-0.parquet")
    content = table().set_column(0, "user_id", pa.array([str(u) for u in USERS]))
    pq.write_table(content, tmp_path / "part-1.parquet")
    with pytest.raises(UserError, match="users are numbers in some tables and text in others"):
        read_log(tmp_path, "part-*")
    times = pa.array([f"2024-01-0{n + 1}" for n in range(6)])
    pq.write_table(table().set_column(2, "timestamp", times), tmp_path / "part-1.parquet")
    with pytest.raises(UserError, match="some times are dates and others numbers"):
        read_log(tmp_path, "part-*")


def test_lists_that_have_one_time_each_are_put_in_its_order(tmp_path: Path) -> None:
    content = {"user": [1, 1, 2], "item": [["c", "d", "c"], ["a", "b"], ["x"]], "time": [20, 10, 5]}
    pq.write_table(pa.table(content), tmp_path / "log.parquet")
    log = read_log(tmp_path)
    assert [i for u, i in events(log) if u == 1] == ["a", "b", "c", "d", "c"]
    assert log.duplicates == 0 and log.time is not None


def test_a_list_of_items_needs_as_many_times(tmp_path: Path) -> None:
    content = {"user": [1, 2], "item": [["a", "b"], ["c"]], "time": [[2], [3, 9]]}
    pq.write_table(pa.table(content), tmp_path / "log.parquet")
    with pytest.raises(UserError, match="have different lengths"):
        read_log(tmp_path)


@pytest.mark.parametrize(
    ("cell", "separator"), [("[1, 22, 3]", ","), ("1 22  3", " "), (" 1|22|3", "|"), ("['1', '22', '3']", ",")]
)
def test_lists_in_text_lose_brackets_blanks_and_quotes(cell: str, separator: str, tmp_path: Path) -> None:
    pacsv.write_csv(pa.table({"user": ["u"], "items": [cell]}), tmp_path / "log.csv")
    assert events(read_log(tmp_path, None, LogFormat(list_separator=separator))) == [("u", 1), ("u", 22), ("u", 3)]


def test_a_list_in_text_that_nothing_tells_is_refused(tmp_path: Path) -> None:
    text(tmp_path / "log.csv", "user,items", 'u,"[1, 2]"')
    with pytest.raises(UserError, match="--data.list_separator"):
        read_log(tmp_path, None, LogFormat(order="rows"))


def test_a_list_of_fixed_size_is_a_list(tmp_path: Path) -> None:
    items = pa.array([[1, 2], [3, 4]], pa.list_(pa.int64(), 2))
    pq.write_table(pa.table({"user": [1, 2], "item": items}), tmp_path / "log.parquet")
    assert events(read_log(tmp_path)) == [(1, 1), (1, 2), (2, 3), (2, 4)]


@pytest.mark.parametrize("zone", ["-05:00", "+0200", "Z", " UTC"])
def test_times_with_a_zone(zone: str, tmp_path: Path) -> None:
    text(tmp_path / "log.csv", "user,item,time", f"1,b,2024-01-31T12:00:01{zone}", f"1,a,2024-01-31T12:00:00{zone}")
    assert events(read_log(tmp_path)) == [(1, "a"), (1, "b")]


def test_blanks_and_floats_make_no_other_ids(tmp_path: Path) -> None:
    text(tmp_path / "log.csv", "user_id, item_id, timestamp", " 1,10.0,1", "1,11.0,2", "1 ,10.0,3")
    assert events(read_log(tmp_path)) == [(1, 10), (1, 11), (1, 10)]
    text(tmp_path / "log.csv", "user,item,time", "1,1.0,1", "1,1.5,2")
    assert events(read_log(tmp_path)) == [(1, "1.0"), (1, "1.5")]


def test_a_tab_can_be_written_and_archives_are_known(tmp_path: Path) -> None:
    text(tmp_path / "log.csv", "user\titem\ttime", "1\ta\t1")
    assert events(read_log(tmp_path, None, LogFormat(separator="\\t"))) == [(1, "a")]
    (tmp_path / "log.csv.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match="is compressed"):
        read_log(tmp_path / "log.csv.gz")
