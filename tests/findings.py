"""What tests of drivers do with a finding."""

import json

from stepbill.experiments.drivers.finding import Finding


def found(capsys, main, *argv) -> Finding:
    """What a driver's command prints with these flags; and that it says nothing else."""
    status = main([*argv, "--format=json"])
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    return Finding.from_json(json.loads(out))


def table(one: Finding, start: str):
    """Its table whose title begins so, as a dictionary of column to cell for each row."""
    (chosen,) = (table for table in one.tables if table.title.startswith(start))
    names = [column.name for column in chosen.columns]
    return [dict(zip(names, row, strict=True)) for row in chosen.rows]
