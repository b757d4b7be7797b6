"""Radiographs: what the readers make of files as scanners write them, and how parts and pictures are made."""

from __future__ import annotations

import subprocess
import sys
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medical.radiographs import MonaiAugment, RadiographData, read_radiograph
from polyhead.data import BatchOrder, generator
from polyhead.errors import BadSample, UserError
from polyhead.pictures import Square
from polyhead.sources import Location

RAMP = np.arange(0, 4096, dtype=np.uint16).reshape(64, 64)


def dicom(path: Path, pixels: np.ndarray = RAMP, bits: int = 12, **tags: Any) -> Path:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.PatientID, file.StudyInstanceUID, file.SOPInstanceUID = "P-7", "1.2.3", "1.2.3.4"
    file.Rows, file.Columns = pixels.shape[-2:]
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, bits, bits - 1, 0
    for name, value in tags.items():
        setattr(file, name, value)
    file.PixelData = pixels.astype(np.int16 if file.PixelRepresentation else np.uint16).tobytes()
    file.save_as(path, enforce_file_format=True)
    return path


def read(path: Path) -> np.ndarray:
    return np.asarray(read_radiograph(Location(str(path))).image)[..., 0].astype(int)


def near(got: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(np.abs(got - np.clip(wanted, 0, 1) * 255).max() <= 1)


# DICOM


def test_without_a_window_the_picture_spans_its_own_values(tmp_path: Path) -> None:
    assert near(read(dicom(tmp_path / "a.dcm", RAMP // 4 + 100)), (RAMP // 4) / (RAMP // 4).max())


def test_rescale_comes_before_the_window_and_inversion_last(tmp_path: Path) -> None:
    tags = {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": 1000, "WindowWidth": 2001}
    # PS3.3 C.11.2.1.2.1 on y = 2 x - 1000
    wanted = (2.0 * RAMP - 1000 - (1000 - 0.5)) / (2001 - 1) + 0.5
    assert near(read(dicom(tmp_path / "a.dcm", **tags)), wanted)
    inverted = read(dicom(tmp_path / "b.dcm", PhotometricInterpretation="MONOCHROME1", **tags))
    assert near(inverted, 1 - np.clip(wanted, 0, 1))


def test_the_first_of_several_windows_counts(tmp_path: Path) -> None:
    one = read(dicom(tmp_path / "a.dcm", WindowCenter=1000, WindowWidth=500))
    many = read(dicom(tmp_path / "b.dcm", WindowCenter=[1000, 3000], WindowWidth=[500, 100]))
    assert (one == many).all() and one.max() == 255 and one.min() == 0


def test_a_lookup_table_replaces_the_window(tmp_path: Path) -> None:
    item = Dataset()
    item.LUTDescriptor = [4096, 0, 8]
    item.add_new("LUTData", "US", [255 - i // 16 for i in range(4096)])
    got = read(dicom(tmp_path / "a.dcm", VOILUTSequence=[item], WindowCenter=5, WindowWidth=2))
    assert near(got, (255 - RAMP // 16) / 255)


def test_signed_pixels_and_padding(tmp_path: Path) -> None:
    pixels = RAMP.astype(np.int16) - 2048
    pixels[0, :8] = -2048
    got = read(dicom(tmp_path / "a.dcm", pixels, PixelRepresentation=1, PixelPaddingValue=-2048))
    assert (got[0, :8] == 0).all()
    seen = pixels[pixels != -2048]
    assert near(got[1:], (pixels[1:] - seen.min()) / (seen.max() - seen.min()))


def test_eight_bits_and_colour(tmp_path: Path) -> None:
    ramp = (RAMP // 16).astype(np.uint16)
    got = read(dicom(tmp_path / "a.dcm", ramp, bits=8, WindowCenter=128, WindowWidth=256))
    assert near(got, ramp / 255)


def test_a_lookup_table_of_bytes_may_be_padded_to_an_even_length(tmp_path: Path) -> None:
    item = Dataset()
    item.LUTDescriptor = [4095, 0, 8]
    item.add_new("LUTData", "OW", bytes(i // 16 for i in range(4095)) + b"\0")
    assert near(read(dicom(tmp_path / "a.dcm", VOILUTSequence=[item])), np.minimum(RAMP, 4094) // 16 / 255)


def test_an_old_file_without_preamble_is_read(tmp_path: Path) -> None:
    path = dicom(tmp_path / "a.dcm", WindowCenter=2048, WindowWidth=4096)
    file = pydicom.dcmread(path)
    plain = Dataset({element.tag: element for element in file})
    plain.save_as(tmp_path / "b.dcm", implicit_vr=True, little_endian=True, enforce_file_format=False)
    assert (tmp_path / "b.dcm").read_bytes()[128:132] != b"DICM"
    assert np.array_equal(read(tmp_path / "b.dcm"), read(path))


def test_odd_headers_are_read_in_silence_or_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = dicom(tmp_path / "a.dcm")
        path.write_bytes(path.read_bytes().replace(b"1.2.3.4", b"1.2.3.."))
        assert read_radiograph(Location(str(path))).identifiers.instance == "1.2.3.."
    several = read_radiograph(Location(str(dicom(tmp_path / "b.dcm", PatientID="A\\B"))))
    assert several.identifiers.patient == "A\\B"
    with pytest.raises(BadSample, match="not finite"):
        read(dicom(tmp_path / "c.dcm", RescaleSlope="1e400", RescaleIntercept="0"))


def test_what_is_no_single_radiograph_is_refused_with_its_reason(tmp_path: Path) -> None:
    stack = np.zeros((3, 8, 8), dtype=np.uint16)
    with pytest.raises(BadSample, match="3 frames"):
        read(dicom(tmp_path / "a.dcm", stack, NumberOfFrames=3))
    path = dicom(tmp_path / "b.dcm", PhotometricInterpretation="PALETTE COLOR")
    with pytest.raises(BadSample, match="PALETTE COLOR"):
        read(path)
    file = pydicom.dcmread(dicom(tmp_path / "c.dcm"))
    del file.PixelData
    file.save_as(tmp_path / "c.dcm")
    with pytest.raises(BadSample, match="holds no picture"):
        read(tmp_path / "c.dcm")
    cut = (tmp_path / "d.dcm", dicom(tmp_path / "e.dcm").read_bytes()[:2000])
    cut[0].write_bytes(cut[1])
    with pytest.raises(BadSample):
        read(cut[0])
    (tmp_path / "f.dcm").write_bytes(b"not a file of this kind")
    with pytest.raises(BadSample):
        read(tmp_path / "f.dcm")


def test_a_dicom_file_needs_no_suffix_and_may_lie_in_a_zip(tmp_path: Path) -> None:
    path = dicom(tmp_path / "IM0001")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(path, "IM0001")
    plain = read_radiograph(Location(str(path)))
    packed = read_radiograph(Location(str(tmp_path / "a.zip"), "IM0001"))
    assert np.array_equal(np.asarray(plain.image), np.asarray(packed.image))
    assert packed.identifiers == ("P-7", "1.2.3", "1.2.3.4")


# Other kinds


@pytest.mark.parametrize(("bits", "top"), [(12, 4095), (16, 65535), (10, 1023)])
def test_deep_grey_is_scaled_by_the_bits_it_uses(tmp_path: Path, bits: int, top: int) -> None:
    values = np.linspace(0, top, 4096).round().astype(np.uint16).reshape(64, 64)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert near(read(tmp_path / "a.png"), values / top)


def test_a_volume_gives_the_asked_slice_as_it_is_looked_at(tmp_path: Path) -> None:
    # This affine stores axes that run to the left, to the back and up
    volume = np.zeros((6, 8, 5), dtype=np.float32)
    volume[:, :, 2] = np.arange(6)[:, None] + 10 * np.arange(8)
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([-1, -1, 1, 1])), tmp_path / "a.nii.gz")
    got = read(tmp_path / "a.nii.gz")
    assert got.shape == (8, 6)
    assert got[0, 0] == 0 and got[-1, -1] == 255 and got[0, -1] < got[-1, 0]
    flat = np.asarray(read_radiograph(Location(str(tmp_path / "a.nii.gz")), at=0.0).image)
    assert flat.max() == 0
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 2, 3), np.float32), np.eye(4)), tmp_path / "b.nii")
    with pytest.raises(BadSample, match="4 dimensions"):
        read(tmp_path / "b.nii")
    (tmp_path / "c.nii").write_bytes(b"nothing")
    with pytest.raises(BadSample):
        read(tmp_path / "c.nii")


# Sets


def covidx(root: Path) -> Path:
    (root / "train").mkdir(parents=True)
    (root / "test").mkdir()
    lines = {"train": [], "test": []}  # type: ignore[var-annotated]
    for part, count in (("train", 12), ("test", 4)):
        for i in range(count):
            Image.new("L", (20, 20), 10 * i).save(root / part / f"{part}{i}.png")
            patient = f"COVID {i}" if i % 2 else str(i)
            lines[part].append(f"{patient} {part}{i}.png {'positive' if i % 2 else 'negative'} sirm")
        (root / f"{part}_COVIDx8B.txt").write_text("\n".join(lines[part]) + "\n")
    return root


def test_covidx_lists_are_read_from_the_right_and_keep_their_class_order(tmp_path: Path) -> None:
    data = RadiographData(str(covidx(tmp_path / "a")), image_size=16)
    parts = data.parts()
    assert data.classes == ["negative", "positive"] and len(parts["test"]) == 4
    assert len(parts["train"]) + len(parts["val"]) == 12 and len(parts["val"]) > 0
    groups = {data.entries()[i].group for i in parts["train"]} & {data.entries()[i].group for i in parts["val"]}
    assert not groups and "COVID 1" in {e.group for e in data.entries()}
    (tmp_path / "a" / "train" / "train3.png").unlink()
    with pytest.raises(UserError, match="no such file: train/train3.png"):
        RadiographData(str(tmp_path / "a"), image_size=16).parts()
    (tmp_path / "a" / "train_other.txt").write_text("1 train1.png positive x\n")
    with pytest.raises(UserError, match="several lists of the train part"):
        RadiographData(str(tmp_path / "a"), image_size=16).parts()


def test_severity_levels_have_the_published_order(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for level in ("level1", "level2"):
            for i in range(4):
                path = tmp_path / part / level / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8)).save(path)
    data = RadiographData(str(tmp_path), image_size=8)
    data.parts()
    assert data.classes == ["level2", "level1"]


def test_predictions_carry_identifiers_unless_told_not_to(tmp_path: Path) -> None:
    dicom(tmp_path / "a.dcm")
    Image.fromarray((RAMP // 16).astype(np.uint8)).save(tmp_path / "b.png")
    for anonymise in (False, True):
        data = RadiographData(str(tmp_path), image_size=32, anonymise=anonymise)
        data.setup("predict")
        samples = [data.samples("predict").load(i, 0) for i in range(2)]
        names = [s.get("about", {}) for s in samples]
        if anonymise:
            assert names == [{}, {}]
        else:
            assert names[0] == {"patient": "P-7", "study": "1.2.3", "instance": "1.2.3.4"}
            assert set(names[1].values()) == {""}
        assert all(s["image"].shape == (3, 32, 32) for s in samples)


def test_balanced_batches_hold_the_classes_equally(tmp_path: Path) -> None:
    for label, count in (("common", 40), ("rare", 8)):
        for i in range(count):
            path = tmp_path / "train" / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), i).save(path)
    data = RadiographData(str(tmp_path), image_size=8, balance="classes", batch_size=8, val_fraction=0.25)
    data.setup("fit")
    samples = data.samples("train")
    batches = data.batches(samples, "train", 0)
    labels = [[int(samples.load(i, 0)["label"]) for i in b] for b in batches]
    assert all(Counter(b) == {0: 4, 1: 4} for b in labels)
    assert sum(len(b) for b in batches) <= len(samples)
    assert batches != data.batches(samples, "train", 1) and batches == data.batches(samples, "train", 0)


# Augmentation


def test_augmentation_is_a_function_of_the_sample_and_leaves_the_middle_grey_range() -> None:
    picture = Image.fromarray((RAMP // 16).astype(np.uint8)).convert("RGB")
    augment = MonaiAugment(Square(48, 1.0, "squash"))
    one, two = augment(picture, generator(0, 1, 2)), augment(picture, generator(0, 1, 2))
    other = augment(picture, generator(0, 2, 2))
    assert one.shape == (3, 48, 48) and one.dtype == torch.uint8
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(one[0], one[1])


def test_augmentation_that_is_off_is_the_evaluation_transform() -> None:
    picture = Image.fromarray((RAMP // 16).astype(np.uint8)).convert("RGB")
    square = Square(48, 1.0, "squash")
    off = MonaiAugment(square, 0.0, 0.0, (1.0, 1.0), 0.0, (1.0, 1.0), (1.0, 1.0), 0.0, 0.0, 0.0)
    got = off(picture, generator(0, 0, 0)).numpy()[0].astype(int)
    wanted = np.asarray(square(picture))[..., 0].astype(int)
    assert np.abs(got - wanted).max() <= 1
    mirrored = MonaiAugment(square, 1.0, 0.0, (1.0, 1.0), 0.0, (1.0, 1.0), (1.0, 1.0), 0.0, 0.0, 0.0)
    assert np.abs(mirrored(picture, generator(0, 0, 0)).numpy()[0].astype(int) - wanted[:, ::-1]).max() <= 1


@pytest.mark.parametrize(
    "options",
    [{"zoom": (1.2, 0.8)}, {"gamma": (0.0, 1.0)}, {"noise": -0.1}, {"slice_at": 1.5}, {"rotate": -5.0}],
)
def test_numbers_without_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"data.{next(iter(options))} is"):
        RadiographData(**options)


def test_a_sample_that_comes_again_in_an_epoch_is_another_draw(tmp_path: Path) -> None:
    for label in ("a", "b"):
        for i in range(3):
            path = tmp_path / "train" / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((RAMP // 16).astype(np.uint8)).save(path)
    data = RadiographData(str(tmp_path), image_size=32, balance="classes", min_epoch_size=24, val_fraction=0.34)
    data.setup("fit")
    drawn = [key for batch in BatchOrder(data, data.samples("train"), "train", 3) for key in batch]
    assert len(drawn) == 24 and len(set(drawn)) == 24
    pictures = {data.samples("train").load(index, epoch)["image"].numpy().tobytes() for epoch, index in drawn}
    assert len(pictures) == 24
    again = [key for batch in BatchOrder(data, data.samples("train"), "train", 3) for key in batch]
    assert again == drawn
    shares = [BatchOrder(data, data.samples("train"), "train", 3, rank, 2) for rank in range(2)]
    both = {key for share in shares for batch in share for key in batch}
    assert len(both) == sum(len(batch) for share in shares for batch in share)


def test_a_dicom_patient_is_on_one_side(tmp_path: Path) -> None:
    for i in range(24):
        path = tmp_path / ("a" if i % 2 else "b") / f"{i}.dcm"
        path.parent.mkdir(exist_ok=True)
        dicom(path, PatientID=f"P{i // 3}")
    data = RadiographData(str(tmp_path), image_size=16, val_fraction=0.25, test_fraction=0.25)
    sides = {name: {data.entries()[i].group for i in indices} for name, indices in data.parts().items()}
    assert all(sides.values()) and {g for s in sides.values() for g in s} == {f"P{i}" for i in range(8)}
    assert not (sides["train"] & sides["val"] or sides["train"] & sides["test"] or sides["val"] & sides["test"])


def test_notes_beside_class_folders_are_no_label_list(tmp_path: Path) -> None:
    for label in ("a", "b"):
        for i in range(6):
            path = tmp_path / label / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("L", (8, 8), i).save(path)
    (tmp_path / "training_notes.txt").write_bytes("some words of caf\xe9 people wrote\n".encode("latin-1"))
    data = RadiographData(str(tmp_path), image_size=8)
    data.parts()
    assert data.classes == ["a", "b"]


@pytest.mark.parametrize("packed", [False, True])
def test_dicom_files_named_by_their_uid_are_found_for_training(tmp_path: Path, packed: bool) -> None:
    root = tmp_path / "set"
    for i in range(12):
        path = root / ("a" if i % 2 else "b") / f"1.2.826.0.1.{i}.81{i}"
        path.parent.mkdir(parents=True, exist_ok=True)
        dicom(path, PatientID=f"P-{i}")
    (root / "a/notes.811").write_text("no picture")
    if packed:
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
            for path in sorted(root.rglob("*.*")):
                archive.write(path, path.relative_to(root))
        root = tmp_path / "set.zip"
    data = RadiographData(str(root))
    assert sorted(Counter(e.label for e in data.entries()).items()) == [("a", 6), ("b", 6)]
    assert data.ignored == ["a/notes.811"]
    assert {e.group for e in data.entries()} == {f"P-{i}" for i in range(12)}


def test_reading_dicom_prints_nothing(tmp_path: Path) -> None:
    path = dicom(tmp_path / "a.dcm")
    code = f"from medical.radiographs import *; read_radiograph(Location({str(path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
