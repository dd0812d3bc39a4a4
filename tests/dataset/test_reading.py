"""Decoding images and labels, and the one line that each of their faults is answered with."""

import errno
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFile

from dataset import DataError, Pair, generic_table
from dataset.reading import _decoded, read_image, read_label, read_sample
from tests.samples import write_pair


def test_image_is_rgb(tmp_path):
    Image.fromarray(np.full((2, 3, 3), (10, 20, 30), np.uint8)).save(tmp_path / "rgb.png")
    assert read_image(tmp_path / "rgb.png")[0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA"])
def test_image_modes(tmp_path, mode):
    Image.new("L", (3, 2), 255).convert(mode).save(tmp_path / "x.png")
    assert (read_image(tmp_path / "x.png") == np.full((2, 3, 3), 255)).all()


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_grey_of_16_bits_is_divided_by_257(tmp_path, ending):
    values = np.array([[0, 128, 129, 999], [32767, 32768, 65406, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"x.{ending}")
    image = read_image(tmp_path / f"x.{ending}")
    assert image.dtype == np.uint8
    assert (image == np.rint(values / 257)[:, :, None]).all()
    assert image.shape == (2, 4, 3)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_colours_of_16_bits_keep_their_upper_byte(tmp_path, ending):
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), np.uint16)
    cv2.imwrite(str(tmp_path / f"x.{ending}"), values[:, :, ::-1])
    image = read_image(tmp_path / f"x.{ending}").astype(int)
    np.testing.assert_array_equal(image, values // 256)
    assert np.abs(image - values / 257).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_8_bit_values_in_16_bits_are_refused_not_read_as_black(tmp_path, channels):
    cv2.imwrite(str(tmp_path / "x.png"), np.full((2, 3, channels), 250, np.uint16))
    with pytest.raises(DataError, match=r"x\.png: this image has 16 bits a channel but no value above 250"):
        read_image(tmp_path / "x.png")
    cv2.imwrite(str(tmp_path / "x.png"), np.zeros((2, 3, channels), np.uint16))
    assert (read_image(tmp_path / "x.png") == np.zeros((2, 3, 3))).all()


@pytest.mark.parametrize(
    ("type_", "words"), [(np.int32, "32 bits a channel"), (np.float32, "floating-point")]
)
def test_images_without_a_range_of_values_are_refused(tmp_path, type_, words):
    Image.fromarray(np.full((2, 3), 99, type_)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=rf"x\.tif: an image needs 8 or 16 bits a channel, .*{words}"):
        read_image(tmp_path / "x.tif")


# How a picture is stored so that each orientation shows it upright (EXIF's definition).
STORED = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: image.swapaxes(0, 1)[::-1],
    7: lambda image: image.swapaxes(0, 1)[::-1, ::-1],
    8: lambda image: image.swapaxes(0, 1)[:, ::-1],
}


def with_orientation(path, pixels, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, exif=exif, quality=100, subsampling=0)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp"])
def test_orientation_tags_are_applied(tmp_path, orientation, ending):
    upright = np.zeros((16, 40, 3), np.uint8)
    upright[:8, :8], upright[8:, :8], upright[:8, 8:] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    with_orientation(tmp_path / f"x.{ending}", STORED[orientation](upright), orientation)
    difference = read_image(tmp_path / f"x.{ending}").astype(int) - upright
    assert difference.shape == (16, 40, 3)
    assert np.abs(difference[2:6, 2:6]).max() < 25  # lossy formats
    assert np.abs(difference[10:14, 2:6]).max() < 25
    assert np.abs(difference[2:6, 12:]).max() < 25


def test_orientation_of_16_bits_and_of_labels(tmp_path):
    upright = np.arange(6, dtype=np.uint16).reshape(2, 3) * 257 * 40
    with_orientation(tmp_path / "x.png", STORED[6](upright), 6)
    assert (read_image(tmp_path / "x.png")[:, :, 1] == upright // 257).all()
    with_orientation(tmp_path / "y.png", STORED[8](upright // 257).astype(np.uint8), 8)
    assert (read_label(tmp_path / "y.png") == upright // 257).all()


def test_a_label_of_the_picture_before_it_was_turned(tmp_path):
    with_orientation(tmp_path / "x.png", np.zeros((16, 40, 3), np.uint8), 6)
    pair = Pair(tmp_path / "x.png", tmp_path / "label.png")
    Image.new("L", (16, 40)).save(pair.label)
    assert read_sample(pair, generic_table(2), 255)[0].shape == (40, 16, 3)
    Image.new("L", (40, 16)).save(pair.label)
    with pytest.raises(DataError, match=r"is 16x40 but its label .* is 40x16; x\.png was turned .*EXIF"):
        read_sample(pair, generic_table(2), 255)


def test_damaged_orientation_tags_do_not_damage_the_picture(tmp_path):
    Image.new("RGB", (3, 2)).save(tmp_path / "x.jpg", exif=b"Exif\0\0nonsense")
    assert read_image(tmp_path / "x.jpg").shape == (2, 3, 3)


def test_palette_labels_give_their_indices(tmp_path):
    label = Image.fromarray(np.array([[0, 1], [2, 255]], np.uint8), mode=None).convert("P")
    label.putpalette([9, 9, 9] * 256)
    label.putdata([0, 1, 2, 255])
    label.save(tmp_path / "x.png")
    assert read_label(tmp_path / "x.png").tolist() == [[0, 1], [2, 255]]


@pytest.mark.filterwarnings("error")
def test_transparency_of_palettes_is_ignored(tmp_path):
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).convert("P")
    image.save(tmp_path / "a.png", transparency=bytes(range(12)))
    assert (read_image(tmp_path / "a.png") == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("RGB", "colours or transparency"), ("LA", "colours or transparency"), ("I;16", "16 bits a channel"),
        ("RGBA", "colours or transparency"),
    ],
)  # fmt: skip
def test_labels_of_other_kinds_are_refused_in_words(tmp_path, mode, words):
    Image.new(mode, (3, 2)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match=rf"x\.png: a label is a grey or palette PNG .* this one has {words}"):
        read_label(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("x.jpg", {}), ("x.webp", {}), ("x.jp2", {}), ("x.gif", {}), ("x.tif", {"compression": "jpeg"}),
        ("really_a_jpeg.png", {"format": "JPEG"}),
    ],
)  # fmt: skip
def test_labels_of_formats_that_change_values_are_refused(tmp_path, name, options):
    Image.new("L", (16, 16), 3).save(tmp_path / name, **options)
    with pytest.raises(DataError, match=rf"{name}: .* which changes label values; save .* PNG"):
        read_label(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "options"),
    [("x.bmp", {}), ("x.tif", {}), ("x.tif", {"compression": "tiff_lzw"}), ("x.pgm", {})],
)
def test_other_lossless_labels(tmp_path, name, options):
    values = np.random.default_rng(0).integers(0, 256, (5, 7), np.uint8)
    Image.fromarray(values).save(tmp_path / name, **options)
    np.testing.assert_array_equal(read_label(tmp_path / name), values)


def test_labels_whose_values_pillow_would_scale(tmp_path):
    (tmp_path / "x.pgm").write_bytes(b"P5 3 1 20\n\x00\x01\x14")
    with pytest.raises(DataError, match=r"x\.pgm: a label .* scaled values"):
        read_label(tmp_path / "x.pgm")
    Image.new("1", (3, 2)).save(tmp_path / "x.pbm")
    with pytest.raises(DataError, match=r"x\.pbm: a label .* inverted values"):
        read_label(tmp_path / "x.pbm")


@pytest.mark.parametrize("ending", ["png", "tif", "bmp"])
def test_labels_of_1_bit_hold_0_and_1(tmp_path, ending):
    values = np.random.default_rng(0).integers(0, 2, (5, 11), np.uint8)
    Image.fromarray(values.astype(bool)).save(tmp_path / f"x.{ending}")
    assert read_label(tmp_path / f"x.{ending}").dtype == np.uint8
    np.testing.assert_array_equal(read_label(tmp_path / f"x.{ending}"), values)


def grey_png(values, bits):
    """A one-row grey PNG of fewer than 8 bits a pixel, chunk by chunk; Pillow does not write them."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packed = int("".join(f"{value:0{bits}b}" for value in values), 2).to_bytes(len(values) * bits // 8, "big")
    header = struct.pack(">IIBBBBB", len(values), 1, bits, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(b"\0" + packed)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packed_grey_labels_hold_what_is_stored(tmp_path, bits):
    values = [0, 1] * 4 if bits == 1 else [3, 1, 2, 0]
    (tmp_path / "x.png").write_bytes(grey_png(values, bits))
    assert read_label(tmp_path / "x.png").tolist() == [values]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_packed_palette_labels_hold_their_indices(tmp_path, bits):
    label = Image.new("P", (4, 1))
    label.putpalette([9, 8, 7, 6, 5, 4])
    label.putdata([0, 1, 1, 0])
    label.save(tmp_path / "x.png", bits=bits)
    assert read_label(tmp_path / "x.png").tolist() == [[0, 1, 1, 0]]


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


def test_the_systems_reasons_are_told_as_such(tmp_path, monkeypatch):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DataError, match=r"folder\.png: cannot read this image \(Is a directory\)"):
        read_image(tmp_path / "folder.png")

    def too_many(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    (tmp_path / "x.png").touch()
    monkeypatch.setattr(Image, "open", too_many)
    with pytest.raises(DataError, match=r"x\.png: cannot read this label \(Too many open files\)"):
        read_label(tmp_path / "x.png")


def test_large_pictures_are_opened(tmp_path):
    """14000×13000 is more than Pillow takes by default; the rows are left out here to keep the test fast."""
    content = bytearray(grey_png([0] * 8, 8))
    content[16:24] = struct.pack(">II", 14000, 13000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "large.png").write_bytes(content)
    with _decoded(tmp_path / "large.png", "image") as image:
        assert image.size == (14000, 13000)
    with pytest.raises(DataError, match=r"large\.png: unreadable or truncated label \((?!.*attack)"):
        read_label(tmp_path / "large.png")


def test_want_of_memory_is_told_as_such(tmp_path, monkeypatch):
    Image.new("RGB", (30, 20)).save(tmp_path / "x.png")

    def load(_):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(DataError, match=r"x\.png: not enough memory for this image of 30x20 pixels"):
        read_image(tmp_path / "x.png")


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


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK", "I;16", "1"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_uncompressed_tiffs_are_turned_as_compressed_ones(tmp_path, mode, compression):
    values = np.random.default_rng(0).integers(0, 256, (16, 40), np.uint8)
    stored = Image.fromarray(values.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(values)
    stored = stored if mode == "I;16" else stored.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / "turned.tif", exif=exif, compression=compression)
    stored.save(tmp_path / "upright.png" if mode != "CMYK" else tmp_path / "upright.tif")
    upright = read_image(next(tmp_path.glob("upright.*")))
    assert np.array_equal(read_image(tmp_path / "turned.tif"), np.rot90(upright, -1))
    if mode in ("L", "P", "1"):
        labels = read_label(tmp_path / "upright.png")
        assert np.array_equal(read_label(tmp_path / "turned.tif"), np.rot90(labels, -1))


def test_grey_values_of_16_bits_in_a_pgm(tmp_path):
    values = np.array([[0, 257, 65535]], ">u2")
    (tmp_path / "x.pgm").write_bytes(b"P5 3 1 65535\n" + values.tobytes())
    assert read_image(tmp_path / "x.pgm")[0, :, 0].tolist() == [0, 1, 255]
