"""`Jobs`: a list of jobs to submit. Only names and types of attributes are checked here; the rest at the submit."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from typing import Any

from pilotq.broker.qcg.errors import FileError, InvalidJobDescriptionError, JobNotDefinedError

MAX_ITERATIONS = 64 * 1024

Kinds = Mapping[str, tuple[type, ...]]

# The simple form: where an attribute goes in the standard form, and the types of values it may have.
_EXECUTION: Kinds = {
    "exec": (str,), "script": (str,), "args": (list, str), "env": (dict,), "stdin": (str,), "stdout": (str,),
    "stderr": (str,), "wd": (str,), "modules": (list, str), "venv": (str,), "model": (str,), "model_opts": (dict,),
}  # fmt: skip
_RESOURCES: Kinds = {"numCores": (int, dict), "numNodes": (int, dict), "wt": (str,)}
_SIMPLE: Kinds = {
    "name": (str,), **_EXECUTION, **_RESOURCES, "iteration": (int, list, dict), "after": (list, str)
}  # fmt: skip
_AMOUNT: Kinds = {"min": (int,), "max": (int,), "exact": (int,), "scheduler": (str, dict)}
_ITERATION: Kinds = {"start": (int,), "stop": (int,), "values": (list,)}


class Jobs:
    """Jobs in the order in which they were added; each has a name of its own.

    jobs = Jobs().add(name="a", exec="date", stdout="a.txt").add(name="b", script="sleep 5", numCores=2, after="a")
    """

    def __init__(self) -> None:
        self._jobs: dict[str, dict[str, Any]] = {}

    def add(self, job_attrs: Mapping[str, Any] | None = None, **kw_attrs: Any) -> Jobs:
        """Add a job in the simple form, where all attributes stand side by side; returns this list.

        name, exec or script, args, env, stdin, stdout, stderr, wd, modules, venv, model, model_opts; numCores, numNodes
        (a number, or min, max, exact, scheduler), wt; iteration (how many, a list of values, or start, stop, values);
        after (names). A job without a name gets one. Keywords win over ``job_attrs``. ``env``, and a ``scheduler`` with
        parameters, are more than QCG-PilotJob takes here. Raises InvalidJobDescriptionError.
        """
        attrs = {"name": str(uuid.uuid4()), **(job_attrs or {}), **kw_attrs}
        self._check_name(attrs["name"])
        _check_kinds("attribute", attrs, _SIMPLE)
        if "exec" not in attrs and "script" not in attrs:
            raise InvalidJobDescriptionError("No 'exec' nor 'script' defined")
        if "exec" in attrs and "script" in attrs:
            raise InvalidJobDescriptionError("Both 'exec' and 'script' defined")
        self._jobs[attrs["name"]] = _standard(attrs)
        return self

    def add_std(self, job_attrs: Mapping[str, Any] | None = None, **kw_attrs: Any) -> Jobs:
        """Add a job in the standard form, that of request files; returns this list.

        A job without a name gets one. Raises InvalidJobDescriptionError.
        """
        self._append({**(job_attrs or {}), **kw_attrs})
        return self

    def _append(self, job: dict[str, Any]) -> None:
        job.setdefault("name", str(uuid.uuid4()))
        if not {"exec", "script"} & set(job.get("execution") or ()):
            raise InvalidJobDescriptionError('Missing "execution/exec" key')
        self._check_name(job["name"])
        self._jobs[job["name"]] = job

    def _check_name(self, name: Any) -> None:
        _check_kinds("attribute", {"name": name}, _SIMPLE)
        if name in self._jobs:
            raise InvalidJobDescriptionError(f"Job {name} already in list")

    def remove(self, name: str) -> None:
        """Take the job off the list; raises JobNotDefinedError when it is not on it."""
        if self._jobs.pop(name, None) is None:
            raise JobNotDefinedError(name)

    def clear(self) -> int:
        """Empty the list; returns how many jobs it had."""
        count = len(self._jobs)
        self._jobs.clear()
        return count

    def job_names(self) -> list[str]:
        return list(self._jobs)

    def ordered_job_names(self) -> list[str]:
        return list(self._jobs)

    def jobs(self) -> list[dict[str, Any]]:
        """The jobs in the standard form."""
        return list(self._jobs.values())

    def ordered_jobs(self) -> list[dict[str, Any]]:
        return list(self._jobs.values())

    def load_from_file(self, file_path: str | os.PathLike[str]) -> None:
        """Add the jobs of a JSON file, a list in the standard form.

        Raises FileError when it cannot be read, and InvalidJobDescriptionError; jobs before the wrong one are added.
        """
        try:
            with open(file_path, encoding="utf-8") as file:
                jobs = json.load(file)
        except (OSError, ValueError) as error:
            raise _file_error(file_path, error) from None
        if not isinstance(jobs, list) or not all(isinstance(job, dict) for job in jobs):
            raise FileError(f'File to open/write file "{file_path}": it holds no list of jobs')
        for job in jobs:
            self._append(job)

    def save_to_file(self, file_path: str | os.PathLike[str]) -> None:
        """Write the jobs to a JSON file, as a list in the standard form; raises FileError."""
        try:
            text = json.dumps(self.ordered_jobs(), indent=2)
            with open(file_path, "w", encoding="utf-8") as file:
                file.write(text)
        except (OSError, TypeError, ValueError) as error:
            raise _file_error(file_path, error) from None


def _file_error(path: str | os.PathLike[str], error: Exception) -> FileError:
    why = error.strerror if isinstance(error, OSError) else error
    return FileError(f'File to open/write file "{os.fspath(path)}": {why}')


def _standard(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """The standard form of a job whose attributes are known and of the right kinds."""
    execution = {key: attrs[key] for key in _EXECUTION if key in attrs}
    if isinstance(execution.get("args"), str):
        execution["args"] = [execution["args"]]
    job: dict[str, Any] = {"name": attrs["name"], "execution": execution}
    resources = {key: _amount(key, attrs[key]) for key in _RESOURCES if key in attrs}
    if resources:
        job["resources"] = resources
    if "iteration" in attrs:
        job["iteration"] = _iteration(attrs["iteration"])
    if "after" in attrs:
        job["dependencies"] = {"after": [attrs["after"]] if isinstance(attrs["after"], str) else attrs["after"]}
    return job


def _amount(key: str, value: Any) -> Any:
    if isinstance(value, int):
        return {"exact": value}
    if isinstance(value, dict):
        _check_kinds(f"{key} attribute", value, _AMOUNT)
        if isinstance(value.get("scheduler"), str):
            return {**value, "scheduler": {"name": value["scheduler"]}}
    return value


def _iteration(value: Any) -> dict[str, Any]:
    if isinstance(value, int):
        value = {"start": 0, "stop": value}
    elif isinstance(value, list):
        value = {"values": value}
    _check_kinds("iteration attribute", value, _ITERATION)
    if "stop" not in value and "values" not in value:
        raise InvalidJobDescriptionError("Required attribute stop of element iteration not defined")
    if "stop" in value and "values" in value:
        raise InvalidJobDescriptionError("Stop and values iteration attribute are excluding")
    count = len(value["values"]) if "values" in value else value["stop"] - value.get("start", 0)
    if not 0 <= count <= MAX_ITERATIONS:
        raise InvalidJobDescriptionError(f"Wrong number of iterations - outside range (0, {MAX_ITERATIONS})")
    return dict(value)


def _check_kinds(what: str, attrs: Mapping[str, Any], kinds: Kinds) -> None:
    for name, value in attrs.items():
        if name not in kinds:
            raise InvalidJobDescriptionError(f"Unknown {what} {name}")
        if not isinstance(value, kinds[name]):
            raise InvalidJobDescriptionError(f"Invalid {what} {name} type {type(value)}")
