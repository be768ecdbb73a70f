"""Variables that are filled in at launch."""

from __future__ import annotations

import subprocess
from string import Template

import msgspec
import pytest

from pilotq.broker.taskfiles.qcg_variables import escape_script, fill, fill_early, names_set_by
from pilotq.broker.tasks.model import ArrayRange, Task
from pilotq.broker.tasks.spec import spec_of
from pilotq.workers.execution.templating import Variables, has_variables, render

ELEMENT = Variables(task_id="7_3", index=3, value="a {index} $it", position=1)
QCG = Variables(task_id="8_4", index=4, value='a"b', position=2, cores=4, nodes=("n1", "n2"), root="/root dir")


def test_without_words_the_spec_itself_comes_back() -> None:
    spec = spec_of(Task(command=["{index}", "${it}"]))
    assert render(spec, ELEMENT) is spec


def test_what_has_no_variables_is_the_same_for_every_element() -> None:
    task = Task(command=["x", "$it"], env={"A": "1"}, cwd="d", stdout="o", array=ArrayRange(0, 9))
    spec = spec_of(task)
    assert not has_variables(spec) and render(spec, ELEMENT) == spec
    for part in ({"command": ["{index}"]}, {"env": {"A": "{value}"}}, {"cwd": "{index}"}, {"stderr": "{id}"}):
        assert has_variables(spec_of(msgspec.structs.replace(task, **part)))
    assert has_variables(spec_of(Task(command=["x"], qcg=True)))


def test_every_part_of_an_array_element() -> None:
    task = Task(
        command=["x{index}", "{value}{value}", "{other} {} ${index} {index"],
        env={"{index}": "{value}"}, cwd="d{index}",
        stdin="i{index}", stdout="o{value}", stderr="e{index}", array=ArrayRange(0, 9),
    )  # fmt: skip
    spec = spec_of(task)
    done = render(spec, ELEMENT)
    assert done.argv == [b"x3", b"a {index} $ita {index} $it", b"{other} {} ${index} {index"]
    assert done.env == {b"{index}": b"a {index} $it"}
    assert (done.cwd, done.stdin, done.stdout, done.stderr) == (b"d3", b"i3", b"oa {index} $it", b"e3")
    assert spec == spec_of(task)


def test_the_script_of_an_array_keeps_its_own_variables() -> None:
    task = Task(script="index=9; echo {index} ${index} $value {value}", values=["v"])
    variables = Variables(task_id="7_0", index=0, value="v")
    assert render(spec_of(task), variables).script == b'index=9; echo 0 ${index} $value "${PILOTQ_VALUE}"'


def test_paths_may_have_the_id() -> None:
    task = Task(command=["{id}"], cwd="${id}{id}", stdin="{id}", stdout="{value}{id}", stderr="{id}", env={"A": "{id}"})
    done = render(spec_of(task), Variables(task_id="1f"))
    assert (done.argv, done.env) == ([b"{id}"], {b"A": b"{id}"})
    assert (done.cwd, done.stdin, done.stdout, done.stderr) == (b"${id}1f", b"1f", b"{value}1f", b"1f")
    task.values = ["{id}"]
    assert render(spec_of(task), Variables(task_id="1f_0", index=0, value="{id}")).stdout == b"{id}1f_0"


def test_a_value_gets_into_no_code() -> None:
    evil = Variables(task_id="7_0", index=4, value="$(id)\n{index}")
    for first in ("", "#!/bin/sh -e\n"):
        task = Task(script=first + "# {value} {index}\necho '{value}' {index}", values=["v"])
        code = first + "# {value} 4\necho ''\"${PILOTQ_VALUE}\"'' 4"
        assert render(spec_of(task), evil).script == code.encode()
        command = Task(command=["bash", "-c", task.script or "", "{value}"], env={"A": "{value}"}, values=["v"])
        done = render(spec_of(command), evil)
        assert (done.argv[2:], done.env) == ([code.encode(), b"$(id)\n{index}"], {b"A": b"$(id)\n{index}"})
    python = Task(script='#!/usr/bin/env python3\nprint(f"{value} {index}")', values=["v"])
    assert render(spec_of(python), evil).script == (python.script or "").encode()
    plain = Task(script="echo {value} {index}", array=ArrayRange(0, 9))
    assert render(spec_of(plain), Variables(task_id="7_4", index=4)).script == b"echo 4 4"


def test_the_value_in_an_array_without_values_is_the_index_and_an_empty_value_is_empty() -> None:
    spec = spec_of(Task(command=["{value}"], array=ArrayRange(0, 9)))
    assert render(spec, Variables(task_id="7_3", index=3)).argv == [b"3"]
    assert render(spec, Variables(task_id="7_3", index=3, value="")).argv == [b""]


def test_arguments_that_are_not_utf8_pass() -> None:
    spec = spec_of(Task(command=["\udcff{index}"], array=ArrayRange(0, 9)))
    assert render(spec, ELEMENT).argv == [b"\xff3"]


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("${it} $it ${itval} $itval", '4 4 a"b a"b'),
        ("${ncores}/$nnodes/${nlist}:${root_wd}", "4/2/n1,n2:/root dir"),
        ("$$ $${it} $$$it ${other} $other $ ${ ${} $items ${it", "$ ${it} $4 ${other} $other $ ${ ${} $items ${it"),
        ("{index} {value} ${index}", "{index} {value} ${index}"),
        ("$it.out-$it", "4.out-4"),
    ],
)
def test_words_of_qcg_files(text: str, filled: str) -> None:
    task = Task(command=["x", text], env={"E": text}, cwd=text, stdin=text, stdout=text, stderr=text, qcg=True)
    task.array = ArrayRange(0, 9)
    done = render(spec_of(task), QCG)
    as_it_is = filled.encode()
    assert done.argv == [b"x", as_it_is]
    assert (done.env, done.cwd, done.stdin) == ({b"E": as_it_is}, as_it_is, as_it_is)
    assert (done.stdout, done.stderr) == (as_it_is, as_it_is)


def test_a_value_with_words_is_not_filled_in_again() -> None:
    task = Task(command=["${itval}"], values=["${ncores}$it"], qcg=True)
    assert render(spec_of(task), Variables(task_id="8_0", index=0, value="${ncores}$it")).argv == [b"${ncores}$it"]


@pytest.mark.parametrize("text", ["$${it}", "$$$${it}", "${it}$$", "a$$b", "$$$$$it", "${jname}${it}", "$", "$$"])
def test_two_passes_are_two_passes_of_string_template(text: str) -> None:
    """QCG-PilotJob fills in with string.Template, when it reads the request and when it starts the job."""
    first, second = {"jname": "j"}, {"it": "4", "ncores": "2"}
    there = Template(Template(text).safe_substitute(first)).safe_substitute(second)
    assert fill(fill(text, first), second) == there
    # Elements that differ get theirs between the two.
    assert fill(fill_early(fill(text, first), {"it": "4"}), {"ncores": "2"}) == there
    assert fill(fill_early("${it}", {"it": text}), second) == text
    assert fill(escape_script(text), second) == fill(text, second, script=True)


def test_it_stays_where_there_is_no_iteration() -> None:
    spec = spec_of(Task(command=["${it} ${ncores}"], qcg=True))
    assert render(spec, Variables(task_id="8", cores=2)).argv == [b"${it} 2"]


@pytest.mark.parametrize(
    ("script", "filled"),
    [
        ('echo "it=${it} ${ncores}"', 'echo "it=4 4"'),
        ("it=${it}; n=${it}", "it=4; n=4"),
        ("cat > f <<EOF\nncores=${ncores}\nEOF", "cat > f <<EOF\nncores=4\nEOF"),
        ("echo $$ $it $ncores", "echo $$ $it $ncores"),
        ("it=0; echo ${it}", "it=0; echo ${it}"),
        ("if true; then export it=0; fi; echo ${it}", "if true; then export it=0; fi; echo ${it}"),
        ("for it in 1 2; do echo ${it} ${itval}; done", 'for it in 1 2; do echo ${it} a"b; done'),
        ("while IFS= read -r it; do echo ${it}; done", "while IFS= read -r it; do echo ${it}; done"),
        ("for ((it=0; it<3; it++)); do echo ${it}; done", "for ((it=0; it<3; it++)); do echo ${it}; done"),
        ("A=1 nlist+=x; echo ${nlist}", "A=1 nlist+=x; echo ${nlist}"),
        ("f() { local it; printf -v ncores x; echo ${it}${ncores}; }",) * 2,
        ("srun --ncores=${ncores} ${it:-1}", "srun --ncores=4 ${it:-1}"),
    ],
)
def test_scripts_keep_the_variables_they_set(script: str, filled: str) -> None:
    task = Task(script=script, qcg=True, array=ArrayRange(0, 9))
    assert render(spec_of(task), QCG).script == filled.encode()


def test_a_script_that_sets_our_words_prints_its_own() -> None:
    script = 'test "$$" -gt 1; for it in 1 2; do echo $it; done; ncores=x; echo $ncores ${ncores}; echo ${nnodes}'
    done = render(spec_of(Task(script=script, qcg=True, array=ArrayRange(0, 9))), QCG)
    shown = subprocess.run(["bash", "-c", done.script], capture_output=True, check=True)
    assert shown.stdout == b"1\n2\nx x\n2\n"


def test_names_in_other_places_are_not_set() -> None:
    assert names_set_by("echo date=1; ./read it; --time=3; x --it=1; test $it = 3; [[ $it == 3 ]]") == frozenset()
