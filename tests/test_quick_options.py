"""Options are read without pydantic, and as typer reads them."""

import sys
from typing import Any, Literal

import pytest
import typer

from ftkit.quick_options import UNKNOWN, plain, read_quickly


def test_the_formula_is_told_without_pydantic(ftkit, tmp_path):
    (tmp_path / "pydantic.py").write_text("raise SystemExit('pydantic was loaded')")
    result = ftkit(
        "estimate-memory",
        "--fast",
        "--r",
        "8",
        "--dropout",
        "0.1",
        "--qlora",
        env={"PYTHONPATH": str(tmp_path) + ":" + ":".join(sys.path)},
    )
    assert result.exit_code == 0, result.stderr
    assert "trained parameters" in result.stdout


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (int, ["7", "-3", "07", " 7", "7.0", "1_0", "x", "", "9" * 30]),
        (float, ["2e-4", "1", "-0.5", ".5", "1E3", "inf", "nan", "x", "1e999"]),
        (str, ["", " a ", "-"]),
        (Literal["on", "off"], ["on", "off", "On", ""]),
        (list[str], [["a", "b"], []]),
    ],
)
def test_each_value_is_read_as_typer_reads_it_or_left_to_typer(kind: Any, values: list[Any]):
    app = typer.Typer()
    app.command("other")(lambda: None)

    @app.command("read")
    def read(value: kind = typer.Option(None)):  # type: ignore[valid-type]
        return value

    group = typer.main.get_command(app)
    option = next(each for each in group.commands["read"].params if each.name == "value")
    context = typer.Context(group.commands["read"])
    own = option.get_runtime_param()
    read_quickly(group)
    for value in values:
        quick = plain(value, kind)
        if quick is not UNKNOWN:
            theirs = own.coerce(value, param=option, ctx=context)
            assert (type(quick), quick) == (type(theirs), theirs)
        try:
            expected = own.coerce(value, param=option, ctx=context)
        except typer.BadParameter as error:
            with pytest.raises(typer.BadParameter) as caught:
                option.get_runtime_param().coerce(value, param=option, ctx=context)
            assert str(caught.value) == str(error)
        else:
            assert repr(option.get_runtime_param().coerce(value, param=option, ctx=context)) == repr(expected)
