"""What a run shows: trackers, curves, report, contact sheets."""
