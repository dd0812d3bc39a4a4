"""The learning rate over a run."""


def poly(base_rate: float, step: int, num_steps: int, power: float = 0.9) -> float:
    """base_rate · (1 - step / num_steps) ** power, so the last step comes close to 0 (paper, section 4.2)."""
    return base_rate * (1 - step / num_steps) ** power
