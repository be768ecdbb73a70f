"""Makes trees of /proc, /sys and /dev after real machines with GPUs, for `find_gpus`. Devices are plain files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

A100 = "NVIDIA A100-SXM4-40GB"
# The buses of the eight A100 of a DGX, and on which of its two sockets they are.
BUSES = {"07": 0, "0f": 0, "47": 0, "4e": 0, "87": 1, "90": 1, "b7": 1, "bd": 1}
SOCKETS = ("0-63", "64-127")


def write(root: Path, files: Mapping[str, str]) -> str:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


def uuid(number: int) -> str:
    return f"GPU-{number:08x}-1111-2222-3333-444444444444"


def a100(root: Path, *, sockets: tuple[str, str] = SOCKETS, closed: tuple[int, ...] = (), count: int = 8) -> str:
    """Eight A100; those of ``closed`` are there, and cannot be opened. Minor numbers run against the addresses."""
    files = {"dev/nvidiactl": ""}
    for number, (bus, socket) in enumerate(list(BUSES.items())[:count]):
        minor = count - 1 - number
        files |= {
            f"proc/driver/nvidia/gpus/0000:{bus}:00.0/information":
                f"Model: \t\t {A100}\nIRQ:   \t\t 500\nGPU UUID: \t {uuid(number)}\nVideo BIOS: \t 92.00\n"
                f"Bus Location: \t 0000:{bus}:00.0\nDevice Minor: \t {minor}\nGPU Excluded:\t No\n",
            f"sys/bus/pci/devices/0000:{bus}:00.0/local_cpulist": sockets[socket] + "\n",
        }  # fmt: skip
        if number not in closed:
            files[f"dev/nvidia{minor}"] = ""
    return write(root, files)


def mig(root: Path) -> str:
    """Two A100, the first one in MIG mode with three instances, of which the last one cannot be opened."""
    a100(root, count=2)
    files = {}
    for number, instance in enumerate((1, 2, 5)):
        # The address of the first is that of minor 1.
        folder = f"proc/driver/nvidia/capabilities/gpu1/mig/gi{instance}"
        caps = 10 + 2 * number, 11 + 2 * number
        for path, cap in zip((f"{folder}/access", f"{folder}/ci0/access"), caps, strict=True):
            files[path] = f"DeviceFileMinor: {cap}\nDeviceFileMode: 292\n"
            if instance != 5:
                files[f"dev/nvidia-caps/nvidia-cap{cap}"] = ""
    return write(root, files)


def mi250x(root: Path, *, partitions: bool = False) -> str:
    """Four MI250X, which are eight dies; with ``partitions`` their UUIDs are not their own."""
    nodes = "sys/class/kfd/kfd/topology/nodes"
    files = {"dev/kfd": ""}
    for socket in range(2):
        files[f"{nodes}/{socket}/properties"] = "cpu_cores_count 64\nsimd_count 0\nunique_id 0\n"
    for die in range(8):
        bus = 0xC0 + 2 * die
        files |= {
            f"{nodes}/{2 + die}/name": "aldebaran\n",
            f"{nodes}/{2 + die}/properties":
                f"cpu_cores_count 0\nsimd_count 440\ngfx_target_version 90010\nvendor_id 4098\ndevice_id 29704\n"
                f"location_id {bus << 8}\ndomain 0\ndrm_render_minor {128 + die}\n"
                f"unique_id {7 if partitions else 1000 + die}\n",
            f"{nodes}/{2 + die}/mem_banks/0/properties": f"heap_type 1\nsize_in_bytes {64 << 30}\nflags 0\n",
            f"sys/bus/pci/devices/0000:{bus:02x}:00.0/local_cpulist": f"{16 * (die // 2)}-{16 * (die // 2) + 15}\n",
            f"dev/dri/renderD{128 + die}": "",
        }  # fmt: skip
    return write(root, files)


def intel_max(root: Path) -> str:
    """Two Intel Max 1550 beside the graphics of a processor and that of a management chip."""
    files = {}
    cards = [("0x8086", "0x9a49", "0000:00:02.0"), ("0x8086", "0x0bd5", "0000:3a:00.0"),
             ("0x8086", "0x0bd5", "0000:18:00.0"), ("0x1a03", "0x2000", "0000:03:00.0")]  # fmt: skip
    for number, (vendor, device, address) in enumerate(cards):
        folder = f"sys/class/drm/renderD{128 + number}/device"
        files |= {
            f"{folder}/vendor": f"{vendor}\n", f"{folder}/device": f"{device}\n",
            f"{folder}/uevent": f"DRIVER=i915\nPCI_SLOT_NAME={address}\n",
            f"sys/class/drm/card{number}/lmem_total_bytes": f"{128 << 30:#x}\n",
            f"dev/dri/renderD{128 + number}": "",
        }  # fmt: skip
    return write(root, files)
