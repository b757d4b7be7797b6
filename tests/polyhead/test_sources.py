"""Samples are found in folders, zips, lists and tables, read in place, and decoded right or refused."""

from __future__ import annotations

import io
import multiprocessing
import os
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from polyhead.decoding import decode_image
from polyhead.errors import BadSample, UserError
from polyhead.sources import Location, find, read_bytes


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(seed: int = 0, size: tuple[int, int] = (24, 16)) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def pixels(data: bytes, **options: int) -> np.ndarray:
    image = decode_image(data, **options)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder of two classes in three parts."""
    for n, inner in enumerate(f"{s}/{c}" for s in ("train", "valid", "Test") for c in ("cat", "dog")):
        folder = tmp_path / "tree" / inner
        folder.mkdir(parents=True)
        for k in range(2):
            (folder / f"{k}.png").write_bytes(encode(picture(10 * n + k)))
    return tmp_path / "tree"


def zipped(folder: Path, path: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, prefix + file.relative_to(folder).as_posix())
    return path


def told(entries: list) -> list[tuple]:
    return sorted((e.label, e.split, read_bytes(e.location)) for e in entries)


def test_the_same_samples_whichever_way_they_are_named(tree: Path, tmp_path: Path) -> None:
    folder = find(tree)
    assert {e.split for e in folder} == {"train", "val", "test"}
    assert {e.label for e in folder} == {"cat", "dog"}
    assert folder[0].id == "Test/cat/0.png"
    archive = find(zipped(tree, tmp_path / "tree.zip"))
    assert [(e.id, e.label, e.split) for e in archive] == [(e.id, e.label, e.split) for e in folder]

    rows = [(f"tree/{e.id}", e.label, e.split) for e in folder]
    table = tmp_path / "table.csv"
    table.write_text("split,file,class\n" + "".join(f"{s},{p},{c}\n" for p, c, s in rows))
    tabs = tmp_path / "table.tsv"
    tabs.write_text("path\tlabel\tsplit\n" + "".join(f"{p}\t{c}\t{s}\n" for p, c, s in rows))
    parquet = tmp_path / "table.parquet"
    paths, labels, splits = (list(c) for c in zip(*rows, strict=True))
    pq.write_table(pa.table({"image": paths, "label": labels, "split": splits}), parquet)
    for found in (archive, find(table), find(tabs), find(parquet)):
        assert told(found) == told(folder)
    assert [e.id for e in find(table)] == paths

    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(f"{p},{c}" for p, c, _ in rows) + "\n\n")
    assert [(e.label, read_bytes(e.location)) for e in find(listed)] == [
        (e.label, read_bytes(e.location)) for e in folder
    ]
    listed.write_text("\n".join(paths))
    assert [e.label for e in find(listed)] == [None] * len(paths)


def test_members_of_a_zip_named_by_a_table_and_a_list_beside_it(tree: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    zipped(tree, home / "tree.zip")
    (home / "list.txt").write_text("train/cat/0.png\tcat\n./train/dog/1.png\tdog\nnone.png\n")
    one, two, missing = find(home / "list.txt")
    assert (one.location.member, two.location.member) == ("train/cat/0.png", "train/dog/1.png")
    with pytest.raises(BadSample, match="no such file"):
        read_bytes(missing.location)
    # A short name is found under its row's split and class, or where it is the only one
    (home / "some.csv").write_text("split,label,file\ntrain,cat,0.png\nvalid,dog,1\n")
    rows = find(home / "some.csv")
    assert [e.location.member for e in rows] == ["train/cat/0.png", None]
    assert "fits 6 members" in str(rows[1].location.problem)


def test_a_folder_with_one_zip_and_a_table_is_a_root(tree: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    zipped(tree, home / "tree.zip")
    (home / "README.md").write_text("about")
    plain = find(home)
    assert [e.id for e in plain] == [e.id for e in find(tree)]
    ids = [f"{e.split},{e.label},{e.id},p{i % 3}" for i, e in enumerate(plain)]
    (home / "split.csv").write_text("split,label,file,patient\n" + "\n".join(ids))
    found = find(home, group_column="patient")
    assert [e.group for e in found] == [f"p{i % 3}" for i in range(len(plain))]
    assert [(e.id, e.label, e.split) for e in found] == [(e.id, e.label, e.split) for e in plain]
    assert find(home, everything=True)[0].id == plain[0].id


@pytest.mark.parametrize("name", ["flowers", "chest-xray-pneumonia", "faces-london"])
def test_real_data_folders_are_roots_as_they_lie(shared: Path, name: str) -> None:
    root = shared / "data" / name
    found = find(root)
    assert found == find(root, name=name)
    assert sorted(e.location for e in found) == sorted(e.location for e in find(root / "split.csv"))
    assert {(e.location, e.label, e.split) for e in found} == {
        (e.location, e.label, e.split) for e in find(root / f"{name}.zip")
    }
    assert not any(e.location.problem for e in found)
    decode_image(read_bytes(found[0].location))


def test_outer_folders_and_classes_called_like_parts(tmp_path: Path) -> None:
    for inner in ("pets/cat", "pets/dog/young", "other"):
        (tmp_path / "a/data" / inner).mkdir(parents=True)
        (tmp_path / "a/data" / inner / "x.png").write_bytes(encode(picture()))
    assert [e.label for e in find(tmp_path / "a")] == ["other", "pets", "pets"]
    for inner in ("test", "control"):
        (tmp_path / "b" / inner).mkdir(parents=True)
        (tmp_path / "b" / inner / "x.png").write_bytes(encode(picture()))
    assert [(e.label, e.split) for e in find(tmp_path / "b")] == [("control", None), ("test", None)]


def test_what_counts_as_a_sample(tmp_path: Path) -> None:
    files = "a.png b.dat README.md labels.csv .hidden.png Thumbs.db notes.txt __MACOSX/c.png sub/d.JPG"
    for name in files.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encode(picture()))
    assert [e.id for e in find(tmp_path)] == ["a.png", "sub/d.JPG"]
    assert [e.id for e in find(tmp_path, everything=True)] == ["a.png", "b.dat", "sub/d.JPG"]
    assert [e.id for e in find(tmp_path / "a.png")] == ["a.png"]


def test_prediction_does_without_the_columns_of_training(tree: Path, tmp_path: Path) -> None:
    assert len(find(tree, everything=True, group_column="patient", label_column="kind")) == 12
    table = tmp_path / "new.csv"
    table.write_text("path\ntree/train/cat/0.png\n")
    assert find(table, everything=True, path_column="file", group_column="patient")[0].label is None
    with pytest.raises(UserError, match="no column 'patient'; its columns are path"):
        find(table, group_column="patient")


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda d: d / "gone", {}, "no such file or folder"),
        (lambda d: d, {}, "no images in"),
        (lambda d: _write(d / "x.zip", b"PK\3\4 cut short"), {}, "not a whole zip archive"),
        (lambda d: _write(d / "t.csv", b"a,b\n1,2\n"), {}, r"no column of paths .*its columns are a, b"),
        (lambda d: _write(d / "t.csv", b"path,label\nx.png\n"), {}, "row 2 of .* has 1 cells, its header 2"),
        (lambda d: _write(d / "t.csv", b""), {}, "is empty"),
        (
            lambda d: _write(d / "t.csv", b"path,split\nx.png,later\n"),
            {},
            "'later' is none of train, val, test",
        ),
        (lambda d: _write(d / "t.csv", b"path\nx.png\nx.png\n"), {}, "names x.png twice"),
        (lambda d: _write(d / "t.parquet", b"none"), {}, "cannot read the table"),
        (lambda d: _write(d / "l.txt", b"\xff\xfe\x00"), {}, "not text in UTF-8"),
        (lambda d: _write(d / "l.txt", b"a.png,x\na.png,y\n"), {}, "two labels"),
        (lambda d: _write(d / "a.png", b"").parent, {"group_column": "p"}, "needs the one table"),
        (lambda d: _write(d / "l.txt", b"a.png"), {"label_column": "p"}, "names a column of a table"),
        (lambda d: _write(d / "l.txt", b"a.png"), {"name": "p"}, "chooses in a folder"),
    ],
)
def test_a_wrong_root_is_one_line(tmp_path: Path, make, options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        find(make(tmp_path), **options)
    assert "\n" not in caught.value.message


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_several_archives_are_chosen_by_name(tree: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    zipped(tree, home / "one.zip")
    zipped(tree / "train", home / "two.zip")
    with pytest.raises(UserError, match="--data.name") as caught:
        find(home)
    assert caught.value.hints == ["--data.name one", "--data.name two"]
    assert len(find(home, name="two")) == 4
    assert len(find(home, name="one.zip")) == 12
    with pytest.raises(UserError, match="no archive or table tow"):
        find(home, name="tow")


def test_archives_with_members_that_lead_out(tmp_path: Path) -> None:
    data = encode(picture())
    path = tmp_path / "bad.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("good/a.png", "../b.png", "/abs/c.png", "x/../../d.png", "..\\e.png", "C:/f.png"):
            info = zipfile.ZipInfo("z")
            info.filename = name
            archive.writestr(info, data)
        link = zipfile.ZipInfo("good/link.png")
        link.external_attr = (0o120777) << 16
        archive.writestr(link, "/etc/passwd")
    before = sorted(tmp_path.rglob("*"))
    found = find(path, everything=True)
    reasons = {}
    for entry in found:
        try:
            read_bytes(entry.location)
        except BadSample as error:
            reasons[entry.id] = str(error)
    assert len(found) == 7
    assert set(reasons) == {e.id for e in found} - {"good/a.png"}
    assert all(r.startswith("refused") for r in reasons.values())
    assert ".." not in {e.label for e in found}
    # Nothing is unpacked
    assert sorted(tmp_path.rglob("*")) == before


def test_damaged_encrypted_and_exploding_members(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("secret.png", b"x" * 100)
        archive.writestr("broken.png", os.urandom(1000))
        archive.writestr("bomb.png", bytes(40 * 2**20))
    data = bytearray(path.read_bytes())
    # The encryption flag of the first member, in its own header and in the directory
    data[6] |= 1
    data[data.index(b"PK\1\2") + 8] |= 1
    middle = data.index(b"broken.png") + 300
    data[middle : middle + 20] = bytes(20)
    path.write_bytes(data)
    reasons = {}
    for entry in find(path):
        with pytest.raises(BadSample) as caught:
            read_bytes(entry.location)
        reasons[entry.id] = str(caught.value)
    assert "encrypted" in reasons["secret.png"]
    assert "cannot be read" in reasons["broken.png"]
    assert "decompression bomb" in reasons["bomb.png"]


def test_odd_files_are_bad_samples(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    os.makedirs(tmp_path / "x")
    with open(os.fsencode(tmp_path / "x") + b"/\xff.png", "wb") as file:
        file.write(encode(picture()))
    found = {e.id: e.location for e in find(tmp_path)}
    assert len(found) == 3
    for name, words in (("pipe.png", "not a regular file"), ("dangling.png", "No such file")):
        with pytest.raises(BadSample, match=words):
            read_bytes(found[name])
    odd = next(i for i in found if i.startswith("x/"))
    odd.encode("utf-8")
    assert read_bytes(found[odd])


def _read_all(locations: list[Location]) -> list[bytes]:
    return [read_bytes(x) for x in locations]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_archives_are_read_by_several_processes(tree: Path, tmp_path: Path, method: str) -> None:
    locations = [e.location for e in find(zipped(tree, tmp_path / "t.zip"))]
    here = _read_all(locations)
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(_read_all, [locations] * 4) == [here] * 4


# Decoding


GREY = np.linspace(0, 255, 24 * 16).reshape(16, 24)


def test_grey_palette_and_one_bit() -> None:
    grey = GREY.astype(np.uint8)
    rgb = np.repeat(grey[..., None], 3, 2)
    assert np.array_equal(pixels(encode(Image.fromarray(grey))), rgb)
    palette = picture().quantize(16)
    assert np.array_equal(pixels(encode(palette)), np.asarray(palette.convert("RGB")))
    bits = Image.fromarray(grey > 127)
    assert np.array_equal(pixels(encode(bits)), np.repeat(255 * (grey > 127)[..., None], 3, 2))


def test_transparency_shows_white() -> None:
    rgba = np.zeros((4, 4, 4), dtype=np.uint8)
    rgba[..., 0], rgba[:2, :, 3], rgba[2, :, 3] = 200, 255, 128
    got = pixels(encode(Image.fromarray(rgba)))
    assert got[0, 0].tolist() == [200, 0, 0]
    assert np.abs(got[2, 0] - [227, 127, 127]).max() <= 1
    assert got[3, 0].tolist() == [255, 255, 255]
    grey_alpha = Image.fromarray(np.array([[[10, 0], [10, 255]]], dtype=np.uint8), "LA")
    assert pixels(encode(grey_alpha))[0, :, 0].tolist() == [255, 10]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.putdata([0, 1])
    for kind in ("PNG", "GIF"):
        got = pixels(encode(palette, kind, transparency=0))
        assert got.tolist() == [[[255, 255, 255], [255, 0, 0]]]
    key = Image.fromarray(np.array([[[1, 2, 3], [9, 9, 9]]], dtype=np.uint8))
    assert pixels(encode(key, transparency=(1, 2, 3))).tolist() == [[[255] * 3, [9] * 3]]


def test_cmyk_jpeg_is_not_inverted() -> None:
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    data = encode(cmyk, "JPEG", quality=95)
    assert b"Adobe" in data
    for got in (pixels(data), pixels(encode(cmyk, "TIFF"))):
        assert np.abs(got - [255, 0, 0]).max() <= 6


def test_sixteen_bits_whole_numbers_and_fractions() -> None:
    deep = np.linspace(0, 65535, 24 * 16).reshape(16, 24)
    high = (deep.astype(np.uint16) >> 8).astype(int)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(pixels(encode(Image.fromarray(deep.astype(np.uint16)), kind))[..., 0], high)
    wide = deep.astype(np.int32)
    wide[0, 0] = -5
    assert np.array_equal(pixels(encode(Image.fromarray(wide), "TIFF"))[..., 1], high)
    unit = (GREY / 255).astype(np.float32)
    unit[0, 0] = np.nan
    for scale in (1, 255):
        got = pixels(encode(Image.fromarray(unit * scale), "TIFF"))[..., 2]
        assert np.abs(got - GREY).max() <= 0.51


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_made_upright(kind: str, orientation: int) -> None:
    upright = np.zeros((32, 48, 3), dtype=np.uint8)
    upright[:16, :24], upright[:16, 24:], upright[16:, :24] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    # The stored picture, by the definition of the tag: where row 0 and column 0 of the file lie
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    got = pixels(encode(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options))
    assert got.shape == upright.shape
    assert np.abs(got - upright).mean() < 3


def test_a_damaged_exif_block_does_not_matter() -> None:
    data = encode(picture(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage")
    assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(encode(picture(), "JPEG")))))


def test_the_first_frame_of_an_animation() -> None:
    frames = [picture(i) for i in range(3)]
    for kind in ("GIF", "WEBP", "TIFF"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(pixels(data) - np.asarray(frames[0])).mean() < 12


def bomb(width: int, height: int) -> bytes:
    """A small PNG that declares many pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(min(width * height, 10**6)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"hello, this is text", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
        (bytes(1000), "not an image"),
        (bomb(30000, 30000), "too many pixels"),
        (encode(picture(1, (200, 200)), "JPEG")[:-900], "damaged"),
        (encode(picture(1, (200, 200)))[:-900], "damaged"),
        (encode(picture(1, (200, 200)), "BMP")[:-900], "damaged"),
        (encode(picture(1), "JPEG")[:20], "not an image|damaged"),
    ],
)
def test_what_cannot_be_decoded_has_a_reason(data: bytes, words: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadSample, match=words) as caught:
            decode_image(data)
    assert "\n" not in str(caught.value)


def test_the_pixel_limit_is_per_call_and_global_state_is_left_alone() -> None:
    limit = Image.MAX_IMAGE_PIXELS
    data = encode(picture(0, (100, 50)))
    with pytest.raises(BadSample, match="100 x 50 is more than 4,999"):
        decode_image(data, max_pixels=4999)
    assert decode_image(data, max_pixels=5000).size == (100, 50)
    assert limit == Image.MAX_IMAGE_PIXELS
    # Between Pillow's warning and its error: silent
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadSample, match="damaged|too many"):
            decode_image(bomb(10000, 10000))


def test_a_large_jpeg_is_decoded_small_but_never_below_twice_the_target() -> None:
    data = encode(picture(0, (1600, 1200)), "JPEG")
    assert decode_image(data, target=64).size == (200, 150)
    assert decode_image(data, target=301).size == (1600, 1200)
    assert decode_image(encode(picture(0, (1600, 1200))), target=64).size == (1600, 1200)


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"]),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=20),
    cut=st.floats(0.05, 1),
)
def test_damage_anywhere_gives_a_picture_or_a_reason(kind: str, changes: list[tuple[float, int]], cut: float) -> None:
    data = bytearray(encode(picture(), kind))
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    try:
        image = decode_image(bytes(data[: max(1, int(cut * len(data)))]), max_pixels=10**6)
    except BadSample as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert image.mode == "RGB"
