"""Counts what a function would launch on a GPU, by the profiler, on any device."""

import torch

# The kernels of our operators on CUDA: libs/csrc/cuda/steps.cuh.
KERNELS = {
    "libs::statistics": 2,
    "libs::merge_statistics": 1,
    "libs::normalize_": 1,
    "libs::normalize_relu_": 1,
    "libs::sums": 2,
    "libs::sums_add_relu": 2,
    "libs::gradient": 1,
}
COLLECTIVES = ("c10d::_allgather_base_",)  # one launch each; what gloo does instead is none of a GPU's
# What only makes or describes a tensor; "to" launches nothing itself, but the copy within it.
NO_LAUNCH = {
    f"aten::{name}"
    for name in ("alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "new_empty")
    + ("promote_types", "result_type", "slice", "to", "view", "view_as")
}


def launches(function):
    """The names of all operators that launch something, each as often as it launches."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        torch.profiler.profile(activities=activities) as profile,
        torch.profiler.record_function("this thread"),
    ):
        function()
    thread = next(event.thread for event in profile.events() if event.name == "this thread")
    events = [
        e for e in profile.events() if e.thread == thread and e.name.startswith(("aten:", "libs:", "c10d:"))
    ]
    found, inside = [], set()
    for event in events:  # an operator comes before those that it calls
        called = [child for child in event.cpu_children if child.name not in NO_LAUNCH]
        whole = event.name in KERNELS or event.name in COLLECTIVES
        if whole or id(event) in inside:
            inside |= {id(child) for child in event.cpu_children}
        if id(event) not in inside and (whole or not called) and event.name not in NO_LAUNCH:
            found += [event.name] * KERNELS.get(event.name, 1)
    return found
