"""Statistics of latent units over data sets: streamed, stored, shown, merged."""
