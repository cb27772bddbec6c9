"""What is known of a step before it runs: the chips it is for, what it moves between them, how fast it can be."""
