"""What NVIDIA's management library tells of GPUs beyond the kernel: memory, and the UUIDs of MIG devices.

Its Python package is an extra (``nvidia``); without it, or where it fails, the kernel's word stands.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pilotq.broker.log import log

if TYPE_CHECKING:
    from pilotq.workers.machine.gpus import Device


def with_nvml(devices: list[Device]) -> list[Device]:
    """These devices, all of NVIDIA, with what the library knows of them."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return devices
    try:
        nvml.nvmlInit()
        try:
            return [_completed(nvml, device) for device in devices]
        finally:
            nvml.nvmlShutdown()
    except Exception as error:  # noqa: BLE001  # whatever a driver does, the kernel has told enough
        log(f"NVIDIA's management library tells nothing: {error}", level="warning")
        return devices


def _completed(nvml: Any, device: Device) -> Device:
    if not device.address:
        return device
    handle = nvml.nvmlDeviceGetHandleByPciBusId(device.address)
    if "/" in device.name:
        instance = device.name.partition("/")[2]
        handle = next((mig for ids, mig in _instances(nvml, handle) if ids == instance), None)
    if handle is None:
        return device
    return device._replace(
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        model=_text(nvml.nvmlDeviceGetName(handle)),
        memory=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
    )


def _instances(nvml: Any, handle: Any) -> Iterator[tuple[str, Any]]:
    """The MIG devices of a GPU: numbers of GPU instance and compute instance (``1/0``), and handle."""
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            mig = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
        except nvml.NVMLError:
            continue  # there are fewer
        yield f"{nvml.nvmlDeviceGetGpuInstanceId(mig)}/{nvml.nvmlDeviceGetComputeInstanceId(mig)}", mig


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
