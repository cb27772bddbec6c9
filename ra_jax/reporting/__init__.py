"""Reports of a run: trackers, curves, `report.html`, contact sheets."""
