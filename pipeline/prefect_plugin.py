"""Let Prefect's commands find a deployment by its bare name.

Stock Prefect wants FLOW/DEPLOYMENT and ends `prefect deployment run train-export` with a
traceback. This plugin, switched on by `[plugins] enabled = true` in prefect.toml, looks the name
up: one deployment of that name is it, several are listed, none is what Prefect says it is.
"""

from typing import Any

from prefect.plugins import register_hook


@register_hook
def setup_environment(*, ctx: Any) -> None:  # noqa: ANN401  Prefect's own signature
    """Wrap the client's look-up once; Prefect calls this while it is imported."""
    from prefect.client.orchestration import PrefectClient  # noqa: PLC0415  not importable sooner

    stock = PrefectClient.read_deployment_by_name
    if getattr(stock, "takes_bare_names", False):
        return

    async def read_deployment_by_name(self: PrefectClient, name: str) -> Any:  # noqa: ANN401
        return await stock(self, await full_name(self, name))

    read_deployment_by_name.takes_bare_names = True  # type: ignore[attr-defined]
    PrefectClient.read_deployment_by_name = read_deployment_by_name  # type: ignore[method-assign, assignment]


async def full_name(client: Any, name: str) -> str:  # noqa: ANN401  PrefectClient
    """Return FLOW/DEPLOYMENT for a bare name.

    Raises:
        ValueError: more than one flow has a deployment of that name.
    """
    from prefect.client.schemas.filters import (  # noqa: PLC0415
        DeploymentFilter,
        DeploymentFilterName,
    )

    if "/" in name:
        return name
    found = await client.read_deployments(
        deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[name]))
    )
    full = sorted(
        [f"{(await client.read_flow(deployment.flow_id)).name}/{name}" for deployment in found]
    )
    if len(full) > 1:
        raise ValueError(f"{name!r} names {len(full)} deployments: {', '.join(full)}; choose one")
    return full[0] if full else f"{name}/{name}"
