import sys
import types

import pytest
from proteus_playground.widgets import colab


def test_outside_colab_one_line_says_what_was_found(capsys):
    colab.setup_colab()
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and all(name in said for name in ("torch 2", "plotly", "anywidget", "ipywidgets"))


def test_in_colab_widgets_are_let_through(monkeypatch, capsys):
    called, output = [], types.ModuleType("google.colab.output")
    output.enable_custom_widget_manager = lambda: called.append(1)
    monkeypatch.setitem(sys.modules, "google.colab.output", output)
    colab.setup_colab()
    assert called == [1] and capsys.readouterr().out


def test_an_old_version_is_named_with_the_command_that_helps(monkeypatch):
    monkeypatch.setattr(colab, "installed", lambda package: "5.24.1" if package == "plotly" else "8.0")
    with pytest.raises(ImportError, match=r"plotly 5.24.1.*pip install 'plotly>=6.1'"):
        colab.setup_colab()
