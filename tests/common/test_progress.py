import pytest
import typer

from proteus_playground.common.progress import Stopped, resumable


@pytest.mark.parametrize("reason", [KeyboardInterrupt, Stopped])
def test_a_stopped_command_reports_and_exits_with_130(capsys, reason):
    reported = []
    with pytest.raises(typer.Exit) as end, resumable(report=lambda: reported.append(1)):
        raise reason
    assert end.value.exit_code == 130 and reported == [1]
    assert capsys.readouterr().err == "Stopped. The same command goes on from here.\n"


def test_a_finished_command_reports_and_an_error_passes_through(capsys):
    reported = []
    with resumable("", report=lambda: reported.append(1)):
        pass
    with pytest.raises(ValueError, match="wrong"), resumable(report=lambda: reported.append(2)):
        raise ValueError("wrong")
    assert reported == [1] and capsys.readouterr().err == ""
