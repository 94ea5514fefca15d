"""One full made-up run with its report, written once for all tests of the report."""

import pytest
from report.synthetic_run import quickstart, record, write_run

from epigone.report import write_report


@pytest.fixture(scope="session")
def full_run(tmp_path_factory):
    """The directory of a run of 107 grown nodes, with report.html and what belongs to it."""
    entries = quickstart()
    run = write_run(tmp_path_factory.mktemp("full"), entries, [record(entry) for entry in entries])
    write_report(run)
    return run
