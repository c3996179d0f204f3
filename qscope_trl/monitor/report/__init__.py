"""`qscope report`: what a run left, as one page that needs nothing else."""
