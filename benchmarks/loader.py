"""How fast samples are read and augmented, and how many workers it takes to feed a training step.

    python benchmarks/loader.py
    python benchmarks/loader.py --data-dir /path/to/cityscapes

Without a data folder it draws scenes of 2048×1024 with noise, so that a PNG is no smaller than a photograph
(3.3 MB; Cityscapes' have 2.3 on average). One core reads, without workers.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset import DataError, TrainTransform, find_dataset, list_samples
from dataset.demo import generate
from dataset.reading import read_sample
from utils.arguments import number

STEP_RATES = (2, 8, 16, 32)  # images/s that a training step may consume


def noisy_scenes(folder: Path, count: int) -> Path:
    """Synthetic Cityscapes whose images compress as badly as photographs."""
    generate(folder / "scenes", num_train=count, num_val=1, height=1024, width=2048)
    rng = np.random.default_rng(0)
    for path in (folder / "scenes" / "leftImg8bit").rglob("*.png"):
        image = cv2.imread(str(path)) + rng.normal(0, 0.8, (1024, 2048, 3))
        cv2.imwrite(str(path), np.clip(np.rint(image), 0, 255).astype(np.uint8))
    return folder / "scenes"


def measure(data: Path, crop: tuple[int, int], rounds: int) -> dict[str, float]:
    """Milliseconds of each stage on one core, and images a second."""
    spec = find_dataset(data)
    pairs = list_samples(spec, data, "train")[:32]
    transform, rng = TrainTransform(crop), np.random.default_rng(0)
    reading, augmenting, sizes = [], [], []
    for index in range(rounds * len(pairs)):
        pair = pairs[index % len(pairs)]
        began = time.perf_counter()
        image, label = read_sample(pair, spec.labels, 255)
        read = time.perf_counter()
        transform(image, label, rng)
        reading.append(1000 * (read - began))
        augmenting.append(1000 * (time.perf_counter() - read))
        sizes.append(pair.image.stat().st_size / 1e6)
    whole = statistics.mean(reading) + statistics.mean(augmenting)
    return {
        "image_mb": statistics.mean(sizes),
        "read_ms": statistics.median(reading),
        "augment_ms": statistics.median(augmenting),
        "images_per_second": 1000 / whole,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, help="a data set; without it scenes are drawn")
    parser.add_argument("--crop", type=number(int, 1), default=769, help="height and width of the crops")
    parser.add_argument("--rounds", type=number(int, 1), default=3, help="times that each sample is read")
    parser.add_argument("--json", type=Path, help="write the numbers there as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = options.data_dir or noisy_scenes(Path(folder), 12)
        try:
            results = measure(data, (options.crop, options.crop), options.rounds)
        except DataError as error:
            parser.error(str(error))
    print("image {image_mb:.1f} MB   read {read_ms:.0f} ms   augment {augment_ms:.0f} ms".format(**results))
    rate = results["images_per_second"]
    print(f"{rate:.1f} images/s a core\n")
    print("a step of   needs")
    for step_rate in STEP_RATES:
        print(f"{step_rate:4d} images/s {-(-step_rate // rate):4.0f} workers")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
