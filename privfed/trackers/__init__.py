"""A run's own record in the forms that other tools read: TensorBoard's files, and runs of an MLflow server.

What they get is no more than the terminal of a run shows: counts of sites, means over sites, the largest ε, the clip.
No name of a site, no path, and no figure of a single site leaves by them.
"""
