"""How good explanations are: perturbation curves, and the search for better rules."""
