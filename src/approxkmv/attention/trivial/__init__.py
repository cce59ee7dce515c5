"""Answers that any method has to beat: the mean of the values, uniform samples, the query's own key."""
