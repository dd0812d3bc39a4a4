"""Annotation files, bad ones among them, and the order of a run's images. Needs no torchvision."""

import itertools
import json
import math
import os
import signal

import cv2
import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from instances.coco import (
    CocoError,
    EvaluationDataset,
    StepBatches,
    TrainDataset,
    clip_box,
    read_by_workers,
    read_image,
    read_split,
)


def test_a_split_is_read_with_all_its_objects(shapes_root):
    data = read_split(shapes_root, "train2017")
    contents = json.loads((shapes_root / "annotations/instances_train2017.json").read_text())
    assert data.categories == {1: "disc", 2: "square", 4: "triangle"}
    assert data.num_classes == 5
    assert sum(map(len, data.annotations)) == len(contents["annotations"]) > 0
    for image, entries in zip(data.images, data.annotations, strict=True):
        assert {entry["image_id"] for entry in entries} <= {image["id"]}
    assert data.notes == ["1 images without objects are trained as background"]


def drop(name):
    return lambda contents: contents.pop(name)


def put(name, key, value, position=0):
    def edit(contents):
        contents[name][position][key] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("annotations"), "it has no list 'annotations'"),
        (lambda contents: contents.update(categories={"1": "disc"}), "it has no list 'categories'"),
        (lambda contents: contents["annotations"][0].pop("segmentation"), "entry 0 (id 1) of 'annotations'"),
        (lambda contents: contents["images"][1].pop("height"), "entry 1 (id 2) of 'images' has no valid 'he"),
        (put("images", "id", 2), "ids of 'images' are not unique"),
        (put("annotations", "image_id", 77), "annotation 1 is of image 77, which the file does not list"),
        (put("annotations", "category_id", 3), "annotation 1 is of category 3, which the file does not"),
        (put("categories", "id", 0), "category id 0 (disc)"),
        (put("annotations", "bbox", [1, 2, 3]), "annotation 1: bbox must be four numbers"),
        (put("annotations", "bbox", [1, 2, 3, math.nan]), "annotation 1: bbox must be four numbers"),
        (put("annotations", "bbox", [1, 2, 3, 10**400]), "annotation 1: bbox must be four numbers"),
        (put("annotations", "iscrowd", "0"), "annotation 1: iscrowd is 0 or 1; got '0'"),
        (put("annotations", "segmentation", [[1, 2, 3, 4]]), "polygons need three or more points"),
        (put("annotations", "segmentation", []), "polygons need three or more points"),
        (put("annotations", "segmentation", [[1, 2, 3, 4, 5, 6, 7]]), "polygons need three or more points"),
        (put("annotations", "segmentation", {"counts": [3]}), "run lengths need 'counts' and 'size'"),
        (put("annotations", "segmentation", {"counts": "abc", "size": [30, 20]}), "its image has [48, 64]"),
        (
            put("annotations", "segmentation", {"counts": [5, 6], "size": [48, 64]}),
            "add up to the image's 3072",
        ),
        (
            put("annotations", "segmentation", {"counts": 5, "size": [48, 64]}),
            "are a list or a string; got 5",
        ),
        (put("annotations", "segmentation", [[1, 2, 3, 4, 5, "6"]]), "polygons must be finite numbers"),
        (put("annotations", "segmentation", [[1, 2, 3, 4, 5, math.nan]]), "polygons must be finite numbers"),
        (lambda contents: contents.update(images=[]), "its list 'images' is empty"),
        (put("images", "height", 0), "image 1 has the size 0x64 (height x width)"),
    ],
)
def test_another_schema_is_told_in_one_line(own_root, edit, message):
    root, change = own_root
    change(edit)
    with pytest.raises(CocoError) as caught:
        read_split(root, "train2017")
    line = str(caught.value)
    assert message in line
    assert str(root / "annotations/instances_train2017.json") in line
    assert "\n" not in line
    assert caught.value.exit_status == 1


def test_no_folder_no_file_no_json(own_root, tmp_path):
    root, _ = own_root
    with pytest.raises(CocoError, match="nowhere: no such data folder; expected COCO's"):
        read_split(tmp_path / "nowhere", "train2017")
    with pytest.raises(CocoError, match=r"instances_val2017.json: no such .* splits found: train2017"):
        read_split(root, "val2017")
    (root / "annotations/instances_train2017.json").write_text("[[[")
    with pytest.raises(CocoError, match="not a JSON file"):
        read_split(root, "train2017")


def test_missing_images_are_counted_and_the_first_named(own_root):
    root, _ = own_root
    (root / "train2017/000002.png").unlink()
    (root / "train2017/000003.png").unlink()
    with pytest.raises(CocoError, match=r"2 of 3 images of .* are missing, the first is 000002.png"):
        read_split(root, "train2017")


def test_broken_and_other_images_are_named(own_root):
    root, _ = own_root
    data = read_split(root, "train2017")
    cv2.imwrite(str(data.path(0)), np.zeros((10, 20, 3), np.uint8))
    data.path(1).write_bytes(b"not an image")
    with pytest.raises(CocoError, match=r"000001.png: is 10x20 \(height x width\), .* says 48x64"):
        read_image(data, 0)
    with pytest.raises(CocoError, match=r"000002.png: cannot be read as an image"):
        read_image(data, 1)


def test_boxes_without_area_and_crowds_are_left_out_with_a_count(own_root):
    root, change = own_root

    def edit(contents):
        first = contents["annotations"][0]
        boxes = [[3, 3, 0, 9], [70, 3, 5, 5], [3, 3, 9, -1], [3.3, 3, 1e-6, 9], [1, 1, 9, 9]]
        for bbox, crowd in zip(boxes, (0, 0, 0, 0, 1), strict=True):
            number = len(contents["annotations"]) + 1
            contents["annotations"].append(first | {"id": number, "bbox": bbox, "iscrowd": crowd})

    before = read_split(root, "train2017")
    change(edit)
    data = read_split(root, "train2017")
    first = len(before.contents["annotations"]) + 1
    assert data.annotations == before.annotations
    assert data.notes[0] == f"4 annotations whose box has no area are left out, the first is {first}"
    assert data.notes[1].startswith("1 crowd regions are left out of training")


def test_boxes_are_clipped_to_the_image():
    image = {"width": 10, "height": 20}
    assert clip_box([-3, 4, 8, 40], image) == (0, 4, 5, 20)


def test_images_are_read_as_they_are_stored(own_root):
    """Annotations are of the stored pixels, whatever way up a camera says they are to be shown."""
    root, change = own_root
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (64, 48)).save(root / "train2017/turned.jpg", exif=exif)
    change(put("images", "file_name", "turned.jpg"))
    assert read_image(read_split(root, "train2017"), 0).shape == (48, 64, 3)


def test_the_largest_category(own_root):
    root, change = own_root

    def edit(contents):
        contents["categories"].append({"id": 9999, "name": "last"})

    change(edit)
    assert read_split(root, "train2017").num_classes == 10000


def test_evaluation_reads_images_as_rgb_in_0_to_1(shapes_root):
    data = read_split(shapes_root, "val2017")
    index, image = EvaluationDataset(data, [3, 1])[1]
    assert index == 1
    stored = cv2.imread(str(data.path(1)))[:, :, ::-1].transpose(2, 0, 1)
    np.testing.assert_allclose(image.numpy() * 255, stored, atol=1e-4)


RATIOS = [1.5, 0.7, 1.0, 1.3, 0.5, 0.6, 1.2, 2.0, 0.9, 1.1, 1.4]


def steps(first=0, last=12, **options):
    return StepBatches(RATIOS, 4, first, last, seed=3, **options)


def test_every_epoch_has_every_image_and_few_mixed_batches():
    batches = steps()
    assert batches.steps_per_epoch == 3
    orders = []
    for epoch in range(4):
        epoch_batches = batches.batches_of_epoch(epoch)
        assert set(epoch_batches.flatten().tolist()) == set(range(len(RATIOS)))
        mixed = [len({RATIOS[index] >= 1 for index in batch}) > 1 for batch in epoch_batches]
        assert sum(mixed) <= 2  # where the groups meet, and the one that is filled up
        orders.append(epoch_batches.tolist())
    assert len({str(order) for order in orders}) == 4


def test_a_resumed_run_sees_the_same_images_mirrored_alike():
    whole = list(steps())
    assert list(steps(first=5)) == whole[5:]
    assert len(steps(first=5)) == 7
    mirrored = [flag for batch in whole for _, flag in batch]
    assert 0 < sum(mirrored) < len(mirrored)
    assert not any(flag for batch in steps(mirror=False) for _, flag in batch)


def test_processes_share_each_step():
    parts = [list(steps(rank=rank, world_size=2)) for rank in range(2)]
    for whole, first, second in zip(steps(), *parts, strict=True):
        assert sorted(first + second) == sorted(whole)
        assert len(first) == len(second) == 2


def test_a_batch_larger_than_the_data_set_repeats_images():
    batch = next(iter(StepBatches([1.0, 2.0, 0.5], 8, 0, 1, seed=0)))
    assert len(batch) == 8
    assert {index for index, _ in batch} == {0, 1, 2}


def filled(polygon, height, width):
    """A polygon's mask by testing each pixel's centre: independent of pycocotools."""
    points = np.array(polygon).reshape(-1, 2)
    mask = np.zeros((height, width), bool)
    for y, x in itertools.product(range(height), range(width)):
        distance = cv2.pointPolygonTest(points.astype(np.float32), (x + 0.5, y + 0.5), measureDist=False)
        mask[y, x] = distance >= 0
    return mask


def test_targets_and_their_mirror_images(shapes_root):
    pytest.importorskip("pycocotools")
    data = read_split(shapes_root, "train2017")
    dataset = TrainDataset(data)
    index = 3  # upright
    image, target = dataset[index, False]
    entries = data.annotations[index]
    assert image.shape == (3, 64, 48)
    assert target["labels"].tolist() == [entry["category_id"] for entry in entries]
    for entry, mask, box in zip(entries, target["masks"].numpy(), target["boxes"].tolist(), strict=True):
        expected = filled(entry["segmentation"][0], 64, 48)
        assert (expected != mask).sum() <= 0.12 * expected.sum()  # the rim is a matter of convention
        x, y, width, height = entry["bbox"]
        assert box == [x, y, x + width, y + height]
    mirrored, other = dataset[index, True]
    np.testing.assert_array_equal(mirrored.numpy(), image.numpy()[:, :, ::-1])
    np.testing.assert_array_equal(other["masks"].numpy(), target["masks"].numpy()[:, :, ::-1])
    left, top, right, bottom = target["boxes"].T
    np.testing.assert_array_equal(other["boxes"].T, np.stack([48 - right, top, 48 - left, bottom]))


def test_an_image_without_objects_has_an_empty_target(shapes_root):
    dataset = TrainDataset(read_split(shapes_root, "train2017"))
    image, target = dataset[5, True]
    shapes = {name: tuple(value.shape) for name, value in target.items()}
    assert shapes == {"boxes": (0, 4), "labels": (0,), "masks": (0, *image.shape[1:])}


def test_run_lengths_are_read_as_polygons_are():
    pytest.importorskip("pycocotools")
    from instances.coco import decode_mask

    mask = np.zeros((5, 7), np.uint8)
    mask[1:4, 2:6] = 1
    flat = mask.flatten(order="F")
    counts, value = [], 0
    for key, group in itertools.groupby(flat):
        if not counts and key != value:
            counts.append(0)
        counts.append(len(list(group)))
    run_lengths = {"counts": counts, "size": [5, 7]}
    np.testing.assert_array_equal(decode_mask({"segmentation": run_lengths}, 5, 7), mask)
    polygon = [[2, 1, 6, 1, 6, 4, 2, 4]]
    np.testing.assert_array_equal(decode_mask({"segmentation": polygon}, 5, 7), mask)
    with pytest.raises(CocoError, match="annotation 9: its run lengths cannot be decoded"):
        decode_mask({"id": 9, "segmentation": {"counts": "abc", "size": [5, 7]}}, 5, 7)


class Dies(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_told():
    loader = DataLoader(Dies(), batch_size=None, num_workers=1)
    with pytest.raises(CocoError, match=r"^a worker process that reads the data died \("):
        list(read_by_workers(loader))


@pytest.mark.parametrize(
    "error", [RuntimeError("Caught RuntimeError in DataLoader worker process 0."), ValueError("no")]
)
def test_other_errors_of_a_loader_are_not_hidden(error):
    def loader():
        yield 1
        raise error

    with pytest.raises(type(error), match=str(error)):
        list(read_by_workers(loader()))
