"""The learning rate over a run."""

from collections.abc import Callable


def poly(base_rate: float, step: int, num_steps: int, power: float = 0.9) -> float:
    """base_rate · (1 - step / num_steps) ** power, so the last step comes close to 0 (paper, section 4.2).

    It is 0 beyond the run's end.
    """
    return base_rate * max(1 - step / num_steps, 0.0) ** power


def constant(base_rate: float, step: int, num_steps: int, power: float = 0.9) -> float:
    """base_rate, for fine-tuning."""
    return base_rate


# name: (base rate, steps done, steps of the run, power) → rate of the next step
SCHEDULES: dict[str, Callable[[float, int, int, float], float]] = {"poly": poly, "constant": constant}
