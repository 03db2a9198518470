"""The report in a real browser: Chromium, without a display."""
