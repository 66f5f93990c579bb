"""Where bfloat16 is worth computing in. Pure torch."""

import torch

_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Say whether the processor has instructions that multiply in bfloat16; False on GPUs.

    Where it has none, torch converts to float32 and back and is slower than with float32 alone.
    """
    known = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(known.get(name, False) for name in _INSTRUCTIONS)
