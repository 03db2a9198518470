"""Patches, series and trees: applied, checked, edited and written back."""
