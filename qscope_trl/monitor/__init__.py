"""What features do during a run: running statistics, reduced across processes."""
