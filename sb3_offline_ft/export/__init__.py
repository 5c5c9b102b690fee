"""Policies as files that run without this package, SB3 and torch, with a contract beside them."""

from sb3_offline_ft.export.exporting import ExportedPolicy, export_policy

__all__ = ["ExportedPolicy", "export_policy"]
