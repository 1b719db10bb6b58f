"""From settings to what ``fastalign plan`` prints."""

from __future__ import annotations

import json
from pathlib import Path

from fastalign.commands import PlanConfig
from fastalign.config import Config
from fastalign.disk import writing
from fastalign.engine.plan.search import fitted
from fastalign.engine.plan.search import plan as plan_of
from fastalign.engine.plan.setting import make_setting
from fastalign.engine.plan.show import as_json, as_settings, as_text


def plan(config: Config, asked: PlanConfig) -> tuple[str, bool]:
    """The page, or JSON, of a plan; and whether it fits. With `--fit` that of the fastest settings that do.

    Raises:
        ValueError: settings that cannot be meant.
    """
    setting = make_setting(config, asked)
    found = plan_of(setting)
    if asked.fit is None:
        return (json.dumps(as_json(found), indent=2) if asked.json else as_text(found)), found.fits
    best = fitted(setting)
    if best is None:
        none = "\n\n--fit: no mesh, recomputing and micro-batch that were tried fit: no file is written"
        return (json.dumps(as_json(found), indent=2) if asked.json else as_text(found) + none), False
    path = Path(asked.fit)
    with writing("settings", path, then="name another file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(as_settings(best), encoding="utf-8")
    text = json.dumps(as_json(best), indent=2) if asked.json else f"{as_text(best)}\n\nwrote {path}"
    return text, True
