"""Predictions of pictures, folders and videos from the command line."""

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import Predictor
from evaluation.prediction_files import overlay
from tests.scripts.conftest import TABLE, random_picture, save_checkpoint, write_video, written


def read(path):
    return np.asarray(Image.open(path))


def one_error(result, status, *parts):
    assert result.status == status, result
    lines = [line for line in result.error.splitlines() if "error: " in line]
    assert len(lines) == 1, result.error
    assert "Traceback" not in result.error
    for part in parts:
        assert str(part) in lines[0]


def test_what_is_written(predict, checkpoint, tmp_path):
    image = random_picture(40, 50)
    Image.fromarray(image).save(tmp_path / "a.png")
    result = predict(tmp_path / "a.png")
    assert result.status == 0, result.error
    out = tmp_path / "out"
    assert written(out) == ["colour/a.png", "ids/a.png", "legend.png", "overlay/a.png"]
    ids = Predictor(checkpoint, "cpu", amp="off")(image)
    assert len(np.unique(ids)) > 1
    assert (read(out / "ids" / "a.png") == TABLE.decode(ids)).all()
    assert (read(out / "colour" / "a.png") == TABLE.colour(ids)).all()
    assert (read(out / "overlay" / "a.png") == overlay(image, ids, TABLE)).all()
    legend = read(out / "legend.png")
    for row, colour in enumerate(TABLE.palette):
        assert tuple(legend[8 + 28 * row + 5, 8 + 5]) == colour
    assert "1 images" in result.out
    assert "images/s" in result.out


def test_the_protocol(predict, checkpoint, tmp_path):
    image = random_picture(40, 50)
    Image.fromarray(image).save(tmp_path / "a.png")
    flags = ("--whole", "no", "--input-size", "25,33", "--scales", "0.75,1", "--flip", "--batch-size", 2)
    assert predict(tmp_path / "a.png", *flags).status == 0
    options = {"whole": False, "tile_size": (25, 33), "scales": (0.75, 1), "flip": True, "batch_size": 2}
    ids = Predictor(checkpoint, "cpu", amp="off", **options)(image)
    assert (read(tmp_path / "out" / "ids" / "a.png") == TABLE.decode(ids)).all()
    assert (ids != Predictor(checkpoint, "cpu", amp="off")(image)).any()


def test_kinds_of_pictures(predict, tmp_path, caplog):
    """All of these show the same grey picture, so all predictions are the same."""
    grey = random_picture(30, 42)[..., 0]
    folder = tmp_path / "in"
    (folder / "below").mkdir(parents=True)
    image = Image.fromarray(grey)
    image.save(folder / "grey.png")
    image.save(folder / "below" / "UPPER.PNG")
    image.convert("RGB").save(folder / "colour.TIF")
    image.convert("P").save(folder / "palette.png")
    Image.fromarray(np.dstack([grey] * 3 + [np.full_like(grey, 255)])).save(folder / "alpha.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "bits16.png")
    (folder / "._hidden.png").write_bytes(b"Mac OS X")
    (folder / "notes.txt").write_text("no picture")
    exif = Image.Exif()
    exif[274] = 6  # to be shown turned by a quarter
    Image.fromarray(np.rot90(grey)).save(folder / "turned.png", exif=exif)
    (folder / "below" / "heic").touch()
    result = predict(folder)
    assert result.status == 0, result.error
    assert caplog.messages[0].startswith(f"{folder}: 2 of 9 files are no pictures or videos")
    assert caplog.messages[0].endswith("are left out: below/heic, notes.txt")
    names = ["alpha", "below/UPPER", "bits16", "colour", "grey", "palette", "turned"]
    out = tmp_path / "out"
    assert written(out / "ids") == [f"{name}.png" for name in names]
    expected = read(out / "ids" / "grey.png")
    for name in names:
        assert (read(out / "ids" / f"{name}.png") == expected).mean() > 0.99, name


def test_inputs_of_one_name(predict, tmp_path):
    paths = [tmp_path / "a" / "x.png", tmp_path / "b" / "x.png", tmp_path / "b" / "X.bmp"]
    for seed, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random_picture(20 + seed, 30, seed=seed)).save(path)
    result = predict(*paths, paths[0])
    assert result.status == 0, result.error
    assert "3 images" in result.out
    sizes = {path.name: read(path).shape for path in (tmp_path / "out" / "ids").iterdir()}
    assert sizes == {"x_png.png": (20, 30), "x_png_2.png": (21, 30), "X_bmp.png": (22, 30)}


def test_inputs_of_several_flags(predict, tmp_path):
    for name in ("a", "b"):
        Image.fromarray(random_picture(20, 30)).save(tmp_path / f"{name}.png")
    result = predict(tmp_path / "a.png", "--input", tmp_path / "b.png")
    assert result.status == 0, result.error
    assert written(tmp_path / "out" / "ids") == ["a.png", "b.png"]


def test_an_unreadable_file_among_others(predict, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "c"):
        Image.fromarray(random_picture(20, 30)).save(folder / f"{name}.png")
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "d.mp4").write_bytes(b"no video")
    result = predict(folder)
    assert result.status == 1
    errors = [line for line in result.error.splitlines() if "error: " in line]
    assert len(errors) == 3
    assert "b.png: unreadable" in errors[0]
    assert "d.mp4: this video cannot be decoded" in errors[1]
    assert errors[2].endswith("2 of 4 inputs failed, see above; the others are done")
    assert written(tmp_path / "out" / "ids") == ["a.png", "c.png"]
    assert "2 images" in result.out


def test_nothing_that_can_be_read(predict, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    result = predict(tmp_path / "a.png")
    assert result.status == 1
    assert result.error.endswith("1 of 1 inputs failed, see above\n")
    assert "results are in" not in result.out


def test_no_such_input(predict, tmp_path):
    one_error(predict(tmp_path / "none"), 1, tmp_path / "none", "no such input")


def test_folders_without_pictures(predict, tmp_path):
    (tmp_path / "in").mkdir()
    one_error(predict(tmp_path / "in"), 1, "in: this folder is empty")
    (tmp_path / "in" / "a.txt").touch()
    one_error(predict(tmp_path / "in"), 1, "in: no picture or video in this folder")


def test_output_folders_that_would_destroy_their_input(predict, tmp_path):
    (tmp_path / "in" / "ids").mkdir(parents=True)
    Image.fromarray(random_picture(20, 30)).save(tmp_path / "in" / "ids" / "a.png")
    before = (tmp_path / "in" / "ids" / "a.png").read_bytes()
    one_error(predict(tmp_path / "in", output_dir=tmp_path / "in"), 2, "is the input folder")
    result = predict(tmp_path / "in" / "ids" / "a.png", output_dir=tmp_path / "in")
    one_error(result, 2, "lies where results of --output-dir")
    assert (tmp_path / "in" / "ids" / "a.png").read_bytes() == before


def test_an_output_folder_that_cannot_be_made(predict, tmp_path):
    Image.fromarray(random_picture(20, 30)).save(tmp_path / "a.png")
    (tmp_path / "file").touch()
    result = predict(tmp_path / "a.png", output_dir=tmp_path / "file")
    one_error(result, 1, "file: cannot write results there")


def test_checkpoints(predict, checkpoint, tmp_path):
    Image.fromarray(random_picture(20, 30)).save(tmp_path / "a.png")
    one_error(predict(tmp_path / "a.png", restore_from=tmp_path / "none.pth"), 1, "none.pth")
    contents = torch.load(checkpoint, weights_only=True)
    torch.save({name: contents[name] for name in ("model", "network")}, tmp_path / "nameless.pth")
    one_error(predict(tmp_path / "a.png", restore_from=tmp_path / "nameless.pth"), 1, "--num-classes 3")
    result = predict(tmp_path / "a.png", "--num-classes", 3, restore_from=tmp_path / "nameless.pth")
    assert result.status == 0, result.error
    contents["model"]["head.bottleneck.3.bias"][0] = float("nan")
    torch.save(contents, tmp_path / "nan.pth")
    one_error(predict(tmp_path / "a.png", restore_from=tmp_path / "nan.pth"), 1, "not finite")


def test_attention_pages(predict, tmp_path):
    Image.fromarray(random_picture(40, 50)).save(tmp_path / "a.png")
    result = predict(tmp_path / "a.png", "--attention")
    assert result.status == 0, result.error
    assert written(tmp_path / "out") == ["attention/a.html"]
    page = (tmp_path / "out" / "attention" / "a.html").read_text()
    assert '"picture": [40, 50], "grid": [6, 7]' in page


def test_attention_of_one_pixel(predict, tmp_path):
    image = random_picture(40, 50)
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(image[:20]).save(tmp_path / "small.png")
    write_video(tmp_path / "v.avi", [image])
    result = predict(tmp_path, "--attention", "30,49")
    assert result.status == 1
    errors = [line for line in result.error.splitlines() if "error: " in line]
    assert len(errors) == 3
    assert "v.avi: --attention shows pictures, not videos" in errors[0]
    assert "small.png: point 30,49 is outside: there are rows 0 to 19 and columns 0 to 49" in errors[1]
    assert "2 of 3 inputs failed" in errors[2]
    assert written(tmp_path / "out") == ["attention/a_R1.png", "attention/a_R2.png"]
    assert read(tmp_path / "out" / "attention" / "a_R1.png").shape == (40, 50, 3)


@pytest.mark.parametrize("flags", [("--whole", "no"), ("--scales", "0.5,1"), ("--flip",)])
def test_attention_is_of_the_whole_picture(predict, tmp_path, flags):
    Image.fromarray(random_picture(20, 30)).save(tmp_path / "a.png")
    named = " ".join(flags) if flags[0] == "--whole" else flags[0]
    one_error(predict(tmp_path / "a.png", "--attention", *flags), 2, f"--attention and {named} exclude")
    assert not (tmp_path / "out").exists()


def test_attention_that_is_not_there(predict, tmp_path):
    Image.fromarray(random_picture(20, 30)).save(tmp_path / "a.png")
    path = save_checkpoint(tmp_path / "z_1.pth", recurrence=0)
    one_error(predict(tmp_path / "a.png", "--attention", restore_from=path), 2, "R = 0")
    one_error(predict(tmp_path / "a.png", "--attention", "5;6"), 2, "--attention 5;6: expected Y,X")


def test_r_may_be_given(predict, tmp_path):
    Image.fromarray(random_picture(40, 48)).save(tmp_path / "x.png")
    ids = []
    for flags in ((), ("--recurrence", 2), ("--recurrence", 0)):
        assert predict(tmp_path / "x.png", *flags).status == 0
        ids.append(read(tmp_path / "out" / "ids" / "x.png"))
    assert np.array_equal(ids[0], ids[1]) and not np.array_equal(ids[0], ids[2])


def test_a_result_does_not_take_the_place_of_a_folder(predict, tmp_path):
    (tmp_path / "in" / "A.png").mkdir(parents=True)
    for name in ("a.jpg", "A.png/in.png"):
        Image.new("RGB", (41, 33)).save(tmp_path / "in" / name)
    assert predict(tmp_path / "in").status == 0
    assert written(tmp_path / "out" / "ids") == ["A.png/in.png", "a_jpg.png"]
