"""The page that a run writes: metrics, curves and pictures with their texts, in one file."""

from tasks.report.page import AnswerCard, CaptionCard, Curve, MetricRow, Report, Trained, write_report

__all__ = ["AnswerCard", "CaptionCard", "Curve", "MetricRow", "Report", "Trained", "write_report"]
