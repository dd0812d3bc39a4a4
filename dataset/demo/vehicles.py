"""What drives: cars, trucks, buses, trams and two-wheelers, each with its own z axis ahead."""

from collections.abc import Sequence

import numpy as np

from dataset.demo.canvas import (
    CIRCLE,
    GLASS,
    PAINTS,
    RUBBER,
    STEEL,
    WHITE,
    Canvas,
    Point,
    Pose,
    pick,
    sides,
    times,
    upright,
)
from dataset.demo.things import rider


def wheels(
    canvas: Canvas, pose: Pose, half_width: float, radius: float, places: Sequence[float], name: str
) -> None:
    for z in places:
        for scale, colour in ((1.0, RUBBER), (0.55, STEEL)):
            rim = [(z + scale * radius * a, radius + scale * radius * b) for a, b in CIRCLE]
            for disc in sides(half_width, rim):
                canvas.face(pose, disc, colour, name)


def lamps(canvas: Canvas, pose: Pose, half_width: float, half_length: float, height: float) -> None:
    """Red at the back, white in front."""
    for x in (-0.8 * half_width, 0.8 * half_width):
        for z, colour in ((-half_length, (50, 40, 215)), (half_length, (225, 245, 250))):
            canvas.face(pose, upright(x, height, z, 0.16, 0.1), colour)


def car(canvas: Canvas, rng: np.random.Generator, pose: Pose) -> None:
    paint = pick(rng, PAINTS)
    roof = rng.uniform(1.4, 1.62)
    back = rng.uniform(-2.05, -1.7)
    canvas.shadow(pose, 1.05, 2.35)
    canvas.solid(pose, [(-2.1, 0.28), (-2.15, 0.9), (2.1, 0.78), (2.15, 0.28)], 0.9, paint, "car")
    cabin = [(back, 0.89), (back + 0.45, roof), (0.35, roof), (1.25, 0.8)]
    canvas.solid(pose, cabin, 0.8, paint, "car")
    for x, z in ((0.68, back), (0.68, 1.25)):
        top = back + 0.4 if z < 0 else 0.45
        low = 0.2 * top + 0.8 * z
        screen = [(-x, 1.0, low), (x, 1.0, low), (x - 0.1, roof - 0.08, top), (0.1 - x, roof - 0.08, top)]
        canvas.face(pose, screen, GLASS)
    for rear, front in ((back + 0.3, -0.45), (-0.35, 0.8)):
        window = [(rear, 0.98), (rear + 0.15, roof - 0.1), (min(front, 0.3), roof - 0.1), (front, 0.98)]
        for flank in sides(0.81, window):
            canvas.face(pose, flank, GLASS)
    lamps(canvas, pose, 0.88, 2.16, 0.72)
    canvas.face(pose, upright(0, 0.5, -2.16, 0.26, 0.07), WHITE)
    wheels(canvas, pose, 0.91, 0.33, (-1.35, 1.35), "car")


def truck(canvas: Canvas, rng: np.random.Generator, pose: Pose) -> None:
    cargo, cab = pick(rng, [WHITE, (190, 200, 205), (70, 110, 60), (150, 120, 80)]), pick(rng, PAINTS)
    parts = [
        ([(-3.9, 0.9), (-3.9, 3.3), (1.9, 3.3), (1.9, 0.9)], cargo),
        ([(2.1, 0.5), (2.1, 2.7), (3.6, 2.7), (3.9, 1.6), (3.9, 0.5)], cab),
    ]
    canvas.shadow(pose, 1.4, 4.2)
    canvas.solid(pose, [(-3.7, 0.5), (-3.7, 0.95), (3, 0.95), (3, 0.5)], 0.9, RUBBER, "truck")
    for profile, colour in parts if np.cos(pose.yaw) < 0 else parts[::-1]:
        canvas.solid(pose, profile, 1.2, colour, "truck")
    for z in np.arange(-3.4, 1.8, 0.65):
        for rib in sides(1.21, [(z, 1.0), (z, 3.2), (z + 0.1, 3.2), (z + 0.1, 1.0)]):
            canvas.face(pose, rib, times(cargo, 0.75))
    canvas.face(pose, upright(0, 2.1, -3.91, 0.04, 1.15), times(cargo, 0.5))
    canvas.face(pose, [(-1, 1.65, 3.9), (1, 1.65, 3.9), (0.95, 2.5, 3.66), (-0.95, 2.5, 3.66)], GLASS)
    for window in sides(1.21, [(2.5, 1.6), (2.5, 2.45), (3.5, 2.45), (3.7, 1.6)]):
        canvas.face(pose, window, GLASS)
    canvas.face(pose, upright(0, 0.7, -3.72, 1.1, 0.12), (40, 40, 190))
    lamps(canvas, pose, 1.2, 3.92, 0.8)
    wheels(canvas, pose, 1.2, 0.48, (-2.9, -1.8, 2.8), "truck")


def bus(canvas: Canvas, rng: np.random.Generator, pose: Pose) -> None:
    paint = pick(rng, [(50, 190, 235), (50, 50, 200), (90, 160, 60), (190, 120, 60)])
    canvas.shadow(pose, 1.45, 5.8)
    canvas.solid(pose, [(-5.5, 0.3), (-5.5, 3.1), (5.4, 3.1), (5.5, 0.3)], 1.27, paint, "bus")
    for z in np.arange(-5.2, 5.0, 1.5):
        for window in sides(1.28, [(z, 1.35), (z, 2.5), (z + 1.3, 2.5), (z + 1.3, 1.35)]):
            canvas.face(pose, window, GLASS)
    for z in (-5.51, 5.51):
        canvas.face(pose, upright(0, 1.9, z, 1.1, 0.55 if z < 0 else 0.7), GLASS)
        canvas.face(pose, upright(0, 2.8, z, 0.85, 0.16), RUBBER)
        canvas.face(pose, upright(0.1, 2.8, z, 0.55, 0.07), (60, 190, 250))
    lamps(canvas, pose, 1.27, 5.52, 0.8)
    wheels(canvas, pose, 1.28, 0.5, (-3.2, 3.4), "bus")


def tram(canvas: Canvas, rng: np.random.Generator, pose: Pose) -> None:
    """Two coaches with a bellows between them; Cityscapes calls it a train."""
    band = pick(rng, [(60, 60, 190), (150, 90, 40), (80, 140, 60)])
    coaches = [(-11.5, -0.4), (0.4, 11.5)]
    canvas.shadow(pose, 1.5, 12)
    for rear, front in coaches if np.cos(pose.yaw) < 0 else coaches[::-1]:
        # Only the two ends of the tram are slanted.
        rear_top, front_top = rear + (0.7 if rear < -1 else 0), front - (0.7 if front > 1 else 0)
        outline = [(rear, 0.2), (rear, 1.4), (rear_top, 3.3), (front_top, 3.3), (front, 1.4), (front, 0.2)]
        canvas.solid(pose, outline, 1.3, (205, 225, 230), "train")
        for low, high, colour in ((0.22, 1.1, band), (1.5, 2.6, GLASS), (2.95, 3.15, band)):
            stripe = [(rear + 0.1, low), (rear + 0.9, high), (front - 0.9, high), (front - 0.1, low)]
            for flank in sides(1.31, stripe):
                canvas.face(pose, flank, colour)
        for z in np.arange(rear + 2.2, front - 1.5, 2.4):
            for post in sides(1.32, [(z, 0.4), (z, 2.7), (z + 0.35, 2.7), (z + 0.35, 0.4)]):
                canvas.face(pose, post, (200, 215, 220))
    for end, tip in ((-11.52, -11.0), (11.52, 11.0)):
        canvas.face(pose, upright(0, 0.75, end, 1.25, 0.45), band)
        canvas.face(pose, [(-1.1, 1.5, end), (1.1, 1.5, end), (1, 2.7, tip), (-1, 2.7, tip)], GLASS)
    lamps(canvas, pose, 1.3, 11.53, 0.8)
    canvas.stroke(pose, [(0, 3.3, 2), (0, 3.9, 3), (0, 4.4, 2)], 0.1, RUBBER, "train")


def bicycle(canvas: Canvas, rng: np.random.Generator, pose: Pose) -> None:
    paint = pick(rng, [(60, 60, 200), (60, 160, 60), (190, 140, 40), (50, 50, 50), (40, 180, 220)])
    canvas.shadow(pose, 0.25, 0.9)
    for z in (-0.52, 0.52):
        rim = [(0.0, 0.35 + 0.34 * b, z + 0.34 * a) for a, b in CIRCLE]
        canvas.polygons([pose.place(rim)], (128, 128, 126), "bicycle", opacity=0.4)
        canvas.stroke(pose, rim + rim[:1], 0.07, RUBBER, "bicycle")
    frame: list[Point] = [(0, 0.35, -0.52), (0, 0.8, -0.15), (0, 0.3, 0), (0, 0.82, 0.38), (0, 0.8, -0.15)]
    canvas.stroke(pose, frame, 0.07, paint, "bicycle")
    canvas.stroke(pose, [(0, 0.35, 0.52), (0, 1.05, 0.36)], 0.06, paint, "bicycle")
    canvas.stroke(pose, [(-0.26, 1.06, 0.36), (0.26, 1.06, 0.36)], 0.06, RUBBER, "bicycle")
    canvas.stroke(pose, [(0, 0.9, -0.3), (0, 0.9, -0.1)], 0.12, RUBBER, "bicycle")


def motorcycle(canvas: Canvas, rng: np.random.Generator, pose: Pose) -> None:
    paint = pick(rng, [(40, 40, 190), (170, 70, 30), (40, 150, 210), (45, 45, 45), (70, 140, 60)])
    canvas.shadow(pose, 0.4, 1.2)
    for z in (-0.72, 0.72):
        for scale, colour in ((1.0, RUBBER), (0.5, STEEL)):
            rim = [(0.0, 0.32 + 0.32 * scale * b, z + 0.32 * scale * a) for a, b in CIRCLE]
            canvas.polygons([pose.place(rim)], colour, "motorcycle")
            canvas.stroke(pose, rim[:9], 0.14 * scale, colour, "motorcycle")
    canvas.stroke(pose, [(0, 0.35, -0.7), (0, 0.45, 0)], 0.16, STEEL, "motorcycle")
    canvas.solid(pose, [(-0.35, 0.3), (-0.95, 0.8), (0.5, 0.95), (0.4, 0.3)], 0.2, paint, "motorcycle")
    canvas.stroke(pose, [(0, 0.35, 0.72), (0, 1.1, 0.42)], 0.14, paint, "motorcycle")
    canvas.stroke(pose, [(0, 0.88, -0.75), (0, 0.86, -0.05)], 0.2, RUBBER, "motorcycle")
    canvas.stroke(pose, [(-0.36, 1.08, 0.38), (0.36, 1.08, 0.38)], 0.09, RUBBER, "motorcycle")
    canvas.stroke(pose, [(0, 0.72, -0.98)] * 2, 0.12, (50, 40, 215), "motorcycle")


def cyclist(canvas: Canvas, rng: np.random.Generator, pose: Pose) -> None:
    (motorcycle if rng.random() < 0.45 else bicycle)(canvas, rng, pose)
    rider(canvas, rng, pose)
