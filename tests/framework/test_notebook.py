"""The display in a real kernel: one output that is updated in place, whatever is trained afterwards."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

CELL = """
from stratagem import Fit
from tiny import Regressor, regression_rows
fit = Fit(Regressor(), regression_rows(8), regression_rows(3), output_dir={output!r}, save_strategy="no", loggers=(),
          max_steps={steps}, logging_steps=1, eval_strategy="steps", eval_steps=2, shuffle=False, run_name="<b>")
fit.train()
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """The outputs of three cells: a run, an evaluation, and a run of more logs than a table shows."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    output = str(tmp_path_factory.mktemp("notebook"))
    sources = [CELL.format(output=output, steps=4), "fit.evaluate()", CELL.format(output=output, steps=130)]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    with pytest.MonkeyPatch.context() as patch:
        places = filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")))
        patch.setenv("PYTHONPATH", os.pathsep.join(places))
        nbclient.NotebookClient(nbformat.v4.new_notebook(cells=cells), timeout=120).execute(cwd=output)
    return [cell.outputs for cell in cells]


def table_of(picture: str) -> list[list[str]]:
    """The rows of the table of logs, its head first."""
    table = picture[picture.index('<div class="logs">') :]
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]


@pytest.mark.slow
def test_a_run_is_one_output_that_ends_with_its_table(outputs: list[list[Any]]) -> None:
    shown, result = outputs[0]
    assert "TrainOutput(global_step=4" in result["data"]["text/plain"]
    picture = shown["data"]["text/html"]
    assert "<td>module</td><td>Regressor: 21 parameters</td>" in picture
    assert "<td>run</td><td>&lt;b&gt;</td>" in picture and "update 4/4 (100 %)" in picture
    assert "<td>finished</td><td>4 updates in " in picture and "width: 100.0%" in picture
    head, *rows = table_of(picture)
    assert head == ["update", "epoch", "loss", "grad norm", "learning rate", "eval loss"]
    assert [row[0] for row in rows] == ["4", "3", "2", "1"]
    assert [bool(row[5]) for row in rows] == [True, False, True, False]  # beside the loss of the same update


@pytest.mark.slow
def test_an_evaluation_afterwards_is_a_line(outputs: list[list[Any]]) -> None:
    line, result = outputs[1]
    assert line["text"].startswith("<b> update 4/4 | epoch 4.00 | eval loss ")
    assert "eval_loss" in result["data"]["text/plain"]


@pytest.mark.slow
def test_old_logs_make_way(outputs: list[list[Any]]) -> None:
    picture = outputs[2][0]["data"]["text/html"]
    rows = table_of(picture)[1:]
    assert len(rows) == 100 and rows[0][0] == "130" and rows[-1][0] == "31"
    assert "30 earlier logs are not shown." in picture
