"""Set a Prefect server up for the deployment of prefect.yaml; doing so again changes nothing.

A work pool of processes, the deployment, and an automation that a Prefect server of one's own does
not come with: a run whose process was killed sends no more heartbeats, and becomes Crashed instead
of staying Running for ever.
"""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import TERMINAL_STATES, StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import get_current_settings
from prefect.workers.process import ProcessWorker

from pipeline import status
from pipeline.errors import ConfigError, PipelineError

NAME = "train-export"  # of the work pool, the flow and the deployment
FILE = "prefect.yaml"
AUTOMATION = "train-export: runs without a heartbeat have crashed"
HEARTBEAT = "prefect.flow-run.heartbeat"
# After these no heartbeat is to be expected.
OVER = ("Completed", "Failed", "Cancelled", "Crashed", "AwaitingRetry", "Paused", "Suspended")
MISSED = 3  # heartbeats in a row; one may be late, on a busy machine


def deploy(folder: Path) -> list[str]:
    """Create or renew all three.

    Args:
        folder: with prefect.yaml; runs are at home in it.

    Returns:
        What there is now, a line each.

    Raises:
        ConfigError: there is no prefect.yaml.
        PipelineError: Prefect refuses it.
    """
    if not (folder / FILE).is_file():
        raise ConfigError(f"{folder} has no {FILE}; go to the project's folder")
    with get_client(sync_client=True) as client:
        pool = create_pool(client)
        _run_prefect(folder)
        automation = create_automation(client)
    return [pool, f"deployment {NAME}: {folder / FILE}", automation]


def run_first(models: Path, preset: str) -> str:
    """Run the deployment once, if nothing is published and no run is on its way.

    Args:
        models: where bundles are published.
        preset: settings of that run.

    Returns:
        What was done, and why.
    """
    if status.homes(models):
        return f"first run: none, {models} has models"
    with get_client(sync_client=True) as client:
        waiting = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[NAME])),
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(
                    type=FlowRunFilterStateType(not_any_=sorted(TERMINAL_STATES))
                )
            ),
            limit=1,
        )
        if waiting:
            return f"first run: {waiting[0].name} is on its way"
        deployment = client.read_deployment_by_name(f"{NAME}/{NAME}")
        run = client.create_flow_run_from_deployment(deployment.id, parameters={"preset": preset})
    return f"first run: {run.name}, of the preset {preset}"


def create_pool(client: SyncPrefectClient) -> str:
    """Create the work pool if it is not there."""
    pool = WorkPoolCreate(
        name=NAME,
        type=ProcessWorker.type,
        base_job_template=ProcessWorker.get_default_base_job_template(),
    )
    try:
        client.create_work_pool(pool)
    except ObjectAlreadyExists:
        return f"work pool {NAME}: as it was"
    return f"work pool {NAME}: created"


def create_automation(client: SyncPrefectClient) -> str:
    """Create the automation, or bring it up to date."""
    every_s = get_current_settings().flows.heartbeat_frequency or 0
    if not every_s:
        return "automation: none, since PREFECT_FLOWS_HEARTBEAT_FREQUENCY switches heartbeats off"
    automation = crashes_silent_runs(timedelta(seconds=MISSED * every_s))
    known = client.read_automations_by_name(AUTOMATION)
    if known:
        client.update_automation(known[0].id, automation)
    else:
        client.create_automation(automation)
    return f"automation: a run that is silent for {MISSED * every_s} s becomes Crashed"


def crashes_silent_runs(after: timedelta) -> AutomationCore:
    """Return the automation.

    Args:
        after: how long a run may be silent once it has sent a heartbeat.
    """
    expected = {HEARTBEAT, *(f"prefect.flow-run.{name}" for name in OVER)}
    return AutomationCore(
        name=AUTOMATION,
        description="Their process was killed, or lost its machine.",
        trigger=EventTrigger(
            after={HEARTBEAT},
            expect=expected,
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=ResourceSpecification(
                {"prefect.resource.role": "flow", "prefect.resource.name": NAME}
            ),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=after,
        ),
        actions=[
            ChangeFlowRunState(
                name=None,
                force=False,
                state=StateType.CRASHED,
                message=f"no heartbeat for {after.total_seconds():g} s: its process is gone",
            )
        ],
    )


def _run_prefect(folder: Path) -> None:
    """Have Prefect read prefect.yaml, which takes $PWD for the folder."""
    done = subprocess.run(
        (sys.executable, "-m", "prefect", "deploy", "--all"),
        cwd=folder,
        env=os.environ | {"PWD": str(folder), "PREFECT_CLI_PROMPT": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise PipelineError(f"prefect deploy failed, its last line: {said}")
