"""What came out: quality, tasks, comparisons of methods, speed, and their reports."""
