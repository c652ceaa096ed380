"""The option that says where models run, and whether torch has such a device here.

Knows nothing of what runs there.
"""

from __future__ import annotations

from typing import Annotated

import typer

from evomerge.errors import UserError

Device = Annotated[
    str, typer.Option("--device", help="Where models run: auto is CUDA where there is one.")
]


def device_here(wanted: str) -> str:
    """The device to run on: `auto` is CUDA where there is one.

    Raises UserError for a word that names no device, and for a CUDA device that is not here.
    """
    import torch

    from evomerge.service.worker import device_of

    try:
        device = torch.device(device_of(wanted))
    except RuntimeError:
        raise UserError(
            f"--device: {wanted!r} is no device of torch; take cpu, cuda or auto"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device: {wanted!r}: there is none here; take cpu or auto")
    return str(device)
