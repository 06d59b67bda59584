from datetime import timedelta

import pytest

from pipeline import deployment
from pipeline.errors import ConfigError


def test_a_silent_run_becomes_crashed_unless_it_is_over():
    automation = deployment.crashes_silent_runs(timedelta(seconds=540))

    assert automation.trigger.within == timedelta(seconds=540)
    assert automation.trigger.after == {"prefect.flow-run.heartbeat"}
    assert {"prefect.flow-run.heartbeat", "prefect.flow-run.Completed"} <= automation.trigger.expect
    assert [action.state for action in automation.actions] == ["CRASHED"]


def test_a_folder_without_prefect_yaml_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no prefect\.yaml; go to the project's folder"):
        deployment.deploy(tmp_path)
