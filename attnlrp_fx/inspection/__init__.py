"""Looking at what the compiler did and at where relevance went."""
