"""Real systems as baselines: started as servers of their own, from environments of their own, and driven over HTTP.

Nothing of them is ever imported here.
"""
