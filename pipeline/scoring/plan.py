"""What is being scored with what, kept beside the scores so that a stopped run can go on.

Also decides what is not the same run.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline import files
from pipeline.errors import ScoringError

PLAN = "_plan.json"  # readers of parquet folders leave out what begins so
LISTING = "_listing.jsonl"
LOCK = "_lock"
PART = "part-"  # how names of parts begin
OURS = frozenset({PLAN, LISTING, LOCK})
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """What must be the same for parts to go together."""

    model: str
    version: int
    bundle_sha256: str  # of the manifest
    column: str  # of parquet files; empty for pictures
    listing_sha256: str
    rows: int
    shard_rows: int
    shards: int
    format: int = FORMAT


def keep(output: Path, plan: Plan) -> None:
    """Write the plan into a folder without parts, or see that its parts are of that plan.

    Raises:
        ScoringError: the folder has the scores of something else, or other files.
    """
    path = output / PLAN
    if not any(output.glob(f"{PART}*")):  # then nothing was done by any plan
        _check_empty(output)
        files.write_whole(path, json.dumps(asdict(plan), indent=1).encode())
        return
    try:
        before = json.loads(path.read_bytes())
    except FileNotFoundError:
        before = None
    except ValueError as error:
        raise ScoringError(f"{path} is not a plan; choose another --output") from error
    why = _difference(before, plan) if isinstance(before, dict) else f"parts, but no {PLAN}"
    if why:
        raise ScoringError(
            f"{output} has {why}; choose another --output, or remove it to score anew"
        )


def _check_empty(output: Path) -> None:
    others = sorted(
        one.name for one in output.iterdir() if one.name not in OURS and one.name[0] != "."
    )
    if others:
        raise ScoringError(
            f"{output} has files of others, such as {others[0]}; choose another --output"
        )


def _difference(before: dict[str, object], plan: Plan) -> str:
    """Return what a folder has, where it is not the same; the first thing that is not."""
    was = {name: before.get(name) for name in asdict(plan)}
    now = asdict(plan)
    if was["format"] != FORMAT:
        return f"a plan of format {was['format']}, expected {FORMAT}"
    if was["bundle_sha256"] != now["bundle_sha256"]:
        return (
            f"scores by {was['model']} version {was['version']} (manifest "
            f"{str(was['bundle_sha256'])[:12]}), not by {plan.model} version {plan.version} "
            f"({plan.bundle_sha256[:12]})"
        )
    if was["column"] != now["column"]:
        return f"scores of the column {was['column']!r}, not of {plan.column!r}"
    if was["shard_rows"] != now["shard_rows"]:
        return f"parts of {was['shard_rows']} rows, not of {plan.shard_rows}"
    if was["listing_sha256"] != now["listing_sha256"]:
        return f"scores of {was['rows']} rows of an input that is not this one of {plan.rows}"
    return ""
