"""Finds the GPUs that this process may use: what the batch system has granted, else the devices that it can open.

``root`` is the directory that contains /proc, /sys and /dev. Nothing here opens a device: opening wakes up a GPU that
sleeps. `os.access` says the same, as the kernel asks the cgroup of devices there, too.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from pilotq.broker.store.resources import GpuFacts, NodeInfo
from pilotq.workers.gpu_variables import BY_BUS
from pilotq.workers.machine.nvml import with_nvml
from pilotq.workers.machine.topology import cpu_list, read_text

NVIDIA, AMD, INTEL = "nvidia", "amd", "intel"
# The variables by which batch systems grant GPUs, in the order in which they are asked; what a GPU is called there; and
# whether the empty variable means none, as the vendor's runtime reads it (Intel's reads it as all).
VARIABLES = (
    (NVIDIA, "CUDA_VISIBLE_DEVICES", re.compile(r"[0-9]+|(GPU|MIG)-[A-Za-z0-9/-]+"), True),
    (AMD, "ROCR_VISIBLE_DEVICES", re.compile(r"[0-9]+|GPU-[A-Za-z0-9]+"), True),
    (INTEL, "ZE_AFFINITY_MASK", re.compile(r"[0-9]+(\.[0-9]+)*"), False),
)
SLURM_COUNTS = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS")  # numbers of the whole machine: they serve to count
NVIDIA_UUID = re.compile(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
AMD_MODELS = {
    0x738C: "AMD Instinct MI100", 0x7408: "AMD Instinct MI250X", 0x740C: "AMD Instinct MI250",
    0x740F: "AMD Instinct MI210", 0x74A0: "AMD Instinct MI300A", 0x74A1: "AMD Instinct MI300X",
    0x74A5: "AMD Instinct MI325X",
}  # fmt: skip
INTEL_MODELS = {
    0x0BD5: "Intel Data Center GPU Max 1550", 0x0BD6: "Intel Data Center GPU Max 1550",
    0x0BD9: "Intel Data Center GPU Max 1100", 0x0BDA: "Intel Data Center GPU Max 1100",
    0x0BDB: "Intel Data Center GPU Max 1100", 0x56C0: "Intel Data Center GPU Flex 170",
    0x56C1: "Intel Data Center GPU Flex 140",
}  # fmt: skip
INTEGRATED = "0000:00:02.0"  # where a processor of Intel has its own graphics


class Device(NamedTuple):
    """A GPU, or a part of one that programs use like one (MIG, a partition).

    ``name`` is its number for the vendor's variable, ``uuid`` another name there, where one is known. ``memory`` in
    bytes, 0 where it is not known; ``near`` is the kernel's list of the CPUs next to it.
    """

    name: str
    uuid: str = ""
    model: str = ""
    memory: int = 0
    address: str = ""  # on the PCI bus
    near: str = ""


class Gpus(NamedTuple):
    """The GPUs of a node, all of one vendor. ``note``: a sentence where granted and found differ."""

    vendor: str
    devices: list[Device]
    note: str = ""


def find_gpus(env: Mapping[str, str], root: str = "/", count: int | None = None) -> Gpus:
    """The GPUs that this process may use, by its environment, else by what it may open; ``count`` overrides how many.

    >>> [device.name for device in find_gpus({"CUDA_VISIBLE_DEVICES": "2,3"}, "/nowhere").devices]
    ['2', '3']
    """
    found = _find(env, root)
    if count is None:
        return found
    names = {device.name for device in found.devices}
    more = (Device(name) for name in map(str, itertools.count()) if name not in names)
    return Gpus(found.vendor, list(itertools.islice(itertools.chain(found.devices, more), count)))


def add_gpus(info: NodeInfo, gpus: Gpus, core_of: Mapping[int, int]) -> None:
    """Write them into the record of a node; ``core_of`` maps the CPUs of its cores to their numbers."""
    info.gpus = [device.name for device in gpus.devices]
    info.gpu_vendor = gpus.vendor if gpus.devices else ""
    info.gpu_note = gpus.note
    for device in gpus.devices:
        near = sorted(core_of[cpu] for cpu in cpu_list(device.near) if cpu in core_of)
        facts = GpuFacts(device.uuid, device.model, device.memory, near if len(near) < len(core_of) else [])
        if facts != GpuFacts():
            info.gpu_facts[device.name] = facts


def _find(env: Mapping[str, str], root: str) -> Gpus:
    here, closed = _devices(root)
    for vendor, variable, form, _ in VARIABLES:
        if env.get(variable, "").strip():
            names = _granted(env[variable], form)
            known = here[vendor]
            # By default CUDA numbers GPUs by speed: which one a number means is known only where all are alike.
            by_bus = vendor != NVIDIA or env.get("CUDA_DEVICE_ORDER") == BY_BUS or len({d.model for d in known}) == 1
            note = _missing(variable, names, known, closed[vendor]) or _slurm_note(env, len(names))
            return Gpus(vendor, [_named(name, known, by_bus) for name in names], note)
    hidden = {kind for kind, variable, _, empty in VARIABLES if empty and variable in env}
    vendor = next((v for v in here if v not in hidden and here[v]), NVIDIA)
    found = [] if vendor in hidden else here[vendor]
    others = sum(count for count in closed.values())
    if others and not found and not hidden and "SLURM_JOB_ID" not in env:
        return Gpus(vendor, [], f"this user may not open the {_gpus(others)} that are there")
    granted = _slurm_numbers(env)
    note = _slurm_note(env, len(found))
    if granted and len(found) > len(granted):
        # Nothing hides the others, so that the numbers of the job are those of the devices.
        mine = [device for device in found if device.name in granted]
        if mine:  # parts of GPUs have other names
            return Gpus(vendor, mine, f"{note}: only those of the job are used")
    return Gpus(vendor, found, note)


def _devices(root: str) -> tuple[dict[str, list[Device]], dict[str, int]]:
    """The devices that can be opened, and how many others there are, by vendor."""
    here, closed = {}, {}
    listings: dict[str, Callable[[str], Iterable[tuple[bool, Device]]]] = {NVIDIA: _nvidia, AMD: _amd, INTEL: _intel}
    for vendor, listing in listings.items():
        listed = list(listing(root))
        found = [device for may_open, device in listed if may_open]
        if vendor == NVIDIA and found and root == "/":
            found = with_nvml(found)
        unique = len({device.uuid for device in found}) == len(found)
        here[vendor] = [
            device._replace(
                name=device.name or str(number),
                uuid=device.uuid if unique else "",  # partitions of a device may share its UUID
                near=_read(root, f"sys/bus/pci/devices/{device.address}/local_cpulist") if device.address else "",
            )
            for number, device in enumerate(found)
        ]
        closed[vendor] = len(listed) - len(found)
    return here, closed


def _granted(text: str, form: re.Pattern[str]) -> list[str]:
    """The names in a variable: as CUDA does, without all that comes after the first invalid one."""
    names: list[str] = []
    for name in map(str.strip, text.split(",")):
        if not form.fullmatch(name):
            break
        if name not in names:
            names.append(name)
    return names


def _named(name: str, known: list[Device], by_bus: bool) -> Device:
    """The device that a granted name means, under that name; ``by_bus``: numbers are places among the ``known``."""
    number = name.partition(".")[0]
    if number.isdecimal():
        if by_bus and int(number) < len(known):
            device = known[int(number)]
            return device._replace(name=name, uuid=device.uuid if number == name else "")
    else:
        for device in known:
            if device.uuid.startswith(name):
                return device._replace(name=name, uuid="")
    return Device(name)


def _missing(variable: str, names: list[str], known: list[Device], closed: int) -> str:
    """A sentence where the variable names more than can be found."""
    numbers = [int(number) for name in names if (number := name.partition(".")[0]).isdecimal()]
    if not known and not closed:
        return ""  # nothing is known about devices here
    if len(set(numbers)) <= len(known) and all(number < len(known) for number in numbers):
        return ""
    return f"{variable} grants {_gpus(len(names))}, and {len(known)} can be opened"


def _slurm_numbers(env: Mapping[str, str]) -> list[str]:
    """The global numbers that Slurm has granted here: ``0,2-3`` -> 0 2 3."""
    text = next((env[name] for name in SLURM_COUNTS if env.get(name)), "")
    numbers = []
    for part in text.split(","):
        if match := re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", part.strip()):
            numbers += [str(number) for number in range(int(match[1]), int(match[2] or match[1]) + 1)]
    return numbers


def _slurm_note(env: Mapping[str, str], found: int) -> str:
    each = env.get("SLURM_GPUS_PER_NODE", "").rpartition(":")[2]  # 2, or a100:2
    granted = len(_slurm_numbers(env)) or (int(each) if each.isdecimal() else 0)
    return f"Slurm has granted {_gpus(granted)}, and {found} can be used" if granted and granted != found else ""


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def _read(root: str, path: str) -> str:
    return read_text(os.path.join(root, path))


def _may_open(root: str, path: str) -> bool:
    return os.access(os.path.join(root, path), os.R_OK | os.W_OK)


def _entries(root: str, path: str, pattern: str) -> list[re.Match[str]]:
    """The names in a folder that match, in the order of the numbers in them."""
    try:
        names = os.listdir(os.path.join(root, path))
    except OSError:
        return []
    found = [match for name in names if (match := re.fullmatch(pattern, name))]
    return sorted(found, key=lambda match: [int(n, 16) for n in re.findall(r"[0-9a-f]+", match[0].lower())])


def _nvidia(root: str) -> Iterator[tuple[bool, Device]]:
    """GPUs in the order of their PCI addresses; those in MIG mode as the instances that they are divided into."""
    folder = "proc/driver/nvidia/gpus"
    addresses = _entries(root, folder, r"[0-9a-fA-F]+:[0-9a-fA-F]+:[0-9a-fA-F]+\.[0-9]")
    if not addresses:  # a container may lack this part of /proc
        for match in _entries(root, "dev", r"nvidia([0-9]+)"):
            yield _may_open(root, f"dev/{match[0]}"), Device("")
    number = 0
    for match in addresses:
        info = _pairs(_read(root, f"{folder}/{match[0]}/information"), ":")
        if info.get("GPU Excluded") == "Yes":
            continue
        minor = info.get("Device Minor", str(number))
        may_open = _may_open(root, f"dev/nvidia{minor}")
        uuid = info.get("GPU UUID", "")
        device = Device(
            str(number), uuid if NVIDIA_UUID.fullmatch(uuid) else "", info.get("Model", ""), 0, match[0].lower()
        )
        instances = list(_mig(root, minor, device)) if may_open else []
        yield from instances or [(may_open, device)]
        number += may_open


def _mig(root: str, minor: str, device: Device) -> Iterator[tuple[bool, Device]]:
    folder = f"proc/driver/nvidia/capabilities/gpu{minor}/mig"
    for gi in _entries(root, folder, r"gi([0-9]+)"):
        for ci in _entries(root, f"{folder}/{gi[0]}", r"ci([0-9]+)"):
            paths = (f"{folder}/{gi[0]}/access", f"{folder}/{gi[0]}/{ci[0]}/access")
            caps = [_pairs(_read(root, path), ":").get("DeviceFileMinor", "") for path in paths]
            uuid = f"MIG-{device.uuid}/{gi[1]}/{ci[1]}" if device.uuid else ""
            may_open = all(_may_open(root, f"dev/nvidia-caps/nvidia-cap{cap}") for cap in caps)
            yield (
                may_open,
                device._replace(name=f"{device.name}/{gi[1]}/{ci[1]}", uuid=uuid, model=f"{device.model} MIG".strip()),
            )


def _amd(root: str) -> Iterator[tuple[bool, Device]]:
    """The nodes of the kernel's topology that are GPUs: dies and partitions have one each."""
    folder = "sys/class/kfd/kfd/topology/nodes"
    for match in _entries(root, folder, r"([0-9]+)"):
        node = f"{folder}/{match[0]}"
        facts = _pairs(_read(root, f"{node}/properties"), " ")
        number = {name: int(text) for name, text in facts.items() if text.isdecimal()}
        if not number.get("simd_count"):
            continue  # a processor, or a device that the cgroup hides
        render = number.get("drm_render_minor", 0)
        place = number.get("location_id", 0)
        address = f"{number.get('domain', 0):04x}:{place >> 8 & 255:02x}:{place >> 3 & 31:02x}.{place & 7}"
        product = _read(root, f"sys/class/drm/renderD{render}/device/product_name")
        model = AMD_MODELS.get(number.get("device_id", 0)) or product or _read(root, f"{node}/name")
        unique = number.get("unique_id", 0)
        banks = _entries(root, f"{node}/mem_banks", r"[0-9]+")
        memory = sum(_bank(root, f"{node}/mem_banks/{bank[0]}") for bank in banks)
        may_open = _may_open(root, "dev/kfd") and _may_open(root, f"dev/dri/renderD{render}")
        yield may_open, Device("", f"GPU-{unique:016x}" if unique else "", model, memory, address)


def _bank(root: str, path: str) -> int:
    """Bytes of a bank of a GPU's own memory."""
    facts = _pairs(_read(root, f"{path}/properties"), " ")
    return int(facts.get("size_in_bytes", "0")) if facts.get("heap_type") in ("1", "2") else 0


def _intel(root: str) -> Iterator[tuple[bool, Device]]:
    """Cards in the order of their PCI addresses, without the graphics of the processor itself."""
    found = []
    for match in _entries(root, "sys/class/drm", r"renderD([0-9]+)"):
        folder = f"sys/class/drm/{match[0]}/device"
        if _read(root, f"{folder}/vendor") != "0x8086":
            continue
        address = _pairs(_read(root, f"{folder}/uevent"), "=").get("PCI_SLOT_NAME", "").lower()
        if address == INTEGRATED:
            continue
        number = _read(root, f"{folder}/device")
        model = INTEL_MODELS.get(int(number, 16) if number.startswith("0x") else 0, f"Intel GPU {number}".strip())
        memory = _read(root, f"sys/class/drm/card{int(match[1]) - 128}/lmem_total_bytes")
        device = Device("", "", model, int(memory, 0) if memory else 0, address)
        found.append((_may_open(root, f"dev/dri/{match[0]}"), device))
    yield from sorted(found, key=lambda pair: pair[1].address)


def _pairs(text: str, between: str) -> dict[str, str]:
    """The lines of a file of the kernel: name, separator, value."""
    lines = (line.partition(between) for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}
