"""What a result was computed with."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import sys


@functools.cache
def environment() -> dict[str, str | int]:
    """Versions, processor and accelerator.  Cost: milliseconds, once."""
    found: dict[str, str | int] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    }
    for name in ("etude", "torch", "transformers", "tokenizers", "peft", "pyarrow", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found
