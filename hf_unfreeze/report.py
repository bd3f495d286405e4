"""What a run will do and what happened in it: plan table, timeline, heat map and model-card section."""

from __future__ import annotations

from ._heatmap import heatmap
from ._plan import PlanRow, model_card_section, plan_rows, plan_table
from ._timeline import timeline

__all__ = ["PlanRow", "heatmap", "model_card_section", "plan_rows", "plan_table", "timeline"]
