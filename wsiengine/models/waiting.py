"""How a thread waits for a GPU: asleep. CUDA by itself turns on the spot, one core for each batch that is under way.

Where processes read for the GPU, those cores are what they lack. How threads wait belongs to a device's context, which
ONNX Runtime makes with its first session there, so that CUDA's driver is told before.
"""

import ctypes
from typing import Any

_ASLEEP = 4  # CU_CTX_SCHED_BLOCKING_SYNC
_HOW = 7  # the bits of a context's flags that say how threads wait


def wait_asleep(index: int) -> bool:
    """Have the threads of this process sleep while they wait for a device of CUDA.

    Args:
        index: Of the device, as CUDA counts them.

    Returns:
        Whether they will: not without a driver, or a device of that number. They wait as they did before then.
    """
    driver = _driver()
    device, flags, active = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
    if driver is None or driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index):
        return False
    if driver.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active)):
        return False
    return not driver.cuDevicePrimaryCtxSetFlags_v2(device, ctypes.c_uint(flags.value & ~_HOW | _ASLEEP))


def _driver() -> Any:
    """The library of CUDA's driver; None where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
