"""Reading data sets, and the one line that each fault of theirs is answered with."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dataset import DataError, find_source, fingerprint, pairs_of
from dataset.files import Pair, read_image, read_label, read_list, read_sample
from dataset.labels import generic_table
from tests.samples import write_pair


def test_image_is_bgr(tmp_path):
    Image.fromarray(np.full((2, 3, 3), (10, 20, 30), np.uint8)).save(tmp_path / "rgb.png")
    assert read_image(tmp_path / "rgb.png")[0, 0].tolist() == [30, 20, 10]


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA"])
def test_image_modes(tmp_path, mode):
    Image.new("L", (3, 2), 255).convert(mode).save(tmp_path / "x.png")
    assert (read_image(tmp_path / "x.png") == np.full((2, 3, 3), 255)).all()


def test_images_of_16_bits_are_refused_not_clipped(tmp_path):
    Image.fromarray(np.full((2, 3), 999, np.uint16)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"x\.png: an image has 8 bits a channel, this one is of mode I;16"):
        read_image(tmp_path / "x.png")


def test_palette_labels_give_their_indices(tmp_path):
    label = Image.fromarray(np.array([[0, 1], [2, 255]], np.uint8), mode=None).convert("P")
    label.putpalette([9, 9, 9] * 256)
    label.putdata([0, 1, 2, 255])
    label.save(tmp_path / "x.png")
    assert read_label(tmp_path / "x.png").tolist() == [[0, 1], [2, 255]]


def test_colour_labels_are_refused(tmp_path):
    Image.new("RGB", (3, 2)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"x\.png: a label is an 8-bit grey or palette image, not RGB"):
        read_label(tmp_path / "x.png")


def grey_png(values, bits):
    """A one-row grey PNG of fewer than 8 bits a pixel, chunk by chunk; Pillow does not write them."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packed = int("".join(f"{value:0{bits}b}" for value in values), 2).to_bytes(len(values) * bits // 8, "big")
    header = struct.pack(">IIBBBBB", len(values), 1, bits, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(b"\0" + packed)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [2, 4])
def test_packed_grey_labels_are_refused_for_their_values_come_back_multiplied(tmp_path, bits):
    (tmp_path / "x.png").write_bytes(grey_png([0, 1, 2, 3], bits))
    with pytest.raises(DataError, match=r"x\.png: a label is an 8-bit grey or palette image"):
        read_label(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes(grey_png([0, 1, 2, 3], 8))
    assert read_label(tmp_path / "x.png").tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("ending", ["png", "jpg"])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.9])
def test_truncated_images_are_named(tmp_path, ending, share):
    path = tmp_path / f"cut.{ending}"
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DataError, match=rf"cut\.{ending}: unreadable or truncated image") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_not_an_image_and_not_there(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(DataError, match=r"text\.png: unreadable"):
        read_label(tmp_path / "text.png")
    with pytest.raises(DataError, match="no such image"):
        read_image(tmp_path / "none.png")


def test_sizes_must_agree(tmp_path):
    write_pair(tmp_path, "a", size=(20, 30), label_size=(20, 31))
    pair = Pair(tmp_path / "images/a.png", tmp_path / "labels/a.png")
    with pytest.raises(DataError, match=r"a\.png is 30x20 but its label .*a\.png is 31x20"):
        read_sample(pair, generic_table(3), 255)


def test_label_values_outside_the_classes(tmp_path):
    write_pair(tmp_path, "a", values=9)
    pair = Pair(tmp_path / "images/a.png", tmp_path / "labels/a.png")
    with pytest.raises(
        DataError, match=r"labels/a\.png: holds label value 6, 7, 8, which is none of the 6 classes"
    ):
        read_sample(pair, generic_table(6), 255)


def test_list_files(list_data):
    pairs = read_list(list_data / "train.lst", list_data)
    assert [pair.image.name for pair in pairs] == ["scene 0.png", "scene 1.png", "scene 2.png"]
    (list_data / "blanks.lst").write_text("\n  images/b.png   labels/b.png \n\n")
    write_pair(list_data, "b")
    assert read_list(list_data / "blanks.lst", list_data)[0].label == list_data / "labels/b.png"
    (list_data / "images.lst").write_text("\ufeffimages/b.png\n", encoding="utf-8")  # as Windows writes it
    assert read_list(list_data / "images.lst", list_data)[0].label is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("images/a.png labels/a.png\na b c\n", "line 2: expected 'image label', got 'a b c'"),
        ("images/a.png\t\n\nimages/a.png\t\tlabels/a.png\n", "line 3: expected 'image label'"),
        ("images/a.png labels/a.png\n\nimages/x.png labels/a.png\n", r"line 3: no file .*images/x\.png"),
        ("images/a.png labels/x.png\n", r"line 1: no file .*labels/x\.png"),
        ("\n\n", "the list is empty"),
        (b"\xff\xfe", "cannot read this list file"),
        (f"images/{'x' * 300}.png labels/a.png\n", "line 1: no file"),
    ],
)
def test_malformed_lists_name_the_line(tmp_path, text, message):
    write_pair(tmp_path, "a")
    list_file = tmp_path / "train.lst"
    list_file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=rf"train\.lst.*{message}") as caught:
        read_list(list_file, tmp_path)
    assert "\n" not in str(caught.value)


def test_cityscapes_by_folder_and_by_list(demo_data, tmp_path):
    source = find_source(demo_data)
    assert (source.name, source.prefix, source.table.num_classes) == ("cityscapes", "CS_scenes", 19)
    train, val = (pairs_of(source, demo_data, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (4, 3)
    assert pairs_of(source, demo_data, "trainval") == train + val
    image, label = (path.relative_to(demo_data) for path in train[1])
    (tmp_path / "train.lst").write_text(f"{image}\t{label}\n")
    assert pairs_of(source, demo_data, "train", tmp_path / "train.lst") == train[1:2]


def test_lists_that_name_labels_of_other_values(demo_data, tmp_path):
    image, label = pairs_of(find_source(demo_data), demo_data, "val")[0]
    other = demo_data / label.name.replace("labelIds", "labelTrainIds")
    other.write_bytes(label.read_bytes())
    (tmp_path / "val.lst").write_text(f"{image}\t{other}\n")
    with pytest.raises(DataError, match=r"labelTrainIds\.png does not hold the label ids of cityscapes"):
        pairs_of(find_source(demo_data), demo_data, "val", tmp_path / "val.lst")


def test_ignoring_a_class_is_refused(demo_data):
    with pytest.raises(DataError, match="--ignore-label 18 is one of the 19 classes of cityscapes"):
        find_source(demo_data, ignore_label=18)
    assert find_source(demo_data, ignore_label=19).name == "cityscapes"


def test_fingerprint_knows_the_data_wherever_it_lies(demo_data, tmp_path):
    source = find_source(demo_data)
    moved = tmp_path / "moved"
    moved.symlink_to(demo_data)
    val = fingerprint(pairs_of(source, demo_data, "val"), demo_data)
    assert val == fingerprint(pairs_of(source, moved, "val"), moved)
    assert val.startswith("3 images, ")
    assert val != fingerprint(pairs_of(source, demo_data, "train")[:3], demo_data)


def test_camvid(camvid):
    source = find_source(camvid)
    assert source.name == "camvid"
    sizes = {split: len(pairs_of(source, camvid, split)) for split in source.splits}
    assert sizes == {"train": 367, "val": 101, "trainval": 468, "test": 233}
    image, label = read_sample(pairs_of(source, camvid, "test")[-1], source.table, 255)
    assert image.shape == (360, 480, 3)
    assert label.shape == (360, 480)
    assert set(np.unique(label)) <= {*range(11), 255}


def test_camvid_without_lists_or_with_those_of_segnet(tmp_path):
    write_pair(tmp_path, "a")
    (tmp_path / "images").rename(tmp_path / "train")
    (tmp_path / "labels").rename(tmp_path / "trainannot")
    source = find_source(tmp_path)
    expected = [Pair(tmp_path / "train/a.png", tmp_path / "trainannot/a.png")]
    assert pairs_of(source, tmp_path, "train") == expected
    (tmp_path / "train.txt").write_text("/SegNet/CamVid/train/a.png /SegNet/CamVid/trainannot/a.png\n")
    assert pairs_of(source, tmp_path, "train") == expected


def test_folders_that_are_no_data_set(tmp_path, demo_data):
    with pytest.raises(DataError, match="no such data folder"):
        find_source(tmp_path / "none")
    with pytest.raises(DataError, match="the data folder is empty"):
        find_source(tmp_path)
    (tmp_path / "readme.txt").touch()
    with pytest.raises(DataError, match=r"not the layout of one known data set .*--dataset list"):
        find_source(tmp_path)
    with pytest.raises(DataError, match="cityscapes has 19 classes"):
        find_source(demo_data, num_classes=20)
    with pytest.raises(DataError, match=r"--split test2: cityscapes has train, val, trainval, test"):
        pairs_of(find_source(demo_data), demo_data, "test2")


def test_a_layout_with_holes(tmp_path, demo_data):
    image = next(demo_data.glob("leftImg8bit/train/*/*.png"))
    copy = tmp_path / image.relative_to(demo_data)
    copy.parent.mkdir(parents=True)
    copy.write_bytes(image.read_bytes())
    source = find_source(tmp_path)
    with pytest.raises(DataError, match=r"_gtFine_labelIds\.png: file is missing"):
        pairs_of(source, tmp_path, "train")
    with pytest.raises(DataError, match=r"leftImg8bit/val: no \*/\*_leftImg8bit\.png"):
        pairs_of(source, tmp_path, "val")
