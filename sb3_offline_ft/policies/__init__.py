"""Policies, their layers, and how they act."""
