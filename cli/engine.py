"""Where models run: the options that `ingest`, `reexpert` and `ask` share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from knowstore import RayConfig

Engine = Literal["here", "ray"]
EngineOption = Annotated[
    Engine,
    typer.Option("--engine", help="Where models run: `here`, or `ray` for workers on all cores or on a Ray cluster."),
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", help="How many workers of --engine ray, each with the models; one a core.", min=1),
]
AddressOption = Annotated[
    str | None,
    typer.Option("--ray-address", help="A running Ray cluster, else one is started here.", metavar="HOST:PORT"),
]


def ray_config(engine: Engine, workers: int | None, address: str | None) -> RayConfig | None:
    """The workers that were asked for; None to run models in this process.

    Raises:
        typer.BadParameter: workers or an address without --engine ray.
    """
    from knowstore import RayConfig

    if engine == "ray":
        return RayConfig(workers, address)
    for name, value in (("--workers", workers), ("--ray-address", address)):
        if value is not None:
            raise typer.BadParameter("it is for --engine ray", param_hint=name)
    return None
