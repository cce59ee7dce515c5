"""Baselines that any method should beat: the mean of the values, uniform samples, the query's own key."""
