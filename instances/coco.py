"""COCO's folder and annotation files, and what training and evaluation read from them."""

import json
import math
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from instances.errors import InstancesError, require

Target = dict[str, Tensor]
Item = TypeVar("Item")
LARGEST_CATEGORY = 9999
# Of a box, in pixels. Mirrored and scaled in fp32, the sides of a thinner one might coincide.
SMALLEST_SIDE = 1e-3


class CocoError(InstancesError):
    """A data set that cannot be read: one line that names the file and the fault."""


@dataclass
class CocoSplit:
    """One split of a data set in COCO's layout: ``annotations/instances_<split>.json`` and ``<split>/``.

    Attributes:
        contents: the annotation file as it is.
        images: its images, in its order.
        annotations: for each image what it is trained on: no crowds, no boxes without area.
        categories: names by id; ids are the labels, 0 is the background.
        notes: what was left out or is unusual, one line each.
    """

    root: Path
    split: str
    contents: dict[str, Any]
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[list[dict[str, Any]]] = field(default_factory=list)
    categories: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def file(self) -> Path:
        return annotation_file(self.root, self.split)

    @property
    def num_classes(self) -> int:
        """Labels 0 (background) … the largest category id."""
        return max(self.categories) + 1

    def path(self, index: int) -> Path:
        return self.root / self.split / self.images[index]["file_name"]


def annotation_file(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}.json"


def read_split(root: Path, split: str) -> CocoSplit:
    """Read and check an annotation file; every image must be on disk.

    Raises:
        CocoError: no such folder or file, another schema, images that are missing.
    """
    file = annotation_file(root, split)
    if not root.is_dir():
        raise CocoError(f"{root}: no such data folder; expected COCO's, with annotations/ and {split}/")
    if not file.is_file():
        found = sorted(p.stem.removeprefix("instances_") for p in root.glob("annotations/instances_*.json"))
        raise CocoError(f"{file}: no such annotation file; splits found: {', '.join(found) or 'none'}")
    try:
        contents = json.loads(file.read_bytes())
    except ValueError as error:
        raise CocoError(f"{file}: not a JSON file ({error})") from None
    check_schema(contents, file)

    data = CocoSplit(root, split, contents, contents["images"])
    data.categories = {entry["id"]: entry["name"] for entry in contents["categories"]}
    _distribute_annotations(data)
    missing = [index for index in range(len(data.images)) if not data.path(index).is_file()]
    if missing:
        raise CocoError(
            f"{root / split}: {len(missing)} of {len(data.images)} images of {file.name} are missing, "
            f"the first is {data.path(missing[0]).name}"
        )
    return data


def check_schema(contents: Any, file: Path) -> None:
    """COCO's instance annotations, as far as this package reads them.

    Raises:
        CocoError: the first entry that is otherwise, by its id.
    """
    for name in ("images", "annotations", "categories"):
        entries = contents.get(name) if isinstance(contents, dict) else None
        if not isinstance(entries, list):
            raise CocoError(f"{file}: not COCO's instance annotations, it has no list {name!r}")
        if not entries and name != "annotations":
            raise CocoError(f"{file}: its list {name!r} is empty")
    fields: dict[str, dict[str, Any]] = {
        "images": {"id": int, "file_name": str, "height": int, "width": int},
        "categories": {"id": int, "name": str},
        "annotations": {"id": int, "image_id": int, "category_id": int, "bbox": list,
                        "segmentation": (list, dict), "area": (int, float)},
    }  # fmt: skip
    for name, types in fields.items():
        for position, entry in enumerate(contents[name]):
            for key, kind in types.items():
                if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                    number = entry.get("id", "?") if isinstance(entry, dict) else "?"
                    raise CocoError(
                        f"{file}: not COCO's instance annotations, entry {position} (id {number}) of "
                        f"{name!r} has no valid {key!r}"
                    )
    for name, entries in ((name, contents[name]) for name in fields):
        if len({entry["id"] for entry in entries}) < len(entries):
            raise CocoError(f"{file}: ids of {name!r} are not unique")
    for entry in contents["images"]:
        if min(entry["height"], entry["width"]) < 1:
            size = f"{entry['height']}x{entry['width']}"
            raise CocoError(f"{file}: image {entry['id']} has the size {size} (height x width)")
    for entry in contents["categories"]:
        if not 1 <= entry["id"] <= LARGEST_CATEGORY:
            raise CocoError(
                f"{file}: category id {entry['id']} ({entry['name']}); ids are labels here and 0 is the "
                f"background, so number them from 1 to at most {LARGEST_CATEGORY}"
            )


def _distribute_annotations(data: CocoSplit) -> None:
    """Fill ``annotations`` and ``notes``."""
    index_of = {image["id"]: index for index, image in enumerate(data.images)}
    data.annotations = [[] for _ in data.images]
    crowds = without_area = 0
    first = None
    for entry in data.contents["annotations"]:
        where = f"{data.file}: annotation {entry['id']}"
        if entry["image_id"] not in index_of:
            raise CocoError(f"{where} is of image {entry['image_id']}, which the file does not list")
        if entry["category_id"] not in data.categories:
            raise CocoError(f"{where} is of category {entry['category_id']}, which the file does not list")
        index = index_of[entry["image_id"]]
        box = entry["bbox"]
        if len(box) != 4 or not _are_finite(box):
            raise CocoError(f"{where}: bbox must be four numbers x, y, width, height; got {box}")
        _check_segmentation(entry["segmentation"], data.images[index], where)
        if entry.get("iscrowd") not in (None, 0, 1):
            raise CocoError(f"{where}: iscrowd is 0 or 1; got {entry['iscrowd']!r}")
        if entry.get("iscrowd"):
            crowds += 1
            continue
        left, top, right, bottom = clip_box(box, data.images[index])
        if min(right - left, bottom - top) < SMALLEST_SIDE:
            without_area += 1
            first = first or entry["id"]
            continue
        data.annotations[index].append(entry)
    if without_area:
        data.notes.append(
            f"{without_area} annotations whose box has no area are left out, the first is {first}"
        )
    if crowds:
        data.notes.append(
            f"{crowds} crowd regions are left out of training; evaluation ignores what lies in them"
        )
    empty = sum(not entries for entries in data.annotations)
    if empty:
        data.notes.append(f"{empty} images without objects are trained as background")


def _check_segmentation(segmentation: Any, image: dict[str, Any], where: str) -> None:
    """Polygons or run lengths; pycocotools takes a polygon of four numbers for a box."""
    if isinstance(segmentation, dict):
        if not {"counts", "size"} <= segmentation.keys():
            raise CocoError(f"{where}: run lengths need 'counts' and 'size'; got {sorted(segmentation)}")
        size, counts = [image["height"], image["width"]], segmentation["counts"]
        if segmentation["size"] != size:
            raise CocoError(f"{where}: run lengths of the size {segmentation['size']}, its image has {size}")
        if isinstance(counts, list):
            if not all(isinstance(x, int) and x >= 0 for x in counts) or sum(counts) != size[0] * size[1]:
                raise CocoError(f"{where}: run lengths must add up to the image's {size[0] * size[1]} pixels")
        elif not isinstance(counts, str):
            raise CocoError(f"{where}: run lengths are a list or a string; got {counts!r}")
        return
    lengths = [len(polygon) if isinstance(polygon, list) else 0 for polygon in segmentation]
    if not lengths or any(length < 6 or length % 2 for length in lengths):
        raise CocoError(f"{where}: polygons need three or more points x, y; got {lengths} numbers")
    for polygon in segmentation:
        if not _are_finite(polygon):
            raise CocoError(f"{where}: polygons must be finite numbers; got {polygon}")


def _are_finite(values: list[Any]) -> bool:
    try:
        return all(isinstance(x, (int, float)) and math.isfinite(x) for x in values)
    except OverflowError:  # a whole number beyond floats
        return False


def clip_box(box: list[float], image: dict[str, Any]) -> tuple[float, float, float, float]:
    """COCO's x, y, width, height as left, top, right, bottom within the image."""
    x, y, width, height = box
    return (
        min(max(x, 0), image["width"]),
        min(max(y, 0), image["height"]),
        min(max(x + width, 0), image["width"]),
        min(max(y + height, 0), image["height"]),
    )


def decode_mask(entry: dict[str, Any], height: int, width: int) -> np.ndarray:
    """The segmentation of an annotation or a detection as a mask (H,W) uint8 of 0 and 1.

    Raises:
        CocoError: run lengths that cannot be decoded.
    """
    mask_utils, segmentation = require("pycocotools.mask"), entry["segmentation"]
    if isinstance(segmentation, list):
        segmentation = mask_utils.merge(mask_utils.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = mask_utils.frPyObjects(segmentation, height, width)
    try:
        return mask_utils.decode(segmentation)
    except ValueError:
        raise CocoError(f"annotation {entry.get('id')}: its run lengths cannot be decoded") from None


def read_image(data: CocoSplit, index: int) -> np.ndarray:
    """An image (H,W,3) uint8 RGB, of the size that its annotations are of.

    Raises:
        CocoError: not an image, or of another size.
    """
    path, entry = data.path(index), data.images[index]
    # Annotations are of the stored pixels, whatever way up a camera says they are to be shown.
    image = cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise CocoError(f"{path}: cannot be read as an image")
    if image.shape[:2] != (entry["height"], entry["width"]):
        height, width = image.shape[:2]
        raise CocoError(
            f"{path}: is {height}x{width} (height x width), {data.file.name} says "
            f"{entry['height']}x{entry['width']}"
        )
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


class TrainDataset(Dataset[tuple[Tensor, Target]]):
    """Images (3,H,W) float32 RGB in 0..1 and their targets, indexed by (index of the image, mirrored)."""

    def __init__(self, data: CocoSplit) -> None:
        self.data = data

    def __getitem__(self, key: tuple[int, bool]) -> tuple[Tensor, Target]:
        index, mirrored = key
        image, entries = read_image(self.data, index), self.data.annotations[index]
        height, width = image.shape[:2]
        boxes = np.array([clip_box(e["bbox"], self.data.images[index]) for e in entries], np.float32)
        masks = [decode_mask(entry, height, width) for entry in entries]
        stacked = np.stack(masks) if masks else np.zeros((0, height, width), np.uint8)
        boxes = boxes.reshape(-1, 4)
        if mirrored:
            image, stacked = image[:, ::-1], stacked[:, :, ::-1]
            boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
        return to_tensor(image), {
            "boxes": torch.from_numpy(np.ascontiguousarray(boxes)),
            "labels": torch.tensor([entry["category_id"] for entry in entries], dtype=torch.int64),
            "masks": torch.from_numpy(np.ascontiguousarray(stacked)),
        }


class EvaluationDataset(Dataset[tuple[int, Tensor]]):
    """Some images of a split: (index in the split, image (3,H,W) float32 RGB in 0..1)."""

    def __init__(self, data: CocoSplit, indices: list[int]) -> None:
        self.data, self.indices = data, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, Tensor]:
        index = self.indices[position]
        return index, to_tensor(read_image(self.data, index))


def to_tensor(image: np.ndarray) -> Tensor:
    """(H,W,3) uint8 → (3,H,W) float32 in 0..1."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float().div(255)


def read_by_workers(loader: Iterable[Item]) -> Iterator[Item]:
    """What a DataLoader yields; a worker's CocoError comes without PyTorch's traceback around it.

    Raises:
        CocoError: also where a worker died.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        items = iter(loader)
        signal.signal(signal.SIGCHLD, handler)  # PyTorch's would raise it in the midst of a step
        yield from items
    except CocoError as error:
        # From a worker the message arrives at the end of its traceback.
        raise CocoError(str(error).split("CocoError: ")[-1].strip()) from None
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise CocoError(f"a worker process that reads the data died ({reason})") from None


@dataclass
class StepBatches:
    """The images of each step for one of several processes, drawn from the seed and the step alone.

    A run that is resumed therefore sees what one that was never interrupted sees; there is no state to save.
    Each epoch is a permutation. Upright and lying images are batched apart, so that little is padded; at most
    one batch an epoch is of both, and the last one is filled up from the epoch's first images.

    Args:
        aspect_ratios: width / height of each image.
        batch_size: images a step over all processes; a multiple of ``world_size``.
        first_step, last_step: the steps are first_step … last_step - 1.
    """

    aspect_ratios: list[float]
    batch_size: int
    first_step: int
    last_step: int
    seed: int
    mirror: bool = True
    rank: int = 0
    world_size: int = 1
    _epoch: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.aspect_ratios) // self.batch_size)

    def batches_of_epoch(self, epoch: int) -> np.ndarray:
        """Indices of images (steps_per_epoch, batch_size)."""
        if self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch, 0])
            order = rng.permutation(len(self.aspect_ratios))
            lying = np.array(self.aspect_ratios)[order] >= 1
            order = np.concatenate([order[lying], order[~lying]])
            batches = np.resize(order, (self.steps_per_epoch, self.batch_size))  # repeats from the start
            self._epoch = epoch, batches[rng.permutation(len(batches))]
        return self._epoch[1]

    def keys(self, step: int) -> list[tuple[int, bool]]:
        """This process's share of a step: (index of the image, mirrored)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        indices = self.batches_of_epoch(epoch)[position].tolist()
        draws = np.random.default_rng([self.seed, step, 1]).random(self.batch_size) < 0.5
        mirrored = (draws & self.mirror).tolist()
        return list(zip(indices, mirrored, strict=True))[self.rank :: self.world_size]

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        return map(self.keys, range(self.first_step, self.last_step))

    def __len__(self) -> int:
        return self.last_step - self.first_step
