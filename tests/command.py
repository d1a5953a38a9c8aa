"""The command, called in this process."""

from fpdarts.cli import main


def run(capsys, *arguments):
    """(exit status, standard output, standard error) of the command in this process."""
    try:
        main([str(a) for a in arguments])
        status = 0
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err
