"""One street scene: its sky, ground and houses, who drives and walks in it, and a photograph of it all."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from dataset.cityscapes import IDS
from dataset.demo.canvas import CIRCLE, WHITE, Canvas, Colour, Point, Pose, pick, times
from dataset.demo.things import (
    barrier,
    building,
    greenery,
    lamp_post,
    litter_bin,
    person,
    traffic_light,
    traffic_sign,
    tree,
)
from dataset.demo.vehicles import bicycle, bus, car, cyclist, motorcycle, tram, truck

MIN_SIZE = 32  # of height and width

# How strongly texture shows on each class; where nothing is said, 0.03.
ROUGHNESS = {"vegetation": 0.14, "terrain": 0.14, "wall": 0.1, "sidewalk": 0.06, "road": 0.04, "sky": 0.01}

Draw = Callable[[Canvas, np.random.Generator, Pose], None]
Thing = tuple[float, Draw, Pose]  # where it begins (z, to sort by), how to draw it, where it stands

LENGTHS: dict[Draw, float] = {car: 4.4, truck: 8, bus: 11, tram: 23, motorcycle: 2.2, cyclist: 2.2}
TRAFFIC: list[Draw] = [car, car, car, car, car, truck, truck, bus, bus, cyclist, cyclist, cyclist]
PARKED: list[Draw] = [car, car, car, car, car, car, motorcycle, truck]


@dataclass(frozen=True)
class Street:
    """The cross-section, in metres from the middle of the road, and the zebra crossing."""

    kerb: float
    verge: float
    front: float
    crossing: float
    has_tram: bool


def draw_scene(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """One street scene: image (H,W,3) uint8 BGR and Cityscapes label ids (H,W) uint8."""
    canvas = Canvas(rng, height, width)
    kerb = rng.uniform(5.8, 7.0)
    verge = kerb + max(0.0, rng.uniform(-0.6, 1.8))
    street = Street(kerb, verge, verge + rng.uniform(2.8, 4.2), rng.uniform(9, 22), rng.random() < 0.65)
    sky(canvas, rng)
    ground(canvas, rng, street)
    for side in (-1, 1):
        roadside(canvas, rng, side, street)
    things = [*traffic(rng, street), *kerbside(rng, street)]
    # Painter's algorithm: what is nearer to the camera goes over what is behind it.
    for _, draw, pose in sorted(things, key=lambda thing: -thing[0]):
        draw(canvas, rng, pose)
    bonnet(canvas, rng)
    return photograph(canvas, rng), canvas.label


def noise(rng: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
    """Smooth noise (H,W) about 0 whose blotches are ``cell`` image heights wide."""
    rows, columns = max(2, round(1 / cell)), max(2, round(width / height / cell))
    coarse = rng.standard_normal((min(rows, height), min(columns, width)), np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def sky(canvas: Canvas, rng: np.random.Generator) -> None:
    """Sky, clouds and, along the horizon, hills."""
    height, width = canvas.label.shape
    rows = int(canvas.vanishing[1]) + 1
    low = np.linspace(0, 1, rows)[:, None, None]
    colour = np.array(canvas.zenith) * (1 - low) + np.array(canvas.haze) * low
    clouds = sum(noise(rng, height, width, cell) * cell**0.5 for cell in (0.3, 0.12, 0.05))[:rows, :, None]
    cover = np.clip(1.6 * clouds - rng.uniform(-0.1, 0.5), 0, 0.85)
    canvas.image[:rows] = colour * (1 - cover) + np.array([245, 243, 240]) * cover
    canvas.label[:rows] = IDS["sky"]
    # Hills far behind the town are nothing that Cityscapes has a class for.
    x = np.linspace(-400, 400, 41)
    hills = 12 + 10 * np.sin(x / rng.uniform(40, 90) + rng.uniform(0, 6)) + rng.uniform(0, 4, x.size)
    foot, top = (np.stack([x, y, np.full_like(x, 380)], -1) for y in (np.full_like(x, -5), hills))
    slices = np.stack([foot[:-1], top[:-1], top[1:], foot[1:]], 1)
    canvas.polygons(slices, (110, 105, 85), "unlabeled")


def flat(left: float, right: float, near: float, far: float) -> list[Point]:
    """A rectangle on the ground."""
    return [(left, 0, near), (right, 0, near), (right, 0, far), (left, 0, far)]


def ground(canvas: Canvas, rng: np.random.Generator, street: Street) -> None:
    """Road, sidewalks and terrain, and what is painted or worn on them."""
    asphalt = pick(rng, [(92, 90, 88), (105, 102, 100), (82, 80, 80)])
    paving = pick(rng, [(140, 148, 155), (150, 160, 172), (125, 135, 150)])
    grass = pick(rng, [(70, 150, 130), (75, 140, 110), (90, 150, 150)])
    # In strips, so that each gets the haze of its own distance.
    for near, far in ((60, 400), (25, 60), (10, 25), (1.2, 10)):
        canvas.polygons([flat(-500, 500, near, far)], grass, "terrain")
        for side in (-1, 1):
            canvas.polygons([flat(side * street.verge, side * street.front, near, far)], paving, "sidewalk")
            edge = flat(side * street.kerb, side * (street.kerb + 0.3), near, far)
            canvas.polygons([edge], times(paving, 1.2), "sidewalk")
        canvas.polygons([flat(-street.kerb, street.kerb, near, far)], asphalt, "road")
    for side in (-1, 1):
        details(canvas, side, street, asphalt, paving)
    canvas.polygons([flat(-0.08, 0.08, z, z + 3) for z in np.arange(1.5, 70, 7.5)], WHITE, opacity=0.85)
    for _ in range(3):
        x, z = rng.uniform(-street.kerb, street.kerb - 2), rng.uniform(4, 25)
        patch = flat(x, x + rng.uniform(0.7, 2), z, z + rng.uniform(1, 5))
        canvas.polygons([patch], times(asphalt, rng.uniform(0.75, 1.1)), opacity=0.7)
    bars = np.arange(-street.kerb + 0.5, street.kerb - 0.6, 1.0)
    zebra = [flat(x, x + 0.5, street.crossing, street.crossing + 3) for x in bars]
    canvas.polygons(zebra, WHITE, opacity=0.85)


def details(canvas: Canvas, side: int, street: Street, asphalt: Colour, paving: Colour) -> None:
    """Slabs, gutter, parking line and tram rails on one side."""
    slabs = [flat(side * street.verge, side * street.front, z, z + 0.08) for z in np.arange(3, 22, 1.2)]
    canvas.polygons(slabs, times(paving, 0.8))
    gutter = street.kerb - 0.25
    canvas.polygons([flat(side * gutter, side * street.kerb, 1.2, 60)], times(asphalt, 0.7))
    canvas.polygons([flat(side * (gutter - 2), side * (gutter - 2.1), 1.2, 50)], WHITE, opacity=0.6)
    if street.has_tram:
        for x in (1.4, 2.85):
            canvas.polygons([flat(side * x, side * (x + 0.1), 1.2, 70)], (75, 72, 70))


def roadside(canvas: Canvas, rng: np.random.Generator, side: int, street: Street) -> None:
    """Buildings, gardens and parks along one side, from far to near."""
    lengths = rng.uniform(7, 17, 9)
    ends = 2.0 + np.cumsum(lengths)
    for near, far in reversed(list(zip(ends - lengths, ends, strict=True))):
        kind = rng.choice(3, p=(0.48, 0.32, 0.2))
        if kind == 0:
            building(canvas, rng, side, street.front, near, far)
        elif kind == 1:
            barrier(canvas, rng, side, street.front, near, far)
        else:
            greenery(canvas, rng, side, street.front + 3, near, far)


def traffic(rng: np.random.Generator, street: Street) -> Iterator[Thing]:
    """Two lanes that drive on the right, and parked vehicles along the kerbs."""
    for side in (-1, 1):
        yaw = np.pi if side < 0 else 0.0
        yield from driving(rng, street, side, yaw)
        yield from parked(rng, street, side, yaw)


def driving(rng: np.random.Generator, street: Street, side: int, yaw: float) -> Iterator[Thing]:
    """One lane, perhaps with a tram in front; two-wheelers may ride across it."""
    z = rng.uniform(7, 20)
    tram_turn = street.has_tram and rng.random() < 0.65
    while z < 65:
        kind = tram if tram_turn else TRAFFIC[rng.integers(len(TRAFFIC))]
        tram_turn = False
        length = LENGTHS[kind]
        turn = rng.normal(0, 0.03) if length > 3 else rng.uniform(-1.2, 1.2)
        lane = side * (2.15 if length > 3 else rng.uniform(1.5, 4))
        yield z, kind, Pose(lane, z + length / 2, yaw + turn, rng.uniform(0.95, 1.05))
        z += length + rng.uniform(3, 18)


def parked(rng: np.random.Generator, street: Street, side: int, yaw: float) -> Iterator[Thing]:
    """One kerb's row, with gaps; motorcycles stand aslant."""
    x, z = side * (street.kerb - 1.1), rng.uniform(4, 14)
    while z < 50:
        kind = PARKED[rng.integers(len(PARKED))]
        length = LENGTHS[kind]
        turn = rng.normal(0, 0.03) if length > 3 else rng.uniform(0.4, 1.2)
        yield z, kind, Pose(x, z + length / 2, yaw + turn, rng.uniform(0.95, 1.05))
        z += length + rng.choice([1.0, 12.0])


def kerbside(rng: np.random.Generator, street: Street) -> Iterator[Thing]:
    """All that stands or walks on the sidewalks and on the crossing."""

    def at(draw: Draw, x: float, z: float, yaw: float = 0.0) -> Thing:
        return z, draw, Pose(x, z, yaw, rng.uniform(0.92, 1.06))

    for side in (-1, 1):
        edge = side * (street.verge + 0.35)
        for _ in range(rng.integers(2, 7)):
            walk = side * rng.uniform(street.verge + 0.6, street.front - 0.4)
            yield at(person, walk, rng.uniform(2.2, 6.5) ** 2, rng.uniform(0, 6))
        for z in np.arange(rng.uniform(5, 25), 90, rng.uniform(18, 28)):
            yield at(lamp_post, edge, z)
        if rng.random() < 0.75:
            for z in np.arange(rng.uniform(6, 20), 70, rng.uniform(9, 16)):
                yield at(tree, edge, z)
        for draw, share in ((traffic_sign, 0.9), (traffic_sign, 0.6), (litter_bin, 0.7)):
            if rng.random() < share:
                yield at(draw, edge, rng.uniform(2.4, 5) ** 2, rng.uniform(-0.3, 0.3))
        for _ in range(rng.integers(0, 4)):
            yield at(bicycle, edge, rng.uniform(2.6, 5) ** 2, rng.uniform(0.6, 1.5))
        if rng.random() < 0.8:
            yield at(traffic_light, edge, street.crossing)
    for _ in range(rng.integers(0, 4)):
        yield at(person, rng.uniform(-street.kerb, street.kerb), street.crossing + rng.uniform(0.5, 2.5), 1.5)
    if rng.random() < 0.5:
        yield at(cyclist, rng.uniform(-4, 4), rng.uniform(6, street.crossing), rng.choice([-1.3, 1.3]))


def bonnet(canvas: Canvas, rng: np.random.Generator) -> None:
    """The camera's own car, at the bottom of the image."""
    height, width = canvas.label.shape
    middle = (width * rng.uniform(0.45, 0.55), height * 1.02)
    outline = np.round(16 * (middle + CIRCLE * (0.55 * width, 0.1 * height))).astype(np.int32)
    cv2.fillConvexPoly(canvas.image, outline, (62, 56, 52), shift=4)
    cv2.fillConvexPoly(canvas.label, outline, IDS["ego vehicle"], shift=4)


def photograph(canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """The picture that a camera takes of it: texture, daylight, a little blur and sensor noise."""
    height, width = canvas.label.shape
    strength = np.full(256, 0.03, np.float32)
    for name, rough in ROUGHNESS.items():
        strength[IDS[name]] = rough
    texture = sum(noise(rng, height, width, cell) for cell in (0.08, 0.02, 0.008)) * strength[canvas.label]
    light = np.array(canvas.tint, np.float32) * rng.uniform(0.85, 1.1)
    image = canvas.image * (1 + texture)[..., None] * light
    image = cv2.GaussianBlur(image.astype(np.float32), (0, 0), max(0.3, 0.0022 * height))
    grain = rng.standard_normal((height, width, 1), np.float32) * rng.uniform(1.5, 3.5)
    return np.clip(image + grain, 0, 255).astype(np.uint8)
