"""The tables of ids and colours."""

from dataclasses import replace

import numpy as np
import pytest

from dataset import DataError
from dataset.camvid import LABELS as CAMVID
from dataset.cityscapes import IDS
from dataset.cityscapes import LABELS as CITYSCAPES
from dataset.labels import generic_table

# FACTS of the benchmark, written out here a second time on purpose.
EVALUATED = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


def test_cityscapes_ids_map_to_train_ids_and_back():
    stored = np.array([[*range(34), 255]], np.uint8)
    train_ids = CITYSCAPES.encode(stored)
    expected = [EVALUATED.index(i) if i in EVALUATED else 255 for i in range(34)] + [255]
    assert train_ids.tolist() == [expected]
    assert CITYSCAPES.decode(np.arange(19)).tolist() == EVALUATED


def test_cityscapes_table_is_the_official_one():
    labels = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    for label in labels:
        if label.id >= 0:
            assert IDS[label.name] == label.id
    official = [label for label in sorted(labels, key=lambda x: x.trainId) if 0 <= label.trainId < 19]
    assert CITYSCAPES.names == tuple(label.name for label in official)
    assert CITYSCAPES.palette == tuple(label.color for label in official)


def test_camvid_table():
    assert CAMVID.encode(np.array([0, 10, 11], np.uint8)).tolist() == [0, 10, 255]
    assert CAMVID.names[10] == "bicyclist"
    with pytest.raises(DataError, match="label value 12"):
        CAMVID.encode(np.array([12], np.uint8))


def test_ignore_label_can_be_another():
    assert CITYSCAPES.encode(np.array([0, 7], np.uint8), ignore_label=200).tolist() == [200, 0]


def test_colours():
    picture = CITYSCAPES.colour(np.array([[0, 13, 255]], np.uint8))
    assert picture.tolist() == [[[128, 64, 128], [0, 0, 142], [0, 0, 0]]]


def test_generic_table_has_voc_colours():
    table = generic_table(4, ignore_label=250)
    assert table.palette == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert table.encode(np.array([3, 250], np.uint8)).tolist() == [3, 255]


def test_encoding_equals_a_table_written_out():
    stored = np.random.default_rng(0).integers(0, 34, (37, 53), np.uint8)
    expected = [[EVALUATED.index(v) if v in EVALUATED else 99 for v in row] for row in stored.tolist()]
    encoded = CITYSCAPES.encode(stored.T, ignore_label=99).T  # in any memory order
    assert encoded.tolist() == expected
    assert encoded.flags.writeable
    assert CITYSCAPES.encode(np.zeros((0, 3), np.uint8)).shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ("a",)}, r"as many names \(1\) as ids \(2\) and colours \(2\)"),
        ({"ids": (0, 256)}, "values 0..255, got 256"),
        ({"ignored_ids": (-1,)}, "values 0..255, got -1"),
        ({"names": ("a", 7)}, "names of classes are texts, got 7"),
        ({"ids": (3, 3)}, r"an id of its own, got \(3, 3\)"),
        ({"palette": ((1, 2, 3), (0, 0, 256))}, r"three whole numbers 0..255, got \(0, 0, 256\)"),
        ({"palette": ((1, 2, 3), "red")}, "three whole numbers 0..255, got 'red'"),
        ({"mirror_pairs": ((0, 2),)}, r"train ids 0..1, got \(0, 2\)"),
    ],
)
def test_tables_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        replace(generic_table(2), **change)
