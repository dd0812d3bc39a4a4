"""Where a pixel looks: the attention of one position over R rounds, as a page and as pictures.

The mathematics is in docs/op.md, "Attention over R rounds".
"""

import base64
import io
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from cc_attention import CrissCrossAttention, attention_weights
from dataset import DataError
from evaluation.inference import PredictionError, resize, scaled_sizes
from evaluation.predictor import Predictor
from utils.arguments import UsageError

TEMPLATE = Path(__file__).with_name("attention_page.html")
PAGE_BYTES = 2_900_000  # of the whole page, at up to 129×257 positions; more positions get more
PAGE_POSITIONS = 129 * 257
FINEST_STEP = 1e-3  # of quantised queries and keys
SHOWN_SIDE = 1024  # the longer side of the picture on a page


@dataclass(frozen=True)
class Round:
    """Queries and keys (Cr,h,w) of one round of criss-cross attention, fp32 on the CPU."""

    query: Tensor
    key: Tensor

    def weights(self) -> Tensor:
        """(h,w,h+w): the column's weights, then the row's, which hold the own one."""
        return attention_weights(self.query[None], self.key[None])[0]


def attention_layer(predictor: Predictor) -> CrissCrossAttention:
    """The one layer that all rounds of a network share.

    Raises:
        UsageError: the network has none.
    """
    head = predictor.network.get_submodule("head")
    layers = [layer for layer in head.modules() if isinstance(layer, CrissCrossAttention)]
    if not getattr(head, "has_attention", False) or len(layers) != 1:
        kind = "R = 0" if layers else type(head).__name__
        raise UsageError(f"--attention: this network has no criss-cross attention ({kind})")
    return layers[0]


@torch.inference_mode()
def attention_rounds(predictor: Predictor, image: np.ndarray) -> list[Round]:
    """Queries and keys of each round for a picture (H,W,3) uint8 RGB, which goes through the network whole.

    It is scaled as for a prediction, to the size that the network was trained for.

    Raises:
        UsageError: a network without criss-cross attention.
        DataError: a picture that is too large for memory.
    """
    layer = attention_layer(predictor)
    ((height, width),) = scaled_sizes(image.shape[:2], (1.0,), predictor.fit)
    if not predictor.goes_whole(height * width):
        raise DataError(
            f"{width}x{height} pixels are too many to go through the network at once, as attention needs; "
            "--whole tries it, or make the picture smaller"
        )
    found: list[Round] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, CrissCrossAttention)
        x = inputs[0].float()
        found.append(Round(layer.query_conv(x)[0].cpu(), layer.key_conv(x)[0].cpu()))

    hook = layer.register_forward_pre_hook(keep)
    try:
        inputs = torch.from_numpy(predictor.normalization(image))[None].to(predictor.device)
        inputs = resize(inputs, (height, width))
        predictor.network(inputs.contiguous(memory_format=torch.channels_last))
    finally:
        hook.remove()
    if not all(x.isfinite().all() for one in found for x in (one.query, one.key)):
        raise PredictionError("the network's queries and keys are not finite; its weights are damaged")
    return found


def attention_of(rounds: list[Tensor], y: int, x: int) -> list[Tensor]:
    """How much position (y,x) attends to each other: (h,w) for R = 1, for R = 2 …; each sums to 1.

    Args:
        rounds: weights (h,w,h+w) of each, in the order of computation.
    """
    height, width = rounds[0].shape[:2]
    maps = []
    for count in range(1, len(rounds) + 1):
        attention = torch.zeros(height, width, dtype=rounds[0].dtype)
        attention[y, x] = 1
        for weights in reversed(rounds[:count]):
            column, row = weights.split([height, width], dim=-1)
            along_column = torch.einsum("hw,hwg->gw", attention, column)
            attention = along_column + torch.einsum("hw,hwv->hv", attention, row)
        maps.append(attention)
    return maps


def check_point(point: tuple[int, int], picture: tuple[int, ...]) -> None:
    """Whether a picture of (H,W) has a pixel (Y,X).

    Raises:
        DataError: it has not.
    """
    if not all(0 <= value < length for value, length in zip(point, picture, strict=True)):
        raise DataError(
            f"point {point[0]},{point[1]} is outside: there are rows 0 to {picture[0] - 1} "
            f"and columns 0 to {picture[1] - 1}"
        )


def position_of(point: tuple[int, int], picture: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, int]:
    """The position of the attention's grid that is next to a pixel (Y,X); corners are aligned."""
    sides = zip(point, picture, grid, strict=True)
    y, x = (int(np.floor(p * (g - 1) / max(side - 1, 1) + 0.5)) for p, side, g in sides)
    return y, x


def heat_pictures(image: np.ndarray, rounds: list[Round], point: tuple[int, int]) -> list[np.ndarray]:
    """The attention of a pixel (Y,X) over the picture, (H,W,3) uint8 RGB, for R = 1, R = 2 …

    Brightness and hue (viridis) grow with the square root of the weight over the largest one.
    """
    height, width = image.shape[:2]
    weights = [one.weights() for one in rounds]
    y, x = position_of(point, (height, width), rounds[0].query.shape[-2:])
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    pictures = []
    for attention in attention_of(weights, y, x):
        heat = (attention / attention.max()).sqrt()[None, None]
        heat = F.interpolate(heat, (height, width), mode="bilinear", align_corners=True)[0, 0]
        opacity = heat.numpy()[..., None]
        colours = _viridis()[(heat * 255).round().to(torch.uint8).numpy()]
        picture = np.rint(0.6 * grey * (1 - opacity) + colours * opacity).astype(np.uint8)
        radius = max(min(height, width) // 80, 2)
        for size, colour in ((radius + 1, (0, 0, 0)), (radius, (255, 255, 255))):
            cv2.circle(picture, (point[1], point[0]), size, colour, max(radius // 3, 1), cv2.LINE_AA)
        pictures.append(picture)
    return pictures


def attention_page(name: str, image: np.ndarray, rounds: list[Round]) -> str:
    """One self-contained HTML page: click a point of the picture and see its attention for each R.

    Queries and keys are stored quantised, as finely as the page's size allows, and the page computes the
    weights from them; it states how far they are from the network's.
    """
    height, width = image.shape[:2]
    grid = rounds[0].query.shape[-2:]
    picture = _jpeg(image)
    positions = grid[0] * grid[1]
    fixed = len(TEMPLATE.read_bytes()) + len(picture) * 4 // 3 + 20_000
    room = int((PAGE_BYTES * max(positions / PAGE_POSITIONS, 1) - fixed) * 3 / 4)
    stored = _quantise(rounds, room)
    data = {
        "name": name,
        "picture": [height, width],
        "grid": list(grid),
        "rounds": [{"channels": part.channels} for part in stored.rounds],
        "step": stored.step,
        "error": stored.largest_error,
        "meanError": stored.mean_error,
        "colours": base64.b64encode(_viridis().tobytes()).decode(),
        "jpeg": base64.b64encode(picture).decode(),
        "packed": base64.b64encode(stored.packed).decode(),
    }
    # "<" may not appear in a script element, whatever the picture is called.
    text = json.dumps(data).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/null", text)


@dataclass(frozen=True)
class StoredRound:
    """How queries and keys of a round are stored: integers, channels first, times the step."""

    channels: int
    query: np.ndarray  # (channels,h,w) int16
    key: np.ndarray

    def restored(self, step: float) -> Round:
        return Round(*(torch.from_numpy(x.astype(np.float32)) * step for x in (self.query, self.key)))


@dataclass(frozen=True)
class QuantisedRounds:
    """The quantised rounds, and what quantisation costs."""

    rounds: list[StoredRound]
    step: float
    packed: bytes
    largest_error: float  # of a weight, as a share of the largest weight of its position
    mean_error: float  # total variation: half the sum of a position's errors, on average


def _quantise(rounds: list[Round], room: int) -> QuantisedRounds:
    """The finest quantisation of which no more than ``room`` bytes are left after deflation."""
    balanced = [_balance(one) for one in rounds]
    largest = max(float(x.abs().max()) for one in balanced for x in (one.query, one.key))
    step = max(FINEST_STEP, largest / 32767)
    candidate, packed = _pack(balanced, step)
    while len(packed) > room:
        # A step twice as coarse saves at most about a bit of each integer, so this does not go too far.
        numbers = sum(2 * part.query.size for part in candidate)
        step *= max(2 ** (8 * (len(packed) - room) / numbers), 1.05)
        candidate, packed = _pack(balanced, step)
    largest_error, mean_error = 0.0, 0.0
    for exact, part in zip(rounds, candidate, strict=True):
        weights = exact.weights()
        difference = part.restored(step).weights().sub_(weights).abs_()
        largest_error = max(largest_error, float((difference.amax(-1) / weights.amax(-1)).max()))
        mean_error = max(mean_error, float(difference.sum(-1).mean() / 2))
    return QuantisedRounds(candidate, step, packed, largest_error, mean_error)


def _balance(one: Round) -> Round:
    """Queries and keys with the same softmax in the basis where rounding to one step costs least.

    The mean key adds the same to all energies of a position, so it is taken off. Of the energies Q Kᵀ the
    singular value decomposition gives channels that are independent, equally large in queries and keys, and
    in the order of what they contribute: those below the step vanish.
    """
    query, key = (x.flatten(1).double() for x in (one.query, one.key))
    key = key - key.mean(1, keepdim=True)
    (query_basis, query_part), (key_basis, key_part) = (torch.linalg.qr(x.mT) for x in (query, key))
    left, values, right = torch.linalg.svd(query_part @ key_part.mT)
    scale = values.clamp_min(0).sqrt()
    shape = one.query.shape[-2:]
    channels = len(values)
    new_query = ((query_basis @ left) * scale).mT.reshape(channels, *shape)
    new_key = ((key_basis @ right.mT) * scale).mT.reshape(channels, *shape)
    return Round(new_query.float(), new_key.float())


def _pack(rounds: list[Round], step: float) -> tuple[list[StoredRound], bytes]:
    """Integers of a step; as bytes: for each round queries, then keys; see ``_planes``."""
    stored, parts = [], []
    for one in rounds:
        whole = [np.rint(x.numpy() / step).clip(-32767, 32767).astype(np.int16) for x in (one.query, one.key)]
        used = [bool(q.any() and k.any()) for q, k in zip(*whole, strict=True)]
        channels = max((index + 1 for index, use in enumerate(used) if use), default=1)
        query, key = (x[:channels] for x in whole)
        stored.append(StoredRound(channels, query, key))
        parts += [_planes(query), _planes(key)]
    return stored, zlib.compress(b"".join(parts), 6)


def _planes(values: np.ndarray) -> bytes:
    """int16 (C,h,w) as differences from the left neighbour: all low bytes, then all high bytes."""
    differences = np.diff(values, axis=2, prepend=np.int16(0)).astype("<i2")
    # Small numbers of both signs get equal high bytes.
    folded = ((differences << 1) ^ (differences >> 15)).astype("<u2")
    return (folded & 255).astype(np.uint8).tobytes() + (folded >> 8).astype(np.uint8).tobytes()


def _viridis() -> np.ndarray:
    """256 colours (256,3) RGB, readable by colour-blind people and in grey."""
    steps = np.arange(256, dtype=np.uint8)[None]
    colours: Any = cv2.applyColorMap(steps, cv2.COLORMAP_VIRIDIS)
    return np.ascontiguousarray(colours[0, :, ::-1])


def _jpeg(image: np.ndarray) -> bytes:
    picture = Image.fromarray(image)
    picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    contents = io.BytesIO()
    picture.save(contents, "JPEG", quality=80)
    return contents.getvalue()
