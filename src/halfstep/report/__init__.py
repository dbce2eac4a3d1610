"""What a comparison looks like: one offline HTML file, or a table in the terminal.

Both show the same :class:`halfstep.compare.result.Comparison` and, for the figures and the details of each
run, the run records it was made of. Nothing is judged here.
"""
