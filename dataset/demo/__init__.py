"""A small synthetic Cityscapes to try the whole chain on: ``python -m dataset.demo OUTPUT``.

Every scene is a street in metres seen through a pinhole camera. x points to the right of the road's middle,
y up from the ground and z ahead of the camera, so that near things come out large by themselves.
"""

from dataset.demo.files import generate
from dataset.demo.scene import draw_scene

__all__ = ["draw_scene", "generate"]
