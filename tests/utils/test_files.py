"""Small files that are written whole or not at all."""

import pytest

from utils.files import write_atomically


def test_names_that_are_not_utf8(tmp_path):
    write_atomically(tmp_path / "x.html", "Straße, bad\udcff.png")
    assert (tmp_path / "x.html").read_text(encoding="utf-8") == "Straße, bad\\udcff.png"
    assert [path.name for path in tmp_path.iterdir()] == ["x.html"]


def test_nothing_is_left_of_one_that_failed(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_atomically(tmp_path / "x", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
