"""The words in which families describe themselves and engines read them. No torch."""
