"""What the attention layer costs in Mask R-CNN: GFLOPs, memory and time, R = 0 and 2 beside non-local."""

import argparse
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from instances.coco import Target
from instances.model import ATTENTION_PREFIX, BACKBONES, MaskRCNNConfig, build_model
from utils.arguments import run_script

VARIANTS = {"R=0": ("none", 0), "R=2": ("criss_cross", 2), "non-local": ("nonlocal", 1)}


def attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Energies and weighted sums of criss-cross attention, two operations for a product and its sum."""
    batch, channels, height, width = value
    return 2 * batch * height * width * (height + width) * (query[1] + channels)


def count_flops(module: nn.Module, *inputs: Any) -> int:
    """The counter of PyTorch, which is told about our operator."""
    ours = {torch.ops.cc_attention.criss_cross_attention: attention_flops}
    with FlopCounterMode(display=False, custom_mapping=ours) as counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops()


def forward_flops(config: MaskRCNNConfig, height: int, width: int) -> tuple[int, int]:
    """Operations of one image in evaluation: the whole network, and the attention layer alone.

    The shapes of the heads' inputs are set to the most there can be, 1000 proposals and 100 detections;
    nothing is computed (meta tensors). Sampling of boxes and non-maximum suppression are not counted.
    """
    with torch.device("meta"):
        model = build_model(config).eval()
        image = torch.empty(1, 3, *(32 * -(-size // 32) for size in (height, width)))
        third = torch.empty(1, BACKBONES[config.backbone], *(size // 16 for size in image.shape[2:]))
        levels = list(model.backbone(image).values())
        heads = model.roi_heads
        boxes, masks = torch.empty(1000, 256, 7, 7), torch.empty(100, 256, 14, 14)
        parts: list[tuple[nn.Module, Any]] = [
            (model.backbone, image),
            (model.rpn.head, levels),
            (nn.Sequential(heads.box_head, heads.box_predictor), boxes),
            (nn.Sequential(heads.mask_head, heads.mask_predictor), masks),
        ]
        total = sum(count_flops(module, inputs) for module, inputs in parts)
        layer = ATTENTION_PREFIX.rstrip(".")
        alone = count_flops(model.get_submodule(layer), third) if config.recurrence else 0
    return total, alone


def random_batch(height: int, width: int, objects: int = 7) -> tuple[list[Tensor], list[Target]]:
    """One image with as many objects as COCO's have on average."""
    corners = torch.rand(objects, 2, 2) * torch.tensor([width / 2, height / 2])
    boxes = torch.cat([corners[:, 0], corners[:, 0] + corners[:, 1] + 1], dim=1)
    target = {
        "boxes": boxes,
        "labels": torch.randint(1, 91, (objects,)),
        "masks": torch.randint(0, 2, (objects, height, width), dtype=torch.uint8),
    }
    return [torch.rand(3, height, width)], [target]


def train_step(model: nn.Module, images: list[Tensor], targets: list[Target]) -> tuple[float, float, float]:
    """One forward and backward pass.

    Returns:
        Bytes that the forward pass saved for the backward pass (each storage once, no parameters), seconds of
        the processor, and seconds.
    """
    parameters = {x.untyped_storage().data_ptr() for x in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    torch.manual_seed(0)  # the same boxes are sampled
    cpu, clock = time.process_time(), time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = sum(model(images, targets).values())
    loss.backward()
    return sum(saved.values()), time.process_time() - cpu, time.perf_counter() - clock


def main(args: argparse.Namespace) -> None:
    height, width = args.size
    networks = {
        name: MaskRCNNConfig(
            min_size=min(args.size),
            max_size=max(args.size),
            backbone=args.backbone,
            attention=attention,
            recurrence=recurrence,
        )
        for name, (attention, recurrence) in VARIANTS.items()
    }
    print(
        f"Mask R-CNN, {args.backbone}-FPN, one image of {height}x{width}, fp32, torch {torch.__version__}, "
        f"{torch.get_num_threads()} CPU thread(s), layer3 of {BACKBONES[args.backbone]} channels"
    )
    print("| | GFLOPs forward | of these the layer | M parameters | saved MiB | step CPU s | step s |")
    print("|---|---|---|---|---|---|---|")
    torch.manual_seed(0)
    batch = random_batch(height, width)
    models = {name: build_model(config).train() for name, config in networks.items()}
    for model in models.values():  # all compute the same function, as gamma is 0, and sample the same boxes
        model.load_state_dict(models["R=0"].state_dict(), strict=False)
    train_step(models["R=0"], *batch)  # the first step of a process takes longer
    steps: dict[str, list[tuple[float, float, float]]] = {name: [] for name in models}
    for _ in range(args.repeat):
        for name, model in models.items():
            steps[name].append(train_step(model, *batch))
    for name, model in models.items():
        total, alone = forward_flops(networks[name], height, width)
        parameters = sum(x.numel() for x in model.parameters()) / 1e6
        saved, cpu, seconds = (min(values) for values in zip(*steps[name], strict=True))
        print(
            f"| {name} | {total / 1e9:.1f} | {alone / 1e9:.2f} | {parameters:.2f} | {saved / 2**20:.0f} | "
            f"{cpu:.1f} | {seconds:.1f} |"
        )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("instances.costs", description=__doc__)
    parser.add_argument("--backbone", choices=BACKBONES, default="resnet50")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"))
    parser.add_argument("--repeat", type=int, default=1, help="steps, of which the fastest counts")
    args = parser.parse_args(argv)
    if min(args.size) < 32 or args.repeat < 1:
        parser.error("--size must be at least 32 32, --repeat at least 1")
    return args


if __name__ == "__main__":
    run_script(lambda: main(parse_args()), "instances.costs")
