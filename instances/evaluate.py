"""Box and mask AP of a trained network by pycocotools, its detections in COCO's JSON, and pictures."""

import argparse
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from instances.coco import (
    CocoError,
    CocoSplit,
    EvaluationDataset,
    decode_mask,
    read_by_workers,
    read_image,
    read_split,
)
from instances.errors import InstancesError, UsageError, require
from instances.model import load_model
from instances.options import HelpFormatter
from instances.pictures import draw_instances
from instances.train import checkpoints
from utils.arguments import run_script
from utils.distributed import Process, process_group

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # the first six of COCOeval.stats
Detection = dict[str, Any]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "instances.evaluate", description=__doc__, allow_abbrev=False,
        formatter_class=HelpFormatter,
    )  # fmt: skip
    parser.add_argument("--data-dir", type=Path, required=True, help="COCO's folder")
    parser.add_argument("--split", default="val2017", help="instances_<split>.json and <split>/")
    parser.add_argument(
        "--restore-from", type=Path, default=Path("snapshots/instances"),
        help="checkpoint, or a folder of which the newest is taken",
    )  # fmt: skip
    parser.add_argument("--output-dir", type=Path, default=Path("results/instances"), help="what is written")
    parser.add_argument("--min-size", type=int, help="short side of the images; default: as trained")
    parser.add_argument("--max-size", type=int, help="longest side of the images; default: as trained")
    parser.add_argument("--pictures", type=int, default=20, help="how many of the first images are drawn")
    parser.add_argument("--score", type=float, default=0.5, help="detections from this score on are drawn")
    parser.add_argument("--num-workers", type=int, default=1, help="processes that read images")
    parser.add_argument("--gpu", default="auto", help="auto, cpu or a GPU's number; several: use torchrun")
    args = parser.parse_args(argv)
    for name in ("pictures", "num_workers", "score"):
        if not getattr(args, name) >= 0:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 0; got {getattr(args, name)}")
    if "," in args.gpu:
        raise UsageError(f"--gpu {args.gpu}: for several GPUs start instances.evaluate by torchrun")
    return args


@torch.inference_mode()
def detect(model: nn.Module, data: CocoSplit, indices: list[int], device: torch.device, workers: int,
           show_progress: bool = False) -> list[Detection]:  # fmt: skip
    """The detections in some images of a split.

    Returns:
        COCO's result format: image_id, category_id, score, bbox (x, y, width, height) and segmentation (run
        lengths, "counts" as str); at most 100 an image, best first.
    """
    mask_utils = require("pycocotools.mask")
    loader = DataLoader(EvaluationDataset(data, indices), batch_size=None, num_workers=workers)
    found = []
    images = read_by_workers(loader)
    for index, image in tqdm(images, total=len(loader), unit="image", disable=not show_progress):
        output = {name: x.cpu() for name, x in model([image.to(device)])[0].items()}
        boxes = output["boxes"].double().numpy()
        boxes[:, 2:] -= boxes[:, :2]
        masks = (output["masks"][:, 0] >= 0.5).numpy().astype(np.uint8)  # [N,H,W]
        for box, label, score, mask in zip(boxes, output["labels"], output["scores"], masks, strict=True):
            lengths = mask_utils.encode(np.asfortranarray(mask))
            found.append(
                {
                    "image_id": data.images[index]["id"],
                    "category_id": int(label),
                    "score": round(float(score), 6),
                    "bbox": [round(x, 2) for x in box.tolist()],
                    "segmentation": lengths | {"counts": lengths["counts"].decode()},
                }
            )
    return found


def score(contents: dict[str, Any], detections: list[Detection], kind: str) -> dict[str, float | None]:
    """COCO's average precision, as pycocotools computes it.

    Args:
        contents: the annotation file.
        detections: entries with "bbox" (``kind`` "bbox") or "segmentation" (``kind`` "segm").

    Returns:
        AP, AP50, AP75, APs, APm, APl in 0..1; None where the annotations have no such object.
    """
    coco_module, evaluation = require("pycocotools.coco"), require("pycocotools.cocoeval")
    truth, results = coco_module.COCO(), coco_module.COCO()
    with contextlib.redirect_stdout(io.StringIO()):
        # pycocotools writes into what it is given, takes an annotation of id 0 for none, and wants "iscrowd".
        annotations = [
            entry | {"id": number, "iscrowd": int(bool(entry.get("iscrowd")))}
            for number, entry in enumerate(contents["annotations"], start=1)
        ]
        truth.dataset = contents | {"annotations": annotations}
        truth.createIndex()
        if detections:
            results = truth.loadRes([dict(entry) for entry in detections])
        else:  # loadRes cannot do without any
            results.dataset = contents | {"annotations": []}
            results.createIndex()
        run = evaluation.COCOeval(truth, results, kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
    values = (float(value) for value in run.stats[:6])
    return {name: value if value >= 0 else None for name, value in zip(METRICS, values, strict=True)}


def result_files(detections: list[Detection]) -> dict[str, list[Detection]]:
    """The detections as COCO's server takes them, one list for each kind of AP.

    With both a box and a mask in an entry, pycocotools would sort masks into small, medium and large by the
    area of their boxes.
    """
    drop = {"bbox": "segmentation", "segm": "bbox"}
    return {
        kind: [{name: value for name, value in entry.items() if name != other} for entry in detections]
        for kind, other in drop.items()
    }


def write_pictures(
    data: CocoSplit, detections: list[Detection], folder: Path, count: int, threshold: float
) -> None:
    """Image, annotated and detected instances side by side, for the first images of the split."""
    folder.mkdir(parents=True, exist_ok=True)
    by_image: dict[int, list[Detection]] = {}
    for entry in detections:
        if entry["score"] >= threshold:
            by_image.setdefault(entry["image_id"], []).append(entry)
    for index in range(min(count, len(data.images))):
        image = read_image(data, index)
        panels = [image]
        for entries in (data.annotations[index], by_image.get(data.images[index]["id"], [])):
            masks = [decode_mask(entry, *image.shape[:2]) for entry in entries]
            names = [caption(data, entry) for entry in entries]
            panels.append(draw_instances(image, masks, names))
        gap = np.full((image.shape[0], 8, 3), 255, np.uint8)
        row = np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=1)
        name = Path(data.images[index]["file_name"])
        # Files of one name in two folders are two pictures.
        stem = "_".join(part for part in name.with_suffix("").parts if part != name.anchor)
        path = folder / f"{stem}.jpg"
        if not cv2.imwrite(str(path), cv2.cvtColor(row, cv2.COLOR_RGB2BGR)):
            raise CocoError(f"{path}: cannot be written")


def caption(data: CocoSplit, entry: dict[str, Any]) -> str:
    label = entry["category_id"]  # a network may also find what the file has no name for
    name = data.categories.get(label, f"category {label}")
    return f"{name} {entry['score']:.2f}" if "score" in entry else name


def table(metrics: dict[str, dict[str, float | None]]) -> str:
    """Box and mask AP in per cent, as a line each."""
    lines = ["      " + "".join(f"{name:>7}" for name in METRICS)]
    for kind, word in (("bbox", "box"), ("segm", "mask")):
        cells = (f"{'-':>7}" if value is None else f"{100 * value:7.2f}" for value in metrics[kind].values())
        lines.append(f"{word:6}" + "".join(cells))
    return "\n".join(lines)


def check_categories(data: CocoSplit, contents: dict[str, Any], path: Path) -> None:
    """The network's categories must be those of the data."""
    trained = contents.get("categories", {})
    other = [(label, name) for label, name in data.categories.items() if trained.get(label) != name]
    if other:
        label, name = other[0]
        raise CocoError(
            f"{data.file}: category {label} is {name!r}, for {path} it is {trained.get(label)!r}; "
            "evaluate on data with the categories that were trained"
        )


def main(args: argparse.Namespace) -> None:
    for package in ("torchvision", "pycocotools.mask"):
        require(package)
    path = args.restore_from
    if path.is_dir():
        found = checkpoints(path)
        if not found:
            raise InstancesError(f"{path}: holds no instances_*.pth")
        path = found[-1]
    with process_group(args.gpu) as process:
        evaluate(args, path, process)


def evaluate(args: argparse.Namespace, path: Path, process: Process) -> None:
    """The images are divided over the processes; the main one scores and writes."""
    data = read_split(args.data_dir, args.split)
    changes = {name: value for name in ("min_size", "max_size") if (value := getattr(args, name)) is not None}
    model, contents = load_model(path, **changes)
    check_categories(data, contents, path)
    mine = list(range(len(data.images)))[process.rank :: process.world_size]
    found = detect(model.to(process.device), data, mine, process.device, args.num_workers, process.is_main)
    # In the order of the images, however many processes there are.
    position = {image["id"]: index for index, image in enumerate(data.images)}
    detections = [entry for part in process.all_gather_object(found) for entry in part]
    detections.sort(key=lambda entry: position[entry["image_id"]])
    if not process.is_main:
        return
    args.output_dir.mkdir(parents=True, exist_ok=True)
    files = result_files(detections)
    for kind, entries in files.items():  # before they are scored: no failure there may lose them
        (args.output_dir / f"detections_{kind}.json").write_text(json.dumps(entries))
    metrics: dict[str, Any] = {kind: score(data.contents, entries, kind) for kind, entries in files.items()}
    about = {
        "checkpoint": str(path), "step": contents["step"], "config": contents["config"] | changes,
        "data": str(data.file), "images": len(data.images), "detections": len(detections),
    }  # fmt: skip
    (args.output_dir / "metrics.json").write_text(json.dumps(metrics | about, indent=1) + "\n")
    write_pictures(data, detections, args.output_dir / "pictures", args.pictures, args.score)
    print(f"{path}, step {contents['step']}, on {len(data.images)} images of {args.split}\n{table(metrics)}")
    print(
        f"written: {args.output_dir}/ (metrics.json, detections_bbox.json, detections_segm.json, pictures/)"
    )


if __name__ == "__main__":
    run_script(lambda: main(parse_args()), "instances.evaluate")
