"""Memory and time of a training step of the whole network, for each normalisation and for plain BatchNorm.

    python benchmarks/memory.py
    python benchmarks/memory.py --device cuda --batch 8 --dtype bfloat16

"held" is what the forward pass leaves for the backward pass, "peak" the most that there is at a time during
the step; both above parameters, their gradients and the images. Ratios are over plain BatchNorm: the same
network with ``nn.BatchNorm2d`` and an in-place activation after it.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import libs
from benchmarks.attention import hardware, levels, peak_mib, seconds
from networks import BACKBONES, build_model
from utils.arguments import number

PLAIN = "BatchNorm2d"
NORMS = (PLAIN, "abn", "inplace_abn")
COLUMNS = ("held MiB", "peak MiB", "step ms")


def network(norm: str, backbone: str, device: torch.device) -> nn.Module:
    model = build_model(backbone=backbone, norm="abn" if norm == PLAIN else norm)
    if norm == PLAIN:
        libs.replace_by_batch_norm(model)
        for layer in model.modules():
            if isinstance(layer, nn.LeakyReLU):
                layer.inplace = True
    return model.to(device, memory_format=torch.channels_last).train()


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """For each normalisation what is held, the peak, and the time of a step."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    images = torch.randn(options.batch, 3, options.size, options.size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)

    def forward(model: nn.Module) -> Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            outputs = model(images)
        return outputs["out"].float().square().mean() + outputs["aux"].float().square().mean()

    results: dict[str, dict[str, float]] = {}
    for norm in NORMS:  # one network at a time: several do not fit where one just does
        model = network(norm, options.backbone, device)

        def step(model: nn.Module = model) -> None:
            forward(model).backward()

        step()  # makes the parameters' gradients, which stay
        held = held_mib(lambda model=model: forward(model), device)
        peak = peak_mib(step, device)
        times = [1000 * seconds(step, device) for _ in range(options.rounds)]
        results[norm] = dict(zip(COLUMNS, (held, peak, statistics.median(times)), strict=True))
        del model, step
    return results


def held_mib(run: Callable[[], Tensor], device: torch.device) -> float:
    """What the result of ``run`` keeps alive."""
    if device.type != "cuda":
        return levels(run)[-1] / 2**20
    before = torch.cuda.memory_allocated()
    kept = run()
    held = torch.cuda.memory_allocated() - before
    del kept
    return held / 2**20


def table(results: dict[str, dict[str, float]]) -> str:
    lines = [f"{'':<12}" + "".join(f" | {column:>9} {'ratio':>6}" for column in COLUMNS)]
    for norm, row in results.items():
        cells = [f" | {row[c]:9.0f} {row[c] / results[PLAIN][c]:5.2f}x" for c in COLUMNS]
        lines.append(f"{norm:<12}" + "".join(cells))
    return "\n".join(lines)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The options of measurements of a training step."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--backbone", default="resnet101", choices=BACKBONES)
    parser.add_argument("--batch", type=number(int, 1), default=1)
    parser.add_argument("--size", type=number(int, 1), default=769, help="height and width of the crops")
    parser.add_argument("--rounds", type=number(int, 1), default=3)
    parser.add_argument("--json", type=Path, help="write the numbers there as well")
    return parser


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    options = parser.parse_args()
    where = hardware(parser, options)
    results = measure(options)
    print(f"{options.backbone}, {options.batch}×3×{options.size}×{options.size} {options.dtype}, {where}")
    print(f"torch {torch.__version__}; In-Place ABN on {libs.backend()}\n")
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
