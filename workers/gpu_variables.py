"""The variables by which a task sees its own GPUs and no others. Each vendor's runtime reads one of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from pilotq.broker.store.resources import NodeInfo, gpu_name

VARIABLE_OF: Final = {
    "nvidia": "CUDA_VISIBLE_DEVICES", "amd": "ROCR_VISIBLE_DEVICES", "intel": "ZE_AFFINITY_MASK"
}  # fmt: skip
# Intel's runtime reads an empty mask as all devices, and passes over numbers that no device has.
NO_INTEL: Final = "9999"
BY_BUS: Final = "PCI_BUS_ID"


def gpu_variables(info: NodeInfo, gpus: Sequence[str], env: Mapping[str, str]) -> dict[str, str]:
    """The variables of a task that has these GPUs of a node; ``env`` is that of the node's worker.

    >>> gpu_variables(NodeInfo("n", 1, "h", 1, [0], gpus=["0", "1"], gpu_vendor="nvidia"), ["1"], {})
    {'CUDA_VISIBLE_DEVICES': '1', 'ROCR_VISIBLE_DEVICES': '', 'CUDA_DEVICE_ORDER': 'PCI_BUS_ID'}
    """
    found = {"CUDA_VISIBLE_DEVICES": "", "ROCR_VISIBLE_DEVICES": ""}
    if info.gpu_vendor == "intel" or env.get("ZE_AFFINITY_MASK"):
        found["ZE_AFFINITY_MASK"] = NO_INTEL
    if not gpus:
        return found
    names = [gpu_name(gpu) for gpu in gpus]
    facts = [info.gpu_facts.get(name) for name in names]
    known = [fact.uuid for fact in facts if fact is not None and fact.uuid]
    vendor = info.gpu_vendor or "nvidia"
    found[VARIABLE_OF[vendor]] = ",".join(known if len(known) == len(names) else names)
    if vendor == "amd":
        del found["CUDA_VISIBLE_DEVICES"]  # AMD's runtime reads that one, too
    # Numbers that were granted, and of which nothing is known, mean what they mean to the worker.
    passed_on = bool(env.get("CUDA_VISIBLE_DEVICES")) and not any(facts) and env.get("CUDA_DEVICE_ORDER") != BY_BUS
    if vendor == "nvidia" and len(known) < len(names) and not passed_on:
        found["CUDA_DEVICE_ORDER"] = BY_BUS
    if vendor == "intel" and not env.get("ZE_AFFINITY_MASK"):
        found["ZE_FLAT_DEVICE_HIERARCHY"] = "COMPOSITE"  # the numbers that were found are those of cards
    return found
