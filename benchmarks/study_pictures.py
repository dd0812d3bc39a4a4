"""Pictures of a study: where R = 0 and R = 2 differ most on test, and where three points of R = 2 look.

python benchmarks/study_pictures.py --data-dir camvid --r0 study/r0_480_1 --r2 study/r2_480_1

Writes ``camvid_study_predictions.jpg`` (image, label, R = 0, R = 2: the two images whose pixel accuracy R = 2
raises most, then the two where it lowers it most) and ``camvid_study_attention.jpg`` (one row for each point:
the attention at R = 1, at R = 2; in the image with the largest cars) to ``--output-dir``.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.attention_mass import resized  # noqa: E402
from dataset import find_dataset, list_samples  # noqa: E402
from dataset.reading import read_sample  # noqa: E402
from evaluation import Predictor  # noqa: E402
from evaluation.attention_page import attention_rounds, heat_pictures  # noqa: E402
from evaluation.pictures import side_by_side  # noqa: E402
from training.snapshots import find_checkpoint  # noqa: E402
from utils.arguments import UsageError, run_script  # noqa: E402

POINTS = ("car", "pavement", "building")


def load(path: Path, names: Sequence[str]) -> Predictor:
    """The checkpoint's predictor; UsageError where it has other classes."""
    predictor = Predictor(find_checkpoint(path), device="cpu", amp="off", whole=True)
    if tuple(predictor.names) != tuple(names):
        raise UsageError(f"{path}: has other classes than the data set")
    return predictor


def predict(predictor: Predictor, image: np.ndarray, short_side: int) -> np.ndarray:
    """Train ids of the image's size, predicted at another."""
    ids = predictor(resized(image, short_side))
    return cv2.resize(ids, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)


def innermost(mask: np.ndarray) -> tuple[int, int]:
    """The pixel (Y,X) of the mask that is farthest from what is not of it."""
    distance = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    return int(y), int(x)


def save(rows: list[np.ndarray], path: Path) -> None:
    gap = np.full((6, rows[0].shape[1], 3), 255, np.uint8)
    Image.fromarray(np.concatenate([part for row in rows for part in (gap, row)][1:])).save(path, quality=88)
    print(f"written to {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="CamVid's folder")
    parser.add_argument("--r0", type=Path, required=True, help="checkpoint of R = 0, or a folder")
    parser.add_argument("--r2", type=Path, required=True, help="checkpoint of R = 2, or a folder")
    parser.add_argument("--short-side", type=int, default=180, help="of what is predicted (default: 180)")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "docs/results")
    options = parser.parse_args()
    spec = find_dataset(options.data_dir)
    if not set(POINTS) <= set(spec.labels.names):
        raise UsageError(f"--data-dir {options.data_dir}: expected CamVid, found {spec.prefix}")
    without, with_ = (load(path, spec.labels.names) for path in (options.r0, options.r2))
    points = [spec.labels.names.index(name) for name in POINTS]
    shown, most = [], 0
    for pair in list_samples(spec, options.data_dir, "test"):
        image, label = read_sample(pair, spec.labels, spec.ignore_label)
        assert label is not None
        known = label != spec.ignore_label
        ids = [predict(one, image, options.short_side) for one in (without, with_)]
        gain = float(np.mean((ids[1] == label)[known]) - np.mean((ids[0] == label)[known]))
        colours = (spec.labels.colour(each) for each in (label, *ids))
        shown.append((gain, pair, side_by_side(image, *colours)))
        counts = [np.count_nonzero(label == point) for point in points]
        if all(counts) and counts[0] > most:
            most, chosen = counts[0], (image, label)
    shown.sort(key=lambda one: -one[0])
    extremes = [*shown[:2], *shown[-2:]]
    for gain, pair, _ in extremes:
        print(f"{pair.image.name}: {100 * gain:+.1f} points of pixel accuracy")
    save([row for _, _, row in extremes], options.output_dir / "camvid_study_predictions.jpg")

    image, label = chosen
    small = resized(image, options.short_side)
    rounds = attention_rounds(with_, small)
    rows = []
    for class_id in points:
        y, x = innermost(label == class_id)
        point = (y * small.shape[0] // image.shape[0], x * small.shape[1] // image.shape[1])
        pictures = (small, *heat_pictures(small, rounds, point))
        rows.append(
            side_by_side(*(cv2.resize(one, (480, 360), interpolation=cv2.INTER_LINEAR) for one in pictures))
        )
    save(rows, options.output_dir / "camvid_study_attention.jpg")


if __name__ == "__main__":
    run_script(main)
