"""What a user calls and gets: the explainer, targets of calls, explanations, data sets."""
