"""Train and evaluate a table of settings with several seeds; one JSON line a run.

python benchmarks/study.py --data-dir camvid --weights resnet18.pth --seeds 1,2,3 --settings r0,r2

A run whose line is in the file is not repeated, one that was interrupted is resumed from its checkpoint,
so the same command goes on with what is left. ``benchmarks/summarise_study.py`` makes the table.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from training.provenance import git_commit  # noqa: E402

COMMON = (
    "--backbone", "resnet18", "--stem", "plain", "--input-size", "180,240", "--batch-size", "4",
    "--ohem", "0", "--gpu", "cpu", "--num-workers", "0",
)  # fmt: skip
SETTINGS: dict[str, tuple[str, ...]] = {
    "r0": ("--recurrence", "0"),
    "r1": ("--recurrence", "1"),
    "r2": ("--recurrence", "2"),
    "r3": ("--recurrence", "3"),
    "fcn": ("--model", "fcn"),
    "pspnet": ("--model", "pspnet"),
    "deeplabv3": ("--model", "deeplabv3"),
    "nonlocal": ("--model", "nonlocal"),
    "r2_ccl": ("--recurrence", "2", "--ccl"),
    "r2_ohem": ("--recurrence", "2", "--ohem", "1", "--ohem-keep", "20000"),
}


def python(*arguments: str, threads: int) -> float:
    """Run a script of the project; its seconds."""
    began = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr.strip().splitlines()[-1]}")
    return time.perf_counter() - began


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one setting with one seed and evaluate it on val and test, whole images."""
    folder = options.work / f"{name}_{options.steps}_{seed}"
    data = ("--data-dir", str(options.data_dir))
    weights = ("--restore-from", str(options.weights)) if options.weights else ()
    flags = (
        *COMMON, *SETTINGS[name], "--num-steps", str(options.steps), "--learning-rate", str(options.rate),
        "--random-seed", str(seed), "--save-pred-every", "200", "--keep-last", "1",
    )  # fmt: skip
    seconds = python(
        "train.py",
        *data,
        *flags,
        *weights,
        "--snapshot-dir",
        str(folder),
        "--resume",
        threads=options.threads,
    )
    line: dict[str, Any] = {
        "setting": name,
        "seed": seed,
        "flags": " ".join(flags),
        "weights": options.weights.name if options.weights else None,
        "steps": options.steps,
        "commit": (git_commit(ROOT) or {}).get("commit"),
        "hardware": options.hardware,
        "seconds": round(seconds),
    }
    for split in ("val", "test"):
        out = folder / split
        python(
            "evaluate.py", *data, "--restore-from", str(folder), "--split", split, "--whole", "--gpu", "cpu",
            "--num-workers", "0", "--output-dir", str(out), threads=options.threads,
        )  # fmt: skip
        metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        line[split] = {key: metrics[key] for key in ("mIoU", "mean_accuracy", "pixel_accuracy", "IoU")}
    return line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="CamVid's folder")
    parser.add_argument("--weights", type=Path, help="ImageNet weights to start from (plain stem)")
    parser.add_argument("--settings", default="r0,r2", help=f"some of {', '.join(SETTINGS)}")
    parser.add_argument("--seeds", default="1,2,3", help="seeds; each setting is run with all of them")
    parser.add_argument("--steps", type=int, default=1200, help="length of a run (default: 1200)")
    parser.add_argument("--rate", type=float, default=0.01, help="learning rate (default: 0.01)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each (default: 1)")
    parser.add_argument("--work", type=Path, default=Path("snapshots/study"), help="folder for checkpoints")
    parser.add_argument("--output", type=Path, default=Path("docs/results/camvid_study.jsonl"))
    parser.add_argument(
        "--hardware", default="2 cores of an AMD EPYC", help="what the lines say of the machine"
    )
    options = parser.parse_args()
    names = options.settings.split(",")
    for name in names:
        if name not in SETTINGS:
            parser.error(f"--settings {name}: expected some of {', '.join(SETTINGS)}")
    for path in ("data_dir", "weights", "work", "output"):
        if getattr(options, path) is not None:
            setattr(options, path, getattr(options, path).resolve())
    lines = options.output.read_text(encoding="utf-8").splitlines() if options.output.exists() else []
    done = {(line["setting"], line["seed"], line["steps"]) for line in map(json.loads, lines)}
    # Seed by seed, so that whatever time there is gives pairs that can be compared.
    todo = [(name, seed) for seed in map(int, options.seeds.split(",")) for name in names]
    todo = [(name, seed) for name, seed in todo if (name, seed, options.steps) not in done]
    print(f"{len(done)} runs are done, {len(todo)} to do")
    with ThreadPoolExecutor(options.jobs) as pool:
        for line in pool.map(lambda job: run(*job, options), todo):
            with options.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{line['setting']} seed {line['seed']}: val {100 * line['val']['mIoU']:.2f}", flush=True)


if __name__ == "__main__":
    main()
