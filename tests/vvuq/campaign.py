"""An EasyVVUQ campaign: serially, through its QCGPJPool on pilotq, and with an `Executor` as its pool; prints the
statistics of all as JSON.

    python campaign.py FOLDER [RESOURCES]

EasyVVUQ imports QCG-PilotJob, and is not changed: `install` stands before its import. RESOURCES is what QCGPJExecutor
takes (default: 2 cores).
"""

# ruff: noqa: E402

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pilotq.broker import Executor
from pilotq.broker.qcg import install

install()

import chaospy
import easyvvuq
from easyvvuq.actions import Actions, CreateRunDirectory, Decode, Encode, ExecuteLocal, QCGPJPool
from qcg.pilotjob.executor_api.qcgpj_executor import QCGPJExecutor

MODEL = Path(__file__).with_name("model.py")
PARAMETERS = {
    "speed": {"type": "float", "default": 1.0},
    "angle": {"type": "float", "default": 0.5},
}


def campaign(folder: Path) -> Any:
    """Nine runs: a polynomial chaos expansion of second order in two parameters."""
    folder.mkdir()
    template = folder / "input.template"
    template.write_text('{"speed": $speed, "angle": $angle}')
    actions = Actions(
        CreateRunDirectory(root=str(folder), flatten=True),
        Encode(easyvvuq.encoders.GenericEncoder(template_fname=str(template), target_filename="input.json")),
        ExecuteLocal(f"{sys.executable} {MODEL} input.json"),
        Decode(easyvvuq.decoders.JSONDecoder(target_filename="output.json", output_columns=["height"])),
    )
    found = easyvvuq.Campaign(name="c", work_dir=str(folder), params=PARAMETERS, actions=actions)
    vary = {"speed": chaospy.Uniform(1, 3), "angle": chaospy.Normal(0.7, 0.1)}
    found.set_sampler(easyvvuq.sampling.PCESampler(vary=vary, polynomial_order=2))
    return found


def statistics(done: Any) -> dict[str, Any]:
    found = done.analyse(qoi_cols=["height"])
    return {
        "runs": len(done.get_collation_result()),
        "mean": found.describe("height", "mean").item(),
        "std": found.describe("height", "std").item(),
        "sobols": {name: index.item() for name, index in found.sobols_first("height").items()},
    }


def main(folder: Path, resources: str) -> None:
    serial = campaign(folder / "serial")
    serial.execute(sequential=True).collate()

    pilot = campaign(folder / "pilot")
    executor = QCGPJExecutor(wd=str(folder), resources=resources)
    # The tasks run in a login shell, whose PATH need not have this Python: the template activates its environment.
    with QCGPJPool(executor, template_params={"venv": sys.prefix}, polling_interval=0.2) as pool:
        pilot.execute(pool=pool).collate()
        states = {name: job["status"] for name, job in executor.qcgpj_manager.list().items()}

    calls = campaign(folder / "calls")
    with Executor(nodes=2) as pool:
        calls.execute(pool=pool).collate()
    print(
        json.dumps(
            {
                "executor": type(executor).__module__,
                "states": states,
                "serial": statistics(serial),
                "pilot": statistics(pilot),
                "calls": statistics(calls),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2] if len(sys.argv) > 2 else "2")
