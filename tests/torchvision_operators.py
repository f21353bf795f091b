"""Makes torchvision importable beside a CPU build of torch, which lacks its operators; tests alone need this."""

import importlib
import sys
from importlib.util import find_spec

import torch


def define_missing() -> None:
    """To be called before transformers is imported, which imports torchvision where it is installed."""
    if find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # its operators do not exist; nothing in the tests calls them
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(operators)  # they are gone with the object
        importlib.import_module("torchvision")


_KEPT: list[torch.library.Library] = []
