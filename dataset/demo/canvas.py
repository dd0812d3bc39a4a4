"""What the scenes are drawn with: colours, the pose of a thing in the street, and the camera's canvas."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import ArrayLike

from dataset.cityscapes import IDS

Colour = tuple[float, float, float]  # blue, green, red: the order OpenCV stores
Point = tuple[float, float, float]  # x, y, z
Flat = tuple[float, float]  # two of them, as in the outline of a vehicle seen from the side

# Sky at the zenith, sky at the horizon, and what the light does to the colour of everything else.
MOODS: list[tuple[Colour, Colour, Colour]] = [
    ((205, 135, 70), (238, 220, 195), (0.98, 1.02, 1.06)),  # clear noon
    ((200, 165, 120), (235, 225, 215), (1.0, 0.98, 0.96)),  # light cloud
    ((180, 172, 165), (214, 210, 206), (0.92, 0.9, 0.88)),  # overcast
    ((170, 115, 95), (165, 200, 245), (0.86, 0.93, 1.03)),  # evening
]
FACADES: list[Colour] = [
    (150, 185, 215), (175, 200, 210), (95, 120, 165), (140, 150, 160), (165, 205, 225), (120, 150, 175),
    (190, 190, 180), (130, 130, 140), (110, 160, 200), (175, 180, 200),
]  # fmt: skip
PAINTS: list[Colour] = [
    (40, 40, 45), (200, 200, 200), (225, 225, 225), (125, 120, 118), (60, 45, 160), (130, 70, 35),
    (95, 95, 90), (70, 90, 40), (60, 150, 190),
]  # fmt: skip
CLOTHES: list[Colour] = [
    (60, 50, 45), (120, 80, 50), (50, 50, 150), (70, 120, 90), (150, 150, 160), (90, 60, 110), (60, 140, 200),
    (190, 195, 200),
]  # fmt: skip
SKIN: list[Colour] = [(150, 180, 225), (120, 155, 205), (70, 95, 140)]
GLASS: Colour = (78, 66, 54)
RUBBER: Colour = (34, 32, 32)
STEEL: Colour = (118, 122, 122)
WHITE: Colour = (215, 218, 218)

CIRCLE = np.stack([np.cos(np.linspace(0, 2 * np.pi, 18)), np.sin(np.linspace(0, 2 * np.pi, 18))], -1)[:-1]


def pick(rng: np.random.Generator, colours: Sequence[Colour]) -> Colour:
    """One of the colours, slightly varied."""
    return times(colours[int(rng.integers(len(colours)))], rng.uniform(0.88, 1.1))


def times(colour: Colour, factor: float) -> Colour:
    """The colour made brighter or darker."""
    blue, green, red = (min(255.0, channel * factor) for channel in colour)
    return blue, green, red


@dataclass(frozen=True)
class Pose:
    """Where a thing stands and how it is turned: its own z axis points ahead, after turning by ``yaw``."""

    x: float
    z: float
    yaw: float = 0.0
    size: float = 1.0

    @cached_property
    def _turn(self) -> np.ndarray:
        cos, sin = self.size * np.cos(self.yaw), self.size * np.sin(self.yaw)
        return np.array([(cos, 0, -sin), (0, self.size, 0), (sin, 0, cos)])

    def place(self, local: ArrayLike) -> np.ndarray:
        """Points (...,3) of the thing → points of the street."""
        street: np.ndarray = np.asarray(local, float) @ self._turn + (self.x, 0, self.z)
        return street


class Canvas:
    """Image and label in one: each shape goes into both with the same pixels.

    ``name`` is the class that a shape gets; None keeps what is labelled there (windows, shadows, markings).
    """

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.image = np.zeros((height, width, 3), np.uint8)
        self.label = np.full((height, width), IDS["unlabeled"], np.uint8)
        self.eye = np.array([rng.uniform(0.8, 2.4), rng.uniform(1.5, 1.9), 0.0])
        self.focal = 0.85 * np.sqrt(height * width)
        self.vanishing = np.array([width * rng.uniform(0.4, 0.6), height * rng.uniform(0.4, 0.47)])
        self.zenith, self.haze, self.tint = MOODS[rng.integers(len(MOODS))]
        self.sun = np.array([rng.choice([-0.7, 0.7]), 0.6, -0.4])

    def polygons(
        self, points: ArrayLike, colour: Colour, name: str | None = None, opacity: float = 1.0
    ) -> None:
        """Convex polygons (N,K,3), paler the farther away they are."""
        points = np.asarray(points, float)
        if not points.size:
            return
        depth = np.maximum(points[..., 2:], 0.5)
        pixels = self.vanishing + self.focal * (points - self.eye)[..., :2] * (1, -1) / depth
        air = 1 - np.exp(-float(depth[0, 0, 0]) / 160)
        blue, green, red = (near + air * (far - near) for near, far in zip(colour, self.haze, strict=True))
        # Four binary places keep the corners of small far things where they belong.
        for polygon in np.round(pixels * 16).clip(-(2**21), 2**21).astype(np.int32):
            if opacity < 1:
                self._blend(polygon, (blue, green, red), opacity)
            else:
                cv2.fillConvexPoly(self.image, polygon, (blue, green, red), shift=4)
            if name is not None:
                cv2.fillConvexPoly(self.label, polygon, IDS[name], shift=4)

    def _blend(self, polygon: np.ndarray, colour: Colour, opacity: float) -> None:
        height, width = self.label.shape
        left, top = np.maximum(polygon.min(0) // 16 - 1, 0)
        right, bottom = np.minimum(polygon.max(0) // 16 + 2, (width, height))
        if left >= right or top >= bottom:
            return
        part = self.image[top:bottom, left:right]
        mask = np.zeros(part.shape[:2], np.uint8)
        cv2.fillConvexPoly(mask, polygon - 16 * np.array([left, top], np.int32), 1, shift=4)
        part[mask > 0] = (part[mask > 0] * (1 - opacity) + np.array(colour) * opacity).astype(np.uint8)

    def face(
        self, pose: Pose, corners: ArrayLike, colour: Colour, name: str | None = None,
        inside: ArrayLike = (0, 0.8, 0),
    ) -> None:  # fmt: skip
        """A flat part (K,3) of a thing's surface, lit by the sun; not drawn if turned away."""
        points = pose.place(corners)
        (ax, ay, az), (bx, by, bz) = (points[1:3] - points[0]).tolist()
        # The cross product by hand, because np.cross is slow on a single pair.
        normal = np.array([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx])
        normal /= max(float(normal @ normal) ** 0.5, 1e-9)
        if normal @ (points[0] - pose.place(inside)) < 0:
            normal = -normal
        if normal @ (self.eye - points[0]) > 0:
            self.polygons([points], times(colour, 0.85 + 0.22 * float(normal @ self.sun)), name)

    def solid(
        self, pose: Pose, profile: Sequence[Flat], half_width: float, colour: Colour, name: str
    ) -> None:
        """A convex outline of (z, y) drawn out to both sides, as vehicles and houses are made of."""
        left, right = ([(x, y, z) for z, y in profile] for x in (-half_width, half_width))
        inside = np.mean(left + right, axis=0)
        self.face(pose, left, colour, name, inside)
        self.face(pose, right, colour, name, inside)
        for here in range(len(profile)):
            ring = [left[here], left[here - 1], right[here - 1], right[here]]
            self.face(pose, ring, colour, name, inside)

    def stroke(self, pose: Pose, points: Sequence[Point], width: float, colour: Colour, name: str) -> None:
        """A round limb of ``width`` metres along the points."""
        path = pose.place(points)
        pixels = self.vanishing + self.focal * (path - self.eye)[:, :2] * (1, -1) / path[:, 2:]
        thickness = max(1, round(float(width * pose.size * self.focal / path[:, 2].mean())))
        polygon = [np.round(pixels).astype(np.int32)]
        cv2.polylines(self.image, polygon, False, colour, thickness)
        cv2.polylines(self.label, polygon, False, IDS[name], thickness)

    def shadow(self, pose: Pose, half_width: float, half_length: float) -> None:
        """The dark oval on the ground under a thing."""
        outline = CIRCLE * (half_width, half_length)
        self.polygons([pose.place([(x, 0.0, z) for x, z in outline])], (30, 26, 24), None, 0.55)


def sides(half_width: float, outline: Sequence[Flat]) -> list[list[Point]]:
    """The same outline of (z, y) on the left and on the right flank of a thing."""
    return [[(x, y, z) for z, y in outline] for x in (-half_width, half_width)]


def upright(x: float, y: float, z: float, half_width: float, half_height: float) -> list[Point]:
    """A rectangle across the street, as rear windows and number plates are."""
    left, right = x - half_width, x + half_width
    low, high = y - half_height, y + half_height
    return [(left, low, z), (right, low, z), (right, high, z), (left, high, z)]


def round_plate(x: float, y: float, z: float, radius: float) -> list[Point]:
    """A disc across the street, as the lenses of traffic lights are."""
    return [(x + radius * a, y + radius * b, z) for a, b in CIRCLE]
