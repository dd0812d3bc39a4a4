"""Train and evaluate a table of settings with several seeds; one JSON line a run.

python benchmarks/study.py --data-dir camvid --weights resnet18.pth --settings r0,r2 --seeds 1,2,3 --steps 480

The settings change the recipe "camvid", whose frames have half CamVid's size, with ``--full-size`` all of it.
They take batches of two, or of six where their names end so: there are many. A run whose line is in
the file is not repeated and one that was interrupted goes on from its checkpoint, so the same command does
what is left. ``benchmarks/summarise_runs.py`` makes the table.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.summarise_runs import kind_of, read_lines  # noqa: E402
from training.provenance import git_commit  # noqa: E402
from training.snapshots import find_checkpoint  # noqa: E402
from utils.arguments import UsageError, number  # noqa: E402
from utils.arguments import run_script as run_main  # noqa: E402
from utils.checkpoint import load_checkpoint, model_state  # noqa: E402

SCALED = "scaled_weights.pth"
EPS = 1e-5  # of torchvision's batch normalisation
SETTINGS: dict[str, tuple[str, ...]] = {
    "r0": ("--recurrence", "0"),
    "r2": ("--recurrence", "2"),
    "r2_from_0": ("--recurrence", "2", "--initial-gamma", "0"),
    "r1": ("--recurrence", "1"),
    "r3": ("--recurrence", "3"),
    "fcn": ("--model", "fcn"),
    "pspnet": ("--model", "pspnet"),
    "deeplabv3": ("--model", "deeplabv3"),
    "nonlocal": ("--model", "nonlocal"),
    "r2_ccl": ("--recurrence", "2", "--ccl"),
    "r2_ohem": ("--recurrence", "2", "--ohem", "1", "--ohem-keep", "20000"),
    # A clip is a sample: a step sees three times the frames of the others.
    "t3_r2": ("--recurrence", "2", "--clip", "3"),
    "t3_r3": ("--recurrence", "3", "--clip", "3"),
}
SETTINGS |= {f"{name}_batch6": (*flags, "--batch-size", "6") for name, flags in SETTINGS.items()}
# Of frames and crops of CamVid's own size, where the recipe halves both.
FULL_SIZE = ("--input-size", "360,480", "--short-sides", "300,330,360,400,440,480")
FULL_SIZE += ("--eval-short-side", "360")


class RunError(RuntimeError):
    """A run that ended with an error."""

    exit_status = 1


def load_backbone(path: Path) -> dict[str, torch.Tensor]:
    """torchvision's weights of a ResNet.

    Raises:
        UsageError: the file holds something else.
        CheckpointError: it cannot be read.
    """
    weights = model_state(load_checkpoint(path), path)
    stem = weights.get("conv1.weight")
    if stem is None or stem.shape[-1] != 7 or "fc.weight" not in weights:
        raise UsageError(f"--weights {path}: expected torchvision's weights of a ResNet")
    return weights


def scale_convolutions(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """torchvision's weights of a ResNet, each convolution as large as one drawn afresh: the same function.

    The normalisation after a convolution takes its size away, but relative to it a step of SGD moves a weight
    by 1 / size². Quantised weights can be several times too large, and such layers hardly learn. The size is
    that of ResNet's initialisation (He, fan out): std² = 2 / (output channels · k²).
    """
    scaled = {name: value.float() for name, value in weights.items()}
    for name in weights:
        if scaled[name].dim() != 4:
            continue
        weight = scaled[name]
        norm = name.replace("conv", "bn").replace("downsample.0", "downsample.1").removesuffix(".weight")
        factor = (2 / weight[:, 0].numel()) ** 0.5 / weight.square().mean().sqrt()
        scaled[name] = weight * factor
        scaled[f"{norm}.running_mean"] = scaled[f"{norm}.running_mean"] * factor
        scaled[f"{norm}.running_var"] = (scaled[f"{norm}.running_var"] + EPS) * factor**2 - EPS
    return scaled


def run_script(*arguments: str, options: argparse.Namespace) -> None:
    """Run a script of the project.

    Raises:
        RunError: it failed; the message is its last line.
    """
    workers = "0" if options.gpu == "cpu" else "2"
    done = subprocess.run(
        [sys.executable, *arguments, "--gpu", options.gpu, "--num-workers", workers],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(options.threads)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode} and no message"]
        raise RunError(f"{' '.join(arguments)}: {lines[-1]}")


def flags_of(name: str, seed: int, options: argparse.Namespace) -> tuple[str, ...]:
    """The options of train.py that make a run what it is."""
    flags = ["--recipe", "camvid", *SETTINGS[name]]
    if "--batch-size" not in flags:
        flags += ["--batch-size", "2"]
    flags += ["--num-steps", str(options.steps), "--random-seed", str(seed), "--backbone", options.backbone]
    if options.full_size:
        flags += FULL_SIZE
    return *flags, "--amp", options.amp


def protocol_of(options: argparse.Namespace) -> tuple[str, ...]:
    """The options of evaluate.py."""
    return "--whole", "--short-sides", "360" if options.full_size else "180"


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one setting with one seed and evaluate it on val and test."""
    folder = options.work / f"{name}_{options.steps}_{seed}"
    data = ("--data-dir", str(options.data_dir))
    flags = flags_of(name, seed, options)
    protocol = protocol_of(options)
    run_script(
        "train.py", *data, *flags, "--restore-from", str(options.work / SCALED),
        "--snapshot-dir", str(folder), "--save-pred-every", "200", "--keep-last", "1", "--resume",
        options=options,
    )  # fmt: skip
    log = map(json.loads, (folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
    line: dict[str, Any] = {
        "setting": name,
        "seed": seed,
        "steps": options.steps,
        "flags": " ".join(flags),
        "protocol": " ".join(protocol),
        "weights": options.weights.name,
        "commit": (git_commit(ROOT) or {}).get("commit"),
        "hardware": options.hardware,
        "threads": options.threads,
        "losses": [[entry["step"], round(entry["loss"], 4)] for entry in log if "loss" in entry],
    }
    weights = load_checkpoint(find_checkpoint(folder))["model"]
    gammas = [value.item() for name, value in weights.items() if name.endswith(".gamma")]
    if gammas and not name.startswith("r0"):
        line["gamma"] = gammas[0]  # how much of the attention the network adds
    for split in ("val", "test"):
        out = folder / split
        run_script(
            "evaluate.py", *data, "--restore-from", str(folder), "--split", split, *protocol,
            "--output-dir", str(out), options=options,
        )  # fmt: skip
        metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        line[split] = {key: metrics[key] for key in ("mIoU", "mean_accuracy", "pixel_accuracy", "IoU")}
    return line


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="CamVid's folder")
    parser.add_argument(
        "--weights",
        type=Path,
        required=True,
        help="torchvision's weights of the backbone; they are scaled first",
    )
    parser.add_argument("--settings", default="r0,r2", help=f"some of {', '.join(SETTINGS)}")
    parser.add_argument("--seeds", default="1,2,3", help="each setting is run with all of them")
    parser.add_argument("--steps", type=number(int, 1), required=True, help="length of a run")
    parser.add_argument(
        "--amp", default="off", help="as train.py's: bf16 where the processor has instructions for it"
    )
    parser.add_argument("--backbone", default="resnet18", help="of --weights (default: resnet18)")
    parser.add_argument("--full-size", action="store_true", help="frames of twice the recipe's size")
    parser.add_argument("--gpu", default="cpu", help="as train.py's (default: cpu)")
    parser.add_argument("--jobs", type=number(int, 1), default=2, help="runs at a time (default: 2)")
    parser.add_argument("--threads", type=number(int, 1), default=1, help="threads of each (default: 1)")
    parser.add_argument("--work", type=Path, default=Path("snapshots/study"), help="folder for checkpoints")
    parser.add_argument("--output", type=Path, default=Path("docs/results/camvid_study.jsonl"))
    parser.add_argument("--hardware", default="", help="what the lines say of the machine")
    options = parser.parse_args()
    options.settings = options.settings.split(",")
    for name in options.settings:
        if name not in SETTINGS:
            parser.error(f"--settings {name}: expected some of {', '.join(SETTINGS)}")
    try:
        options.seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds {options.seeds}: expected numbers, divided by commas")
    if options.backbone != "resnet18" or options.full_size:  # runs of another kind: folders of their own
        options.work /= options.backbone + ("_full_size" if options.full_size else "")
    for path in ("data_dir", "weights", "work", "output"):
        setattr(options, path, getattr(options, path).resolve())
    return options


def main() -> None:
    options = parse_args()
    lines = read_lines(options.output) if options.output.exists() else []
    done = {(line["setting"], line["seed"], *kind_of(line)) for line in lines}
    kind = kind_of(
        {
            "steps": options.steps,
            "protocol": " ".join(protocol_of(options)),
            "weights": options.weights.name,
            "flags": " ".join(flags_of(options.settings[0], options.seeds[0], options)),
        }
    )
    # Seed by seed, so that whatever time there is gives pairs that can be compared.
    todo = [(name, seed) for seed in options.seeds for name in options.settings]
    todo = [job for job in todo if (*job, *kind) not in done]
    print(f"{len(done)} runs are done, {len(todo)} to do", flush=True)
    options.work.mkdir(parents=True, exist_ok=True)
    torch.save(scale_convolutions(load_backbone(options.weights)), options.work / SCALED)
    writing = threading.Lock()

    def work(job: tuple[str, int]) -> None:
        line = run(*job, options)
        with writing, options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{job[0]} seed {job[1]}: test {100 * line['test']['mIoU']:.2f}", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        for _ in pool.map(work, todo):
            pass


if __name__ == "__main__":
    run_main(main)
