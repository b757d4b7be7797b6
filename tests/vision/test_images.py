"""Image data: the same row whichever way an image is named, repeatable training, honest parts and classes."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from polyhead.errors import BadSample, UserError
from polyhead.pictures import Augment, Square
from vision import ImageData


def noise(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def save(path: Path, image: Image.Image, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def classes_tree(root: Path, counts: dict[str, int], width: int = 48) -> Path:
    for c, (inner, count) in enumerate(counts.items()):
        for k in range(count):
            save(root / inner / f"{k:02d}.jpg", noise(100 * c + k, width))
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return classes_tree(tmp_path / "pets", {"cat": 10, "dog": 10})


def rows(data: ImageData, stage: str = "predict") -> dict[str, torch.Tensor | str]:
    """What each sample is: its image, or the reason why there is none."""
    data.setup(stage)
    result: dict[str, torch.Tensor | str] = {}
    for batch in data.predict_dataloader():
        result |= dict(zip(batch["id"], batch.get("image", []), strict=True))
        result |= {e.id: e.reason for e in batch["errors"]}
    return result


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A file of every kind that people have."""
    root = tmp_path / "zoo"
    picture, grey = noise(0), noise(1).convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = (np.asarray(grey).astype(np.uint16) << 8) + 7
    alpha = picture.copy()
    alpha.putalpha(128)
    jpeg = encode(picture, "JPEG")
    files = {
        "good.jpg": jpeg,
        "large.jpg": encode(noise(2, 900, 700), "JPEG"),
        "grey.png": encode(grey, "PNG"),
        "rgba.png": encode(alpha, "PNG"),
        "palette.gif": encode(picture.quantize(32), "GIF"),
        "cmyk.jpg": encode(picture.convert("CMYK"), "JPEG"),
        "deep.png": encode(Image.fromarray(deep), "PNG"),
        "turned.jpg": encode(picture, "JPEG", exif=exif),
        "bits.tif": encode(picture.convert("1"), "TIFF"),
        "wrong_name.png": jpeg,
        "no_name": jpeg,
        "sub/deeper/a.webp": encode(picture, "WEBP"),
        "thin.png": encode(noise(3, 4000, 2), "PNG"),
        "cut.jpg": jpeg[:-300],
        "empty.jpg": b"",
        "text.jpg": b"this is no picture",
        "other.bin": bytes(range(256)),
        "big.png": encode(Image.new("L", (1000, 1000)), "PNG"),
    }
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root / "README.txt").write_text("not a sample")
    return root


BAD = {
    "cut.jpg": "damaged",
    "empty.jpg": "empty",
    "text.jpg": "not an image",
    "other.bin": "not an image",
    "big.png": "too many pixels",
}


def test_every_kind_of_file_gives_the_same_row_whichever_way_it_is_named(zoo: Path, tmp_path: Path) -> None:
    names = sorted(p.relative_to(zoo).as_posix() for p in zoo.rglob("*") if p.is_file() and p.suffix != ".txt")
    with zipfile.ZipFile(tmp_path / "zoo.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.write(zoo / name, name)
    home = tmp_path / "home"
    home.mkdir()
    (home / "zoo.zip").write_bytes((tmp_path / "zoo.zip").read_bytes())
    (zoo / "names.lst").write_text("\n".join(names))
    (zoo / "names.csv").write_text("path\n" + "\n".join(names))
    options: dict[str, Any] = {
        "image_size": 32,
        "classes": ["a", "b"],
        "max_pixels": 900_000,
        "batch_size": 4,
    }
    roots = [zoo, tmp_path / "zoo.zip", home, zoo / "names.lst", zoo / "names.csv", home / "zoo.zip"]
    expected = rows(ImageData(root=str(zoo), **options))
    assert sorted(expected) == names
    for name, row in expected.items():
        if name in BAD:
            assert isinstance(row, str) and BAD[name] in row, name
        else:
            assert isinstance(row, torch.Tensor), (name, row)
            assert row.shape == (3, 32, 32) and row.dtype == torch.uint8
    for root in roots:
        for workers in (0, 2) if root == roots[1] else (0,):
            got = rows(ImageData(root=str(root), num_workers=workers, **options))
            assert got.keys() == expected.keys()
            for name, row in expected.items():
                same = torch.equal(got[name], row) if isinstance(row, torch.Tensor) else got[name] == row
                assert same, (root, name)
    # The Python door: paths, bytes
    data = ImageData(**options)
    for items in ([str(zoo / n) for n in names], [(zoo / n).read_bytes() for n in names]):
        samples = data.raw_dataset(items)
        for k, name in enumerate(names):
            if name in BAD:
                with pytest.raises(BadSample, match=BAD[name]):
                    samples.load(k, 0)
            else:
                assert torch.equal(samples.load(k, 0)["image"], expected[name])
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".jpg") and zoo not in p.parents]


def test_raw_inputs_of_all_types_agree(tmp_path: Path) -> None:
    image = noise(5)
    save(tmp_path / "x.png", image)
    array = np.asarray(image)
    items = [tmp_path / "x.png", (tmp_path / "x.png").read_bytes(), image, array]
    items += [torch.from_numpy(array.copy()).permute(2, 0, 1), Image.open(tmp_path / "x.png")]
    samples = ImageData(image_size=24, classes=["a", "b"]).raw_dataset(items)
    first = samples.load(0, 0)["image"]
    for k in range(len(items)):
        assert torch.equal(samples.load(k, 0)["image"], first)
    assert samples.ids[0] == str(tmp_path / "x.png") and len(set(samples.ids)) == len(items)
    grey = ImageData(image_size=24, classes=["a", "b"]).raw_dataset([array[..., 0], array[None, ..., 0]])
    assert grey.load(0, 0)["image"].shape == (3, 24, 24)
    for wrong, words in ((array[None], "an array must be"), (array / 255, "float64"), (3, "type int is no")):
        with pytest.raises(UserError, match=words):
            ImageData(classes=["a", "b"]).raw_dataset([wrong]).load(0, 0)


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(20, 150), height=st.integers(20, 150), size=st.integers(8, 64),
    crop=st.sampled_from([0.875, 0.95, 1.0]),
)  # fmt: skip
def test_evaluation_is_the_usual_resize_and_centre_crop(width: int, height: int, size: int, crop: float) -> None:
    image = noise(0, width, height)
    usual = v2.Compose(
        [v2.Resize(round(size / crop), v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(size)]
    )
    ours, theirs = (np.asarray(f(image)).astype(int) for f in (Square(size, crop), usual))
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 2


def test_squares_of_other_kinds() -> None:
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    padded = np.asarray(Square(20, resize="pad")(image))
    assert padded[:5].max() == 0 and padded[15:].max() == 0 and (padded[5:15, :, 0] == 255).all()
    half = Image.new("RGB", (40, 20), (255, 0, 0))
    half.paste((0, 0, 255), (20, 0, 40, 20))
    squashed = np.asarray(Square(20, resize="squash")(half))
    assert squashed[0, 1].tolist() == [255, 0, 0] and squashed[0, 18].tolist() == [0, 0, 255]
    # Extreme shapes never make a large picture on the way
    assert Square(64)(Image.new("RGB", (300_000, 1))).size == (64, 64)


AUGMENTATIONS: list[dict[str, Any]] = [
    {},
    {"policy": "trivial"},
    {"policy": "rand", "colour": 0.4, "erase": 0.5, "flip_vertical": 0.5},
    {"scale": None, "cache": "none"},
]


@pytest.mark.parametrize("options", AUGMENTATIONS)
def test_training_samples_are_a_function_of_seed_epoch_and_index(tree: Path, options: dict) -> None:
    def epoch(workers: int, number: int, seed: int = 1) -> dict[str, torch.Tensor]:
        data = ImageData(
            root=str(tree), image_size=32, batch_size=5, num_workers=workers, seed=seed, val_fraction=0.5,
            test_fraction=0, **options,
        )  # fmt: skip
        data.setup("fit")
        loader = data.train_dataloader()
        loader.batch_sampler.set_epoch(number)
        batches = list(loader)
        images = torch.cat([b["image"] for b in batches])
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 32, 32)
        assert all(b["label"].dtype == torch.int64 for b in batches)
        return dict(zip([i for b in batches for i in b["id"]], images, strict=True))

    state = torch.get_rng_state()
    here, there = epoch(0, 3), epoch(2, 3)
    assert torch.equal(state, torch.get_rng_state())
    assert list(here) == list(there)
    assert all(torch.equal(here[i], there[i]) for i in here)
    torch.manual_seed(123)
    again = epoch(0, 3)
    assert all(torch.equal(here[i], again[i]) for i in here)
    other = epoch(0, 4)
    assert list(other) != list(here)
    differ = [not torch.equal(here[i], other[i]) for i in here]
    assert sum(differ) >= len(differ) // 4


def test_what_is_remembered_never_changes_a_sample(tmp_path: Path) -> None:
    root = classes_tree(tmp_path / "big", {"train/a": 4, "train/b": 4, "val/a": 2, "val/b": 2}, width=200)
    images = []
    for limit, workers in ((2048, 0), (0, 0), (2048, 1)):
        data = ImageData(root=str(root), image_size=32, cache_limit_mb=limit, num_workers=workers)
        data.setup("fit")
        for split in ("train", "val"):
            samples = data.samples(split)  # type: ignore[arg-type]
            copy = pickle.loads(pickle.dumps(samples))
            for i in range(len(samples)):
                sample = samples.load(i, 0)["image"]
                # Read again from memory, and in a process that has none
                assert torch.equal(sample, samples.load(i, 0)["image"])
                assert torch.equal(sample, copy.load(i, 0)["image"])
                images.append(sample)
    third = len(images) // 3
    for k in range(third):
        assert torch.equal(images[k], images[third + k])
        assert torch.equal(images[k], images[2 * third + k])


def test_memory_keeps_to_its_limit(tmp_path: Path) -> None:
    root = classes_tree(tmp_path / "big", {"train/a": 30, "train/b": 30, "val/a": 2, "val/b": 2}, width=200)
    data = ImageData(root=str(root), image_size=224, cache_limit_mb=1)
    data.setup("fit")
    samples: Any = data.samples("train")
    samples.remember()
    held = sum(image.nbytes for image in samples._memory if image is not None)
    assert 2**19 < held <= 2**20


def test_random_crops_stay_inside_and_keep_their_share() -> None:
    augment = Augment(Square(16), scale=(0.2, 0.6))
    for size in ((100, 50), (50, 100), (1000, 10)):
        for seed in range(50):
            draws = torch.rand(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
            left, top, right, bottom = augment._box(size, draws)
            assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
            if size != (1000, 10):
                assert 0.19 <= (right - left) * (bottom - top) / 5000 <= 0.61
            assert 0.74 <= (right - left) / (bottom - top) <= 1.34


def test_a_mirror_of_probability_one_mirrors() -> None:
    augment = Augment(Square(40), scale=None, flip=1.0, flip_vertical=1.0)
    image = noise(3, 40, 40)
    got = augment(image, torch.Generator())
    assert np.array_equal(got.permute(1, 2, 0).numpy(), np.asarray(image)[::-1, ::-1])


def test_the_embedded_digits() -> None:
    data = ImageData(image_size=32)
    assert data.facts() == {"classes": [str(i) for i in range(10)]}
    data.setup("fit")
    data.setup("test")
    sizes = {s: len(data.samples(s)) for s in ("train", "val", "test")}  # type: ignore[arg-type]
    assert sum(sizes.values()) == 1797 and min(sizes.values()) > 250
    ids = [i for s in sizes for i in data.samples(s).ids]  # type: ignore[arg-type]
    assert sorted(ids) == [f"digits/{i:04d}" for i in range(1797)]
    # The split does not move with the seed
    other = ImageData(image_size=32, seed=5)
    other.setup("test")
    assert other.samples("test").ids == data.samples("test").ids
    sample = data.samples("val").load(0, 0)
    assert sample["image"].shape == (3, 32, 32) and sample["image"].max() > 200
    assert torch.equal(sample["image"][0], sample["image"][1])
    assert data.check() == [] and sum(data.class_counts()) == sizes["train"]
    assert len(rows(ImageData(image_size=8))) == 1797


@pytest.mark.parametrize("name", ["flowers", "faces-london", "chest-xray-pneumonia"])
def test_real_data_as_it_lies(shared: Path, name: str) -> None:
    data = ImageData(root=str(shared / "data" / name), image_size=64)
    for stage in ("fit", "test"):
        data.setup(stage)
    expected = {
        "flowers": (2593, 528, 546),
        "faces-london": (124, 30, 50),
        "chest-xray-pneumonia": (1633, 284, 977),
    }
    parts: tuple[Any, ...] = ("train", "val", "test")
    assert tuple(len(data.samples(s)) for s in parts) == expected[name]
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (64, 3, 64, 64)
    assert set(batch["label"].tolist()) <= set(range(len(data.classes or [])))
    assert batch["errors"] == []


def test_parts_of_a_group_stay_together(tmp_path: Path, shared: Path) -> None:
    table = (shared / "data/faces-london/split.csv").read_text().splitlines()
    # Without the split column the parts are cut, by person
    (tmp_path / "faces-london.zip").symlink_to(shared / "data/faces-london/faces-london.zip")
    (tmp_path / "people.csv").write_text("\n".join(line.split(",", 1)[1] for line in table))
    data = ImageData(root=str(tmp_path / "people.csv"), group_column="subject", image_size=32)
    data.setup("fit")
    people = [{data.entries()[i].group for i in part} for part in data.parts().values()]
    assert sum(map(len, people)) == 102 == len(set.union(*people))
    assert min(map(len, people)) >= 14


def _tree(counts: dict[str, int]) -> Callable[[Path], dict[str, Any]]:
    return lambda tmp: {"root": str(classes_tree(tmp / "data", counts))}


FULL = {"train/a": 2, "train/b": 2, "val/a": 1, "val/b": 1}


@pytest.mark.parametrize(
    ("make", "options", "stage", "words"),
    [
        (
            _tree({"train/a": 2, "train/b": 2, "val/a": 1}),
            {},
            "fit",
            "class 'b' is missing from the val part",
        ),
        (_tree({**FULL, "val/c": 1}), {}, "fit", "class 'c' that is none of: a, b"),
        (_tree(FULL), {}, "test", "has no test part, only train .*, val"),
        (_tree({"test/a": 2, "test/b": 2}), {}, "fit", "has no train part"),
        (_tree(FULL), {"val_fraction": 0.0, "classes": ["b", "x"]}, "fit", "class 'a' that is none of: b, x"),
        (_tree(FULL), {"classes": ["a", "b", "c"]}, "fit", "class 'c' is missing from the train part"),
        (_tree({"a": 9, "b": 1}), {}, "fit", "class b has too few samples"),
        (_tree({"a": 9, "b": 9}), {"val_fraction": 0.0}, "fit", "has no val part"),
        (_tree({".": 4}), {}, "fit", "00.jpg has no class"),
        (_tree(FULL), {"crop_fraction": 1.5}, "fit", "data.crop_fraction is 1.5"),
        (_tree(FULL), {"scale": (0.9, 0.5)}, "fit", "data.scale"),
        (_tree(FULL), {"flip": 2.0}, "fit", "data.flip is 2"),
        (lambda tmp: {"root": str(tmp / "nowhere")}, {}, "fit", "no such file or folder"),
        (lambda tmp: {"name": "x"}, {}, "fit", "data.name needs data.root"),
    ],
)
def test_a_person_s_mistake_is_one_line(tmp_path: Path, make, options: dict, stage: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        ImageData(**make(tmp_path), **options).setup(stage)
    assert "\n" not in caught.value.message


def test_bad_members_stop_a_training_by_name_unless_skipped(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("a/0.png", "a/1.png", "a/2.png", "b/0.png", "b/1.png", "b/2.png", "../evil.png"):
            archive.writestr(name, encode(noise(0), "PNG"))
    with pytest.raises(UserError, match=r"cannot read \.\./evil.png: refused"):
        ImageData(root=str(tmp_path / "a.zip")).setup("fit")
    data = ImageData(root=str(tmp_path / "a.zip"), on_error="skip")
    data.setup("fit")
    assert data.classes == ["a", "b"]
    assert data.plan()["left out"] == "1 without a part or unreadable"
    predicted = rows(ImageData(root=str(tmp_path / "a.zip"), image_size=16, classes=["a", "b"]))
    assert len(predicted) == 7 and "refused" in str(predicted["../evil.png"])


def test_prediction_keeps_the_classes_of_the_checkpoint(tree: Path) -> None:
    data = ImageData(root=str(tree), classes=["dog", "cat", "bird"], image_size=16)
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    assert data.facts() == {"classes": ["dog", "cat", "bird"]}
    assert {(i[:3], int(k)) for i, k in zip(batch["id"], batch["label"], strict=True)} == {
        ("cat", 1),
        ("dog", 0),
    }
    unlabelled = ImageData(root=str(tree / "cat"), classes=["x", "y"], image_size=16)
    unlabelled.setup("predict")
    assert "label" not in next(iter(unlabelled.predict_dataloader()))


def test_doctor_counts_and_finds_bad_files(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "cat" / "bad.jpg").write_bytes(b"x")
    (tree / "cat" / "notes.docx").write_bytes(b"x")
    data = ImageData(root=str(tree))
    assert data.check() == [("cat/bad.jpg", "not an image in a format that is read here")]
    assert "check pets" in capsys.readouterr().err
    summary = data.summary()
    assert summary["pictures"] == 21 and summary["classes"] == 2
    assert sum(summary[part]["cat"] for part in ("train", "val", "test")) == 11
    assert summary["left out"] == {"not pictures": 1}
    flat = ImageData(root=str(tree / "dog"))
    assert flat.summary() == {"pictures": 10, "classes": "none"}
