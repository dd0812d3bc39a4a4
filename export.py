"""Export a checkpoint: ONNX (.onnx), torch.export (.pt2), or weights under another code's names (.pth).

What was written is run beside the network on pictures of two sizes, and kept only where their classes agree.
"""

from utils import startup

startup.prepare()  # before imports that take seconds

import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dataset import DATASETS, LabelTable, Normalization
from dataset.demo import draw_scene
from evaluation.checkpoint import labels_of, trained_on
from evaluation.inference import Fit, describe_fit
from evaluation.options import CheckpointOptions
from networks import HEADS, NetworkConfig, Segmenter, fold_norms, load_model, mmsegmentation, restore_model
from networks.config import REFERENCE_NETWORK, difference
from networks.portable import Full, Logits, with_formula
from training.recipes import find_recipe
from training.snapshots import find_checkpoint
from utils.arguments import OutputError, UsageError, parse_options, run_script
from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from utils.fields import REQUIRED, setting
from utils.files import sha256_of

OPSET = 18  # onnxruntime takes it since version 1.14; files have IR version 10, which 1.18 reads
CHECKED_SIZES = ((1, 97, 161), (2, 136, 184))  # batch, height, width; the network is traced at another
TRACED_SIZE = (2, 105, 145)
LEAST_AGREEMENT = 0.999  # of the predicted classes
# Of the network's config, what a user of the file must know.
DESCRIBED = ("mean", "std", "channel_order", "model", "backbone", "recurrence", "align_corners")

# (images, float32 or uint8) → logits or ids
Runner = Callable[[Tensor], Tensor]


class ExportError(RuntimeError):
    """A file that cannot be written, or does not compute what the network does."""

    exit_status = 1


@dataclass(frozen=True, kw_only=True)
class ExportOptions(CheckpointOptions):
    """What is exported, and how; ``export.py`` makes a flag of each field."""

    recurrence: int | None = setting(
        None, "rounds R of criss-cross attention (default: the checkpoint's)", group="network", min=0
    )
    dataset: str | None = setting(
        None, "whose names and colours classes have (default: the checkpoint's)", group="network",
        choices=lambda: tuple(DATASETS),
    )  # fmt: skip
    output: Path = setting(REQUIRED, "file to write: .onnx, .pt2, or .pth with --names", group="export")
    full: bool = setting(
        False,
        "RGB pictures (B,H,W,3) uint8 in, class ids (B,H,W) uint8 out; default: normalised images (B,3,H,W) "
        "in, logits (B,N,~H/8,~W/8) out",
        group="export",
    )
    names: str | None = setting(
        None, "write weights that another code loads", group="export", choices=("reference", "mmsegmentation")
    )

    def __post_init__(self) -> None:
        ending = self.output.suffix
        if ending not in (".onnx", ".pt2", ".pth"):
            raise UsageError(f"--output {self.output}: the ending must be .onnx, .pt2, or .pth with --names")
        if ending == ".pth" and self.names is None:
            raise UsageError("--output with .pth needs --names: whose names the weights are to have")
        if ending != ".pth" and self.names is not None:
            raise UsageError(f"--names {self.names} writes weights; --output must end with .pth")
        if self.names and self.full:
            raise UsageError("--full is for .onnx and .pt2; weights have no pre- and post-processing")
        if self.dataset and self.num_classes:
            raise UsageError("--dataset and --num-classes exclude each other")


def main() -> None:
    options = parse_options(ExportOptions, __doc__)
    if options.output.suffix == ".onnx":
        import_onnx()
    if options.recipe:
        find_recipe(options.recipe)  # for what its module registers
    path = find_checkpoint(options.restore_from)
    contents = load_checkpoint(path)
    trained = trained_on(contents, path)
    if trained.clip > 1:  # with one frame it would be another network
        raise ExportError(
            f"{path}: was trained on clips of {trained.clip} frames; only networks of images are exported"
        )
    given = {} if options.recurrence is None else {"recurrence": options.recurrence}
    model, config = restore_model(contents, path, **given)
    labels = classes_of(contents, config, path, options)
    output = options.output
    if output.resolve() == path.resolve():
        raise UsageError(f"--output {output} is the checkpoint itself")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = output.with_name(f".tmp_{output.name}")
        temporary.touch()
    except OSError as error:
        raise OutputError(f"{output}: cannot write there ({error.strerror})") from None
    try:
        if options.names:
            write_weights(options.names, model, config, labels, temporary)
            # A state dict does not hold them.
            untold = {name: getattr(config, name) for name in HEADS[config.model].options}
            check(Logits(model), Logits(load_model(temporary, **untold)[0]), config, full=False)
            if config.recurrence != NetworkConfig().recurrence:
                print(f"R = {config.recurrence} is not in these weights: whoever loads them has to set it")
        else:
            folded = fold_norms(model)
            module = (Full(folded, config) if options.full else Logits(folded)).eval()
            write = write_onnx if output.suffix == ".onnx" else write_pt2
            run = write(
                with_formula(module), metadata(config, labels, path, options.full, trained.fit), temporary
            )
            check(module, run, config, options.full)
        size = temporary.stat().st_size
        temporary.replace(output)
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({error.strerror or error})") from None
    finally:
        temporary.unlink(missing_ok=True)
    print(f"written to {output}, {size / 2**20:.1f} MiB")
    if trained.fit is not None:
        print(f"note: predict.py scales pictures to {describe_fit(trained.fit)} first, this file does not")


def classes_of(
    contents: dict[str, Any], config: NetworkConfig, path: Path, options: ExportOptions
) -> LabelTable:
    """Names and colours of the classes: the checkpoint's, or what the command line says.

    Raises:
        CheckpointError: there are none, or not as many as the network has classes.
    """
    if options.dataset is None:
        return labels_of(contents, path, config.num_classes, options.num_classes)
    labels = DATASETS[options.dataset].labels
    if labels.num_classes != config.num_classes:
        raise CheckpointError(
            f"{path}: the network has {config.num_classes} classes, not {labels.num_classes}"
        )
    return labels


def metadata(config: NetworkConfig, labels: LabelTable, path: Path, full: bool, fit: Fit) -> dict[str, str]:
    """What a user of the file must know, as texts; lists are JSON."""
    values: dict[str, Any] = {
        "class_names": labels.names,
        "colours": labels.palette,
        "label_ids": labels.ids,
        **{name: getattr(config, name) for name in DESCRIBED},
        "fit": fit,
        "input": "RGB (B,H,W,3) uint8" if full else "(channel - mean) / std, (B,3,H,W) float32",
        "output": "class ids (B,H,W) uint8" if full else "logits (B,N,~H/8,~W/8) float32",
        "checkpoint": path.name,
        "checkpoint_sha256": sha256_of(path),
    }
    return {
        name: x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for name, x in values.items()
    }


def import_onnx() -> tuple[Any, Any]:
    """onnx and onnxruntime, which most users do without.

    Raises:
        ExportError: a package is missing.
    """
    try:
        importlib.import_module("onnxscript")
        return importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ExportError(
            f".onnx needs a package that is missing ({error.name}): pip install onnx onnxscript onnxruntime"
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Suppresses the exporters' warnings and log messages, on which no user can act."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def traced_input(module: Logits) -> tuple[Tensor, dict[int, str]]:
    """An input to trace, and the names of its axes that may have any length."""
    batch, height, width = TRACED_SIZE
    if isinstance(module, Full):
        return torch.zeros(batch, height, width, 3, dtype=torch.uint8), {0: "batch", 1: "height", 2: "width"}
    return torch.zeros(batch, 3, height, width), {0: "batch", 2: "height", 3: "width"}


def cannot_export(error: Exception) -> ExportError:
    """One line about an exporter's long message."""
    reason = next(iter(str(error).splitlines()), "")
    return ExportError(f"the network cannot be exported ({type(error).__name__}: {reason})")


def write_onnx(module: Logits, described: dict[str, str], path: Path) -> Runner:
    """Write ONNX; returns the file's function, as onnxruntime computes it on the CPU."""
    onnx, onnxruntime = import_onnx()
    images, axes = traced_input(module)
    name = "ids" if isinstance(module, Full) else "logits"
    with quiet():
        try:
            program = torch.onnx.export(
                module,
                (images,),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=["images"],
                output_names=[name],
                dynamic_shapes={"images": axes},
            )
        except torch.onnx.OnnxExporterError as error:
            raise cannot_export(error) from None
        assert program is not None
        program.model.metadata_props.update(described)
        program.save(path, external_data=False)
        onnx.checker.check_model(str(path))
        with onnxruntime_errors():
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        with onnxruntime_errors():
            return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return run


@contextmanager
def onnxruntime_errors() -> Iterator[None]:
    """Within it an error of onnxruntime is an ExportError of one line."""
    try:
        yield
    except Exception as error:  # its own have no class in common
        raise ExportError(
            f"onnxruntime cannot run the exported file ({' '.join(str(error).split())}); it was not kept"
        ) from None


def write_pt2(module: Logits, described: dict[str, str], path: Path) -> Runner:
    """Write a program of torch.export; returns the file's function. It needs PyTorch alone."""
    images, axes = traced_input(module)
    free = {axis: torch.export.Dim.AUTO for axis in axes}
    with quiet(), torch.no_grad():
        try:
            program = torch.export.export(module, (images,), dynamic_shapes={"images": free})
        except Exception as error:  # of many kinds, some of them a user's head's own
            raise cannot_export(error) from None
        texts = {"metadata.json": json.dumps(described, indent=1, ensure_ascii=False)}
        contents = io.BytesIO()  # on a full disk PyTorch's own writer ends the process
        torch.export.save(program, contents, extra_files=texts)
        path.write_bytes(contents.getbuffer())
        return torch.export.load(path).module()


def write_weights(
    names: str, model: Segmenter, config: NetworkConfig, labels: LabelTable, path: Path
) -> None:
    """Write a state dict that another code loads.

    Raises:
        ExportError: that code has no such network.
    """
    there = REFERENCE_NETWORK
    if names == "mmsegmentation":
        there = mmsegmentation.MMSEGMENTATION_NETWORK | {
            "backbone": "resnet50" if config.backbone == "resnet50" else "resnet101"
        }
    if differs := difference(config, there):
        raise ExportError(f"--names {names}: its code has no such network; {differs}")
    if names == "reference":
        state = {name: x for name, x in model.state_dict().items() if not name.startswith("embedding.")}
        save_checkpoint(dict(state), path)
    else:
        meta = {"dataset_meta": {"classes": labels.names, "palette": [list(x) for x in labels.palette]}}
        save_checkpoint({"meta": meta, "state_dict": mmsegmentation.to_mmsegmentation(model)}, path)


@torch.inference_mode()
def check(network: nn.Module, exported: Runner, config: NetworkConfig, full: bool) -> None:
    """Compare what was written with the network on synthetic streets of two sizes.

    Raises:
        ExportError: they predict other classes at more than a thousandth of the pixels.
    """
    normalization = Normalization(config.mean, config.std, config.channel_order)
    rng = np.random.default_rng(0)
    for batch, height, width in CHECKED_SIZES:
        scenes = [draw_scene(rng, height, width)[0][..., ::-1] for _ in range(batch)]
        if full:
            images = torch.from_numpy(np.stack(scenes))
        else:
            images = torch.from_numpy(np.stack([normalization(scene) for scene in scenes]))
        expected, got = network(images), exported(images)
        if got.shape != expected.shape or got.dtype != expected.dtype:
            raise ExportError(
                f"the exported file gives {got.dtype} {tuple(got.shape)} "
                f"instead of {expected.dtype} {tuple(expected.shape)}"
            )
        classes = (expected, got) if full else (expected.argmax(dim=1), got.argmax(dim=1))
        agreement = float((classes[0] == classes[1]).double().mean())
        line = f"{batch}×{height}×{width}: "
        if not full:
            error, largest = float((got - expected).abs().max()), float(expected.abs().max())
            line += f"largest difference {error:.2g} of logits up to {largest:.3g}, "
        print(f"{line}classes agree on {100 * agreement:.3f} % of the positions")
        if not agreement >= LEAST_AGREEMENT:
            raise ExportError(
                f"the exported file predicts other classes than the network on {100 * (1 - agreement):.3g} % "
                f"of the positions of {batch}×{height}×{width} pixels; it was not kept"
            )


if __name__ == "__main__":
    run_script(main)
