"""The model card of a run, in Markdown: intended use, training, privacy, metrics by group, leakage and limits.

The template is model_card.md. Source: Mitchell et al. 2019 (arXiv:1810.03993). Everything that a device or a YAML file
wrote is escaped, because Markdown allows HTML.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedface.atomic_io import replace_text
from fedface.audits.bias import METRICS
from fedface.audits.dp_ratio_estimates import DP_METRICS
from fedface.audits.gradient_inversion import NOT_TESTED, THREAT_MODEL
from fedface.privacy.accounting import ADJACENCY
from fedface.privacy.privacy_target import PrivacyTarget
from fedface.privacy_units import describe_unit
from fedface.reports import device_metrics_section, disclosures, formatting
from fedface.reports.headline_summary import headline_summary
from fedface.reports.run_record import BiasRecord, RunRecord
from fedface.reports.templates import markdown_template

FILE = "model-card.md"
TEMPLATE = Path(__file__).with_name("model_card.md")
NO_LIMITS = "The limits of this run were not documented; interpret its numbers with care."


def common_values(record: RunRecord) -> dict[str, Any]:
    """What the templates of the card and of the report page both print."""
    return {
        "record": record,
        "plan": record.plan,
        "dp": record.plan.dp_parameters,
        "is_private": isinstance(record.plan.privacy, PrivacyTarget),
        "disclosures": disclosures,
        "formatting": formatting,
        "device_metrics_section": device_metrics_section,
        "neighbours": ADJACENCY,
        "threat_model": THREAT_MODEL,
        "not_tested": "; ".join(NOT_TESTED),
        "no_limits": NO_LIMITS,
    }


def render(record: RunRecord) -> str:
    bias = record.bias_after if isinstance(record.bias_after, BiasRecord) else None
    own = device_metrics_section.groups_of(record.device_metrics[-1]) if record.device_metrics else {}
    text = markdown_template(TEMPLATE.read_text(encoding="utf-8")).render(
        **common_values(record),
        headline_summary=headline_summary,
        describe_unit=describe_unit,
        devices=[[device.id, device.description] for device in record.devices],
        updates=sum(len(entry.participants) for entry in record.rounds),
        refused=sum(len(entry.refusals) for entry in record.rounds),
        dropped=sum(len(entry.dropped) for entry in record.rounds),
        bias=bias,
        bias_heads=["Group", *map(formatting.title_and_unit, METRICS)],
        bias_rows=[] if bias is None else _bias_rows(bias),
        device_heads=["Group", "Units", *map(device_metrics_section.title, DP_METRICS)],
        device_rows=[[name, *device_metrics_section.texts(group)] for name, group in own.items()],
        attacks=disclosures.applicable_attacks(record),
    )
    return text + "\n"


def write(record: RunRecord, folder: Path) -> Path:
    """Render the card into the run's folder and return its path."""
    path = folder / FILE
    replace_text(path, render(record))
    return path


def _bias_rows(bias: BiasRecord) -> list[list[str]]:
    absent = ["not measured: too few photos of this group"] * len(METRICS)
    groups = bias.report.groups
    return [
        [name, *([str(groups[name][metric]) for metric in METRICS] if name in groups else absent)]
        for name in bias.report.counts
    ]
