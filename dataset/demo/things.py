"""What stands and walks beside the road: people, plants, street furniture, buildings and fences."""

from collections.abc import Sequence

import numpy as np

from dataset.demo.canvas import (
    CIRCLE,
    CLOTHES,
    FACADES,
    GLASS,
    PAINTS,
    SKIN,
    STEEL,
    Canvas,
    Colour,
    Flat,
    Point,
    Pose,
    pick,
    round_plate,
    times,
    upright,
)


def body(canvas: Canvas, rng: np.random.Generator, pose: Pose, joints: Sequence[Point], name: str) -> None:
    """A human: joints are foot, knee, hip, shoulder, hand; the left limbs mirror the right ones."""
    foot, knee, hip, shoulder, hand = joints
    trousers, shirt = pick(rng, CLOTHES), pick(rng, CLOTHES)
    stride = rng.uniform(-0.22, 0.22)
    for sign in (-1, 1):
        leg = [(sign * x, y, z + sign * stride * (1 - y)) for x, y, z in (foot, knee, hip)]
        canvas.stroke(pose, leg, 0.17, trousers, name)
    canvas.stroke(pose, [(0, hip[1] + 0.1, hip[2]), (0, shoulder[1] - 0.12, shoulder[2])], 0.4, shirt, name)
    for sign in (-1, 1):
        arm = [(sign * 0.22, *shoulder[1:]), (sign * hand[0], *hand[1:])]
        canvas.stroke(pose, arm, 0.12, times(shirt, 0.8), name)
    skull = (0.0, shoulder[1] + 0.26, shoulder[2] + 0.05)
    canvas.stroke(pose, [skull, (0, skull[1] - 0.06, skull[2])], 0.25, pick(rng, SKIN), name)
    if rng.random() < 0.8:
        canvas.stroke(pose, [(0, skull[1] + 0.08, skull[2] - 0.03)] * 2, 0.2, pick(rng, CLOTHES), name)


def person(canvas: Canvas, rng: np.random.Generator, pose: Pose) -> None:
    canvas.shadow(pose, 0.4, 0.3)
    joints = [(0.16, 0.05, 0), (0.14, 0.45, 0.03), (0.1, 0.85, 0), (0.2, 1.42, 0), (0.3, 0.85, 0.05)]
    body(canvas, rng, pose, joints, "person")


def rider(canvas: Canvas, rng: np.random.Generator, pose: Pose) -> None:
    joints = [(0.12, 0.32, 0.1), (0.14, 0.7, 0.25), (0.12, 0.95, -0.2), (0.2, 1.45, 0.05), (0.24, 1.05, 0.45)]
    body(canvas, rng, pose, joints, "rider")


def tree(canvas: Canvas, rng: np.random.Generator, pose: Pose) -> None:
    height = rng.uniform(3.2, 4.6)
    green = pick(rng, [(50, 110, 75), (45, 95, 85), (60, 125, 95), (40, 120, 130)])
    canvas.shadow(pose, 1.2, 1.0)
    canvas.stroke(pose, [(0, 0, 0), (0, height, 0)], 0.26, (55, 70, 85), "vegetation")
    foliage(canvas, rng, pose, (0, height + 0.6), (1.6, 1.5), green, int(8 + 150 / pose.z))


def foliage(
    canvas: Canvas, rng: np.random.Generator, pose: Pose, middle: Flat,
    spread: Flat, green: Colour, leaves: int,
) -> None:  # fmt: skip
    """Round tufts, dark ones first and bright ones, higher up, over them."""
    for shade, rise in ((0.6, -0.15), (0.85, 0.0), (1.15, 0.2)):
        angle, radius = rng.uniform(0, 2 * np.pi, leaves), np.sqrt(rng.random(leaves))
        across = middle[0] + spread[0] * radius * np.cos(angle)
        up = middle[1] + spread[1] * (radius * np.sin(angle) + rise)
        tuft = rng.uniform(0.2, 0.42, (leaves, 1)) * min(spread) * shade**-0.5
        x, y = across[:, None] + tuft * CIRCLE[::2, 0], up[:, None] + tuft * CIRCLE[::2, 1]
        points = pose.place(np.stack([x, np.maximum(y, 0), np.zeros_like(x)], -1))
        canvas.polygons(points, times(green, shade), "vegetation")


def post(canvas: Canvas, pose: Pose, height: float) -> None:
    canvas.stroke(pose, [(0, 0, 0), (0, height, 0)], 0.13, STEEL, "pole")


def lamp_post(canvas: Canvas, rng: np.random.Generator, pose: Pose) -> None:
    reach = -1.8 * np.sign(pose.x)
    post(canvas, pose, 6.5)
    canvas.stroke(pose, [(0, 6.5, 0), (reach, 6.9, 0)], 0.11, STEEL, "pole")
    canvas.stroke(pose, [(reach, 6.85, 0), (1.3 * reach, 6.9, 0)], 0.2, (170, 200, 205), "pole")


def traffic_light(canvas: Canvas, rng: np.random.Generator, pose: Pose) -> None:
    post(canvas, pose, 3.4)
    canvas.polygons([pose.place(upright(0, 2.95, 0, 0.24, 0.58))], (38, 40, 36), "traffic light")
    lit = rng.integers(3)
    for index, colour in enumerate([(60, 230, 60), (40, 190, 250), (50, 50, 245)]):
        lens = round_plate(0, 2.6 + 0.36 * index, 0, 0.16)
        canvas.polygons([pose.place(lens)], times(colour, 1.0 if index == lit else 0.3))


def traffic_sign(canvas: Canvas, rng: np.random.Generator, pose: Pose) -> None:
    post(canvas, pose, 2.9)
    red, blue, white, yellow = (45, 40, 205), (170, 85, 30), (235, 235, 235), (60, 205, 245)
    rim, plate = [(red, white), (white, blue), (red, blue), (white, yellow), (blue, white)][rng.integers(5)]
    corners = [17, 3, 4][rng.integers(3)]  # round, warning triangle or square
    for radius, colour in ((0.5, rim), (0.36, plate)):
        angle = np.pi / 2 + np.pi / 4 * (corners == 4) + 2 * np.pi * np.arange(corners) / corners
        outline = [(radius * np.cos(a), 2.6 + radius * np.sin(a), 0.0) for a in angle]
        canvas.polygons([pose.place(outline)], colour, "traffic sign")


def litter_bin(canvas: Canvas, rng: np.random.Generator, pose: Pose) -> None:
    canvas.solid(pose, [(-0.3, 0), (-0.35, 1), (0.35, 1), (0.3, 0)], 0.3, pick(rng, PAINTS), "static")


def building(
    canvas: Canvas, rng: np.random.Generator, side: int, street: float, near: float, far: float
) -> None:
    """A house with a shop on its ground floor; only the two walls that can be seen have windows."""
    height, colour = rng.uniform(7, 19), pick(rng, FACADES)
    pose = Pose(side * (street + 6), (near + far) / 2)
    length = (far - near) / 2
    outline = [(-length, 0.0), (-length, height), (length, height), (length, 0.0)]
    canvas.solid(pose, outline, 6, colour, "building")
    storey, bay = rng.uniform(2.8, 3.6), rng.uniform(1.8, 3.4)
    lit = (120, 205, 240) if rng.random() < 0.5 else (165, 140, 115)
    corner, ahead, inward = np.array([side * street, 0, near]), np.array([0, 0, 1.0]), np.array([side, 0, 0])
    for along, extent in ((inward, 12.0), (ahead, far - near)):
        columns, rows = max(1, int(extent / bay)), max(1, int((height - 4) / storey))
        u, v = windows(columns, rows, extent, storey)
        panes = corner + u[..., None] * along + v[..., None] * (0, 1, 0)
        bright = rng.random(len(panes)) < 0.25
        canvas.polygons(panes[~bright], GLASS)
        canvas.polygons(panes[bright], lit)
        awning, cornice = pick(rng, CLOTHES), times(colour, 0.7)
        for low, high, paint in ((0.3, 2.6, GLASS), (2.75, 3.4, awning), (height - 0.6, height, cornice)):
            band = [(0.04, low), (0.96, low), (0.96, high), (0.04, high)]
            canvas.polygons([[corner + extent * a * along + (0, b, 0) for a, b in band]], paint)


def windows(columns: int, rows: int, extent: float, storey: float) -> tuple[np.ndarray, np.ndarray]:
    """Where the four corners of each pane are (N,4): along the wall and up it, from the first floor on."""
    column, row = (grid.ravel() for grid in np.meshgrid(np.arange(columns), np.arange(rows)))
    u = (column[:, None] + [0.25, 0.75, 0.75, 0.25]) * extent / columns
    v = 4.2 + (row[:, None] + [0.0, 0.0, 0.58, 0.58]) * storey
    return u, v


def barrier(
    canvas: Canvas, rng: np.random.Generator, side: int, street: float, near: float, far: float
) -> None:
    """A garden behind a wall or a fence."""
    greenery(canvas, rng, side, street + 1.5, near, far)
    x, height = side * street, rng.uniform(1.8, 2.9)
    points = np.array([(x, 0, near), (x, 0, far), (x, height, far), (x, height, near)], float)
    if rng.random() < 0.5:
        stone = pick(rng, [(125, 135, 150), (140, 145, 150), (95, 110, 150)])
        canvas.polygons([points], stone, "wall")
        joints, strength, cap = np.arange(near, far, 2.0), 0.12, 0.25
        colour, name = times(stone, 0.72), "wall"
    else:
        colour, name = pick(rng, [(60, 60, 55), (70, 85, 60), (60, 90, 130), (200, 205, 205)]), "fence"
        canvas.polygons([points], colour, "fence", opacity=0.25)
        joints, strength, cap = np.arange(near, far, 0.5), 0.1, 0.1
    uprights = [[(x, 0, z), (x, height, z), (x, height, z + strength), (x, 0, z + strength)] for z in joints]
    rail = points.copy()
    rail[:2, 1] = height - cap
    canvas.polygons(np.array([*uprights, rail]), colour, name)


def greenery(
    canvas: Canvas, rng: np.random.Generator, side: int, street: float, near: float, far: float
) -> None:
    """A row of bushes and trees, from far to near."""
    for z in np.arange(far, near, -3.5):
        pose = Pose(side * (street + rng.uniform(1, 4)), max(z, 4.5))
        if rng.random() < 0.6:
            tree(canvas, rng, pose)
        green = pick(rng, [(55, 105, 85), (50, 90, 70), (50, 115, 110)])
        foliage(canvas, rng, pose, (0, 0.6), (2.0, 0.8), green, int(3 + 50 / pose.z))
